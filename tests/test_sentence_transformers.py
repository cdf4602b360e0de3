"""The repository in sentence-transformers."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, run_python
from datasets import Dataset
from phi3_embed.configuration_phi3_embed import SENTENCE_TRANSFORMERS_FILES
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import load_image

from phi3_tools.images import digits_split  # noqa: E402

FILES = tuple(SENTENCE_TRANSFORMERS_FILES)
IMAGES = [Image.linear_gradient("L").resize(size).convert("RGB") for size in [(60, 60), (200, 50), (50, 150)]]


@pytest.fixture(scope="module")
def tiny(embedding_checkpoint):
    """The small checkpoint's image embedding; four crops show unequal images and keep the tests short."""
    return SentenceTransformer(embedding_checkpoint, trust_remote_code=True, processor_kwargs={"num_crops": 4})


@pytest.fixture
def small(repository):
    return SentenceTransformer(repository, trust_remote_code=True)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A pair of files for each digit: `(paths of anchors, paths of positives)`."""
    folder = tmp_path_factory.mktemp("digits")
    images, _, labels, _ = digits_split()
    pairs = [np.flatnonzero(labels == digit)[:2] for digit in range(10)]
    for number in np.concatenate(pairs):
        Image.fromarray(images[number]).save(folder / f"{number}.png")
    return tuple([str(folder / f"{number}.png") for number in numbers] for numbers in zip(*pairs))


def test_images_of_every_kind_give_the_pooled_vector_normalised(tiny, tmp_path):
    image = IMAGES[1]
    image.save(tmp_path / "image.png")
    path = str(tmp_path / "image.png")
    inputs = tiny[0].processor(images=image, return_tensors="pt")
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(tiny[0].model(**inputs).pooler_output[0], dim=0).numpy()
    array = np.array(image)
    for kind in (image, path, {"image": image}, {"image": path}, array, torch.from_numpy(array)):
        np.testing.assert_allclose(tiny.encode(kind), wanted, atol=1e-6, rtol=0)


def test_a_batch_of_unequal_images_equals_each_alone(tiny):
    together = tiny.encode(IMAGES, batch_size=3)
    for image, vector in zip(IMAGES, together):
        np.testing.assert_allclose(vector, tiny.encode(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", ["seven", "no/such/file.png", {"image": IMAGES[0], "text": "what is this"}])
def test_texts_are_refused_because_the_model_has_no_one_vector_of_them(tiny, text):
    with pytest.raises(ValueError, match=r"Modality '(image\+)?text' is not supported .* Supported modalities: image"):
        tiny.encode(text)


def test_a_url_is_fetched_by_the_caller(tiny, tmp_path):
    IMAGES[0].save(tmp_path / "image.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/image.png"
        with pytest.raises(ValueError, match="is a URL. Fetch it first: `transformers.image_utils.load_image` does"):
            tiny.encode(url)
        np.testing.assert_allclose(tiny.encode(load_image(url)), tiny.encode(IMAGES[0]), atol=1e-6, rtol=0)
    finally:
        server.shutdown()


def test_similarity_and_search(tiny, digits):
    anchors, positives = (tiny.encode(paths) for paths in digits)
    np.testing.assert_allclose(tiny.similarity(anchors, positives).numpy(), anchors @ positives.T, atol=1e-6)
    found = util.semantic_search(anchors, np.concatenate((positives, anchors)), top_k=2)
    assert [hits[0]["corpus_id"] for hits in found] == list(range(10, 20))
    assert all(hits[0]["score"] == pytest.approx(1, abs=1e-5) for hits in found)


def test_hard_negatives_are_mined(tiny, digits):
    pairs = Dataset.from_dict(dict(zip(("anchor", "positive"), digits)))
    mined = util.mine_hard_negatives(pairs, tiny, num_negatives=1, verbose=False)
    anchors, positives = (tiny.encode(paths) for paths in digits)
    scores = anchors @ positives.T - 2 * np.eye(len(anchors))  # its own positive is no negative
    assert mined["negative"] == [digits[1][nearest] for nearest in scores.argmax(1)]


ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer
for folder in sys.argv[2:]:
    print(json.dumps(SentenceTransformer(folder, trust_remote_code=True).encode(json.loads(sys.argv[1])).tolist()))
"""


