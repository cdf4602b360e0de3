"""`phi3-embed finetune --task embedding` of a whole checkpoint: texts and images learn one space."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import run_python
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from spaces import CAPTIONED, COMMON, SHORT, last_token, save_captions, save_embedder
from trainings import finetune, killed, losses, make_images
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from phi3_tools import models
from phi3_tools.finetune import command, pairs
from phi3_tools.models import load_embedder

pytestmark = pytest.mark.train

LEARN = f"{COMMON} --num-train-epochs 10 --learning-rate 3e-3"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_embedder(tmp_path_factory.mktemp("start") / "whole", switch=256)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return save_captions(tmp_path_factory.mktemp("captions") / "captions.parquet")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of three colours, their names those of other things."""
    return make_images(tmp_path_factory.mktemp("images") / "colours", ("dog", "front", "cat"))


@pytest.fixture(scope="module")
def trained(classes, start, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "colours"
    return output, finetune(start, classes, output, f"{LEARN} --matryoshka 8 --mini-batch-size 2")


def test_images_are_found_by_the_words_of_their_classes_cut_vectors_too(trained):
    before, after = trained[1]["held out"]["untrained"], trained[1]["held out"]["fine-tuned"]
    for cut in ("", ", 8 dimensions"):
        assert before[f"{pairs.TO_TEXT}{cut}"] < 0.7 and before[f"recall@1{cut}"] < 1
        assert after[f"{pairs.TO_TEXT}{cut}"] == after[f"recall@1{cut}"] == after[f"mAP{cut}"] == 1
    assert trained[1]["verdict"] == [] and "6 images with 3 texts" in trained[1]["held-out images"]
    card = (trained[0] / "README.md").read_text()
    assert "image to text: the nearest text is the image's own" in card and "encode_query" in card


def test_the_result_gives_the_same_vectors_in_every_library(trained, start, classes):
    output, _ = trained
    embedder = SentenceTransformer(str(output), trust_remote_code=True)
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    image = Image.open(classes / "cat" / "3.png")

    def by_hand(text, images=None):
        return last_token(model, processor, text=text, images=images, **({"num_crops": 0} if images else {}))

    np.testing.assert_allclose(embedder.encode_query("cat"), by_hand("what is this cat"), atol=1e-6)
    np.testing.assert_allclose(embedder.encode_document(image), by_hand("<|image_1|> a picture", [image]), atol=1e-6)
    again = load_embedder(str(output))
    np.testing.assert_allclose(again.encode_texts(["cat"])[0], embedder.encode_query("cat"), atol=1e-6)
    assert again.dimensions == (8,)
    # The head, which embeds nothing, stays as it was.
    heads = [
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).lm_head.weight
        for folder in (output, start)
    ]
    assert torch.equal(*heads)


def test_a_batch_in_parts_of_memory_is_compared_whole(captions, start, tmp_path):
    options = f"{SHORT} --text-column said"
    finetune(start, captions, tmp_path / "whole", options)
    finetune(start, captions, tmp_path / "parts", f"{options} --mini-batch-size 3")
    whole = losses(tmp_path / "whole")
    assert len(whole) == 4 and losses(tmp_path / "parts") == pytest.approx(whole, abs=1e-4)


def test_a_resumed_training_goes_on_as_if_it_had_not_been(captions, start, tmp_path):
    options = f"{SHORT} --text-column said --save-strategy steps --save-steps 2"
    finetune(start, captions, tmp_path / "whole", options)
    finetune(start, captions, killed(tmp_path / "whole", tmp_path / "killed"), options)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_adapters_lie_on_language_model_and_tower_and_are_merged(classes, start, tmp_path):
    metrics = finetune(start, classes, tmp_path, f"{LEARN} --train lora --learning-rate 1e-2")
    after, before = metrics["held out"]["fine-tuned"], metrics["held out"]["untrained"]
    assert after[pairs.TO_TEXT] > before[pairs.TO_TEXT]
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for part in ("language_model.layers.1.mlp.down_proj", "img_processor", "img_projection"):
        assert any(part in name for name in names)
    base = AutoModel.from_pretrained(start, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, adapted[name], atol=1e-5, rtol=0)


def test_hard_negatives_are_near_images_of_other_texts(classes, start, tmp_path, capsys):
    rows = pairs.load_pairs(str(classes), command.parse([str(classes), "--model", "x"]).data, 0)["train"]
    embedder = SentenceTransformer(str(start), trust_remote_code=True)
    mined = pairs.rows_to_train(embedder, rows, 2, 8)
    assert mined.column_names == ["text", "image", "negative_1", "negative_2"] and len(mined) > 0
    for row in mined:
        assert rows[row["image"]]["text"] == row["text"]
        assert row["text"] not in {rows[row[name]]["text"] for name in ("negative_1", "negative_2")}
    finetune(start, classes, tmp_path, f"{LEARN} --hard-negatives 1 --max-steps 6")
    assert re.search(r"Hard negatives: \d+ of 24 images have 1", capsys.readouterr().out)
    assert losses(tmp_path)[6] < losses(tmp_path)[1]


