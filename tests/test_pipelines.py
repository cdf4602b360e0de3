"""The repository in transformers' pipelines."""

import json

import torch
from conftest import ROOT, run_python
from datasets import Dataset
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

PICTURES = [Image.linear_gradient("L").resize(size) for size in [(60, 60), (200, 50), (50, 200), (70, 60), (150, 50)]]


def test_image_feature_extraction_in_batches_of_unequal_images(repository):
    extract = pipeline("image-feature-extraction", model=repository, trust_remote_code=True)
    one_by_one = extract(PICTURES, pool=True, return_tensors=True)
    together = extract(PICTURES, pool=True, return_tensors=True, batch_size=3)
    for left, right, picture in zip(one_by_one, together, PICTURES):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
        inputs = extract.image_processor(picture, return_tensors="pt")
        features = extract.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        torch.testing.assert_close(right.reshape(-1), features.image_embeds[0], atol=1e-6, rtol=1e-5)


def test_image_feature_extraction_gives_the_tokens_without_pool(repository):
    extract = pipeline("image-feature-extraction", model=repository, trust_remote_code=True)
    tokens = extract(PICTURES[1], return_tensors=True)
    assert tokens.shape == (1, extract.image_processor.num_image_tokens(200, 50), 48)
    batch = extract([PICTURES[1], PICTURES[2]], return_tensors=True, batch_size=2)
    torch.testing.assert_close(batch[0][:, : tokens.shape[1]], tokens, atol=1e-6, rtol=1e-5)


def test_image_feature_extraction_takes_one_image_a_path_and_a_dataset(repository, tmp_path):
    extract = pipeline("image-feature-extraction", model=repository, trust_remote_code=True)
    wanted = [extract(picture, pool=True) for picture in PICTURES]
    PICTURES[1].save(tmp_path / "picture.png")
    assert extract(str(tmp_path / "picture.png"), pool=True) == wanted[1]
    pictures = KeyDataset(Dataset.from_dict({"image": PICTURES}), "image")
    for given, each in zip(extract(pictures, pool=True, batch_size=2), wanted, strict=True):
        torch.testing.assert_close(torch.tensor(given), torch.tensor(each), atol=1e-6, rtol=1e-5)


def test_device_map_and_dtype_pass_through(repository, tmp_path):
    options = {"model": repository, "trust_remote_code": True, "dtype": torch.bfloat16}
    wanted = pipeline("image-feature-extraction", **options)(PICTURES[1], pool=True, return_tensors=True)
    parts = {"wte": "cpu", "projector": "cpu", "img_processor": "disk"}
    device_map = {f"vision_embed_tokens.{name}": device for name, device in parts.items()}
    options |= {"device_map": device_map, "model_kwargs": {"offload_folder": str(tmp_path)}}
    extract = pipeline("image-feature-extraction", **options)
    assert extract.model.hf_device_map == device_map
    given = extract(PICTURES[1], pool=True, return_tensors=True)
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
