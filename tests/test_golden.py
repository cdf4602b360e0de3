"""Numerical agreement with the original computation. The tolerances are those that its golden data state."""

import zlib

import golden
import numpy as np
import pytest
import torch
from phi3_embed.configuration_phi3_embed import CLIP_VIT_LARGE_PATCH14_336, Phi3EmbedConfig
from phi3_embed.modeling_phi3_embed import Phi3EmbedModel
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor

from phi3_tools.checkpoint.layout import published_names

close = {"atol": 6e-5, "rtol": 1e-5}
close_small = {"atol": 3e-5, "rtol": 0}


def build(config, attn_implementation="sdpa"):
    """A model with the rule-made weights, which all have to be found by name."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Phi3EmbedModel(config).state_dict().items()}
    weights = {name: torch.from_numpy(golden.weight(published_names(name)[0], shapes[name])) for name in shapes}
    return Phi3EmbedModel.from_pretrained(
        None, config=config, state_dict=weights, attn_implementation=attn_implementation
    )


@pytest.fixture(scope="module")
def full_model():
    return build(Phi3EmbedConfig())


def preprocess(note, **kwargs):
    images = [golden.image(**image) for image in note["images"]]
    return Phi3EmbedImageProcessor(num_crops=note["num_crops"])(images, return_tensors="pt", **kwargs)


def of_images(inputs):
    """The views of each image."""
    return np.split(inputs["pixel_values"], ((inputs["image_sizes"] // 336).prod(1) + 1).cumsum()[:-1])


def assert_probes_close(tokens, arrays, **tolerance):
    """Norms and fixed projections of every token, for where the golden data do not hold all values."""
    probe = golden.weight("probe", (8, tokens.shape[-1]))
    np.testing.assert_allclose(tokens @ probe.T, arrays["probe"], **tolerance)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), arrays["norms"], **tolerance)


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_preprocessing_equals_the_original(num_crops):
    arrays, note = golden.load(f"preprocess_nc{num_crops}")
    processor = Phi3EmbedImageProcessor(num_crops=num_crops)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    inputs = preprocess(note).convert_to_tensors("np")
    for number, image in enumerate(note["images"]):
        wanted = {key.partition(".")[2]: arrays[key] for key in arrays if key.startswith(f"{number}.")}
        views, real = of_images(inputs)[number], int(wanted["real_crops"][0])
        np.testing.assert_array_equal(inputs["image_sizes"][number], wanted["image_size"])
        assert inputs["num_image_tokens"][number] == wanted["num_img_tokens"]
        assert processor.num_image_tokens(image["width"], image["height"]) == wanted["num_img_tokens"]
        assert len(views) == real

        lines = wanted["line_crops"]
        np.testing.assert_allclose(views[0, :, 5::29, 7::29], wanted["samples"][0], atol=2e-6, rtol=0)
        np.testing.assert_allclose(views[1:real, :, 5::29, 7::29], wanted["samples"][1:], atol=1e-6, rtol=0)
        np.testing.assert_allclose(views[lines][:, :, 167], wanted["row"], atol=2e-6, rtol=0)
        np.testing.assert_allclose(views[lines][..., 101], wanted["col"], atol=2e-6, rtol=0)
        np.testing.assert_allclose(views[:real].mean((2, 3), dtype=np.float64), wanted["mean"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(views[:real].std((2, 3), dtype=np.float64), wanted["std"], atol=1e-6, rtol=0)
        pixels = np.rint((views[1:real].astype(np.float64).transpose(0, 2, 3, 1) * std + mean) * 255).astype(np.uint8)
        assert [zlib.crc32(crop.tobytes()) for crop in pixels] == wanted["crc32"].tolist()


# That eager attention equals sdpa is independent of the grid, so one case of it is enough.
@pytest.mark.parametrize(
    ("name", "attn_implementation"),
    [("wide_nc1", "eager"), *((name, "sdpa") for name in ("wide_nc1", "tall_nc1", "row_nc4", "grid_nc6"))],
)
@pytest.mark.full_size
def test_image_tokens_equal_the_original_at_full_size(full_model, name, attn_implementation):
    arrays, note = golden.load(f"embedding_{name}")
    full_model.set_attn_implementation(attn_implementation)
    inputs = preprocess(note)
    with torch.inference_mode():
        outputs = full_model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    tokens, features = outputs.pooler_output[0].numpy(), outputs.last_hidden_state.numpy()
    assert len(tokens) == inputs["num_image_tokens"][0] == arrays["num_img_tokens"][0]
    np.testing.assert_allclose(tokens[arrays["token_index"]], arrays["tokens"], **close)
    assert_probes_close(tokens, arrays, **close)
    np.testing.assert_allclose(features[:, arrays["feature_index"]], arrays["features"], **close)


@pytest.mark.full_size
def test_forward_equals_the_original_at_full_size(full_model):
    arrays, note = golden.load("forward")
    full_model.set_attn_implementation("sdpa")
    inputs, input_ids = preprocess(note), torch.from_numpy(arrays["input_ids"])
    before = input_ids.clone()
    with torch.inference_mode():
        hidden = full_model(input_ids, **inputs).last_hidden_state
    assert torch.equal(input_ids, before)
    rows, columns = arrays["at"].T
    np.testing.assert_allclose(hidden[rows, columns].numpy(), arrays["hidden"], **close)
    assert_probes_close(hidden.numpy(), arrays, **close)
    is_text = (input_ids >= 0) | (input_ids <= -(10**9))
    table = full_model.get_input_embeddings().weight
    assert torch.equal(hidden[is_text], table[input_ids[is_text].clamp(min=0)])


@pytest.mark.full_size
def test_bfloat16_is_near_the_original(full_model):
    arrays, note = golden.load("embedding_wide_nc1")
    inputs = preprocess(note)
    full_model.set_attn_implementation("sdpa")
    weights = {name: weight.bfloat16() for name, weight in full_model.state_dict().items()}
    model = Phi3EmbedModel.from_pretrained(None, config=full_model.config, state_dict=weights, dtype=torch.bfloat16)
    with torch.inference_mode():
        tokens = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    assert tokens.dtype == torch.bfloat16
    wanted = torch.from_numpy(arrays["tokens"])
    assert torch.cosine_similarity(tokens[arrays["token_index"]].float(), wanted, dim=-1).min() > 0.998


def reduced_config(sizes, case):
    tower = {
        "hidden_size": sizes["width"],
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "intermediate_size": sizes["mlp"],
    }
    settings = {key: case[key] for key in case if key not in ("pixel_values", "image_sizes", "num_img_tokens")}
    if not case.get("use_hd_transform", True):
        settings["num_img_tokens"] = case["num_img_tokens"]
    return Phi3EmbedConfig(
        vision_config=CLIP_VIT_LARGE_PATCH14_336 | tower,
        hidden_size=sizes["hidden"],
        vocab_size=sizes["vocab"],
        image_token_id=None,
        **settings,
    )


def reduced_inputs(arrays, note, case):
    if case["pixel_values"] is None:
        return {}
    if case["pixel_values"] == "features":
        return {"pixel_values": torch.from_numpy(arrays["features"])}
    if case["pixel_values"] == "hd":
        return preprocess(note["hd"])
    seeds = note["seeds"][:1] if case["pixel_values"] == "seeds[:1]" else note["seeds"]
    images = [golden.image(seed, 336, 336) for seed in seeds]
    views = Phi3EmbedImageProcessor(num_crops=0)(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": views}


@pytest.mark.parametrize("name", sorted(golden.load("reduced")[1]["cases"]))
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_every_path_of_the_sample_equals_the_original(name, attn_implementation):
    arrays, note = golden.load("reduced")
    case = note["cases"][name]
    model = build(reduced_config(note["config"], case), attn_implementation)
    inputs = reduced_inputs(arrays, note, case)
    arrays = {key.removeprefix(f"{name}."): arrays[key] for key in arrays if key.startswith(f"{name}.")}
    with torch.inference_mode():
        hidden = model(torch.from_numpy(arrays["input_ids"]), **inputs).last_hidden_state.numpy()
    rows, columns = arrays["at"].T
    np.testing.assert_allclose(hidden[rows, columns], arrays["hidden"], **close_small)
    assert_probes_close(hidden, arrays, **close_small)
