"""Heads for training."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python, small_config, small_model, small_pixels
from phi3_embed.modeling_phi3_embed import AUTO_MAP, Phi3EmbedForImageClassification, Phi3EmbedModel
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, pipeline

CLASSES = {0: "cat", 1: "dog", 2: "bird"}
INPUTS = small_pixels((1, 2), (1, 1), (2, 1), (0, 0))


def small_head(**kwargs):
    """A small head with fixed random weights, none of them zero."""
    torch.manual_seed(0)
    head = Phi3EmbedForImageClassification(small_config(**({"id2label": CLASSES} | kwargs))).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    return head


# The head


def test_logits_are_a_linear_layer_on_the_pooled_embedding():
    head = small_head()
    outputs = head(**INPUTS, output_hidden_states=True)
    assert outputs.logits.shape == (4, 3) and outputs.loss is None and len(outputs.hidden_states) == 3
    wanted = head.model(**INPUTS).pooler_output @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(outputs.logits, wanted)
    assert torch.equal(head(**INPUTS, return_dict=False)[0], outputs.logits)


@pytest.mark.parametrize(
    "settings, labels, loss",
    [
        ({}, torch.tensor([0, 2, 1, -100]), nn.CrossEntropyLoss()),
        ({}, torch.tensor([[1.0, 0, 1]] * 4), nn.BCEWithLogitsLoss()),
        ({"problem_type": "multi_label_classification"}, torch.tensor([[0.0, 0, 1]] * 4), nn.BCEWithLogitsLoss()),
        ({"problem_type": "regression"}, torch.tensor([[0.5, 2, -1]] * 4), nn.MSELoss()),
        ({"num_labels": 1}, torch.tensor([[0.5]] * 4), nn.MSELoss()),
    ],
)
def test_the_loss_by_problem_type(settings, labels, loss):
    head = small_head(**({"id2label": None} | settings if "num_labels" in settings else settings))
    outputs = head(**INPUTS, labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 1, 2, 3]), "hold 3, but must be from 0 to 2, or -100"),
        (torch.tensor([0, -1, 2, 1]), "hold -1, but must be from 0 to 2, or -100"),
        ([0, 1, 2, 0], "`labels` are of type list, but must be a tensor"),
        (torch.tensor([0, 1]), r"shape \(2,\) and dtype torch.int64, .* must be ints of shape \(4,\)"),
        (torch.tensor([[1, 0, 1]] * 4), r"shape \(4, 3\) and dtype torch.int64"),
        (torch.tensor([0.0, 1, 2, 0]), r"must be floating point of shape \(4, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(labels, message):
    with pytest.raises(ValueError, match=message):
        small_head()(**INPUTS, labels=labels)


@pytest.mark.parametrize("pooling_mode", ["mean", "global"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_but_word_embeddings_and_separators_learn_from_labels(checkpointing, pooling_mode):
    head = small_head(pooling_mode=pooling_mode).train()
    if checkpointing:
        head.gradient_checkpointing_enable()
    head(**INPUTS, labels=torch.tensor([0, 2, 1, 1])).loss.backward()
    for name, parameter in head.named_parameters():
        learns = parameter.grad is not None and parameter.grad.any()
        assert learns == (not name.endswith(("wte.weight", "_GN"))), name


def test_a_head_trains_without_hd_transform_and_in_bfloat16():
    head = small_head(use_hd_transform=False).to(torch.bfloat16)
    outputs = head(small_pixels(*[(0, 0)] * 4)["pixel_values"], labels=torch.tensor([0, 2, 1, 1]))
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.isfinite()
    assert head.classifier.weight.grad.any()


# Checkpoints


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("head")
    small_head().save_pretrained(path)
    Phi3EmbedImageProcessor(num_crops=4, size={"height": 56, "width": 56}, num_img_tokens=4).save_pretrained(path)
    return path


def test_a_head_on_a_base_checkpoint_starts_fresh_and_says_so(repository, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # a test before this one may have turned it down
    loaded = Phi3EmbedForImageClassification.from_pretrained(repository, id2label=CLASSES, output_loading_info=True)
    head, info = loaded
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    assert "classifier.weight" in caplog.text and "MISSING" in caplog.text
    assert 0 < head.classifier.weight.std() < 0.1 and not head.classifier.bias.any()
    assert torch.equal(head.model(**INPUTS).pooler_output, small_model()(**INPUTS).pooler_output)


@pytest.mark.parametrize(
    "model, model_class, gone",
    [
        (small_head, Phi3EmbedForImageClassification, "classifier.weight"),
        (small_model, Phi3EmbedForImageClassification, "vision_embed_tokens.wte.weight"),
        (small_model, Phi3EmbedModel, "vision_embed_tokens.projector.img_projection.2.bias"),
    ],
)
def test_weights_that_are_missing_are_an_error_that_names_them(model, model_class, gone, tmp_path):
    model = model()
    weights = model.state_dict()
    del weights[gone]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=f"lacks 1 of the model's weights: .*{gone}"):
        model_class.from_pretrained(tmp_path, id2label=CLASSES)


def test_a_head_without_a_checkpoint_of_the_base_is_an_error(repository):
    with pytest.raises(ValueError, match="lacks 2 of the model's weights: classifier.bias, classifier.weight"):
        Phi3EmbedForImageClassification.from_pretrained(repository, config=small_config())


def test_a_head_that_nobody_asked_for_is_an_error(repository):
    """A pipeline would answer by weights that are random."""
    with pytest.raises(ValueError, match="lacks 2 .*classifier.weight. To train them, name the classes by `id2label`"):
        pipeline("image-classification", model=repository, trust_remote_code=True)
    for named in ({"num_labels": 3}, {"id2label": {0: "cat", 1: "no cat", 2: "both"}}):
        head = AutoModelForImageClassification.from_pretrained(repository, trust_remote_code=True, **named)
        assert head.classifier.out_features == 3
    # In a config two classes without names are those of a model that has none.
    with pytest.raises(ValueError, match=r"by `id2label`, or their number \(if not 2\) by `num_labels`"):
        AutoModelForImageClassification.from_pretrained(repository, trust_remote_code=True, num_labels=2)


def test_a_trained_head_starts_again_with_other_classes(head_folder):
    head = Phi3EmbedForImageClassification.from_pretrained(head_folder, num_labels=5, ignore_mismatched_sizes=True)
    assert head(**INPUTS).logits.shape == (4, 5)
    assert torch.equal(head.model(**INPUTS).pooler_output, small_head().model(**INPUTS).pooler_output)


def test_a_head_is_saved_with_code_and_classes_and_gives_the_embedding_too(head_folder):
    code = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
head = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True, device_map="auto")
assert type(head.config) is head.config_class
torch.manual_seed(0)
images = {"pixel_values": torch.randn(2, 3, 3, 56, 56), "image_sizes": [(56, 112), (112, 56)]}
print(json.dumps([head.config.id2label, head(**images).logits.tolist()]))
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.equal(base(**images).pooler_output, head.model(**images).pooler_output)
"""
    classes, logits = json.loads(run_python(code, head_folder).splitlines()[-1])
    assert classes == {str(number): name for number, name in CLASSES.items()}
    torch.manual_seed(0)
    images = {"pixel_values": torch.randn(2, 3, 3, 56, 56), "image_sizes": [(56, 112), (112, 56)]}
    torch.testing.assert_close(torch.tensor(logits), small_head()(**images).logits, atol=1e-5, rtol=1e-5)


