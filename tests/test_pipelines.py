"""The repository in transformers' pipelines."""

import torch
from PIL import Image
from transformers import pipeline

PICTURES = [Image.linear_gradient("L").resize(size) for size in [(60, 60), (200, 50), (50, 200), (70, 60), (300, 20)]]


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


def test_feature_extraction_gives_word_embeddings(repository):
    extract = pipeline("feature-extraction", model=repository, trust_remote_code=True)
    ids = extract.tokenizer("what is this").input_ids
    wanted = extract.model.get_input_embeddings().weight[ids]
    assert torch.equal(extract("what is this", return_tensors=True)[0], wanted)