@pytest.mark.parametrize(
    "options, said",
    [
        ("--train head", "its vectors come out of the language model. Give --train all or lora"),
        ("--words", "--words goes with the image embedding alone"),
        ("--streaming --max-steps 3", "go not with texts and images in one space"),
        ("--text-column caption", "caption"),
        ("--matryoshka 48", "must be below the model's 48"),
    ],
)
def test_what_goes_not_with_one_space_is_refused_before_it_is_trained(options, said, classes, start, tmp_path):
    with pytest.raises(ValueError, match=said):
        finetune(start, classes, tmp_path / "out", f"{SHORT} {options}")


def test_captions_that_are_lacking_are_named(captions, start, tmp_path):
    rows = Dataset.from_parquet(str(captions)).to_list()
    rows[3]["said"] = " "
    Dataset.from_list(rows, CAPTIONED).to_parquet(tmp_path / "captions.parquet")
    with pytest.raises(ValueError, match=r"(?s)1 images of .* have no text:.*row 3"):
        finetune(start, tmp_path / "captions.parquet", tmp_path / "out", f"{SHORT} --text-column said")


def test_the_image_embedding_of_a_whole_checkpoint_is_trained_where_its_pooling_is_named(classes, start, tmp_path):
    metrics = finetune(f"{start}:mean", classes, tmp_path / "out", SHORT)
    assert "linear probe" in metrics["held out"]["untrained"] and not (tmp_path / "out" / "start").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] is None
    embedder = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True)
    assert embedder.encode(Image.new("RGB", (40, 30))).shape == (48,) and not embedder.supports("text")
    with pytest.raises(ValueError, match="--hard-negatives goes with whole checkpoints"):
        finetune(f"{start}:mean", classes, tmp_path / "no", f"{SHORT} --hard-negatives 1")


# Embedding by a recipe, trained or not


def test_several_images_are_one_message_and_prompts_have_names(start):
    embedder = SentenceTransformer(str(start), trust_remote_code=True)
    model = AutoModel.from_pretrained(start, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    images = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").resize((90, 40)).convert("RGB")]
    content = [{"type": "image", "image": image} for image in images]
    wanted = last_token(model, processor, text="<|image_1|> <|image_2|> a picture", images=images, num_crops=1)
    vector = embedder.encode([[{"role": "user", "content": content}]])[0]
    np.testing.assert_allclose(vector, wanted, atol=1e-6)
    np.testing.assert_array_equal(embedder.encode("cat", prompt_name="query"), embedder.encode_query("cat"))
    with pytest.raises(ValueError, match="'nobody' not found"):
        embedder.encode("cat", prompt_name="nobody")
    # Cut by the library, where it was trained for that.
    cut = SentenceTransformer(str(start), trust_remote_code=True, truncate_dim=8).encode("cat")
    np.testing.assert_allclose(cut, embedder.encode("cat")[:8], atol=1e-6)


def test_a_batch_of_unequal_texts_and_images_equals_each_alone(start):
    embedder = SentenceTransformer(str(start), trust_remote_code=True)
    images = Image.new("RGB", (90, 30), "red"), Image.new("RGB", (20, 40))
    items = ["cat", images[0], "what is this and that ? a picture", images[1], "dog"]
    for item, vector in zip(items, embedder.encode(items, batch_size=5)):
        np.testing.assert_allclose(vector, embedder.encode(item), atol=1e-5, rtol=0)


def test_a_text_beyond_the_switch_of_rope_factors_changes_none_beside_it(tmp_path, monkeypatch):
    folder = str(save_embedder(tmp_path / "start", switch=64))
    monkeypatch.setattr(models, "MAX_BYTES_TOGETHER", 40)
    embedder, short, long = load_embedder(folder), "cat", "what is this and that " * 20
    vectors = embedder.encode_texts([short, long])
    np.testing.assert_allclose(vectors[0], embedder.encode_texts([short])[0], atol=1e-6)
    together = SentenceTransformer(folder, trust_remote_code=True).encode_query([short, long])
    assert np.abs(together[0] - vectors[0]).max() > 1e-4  # which they would change


@pytest.mark.parametrize("text, said", [("", "A text is empty"), ("cat " * 300, "302|30. tokens, .* takes 256")])
def test_a_text_that_has_no_vector_is_told(text, said, start):
    with pytest.raises(ValueError, match=said):
        load_embedder(str(start)).encode_texts([text])


PUSH = """
import sys
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], trust_remote_code=True).push_to_hub("someone/one-space")
"""
PULL = """
from sentence_transformers import SentenceTransformer
print(SentenceTransformer("someone/one-space", trust_remote_code=True).encode_query("cat").tolist())
"""


@pytest.mark.hub
def test_pushed_it_embeds_by_its_recipe_under_its_name(start, hub, tmp_path):
    run_python(PUSH, start, **hub.environment(tmp_path / "here"))
    printed = run_python(PULL, **hub.environment(tmp_path / "there", token=""))
    wanted = SentenceTransformer(str(start), trust_remote_code=True).encode_query("cat")
    np.testing.assert_allclose(json.loads(printed), wanted, atol=1e-6)