def test_trained_saved_and_loaded_in_a_fresh_process(small, repository, digits, tmp_path):
    before = small.encode(digits[0])
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "training"),
        num_train_epochs=8,
        per_device_train_batch_size=10,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    pairs = Dataset.from_dict(dict(zip(("anchor", "positive"), digits)))
    trainer = SentenceTransformerTrainer(small, arguments, pairs, loss=MultipleNegativesRankingLoss(small))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]

    small.save_pretrained(str(tmp_path / "saved"))
    printed = run_python(ENCODE, json.dumps(digits[0]), tmp_path / "saved", repository, HF_HOME=str(tmp_path / "home"))
    trained, untrained = (json.loads(line) for line in printed.splitlines())
    np.testing.assert_allclose(trained, small.encode(digits[0]), atol=1e-6, rtol=0)
    np.testing.assert_allclose(untrained, before, atol=1e-6, rtol=0)


PUSH = """
import sys
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
SentenceTransformer(sys.argv[1], trust_remote_code=True).push_to_hub("someone/by-sentence-transformers")
options = {"pretrained_model_name_or_path": sys.argv[1], "trust_remote_code": True}
AutoProcessor.from_pretrained(**options).push_to_hub("someone/by-transformers")
AutoModel.from_pretrained(**options).save_pretrained(sys.argv[2], push_to_hub=True, repo_id="someone/by-transformers")
"""


def test_pushed_by_either_library_it_is_loaded_by_name(small, repository, digits, hub, tmp_path):
    run_python(PUSH, repository, tmp_path / "saved", **hub.environment(tmp_path / "here"))
    names = ("someone/by-sentence-transformers", "someone/by-transformers")
    assert all(set(FILES) <= set(hub.files(name, "main")) for name in names)
    printed = run_python(ENCODE, json.dumps(digits[0]), *names, **hub.environment(tmp_path / "there", token=""))
    for line in printed.splitlines():
        np.testing.assert_allclose(json.loads(line), small.encode(digits[0]), atol=1e-6, rtol=0)


def test_a_classifier_with_its_image_processor_gives_the_embedding_too(small, repository, tmp_path):
    options = {"pretrained_model_name_or_path": repository, "trust_remote_code": True}
    AutoModelForImageClassification.from_pretrained(**options, num_labels=3).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(**options).save_pretrained(tmp_path)
    classifier = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(classifier.encode(IMAGES), small.encode(IMAGES), atol=1e-6, rtol=0)


def test_every_saved_folder_has_the_files_of_sentence_transformers(repository):
    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        assert json.loads((Path(repository) / name).read_text()) == content


def test_saving_leaves_a_modules_file_that_is_there(repository, tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    AutoConfig.from_pretrained(repository, trust_remote_code=True).save_pretrained(tmp_path)
    assert (tmp_path / "modules.json").read_text() == "[]"


def test_a_wrong_environment_is_told_before_weights_are_read(repository, tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).write_text((Path(repository) / name).read_text())
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ImportError, match="transformers>=5.18, but transformers==5.17.0 is installed. Earlier"):
        SentenceTransformer(str(tmp_path), trust_remote_code=True)


def test_the_stated_requirement_is_that_of_the_repository():
    name = "config_sentence_transformers.json"
    requirements = json.loads((ROOT / name).read_text())["requirements"]
    assert requirements == SENTENCE_TRANSFORMERS_FILES[name]["requirements"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert f"transformers{requirements['transformers']['specifier']}" in lines
