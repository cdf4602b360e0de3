"""The repository in transformers' pipelines."""

import json

import pytest
import torch
from conftest import ROOT, run_python
from datasets import Dataset
from PIL import Image
from transformers import pipeline
from transformers.decision import DecisionConfig
from transformers.pipelines import SUPPORTED_TASKS, any_to_any
from transformers.pipelines.pt_utils import KeyDataset

from phi3_tools.digits import ask

IMAGES = [Image.linear_gradient("L").resize(size) for size in [(60, 60), (200, 50), (50, 200), (70, 60), (150, 50)]]


def test_image_feature_extraction_in_batches_of_unequal_images(repository):
    extract = pipeline("image-feature-extraction", model=repository, trust_remote_code=True)
    one_by_one = extract(IMAGES, pool=True, return_tensors=True)
    together = extract(IMAGES, pool=True, return_tensors=True, batch_size=3)
    for left, right, image in zip(one_by_one, together, IMAGES):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
        inputs = extract.image_processor(image, return_tensors="pt")
        features = extract.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        torch.testing.assert_close(right.reshape(-1), features.image_embeds[0], atol=1e-6, rtol=1e-5)


def test_image_feature_extraction_gives_the_tokens_without_pool(repository):
    extract = pipeline("image-feature-extraction", model=repository, trust_remote_code=True)
    tokens = extract(IMAGES[1], return_tensors=True)
    assert tokens.shape == (1, extract.image_processor.num_image_tokens(200, 50), 48)
    batch = extract([IMAGES[1], IMAGES[2]], return_tensors=True, batch_size=2)
    torch.testing.assert_close(batch[0][:, : tokens.shape[1]], tokens, atol=1e-6, rtol=1e-5)


def test_image_feature_extraction_takes_one_image_a_path_and_a_dataset(repository, tmp_path):
    extract = pipeline("image-feature-extraction", model=repository, trust_remote_code=True)
    wanted = [extract(image, pool=True) for image in IMAGES]
    IMAGES[1].save(tmp_path / "image.png")
    assert extract(str(tmp_path / "image.png"), pool=True) == wanted[1]
    images = KeyDataset(Dataset.from_dict({"image": IMAGES}), "image")
    for given, tokens in zip(extract(images, pool=True, batch_size=2), wanted, strict=True):
        torch.testing.assert_close(torch.tensor(given), torch.tensor(tokens), atol=1e-6, rtol=1e-5)


def test_device_map_and_dtype_pass_through(repository, tmp_path):
    options = {"model": repository, "trust_remote_code": True, "dtype": torch.bfloat16}
    wanted = pipeline("image-feature-extraction", **options)(IMAGES[1], pool=True, return_tensors=True)
    parts = {"wte": "cpu", "projector": "cpu", "img_processor": "disk"}
    device_map = {f"vision_embed_tokens.{name}": device for name, device in parts.items()}
    options |= {"device_map": device_map, "model_kwargs": {"offload_folder": str(tmp_path)}}
    extract = pipeline("image-feature-extraction", **options)
    assert extract.model.hf_device_map == device_map
    given = extract(IMAGES[1], pool=True, return_tensors=True)
    assert given.dtype == torch.bfloat16 and torch.equal(given, wanted)


def test_a_pipeline_by_name_in_a_fresh_process(repository):
    code = """
import json, sys
from transformers import pipeline
from PIL import Image
extract = pipeline("image-feature-extraction", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(extract(Image.linear_gradient("L"), pool=True)[0]))
"""
    extract = pipeline("image-feature-extraction", model=str(ROOT), trust_remote_code=True)
    inputs = extract.image_processor(Image.linear_gradient("L"), return_tensors="pt")
    with torch.inference_mode():
        wanted = extract.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).image_embeds[0]
    printed = torch.tensor(json.loads(run_python(code, ROOT)))
    torch.testing.assert_close(printed, wanted, atol=1e-5, rtol=1e-5)