def test_every_saved_config_names_the_code_of_all_models(repository, head_folder):
    for folder in (Path(repository), head_folder):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert (folder / "modeling_phi3_embed.py").read_bytes() == (ROOT / "modeling_phi3_embed.py").read_bytes()


def test_a_head_works_from_disk(head_folder, tmp_path):
    head = Phi3EmbedForImageClassification.from_pretrained(
        head_folder, device_map={"": "disk"}, offload_folder=str(tmp_path)
    )
    with torch.no_grad():
        torch.testing.assert_close(head(**INPUTS).logits, small_head()(**INPUTS).logits)


# Pipeline

IMAGES = [Image.linear_gradient("L").resize(size) for size in [(60, 60), (200, 50), (150, 50), (70, 60), (300, 20)]]


def test_image_classification_in_batches_of_unequal_images(head_folder):
    classify = pipeline("image-classification", model=str(head_folder), trust_remote_code=True)
    together = classify(IMAGES, batch_size=3)
    assert [len(scores) for scores in together] == [3] * 5
    assert {score["label"] for score in together[0]} == {*CLASSES.values()}
    for image, scores in zip(IMAGES, together):
        alone = classify(image)
        inputs = classify.image_processor(image, return_tensors="pt")
        wanted = classify.model(**inputs).logits.softmax(-1)[0].sort(descending=True)
        assert [score["label"] for score in scores] == [score["label"] for score in alone]
        assert [score["label"] for score in scores] == [CLASSES[index] for index in wanted.indices.tolist()]
        torch.testing.assert_close(torch.tensor([score["score"] for score in scores]), wanted.values)
