"""The repository in datasets, mteb and peft."""

import dataclasses
import shutil

import faiss
import mteb
import numpy as np
import pytest
import torch
from conftest import ROOT, small_model, small_pixels, whole_model
from datasets import Dataset, Features, List, Value
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sentence_transformers import SentenceTransformer
from test_finetune import small_head
from test_generation import prompt
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText

from phi3_tools import evaluate as mteb_eval  # noqa: E402
from phi3_tools.cli import main
from phi3_tools.images import digits_split
from phi3_tools.measures import recall

NUM_DIGITS = 40


@pytest.fixture(scope="module")
def digits():
    """Digits that the small checkpoint was not trained on, as a dataset of images and labels."""
    _, images, _, labels = digits_split()
    images = [Image.fromarray(image) for image in images[:NUM_DIGITS]]
    return Dataset.from_dict({"image": images, "label": labels[:NUM_DIGITS]})


@pytest.fixture(scope="module")
def tiny():
    return SentenceTransformer(str(ROOT), trust_remote_code=True, processor_kwargs={"num_crops": 0})


@pytest.fixture(scope="module")
def vectors(tiny, digits):
    return tiny.encode(digits["image"][:])


# datasets


def test_a_dataset_holds_embeddings_of_fixed_size_and_is_searched_by_them(tiny, digits, vectors):
    embedding = List(Value("float32"), length=tiny.get_embedding_dimension())
    embedded = digits.map(
        lambda batch: {"embedding": tiny.encode(batch["image"])},
        batched=True,
        batch_size=16,
        features=Features({**digits.features, "embedding": embedding}),
    )
    assert embedded.features["embedding"].length == vectors.shape[1]
    np.testing.assert_allclose(embedded.with_format("numpy")["embedding"][:], vectors, atol=1e-6, rtol=0)

    embedded.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
    scores, found = embedded.get_nearest_examples("embedding", vectors[3], k=5)
    cosines = vectors @ vectors[3]
    nearest = np.argsort(-cosines)[:5]
    assert found["label"] == [digits["label"][number] for number in nearest]
    np.testing.assert_allclose(scores, cosines[nearest], atol=1e-6)


# mteb


def test_mteb_runs_its_mock_tasks(repository):
    encoder = mteb_eval.load(repository)
    outcome = mteb.mock_run(encoder)
    passed = [name for name, status in outcome.items() if status is not None]
    assert outcome.all_passed, outcome.to_markdown()
    assert {"MockImageClassification", "MockImageClustering", "MockVisualSTS"} <= set(passed)


def test_mteb_scores_texts_images_and_both_by_a_model_with_words(whole_checkpoint):
    outcome = mteb.mock_run(mteb_eval.load(whole_checkpoint, num_crops=0))
    assert outcome.all_passed, outcome.to_markdown()
    of_texts = ("MockRetrievalTask", "MockClassificationTask")
    of_images = ("MockImageClassification", "MockImageClustering")
    of_both = ("MockAny2AnyRetrievalI2T", "MockAny2AnyRetrievalT2I", "MockImageTextPairClassification")
    scores = {name: outcome[name].get_score() for name in of_texts + of_images + of_both}
    assert all(0 < score <= 1 for score in scores.values()), scores