def test_feature_extraction_gives_word_embeddings(repository):
    extract = pipeline("feature-extraction", model=repository, trust_remote_code=True)
    ids = extract.tokenizer("what is this").input_ids
    wanted = extract.model.get_input_embeddings().weight[ids]
    assert torch.equal(extract("what is this", return_tensors=True)[0], wanted)


# The whole model


CHATS = [
    ask("what digit is this ?", IMAGES[:1]),
    ask("which of the two is larger ?", IMAGES[1:3]),
    ask("the number seven"),
]


def few():
    """Anew for each call, because pipelines write into `processor_kwargs`."""
    return {"max_new_tokens": 8, "return_full_text": False, "processor_kwargs": {"num_crops": 0}}


def answers(outputs):
    return [output["generated_text"] for outputs_of_chat in outputs for output in outputs_of_chat]


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_chats_with_one_and_two_images_are_answered_in_a_batch_as_alone(task, monkeypatch):
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)  # it asks for torchvision, for videos
    talk = pipeline(task, model=str(ROOT), trust_remote_code=True)
    alone = [answers([talk(text=chat, **few())])[0] for chat in CHATS]
    assert len({*alone}) == 3 and alone[2].split() == ["seven"]
    assert answers(talk(text=CHATS[:2], batch_size=2, **few())) == alone[:2]
    assert answers(talk(text=CHATS, **few())) == alone  # one by one: a batch of the pipeline has images in all or none
    text = "<|user|>\n<|image_1|>\nwhat digit is this ?<|end|>\n<|assistant|>\n"
    assert answers([talk(images=IMAGES[0], text=text, **few())]) == alone[:1]


def test_text_generation_goes_on_with_texts_and_chats_in_batches():
    write = pipeline("text-generation", model=str(ROOT), trust_remote_code=True)
    few = {"max_new_tokens": 4, "return_full_text": False}
    chats = [[{"role": "user", "content": f"the number {number}"}] for number in ("seven", "four")]
    assert [answer.split() for answer in answers(write(chats, batch_size=2, **few))] == [["seven"], ["four"]]
    texts = ["<|user|>\nthe number seven<|end|>\n<|assistant|>\n", "the number"]
    assert answers(write(texts, batch_size=2, **few)) == answers([write(text, **few) for text in texts])


def test_a_decision_is_made_by_the_logits_of_its_labels():
    names = ["three", "seven"]
    template = (
        "<|user|>\n{% for part in state %}{{ '<|image_1|>' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ question.instructions }}<|end|>\n<|assistant|>\n"
    )
    config = DecisionConfig(labels={"choice": names}, chat_template=template, sanitize_control_tokens=False)
    decide = pipeline("decision", model=str(ROOT), trust_remote_code=True, decision_config=config)
    decide.processor.chat_template = decide.processor.chat_template["default"]
    question = {"type": "choice", "criteria": dict.fromkeys(names, "")}
    for name in names:
        told = {"state": [], "questions": {"which": question | {"instructions": f"the number {name}"}}}
        assert decide(told)["which"]["choice"] == name
    seen = {"state": "[it]", "assets": {"[it]": IMAGES[0]}}
    seen["questions"] = {"which": question | {"instructions": "what digit is this ?"}}
    assert 0 < decide(seen)["which"]["probabilities"]["seven"] < 1


def test_feature_extraction_of_a_whole_checkpoint_gives_the_states_of_the_text():
    extract = pipeline("feature-extraction", model=str(ROOT), trust_remote_code=True)
    inputs = extract.tokenizer("the number seven", return_tensors="pt")
    with torch.inference_mode():
        wanted = extract.model(**inputs).last_hidden_state
    torch.testing.assert_close(extract("the number seven", return_tensors=True), wanted)


SERVED = {
    *("image-text-to-text", "any-to-any", "text-generation", "decision"),
    *("image-feature-extraction", "feature-extraction"),
}


@pytest.mark.parametrize("task", sorted(SUPPORTED_TASKS.keys() - SERVED))
def test_a_task_without_a_head_in_the_checkpoint_is_refused(task):
    with pytest.raises((ValueError, OSError), match="Could not load model|lacks .*classifier|feature extractor"):
        pipeline(task, model=str(ROOT), trust_remote_code=True)