class DigitsInPlaceOfBirds(type(mteb.get_task("CUB200I2IRetrieval"))):
    """A retrieval task of MIEB(Img), each image searched among the others, with digits that are on this machine."""

    def load_data(self, **kwargs):
        _, images, _, labels = digits_split()
        images, labels = images[:NUM_DIGITS], labels[:NUM_DIGITS].tolist()
        names = [str(number) for number in range(NUM_DIGITS)]
        images = Dataset.from_dict({"id": names, "image": [Image.fromarray(image) for image in images]})
        relevant = {
            query: {name: 1 for name, label in zip(names, labels) if label == wanted}
            for query, wanted in zip(names, labels)
        }
        split = {"corpus": images, "queries": images, "relevant_docs": relevant, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


def test_the_evaluation_prints_a_row_and_goes_on_from_what_is_done(digits, vectors, tmp_path, capsys, monkeypatch):
    encoder = mteb_eval.load(str(ROOT), num_crops=0)
    images = mteb.get_benchmark("MIEB(Img)")
    offline = next(task for task in images.tasks if task.metadata.type == "ImageClustering")
    score = f"{recall(vectors, np.array(digits['label']), 1):.2%}"

    one = dataclasses.replace(images, tasks=[DigitsInPlaceOfBirds()])
    assert mteb_eval.evaluate(encoder, one, 16, tmp_path) == []
    printed = capsys.readouterr().out
    assert "The leaderboard's row" in printed and printed.count(score) == 3

    monkeypatch.setattr(encoder, "encode", None)  # what is done is not done again
    two = dataclasses.replace(images, tasks=[DigitsInPlaceOfBirds(), offline])
    failed = mteb_eval.evaluate(encoder, two, 16, tmp_path)
    printed = capsys.readouterr().out
    assert [error.task_name for error in failed] == [offline.metadata.name]
    assert "The leaderboard's row" not in printed and score in printed and offline.metadata.name in printed


def test_the_evaluation_names_the_tasks_that_failed(tmp_path, capsys):
    # No test reaches the network, so no task has its images.
    with pytest.raises(SystemExit, match="phi3-embed evaluate: 49 tasks failed, so there is no row. Run again"):
        main(["evaluate", str(ROOT), "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("failed:") == 49


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(ROOT), "--num-crops", "99999"], "`num_crops` is 99999"),
        (["no/such/folder"], "There is no folder no/such"),
        (["pixels"], "pixels is no model that mteb takes"),
        ([f"{ROOT}:mean"], "is a whole checkpoint, which mteb takes by its recipe"),
    ],
)
def test_the_evaluation_tells_a_users_mistake_in_a_line(arguments, said):
    with pytest.raises(SystemExit, match=f"phi3-embed evaluate: .*{said}"):
        main(["evaluate", *arguments])


def test_a_benchmark_that_is_not_there_is_told_in_a_line(tmp_path):
    with pytest.raises(SystemExit, match=r"mteb has no benchmark 'MIEB'\. Those of images are MIEB\(Img\), "):
        main(["evaluate", str(ROOT), "--benchmark", "MIEB", "--output", str(tmp_path)])


def test_scores_of_other_weights_are_not_taken_over(repository, tmp_path):
    changed = shutil.copytree(repository, tmp_path / "repository")
    model = AutoModel.from_pretrained(repository, trust_remote_code=True)
    with torch.no_grad():
        model.vision_embed_tokens.projector.img_projection[2].bias[0] += 1
    model.save_pretrained(changed)
    first, again, other = (mteb_eval.load(str(folder)).mteb_model_meta for folder in (repository, repository, changed))
    assert first.revision == again.revision != other.revision


# peft


TARGETS = r".*(language_model.*(qkv_proj|o_proj|gate_up_proj|down_proj)|img_processor.*(q_proj|v_proj))"
IMAGES = small_pixels((1, 2), (1, 1))


@pytest.mark.parametrize(
    ("build", "auto_class", "output", "inputs", "atol"),
    [
        (small_model, AutoModel, "pooler_output", IMAGES, 1e-5),
        (small_head, AutoModelForImageClassification, "logits", IMAGES, 1e-5),
        (whole_model, AutoModelForImageTextToText, "logits", prompt(0), 1e-4),
    ],
)
def test_lora_trains_is_saved_and_merges_into_the_model(build, auto_class, output, inputs, atol, tmp_path):
    adapted = get_peft_model(build(), LoraConfig(r=4, target_modules=TARGETS))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):  # B starts at zero, so A gets its first gradient in the second step
        adapted(**inputs)[output].square().mean().backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    with torch.no_grad():
        untrained, wanted = build()(**inputs)[output], adapted(**inputs)[output]
        assert not torch.allclose(wanted, untrained, atol=1e-3)

        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(build(), tmp_path / "adapter")
        torch.testing.assert_close(again(**inputs)[output], wanted)

        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = auto_class.from_pretrained(tmp_path / "merged", trust_remote_code=True)
        torch.testing.assert_close(merged(**inputs)[output], wanted, atol=atol, rtol=1e-4)
