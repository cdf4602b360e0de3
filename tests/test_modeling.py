"""The model's paths, outputs, states and errors, at small size."""

import math
import re

import pytest
import torch
from conftest import SMALL_TOWER, small_config, small_model, small_pixels, whole_model
from phi3_embed.configuration_phi3_embed import CLIP_VIT_LARGE_PATCH14_336, Phi3EmbedConfig
from phi3_embed.modeling_phi3_embed import (
    CLOSING_MODULES,
    Phi3EmbedForImageClassification,
    Phi3EmbedModel,
    Phi3ImageEmbedding,
    build_vision_tower,
)
from torch import nn
from transformers import AutoModel, PreTrainedConfig

IMAGE = 5  # image_token_id of the small config
TOWERS = {
    "clip": SMALL_TOWER,
    "siglip": SMALL_TOWER | {"model_type": "siglip_vision_model"},
    "dinov2": SMALL_TOWER | {"model_type": "dinov2"},
    "dinov2_with_registers": SMALL_TOWER | {"model_type": "dinov2_with_registers"},
    "vit": SMALL_TOWER | {"model_type": "vit"},
    "aimv2": SMALL_TOWER | {"model_type": "aimv2_vision_model"},
}


def num_tokens(rows, cols):
    """Tokens of 2 x 2 a crop: of the crops, the global view and the ends of their lines, and one separator."""
    return (rows * 2) * (cols * 2 + 1) + 1 + 2 * 3


def run(rows, cols, token=IMAGE):
    return [token] * num_tokens(rows, cols)


def assert_same(left, right):
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


# What comes out


def test_images_alone_give_tokens_padded_by_zeros_and_one_vector_each(model):
    outputs = model(**small_pixels((2, 2), (1, 3), (0, 0)))
    lengths = [num_tokens(2, 2), num_tokens(1, 3), num_tokens(0, 0)]
    assert [tokens.shape for tokens in outputs.image_outputs.pooler_output] == [(length, 48) for length in lengths]
    assert outputs.last_hidden_state.shape == (3, max(lengths), 48)
    for tokens, padded in zip(outputs.image_outputs.pooler_output, outputs.last_hidden_state):
        assert torch.equal(padded[: len(tokens)], tokens)
        assert not padded[len(tokens) :].any()
    assert outputs.pooler_output.shape == (3, 48)
    assert outputs.hidden_states is None and outputs.attentions is None


def test_a_batch_of_images_equals_its_images_one_by_one(model):
    batch = small_pixels((2, 2), (1, 1), (3, 1), (0, 0), pad_views=True)
    together = model.get_image_features(**batch)
    for number in range(4):
        alone = model.get_image_features(*(value[number : number + 1] for value in batch.values()))
        assert_same(together.pooler_output[number], alone.pooler_output[0])
        assert_same(together.image_embeds[number], alone.image_embeds[0])


def test_get_image_features_is_what_forward_gives(model):
    inputs = small_pixels((2, 1), (1, 2)) | {"num_image_tokens": torch.tensor([19, 19])}  # as of the image processor
    features, outputs = model.get_image_features(**inputs), model(**inputs)
    assert all(torch.equal(*pair) for pair in zip(features.pooler_output, outputs.image_outputs.pooler_output))
    assert torch.equal(features.image_embeds, outputs.pooler_output)
    assert features.last_hidden_state.shape == (6, 16, 32)  # 3 views each of 4 x 4 patches


def test_return_dict_false_gives_a_tuple(model):
    inputs = small_pixels((1, 2))
    as_tuple, outputs = model(**inputs, return_dict=False), model(**inputs)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.last_hidden_state)
    assert isinstance(model.get_image_features(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("order", ["sub_glb", "glb_sub"])
@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (0, 0)])
def test_pooling_leaves_out_separators_and_padding(order, grid):
    inputs = small_pixels(grid, (3, 3))
    model = small_model(hd_transform_order=order)
    features = model.get_image_features(**inputs)
    tokens, separators = features.pooler_output[0], model.vision_embed_tokens.projector(torch.zeros(1, 16, 32))[-2:]
    is_patch = ~(tokens[:, None] - separators).abs().amax(-1).lt(1e-5).any(-1)
    assert is_patch.sum() == (math.prod(grid) + 1) * 4
    assert_same(features.image_embeds[0], tokens[is_patch].mean(0))

    end = torch.arange(len(tokens)).flip(0) if order == "sub_glb" else torch.arange(len(tokens))
    of_global_view = is_patch & (end < 6)
    of_call = model.get_image_features(**inputs, pooling_mode="global").image_embeds
    assert_same(of_call[0], tokens[of_global_view].mean(0))
    assert torch.equal(small_model(hd_transform_order=order, pooling_mode="global")(**inputs).pooler_output, of_call)


@pytest.mark.parametrize("order", ["sub_glb", "glb_sub"])
def test_tokens_are_put_in_place_without_separators(order):
    model, inputs = small_model(hd_transform_order=order), small_pixels((2, 3), (1, 1), (0, 0))
    outputs = model.get_image_features(**inputs)
    assert outputs.grids.tolist() == [[2, 3], [1, 1], [0, 0]]
    table = model.vision_embed_tokens.projector(outputs.last_hidden_state)[:-2].view(-1, 2, 2, 48)
    for tokens, grid, views in zip(outputs.pooler_output, outputs.grids, table.split((7, 2, 1))):
        crop_lines, global_lines = model.split_image_tokens(tokens, grid)
        rows, cols = grid.tolist()
        assert_same(global_lines, views[0])
        wanted = views[1:].view(rows, cols, 2, 2, 48).transpose(1, 2).reshape(rows * 2, cols * 2, 48)
        assert_same(crop_lines, wanted)
    with pytest.raises(ValueError, match="an image of 2 x 3 crops has 35 tokens"):
        model.split_image_tokens(outputs.pooler_output[1], (2, 3))


def test_the_towers_vector_is_the_mean_of_the_global_views_features(model):
    inputs = small_pixels((1, 1), (2, 2), (0, 0))
    outputs = model(**inputs, pooling_mode="tower")
    features = model.vision_embed_tokens.get_img_features(inputs["pixel_values"][[0, 2, 7]])
    assert_same(outputs.pooler_output, features.mean(1))
    assert_same(outputs.image_outputs.global_features, features)
    single = small_model(use_hd_transform=False, type_feature="cls_patch", pooling_mode="tower")
    pixels = inputs["pixel_values"][:2]
    assert_same(
        single(pixel_values=pixels).pooler_output, single.vision_embed_tokens.get_img_features(pixels)[:, 1:].mean(1)
    )
    assert single.config.embed_dim == 32
    with pytest.raises(ValueError, match="`pooling_mode` is 'cls', but must be one of"):
        model(**inputs, pooling_mode="cls")


# Texts with images


def test_both_kinds_of_placeholders_and_inputs_embeds_agree(model):
    images = small_pixels((1, 2), (2, 1))
    ids = torch.tensor([[1, *run(1, 2), 7, *run(2, 1), 8]])
    negative = torch.tensor([[1, *run(1, 2, -1), 7, *run(2, 1, -2), 8]])
    hidden = model(ids, **images).last_hidden_state
    assert torch.equal(model(negative, **images).last_hidden_state, hidden)
    embeds = model.get_input_embeddings()(ids)
    before = embeds.clone()
    assert torch.equal(model(inputs_embeds=embeds, **images).last_hidden_state, hidden)
    assert torch.equal(embeds, before)


def test_padded_batches_of_texts_with_none_one_and_two_images(model):
    pad = 0
    texts = [[1, *run(1, 2), 7, *run(2, 2)], [9, 9, 9], [*run(2, 1), 4]]
    width = max(map(len, texts))
    images = small_pixels((1, 2), (2, 2), (2, 1), pad_views=True)
    padded = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
    hidden = model(padded, **images, attention_mask=(padded != pad).long()).last_hidden_state
    of_text = [slice(0, 2), slice(0, 0), slice(2, 3)]
    for row, text, which in zip(hidden, texts, of_text):
        own = {key: images[key][which] for key in images} if which.stop > which.start else {}
        assert_same(row[width - len(text) :], model(torch.tensor([text]), **own).last_hidden_state[0])


def test_text_alone_is_rows_of_the_table(model):
    ids = torch.tensor([[1, 2, 99], [0, 0, 7]])
    outputs = model(ids)
    assert torch.equal(outputs.last_hidden_state, model.get_input_embeddings().weight[ids])
    assert outputs.pooler_output is None and outputs.image_outputs is None


def test_ids_are_left_unchanged_and_very_low_ones_are_the_id_0(model):
    ids = torch.tensor([[1, *run(1, 1, -1), -(10**9), -(10**9) - 1]])
    before = ids.clone()
    hidden = model(ids, **small_pixels((1, 1))).last_hidden_state
    assert torch.equal(ids, before)
    assert torch.equal(hidden[0, -2:], model.get_input_embeddings().weight[[0, 0]])


@pytest.mark.parametrize(
    "ids, runs",
    [
        ([1, 2, 3], []),
        (run(1, 2), [17]),
        (run(1, 1) + [1] + run(1, 2), [13, 17]),
        (run(1, 2) + [1] + run(1, 1)[:-1] + [1, IMAGE], [17, 12, 1]),
        (run(1, 2, -1)[:-1] + run(1, 1, -2) + [-2], [16, 14]),
    ],
)
def test_placeholders_that_do_not_match_the_images_are_an_error(model, ids, runs):
    lengths = [num_tokens(1, 2), num_tokens(1, 1)]
    message = (
        f"The text has {sum(runs)} image placeholders, in runs of {runs}, but the images take {sum(lengths)} tokens, "
        f"{lengths}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.tensor([ids]), **small_pixels((1, 2), (1, 1)))


@pytest.mark.parametrize("numbers", [(-2, -1), (-7, -7)])
def test_numbered_placeholders_in_another_order_are_an_error(model, numbers):
    first, second = (run(1, 1, number) for number in numbers)
    with pytest.raises(ValueError, match=re.escape(f"placeholders are {list(numbers)}, but must be -1, -2, -3, ...")):
        model(torch.tensor([[*first, 1, *second]]), **small_pixels((1, 1), (1, 1)))


@pytest.mark.parametrize(
    "ids",
    [torch.tensor(1), [[1, 2]], torch.ones(1, 2, 3, dtype=torch.long), torch.ones(1, 0, dtype=torch.long)]
    + [torch.ones(1, 2, dtype=dtype) for dtype in (torch.bool, torch.uint8, torch.float32)],
    ids=["0-d", "list", "3-d", "empty", "bool", "uint8", "float"],
)
def test_ids_of_a_wrong_kind_are_an_error(model, ids):
    with pytest.raises(ValueError, match="`input_ids` are of .* but must be"):
        model(ids)


def test_inputs_embeds_and_pixels_of_a_wrong_kind_are_an_error(model):
    for embeds in (torch.zeros(2, 48), torch.zeros(1, 2, 47), torch.zeros(1, 0, 48), torch.zeros(1, 2, 48).long()):
        with pytest.raises(ValueError, match="`inputs_embeds` are of shape .* must be .*48"):
            model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="`inputs_embeds` hold NaN"):
        model(inputs_embeds=torch.full((1, 2, 48), math.nan))
    images = small_pixels((1, 1))
    with pytest.raises(ValueError, match="`pixel_values` are of type ndarray, .*return_tensors='pt'"):
        model(pixel_values=images["pixel_values"].numpy(), image_sizes=images["image_sizes"])


# The sample's interface


def test_phi3_image_embedding_shares_word_embeddings_and_takes_microsofts_settings():
    wte = nn.Embedding(100, 48)
    embedding = Phi3ImageEmbedding(
        small_config(), wte, use_hd_transform=False, with_learnable_separator=False, projection_cls="linear"
    )
    assert embedding.wte is wte
    assert isinstance(embedding.projector.img_projection, nn.Linear)
    hidden = embedding(torch.tensor([[1] + 16 * [-1]]), small_pixels((0, 0))["pixel_values"])
    assert hidden.shape == (1, 17, 48) and torch.equal(hidden[0, 0], wte.weight[1])
    with pytest.raises(ValueError, match="`wte` has rows of width 7, but must have those of `hidden_size`, 48"):
        Phi3ImageEmbedding(small_config(), nn.Embedding(100, 7))


def test_a_tower_that_gives_no_tokens_is_an_error_of_ours():
    tower = {"model_type": "vitdet", "image_size": 56, "patch_size": 14, "window_size": 0}
    model = Phi3EmbedModel(small_config(tower, layer_idx=-1))
    with pytest.raises(
        ValueError, match=r"features of shape \(2, 32, 4, 4\), but must give \(views, patches, width\)"
    ):
        model(**small_pixels((1, 1)))


def test_phi3_image_embedding_takes_microsofts_own_config():
    class Phi3VConfig(PreTrainedConfig):
        model_type = "phi3_v"

    config = Phi3VConfig(
        hidden_size=48, vocab_size=32064, img_processor={"image_dim_out": 1024, "num_img_tokens": 144}
    )
    with torch.device("meta"):
        embedding = Phi3ImageEmbedding(
            config,
            use_hd_transform=True,
            with_learnable_separator=True,
            hd_transform_order="sub_glb",
            projection_cls="mlp",
        )
    assert embedding.wte.weight.shape == (32064, 48)
    assert embedding.projector.img_projection[0].weight.shape == (48, 4096)
    assert embedding.config.hd_transform_order == "sub_glb"


@pytest.fixture(scope="module")
def embedding(model):
    """Microsoft's interface, with the weights of the model."""
    embedding = Phi3ImageEmbedding(small_config()).eval()
    embedding.load_state_dict(model.vision_embed_tokens.state_dict())
    return embedding


def test_phi3_image_embedding_forward_equals_the_model(model, embedding):
    images, ids = small_pixels((1, 2)), torch.tensor([[1, *run(1, 2)]])
    assert torch.equal(embedding(ids, **images), model(ids, **images).last_hidden_state)
    assert torch.equal(embedding(ids[:, :1]), model(ids[:, :1]).last_hidden_state)
    assert torch.equal(embedding(**images), model(**images).last_hidden_state)
    with pytest.raises(ValueError, match="Give one of them, or both"):
        embedding()


def test_deferred_features_and_sizes_are_used_once(embedding):
    images, ids = small_pixels((1, 2), pad_views=True), torch.tensor([[1, *run(1, 2)]])
    wanted = embedding(ids, **images)
    embedding.set_img_features(images["pixel_values"])
    embedding.set_img_sizes(images["image_sizes"])
    assert torch.equal(embedding(ids), wanted)
    assert embedding.img_features is None and embedding.img_sizes is None
    with pytest.raises(ValueError, match="17 image placeholders"):
        embedding(ids)


def test_deferred_features_beside_given_ones_are_an_error(embedding):
    images = small_pixels((1, 2))
    embedding.set_img_sizes(images["image_sizes"])
    with pytest.raises(ValueError, match="set_img_sizes"):
        embedding(**images)
    embedding.set_img_features(images["pixel_values"])
    with pytest.raises(ValueError, match="set_img_features"):
        embedding(**images)
    embedding.set_img_features(None)
    embedding.set_img_sizes(None)


def test_precomputed_features_take_the_place_of_pixels(model):
    images = small_pixels((1, 2), (1, 1), (0, 0))
    images["pixel_values"][4] = images["pixel_values"][3]
    wanted = model(**images)
    features = model.vision_embed_tokens.get_img_features(images["pixel_values"])
    padded = torch.stack([torch.cat((own, own.new_zeros(3 - len(own), 16, 32))) for own in features.split((3, 2, 1))])
    for given in (features, padded, wanted.image_outputs.last_hidden_state):
        outputs = model(pixel_values=given, image_sizes=images["image_sizes"])
        assert_same(outputs.last_hidden_state, wanted.last_hidden_state)
        assert_same(outputs.pooler_output, wanted.pooler_output)
        assert_same(outputs.image_outputs.last_hidden_state, features)


def test_get_img_features_keeps_or_drops_the_class_token():
    pixels = small_pixels((0, 0))["pixel_values"]
    patch = small_model(use_hd_transform=False).vision_embed_tokens
    cls_patch = small_model(use_hd_transform=False, type_feature="cls_patch").vision_embed_tokens
    cls_patch.load_state_dict(patch.state_dict())
    assert cls_patch.config.num_img_tokens == 17
    assert cls_patch.get_img_features(pixels).shape == (1, 17, 32)
    assert torch.equal(cls_patch.get_img_features(pixels)[:, 1:], patch.get_img_features(pixels))


def test_a_tower_without_class_token_refuses_cls_patch():
    model = small_model({"model_type": "siglip_vision_model"}, use_hd_transform=False, type_feature="cls_patch")
    with pytest.raises(ValueError, match="16 tokens a view of 16 patches"):
        model(pixel_values=small_pixels((0, 0))["pixel_values"])


# The tower


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer_idx", [-2, -1, 1, 0])
def test_features_are_the_full_towers_at_the_layer_and_no_later_layer_is_built(tower, layer_idx):
    config = small_config(TOWERS[tower], layer_idx=layer_idx)
    full = AutoModel.from_config(config.vision_config).eval()
    ours = build_vision_tower(config).eval()
    missing, _ = ours.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    built = {found[1] for name in ours.state_dict() if (found := re.search(r"layers?\.(\d+)\.", name))}
    assert len(built) == config.num_feature_layers == layer_idx % 4
    assert not [name for name in ours.state_dict() if name.startswith(CLOSING_MODULES)]
    pixels = small_pixels((1, 2))["pixel_values"]
    wanted = full(pixels, output_hidden_states=True).hidden_states
    # The last hidden state of a tower that ends in a norm is listed behind it: take it off.
    wanted = wanted[layer_idx]
    if layer_idx == -1 and tower != "clip":
        norm = {"siglip": "post_layernorm", "aimv2": "rms_norm"}.get(tower, "layernorm")
        setattr(full, norm, nn.Identity())
        wanted = full(pixels).last_hidden_state
    assert torch.equal(ours(pixels).last_hidden_state, wanted)


@pytest.mark.parametrize("tower", TOWERS)
def test_any_tower_embeds_and_survives_save_and_reload(tower, tmp_path):
    model, images = small_model(TOWERS[tower]), small_pixels((1, 2), (1, 1))
    wanted = model(**images)
    model.save_pretrained(tmp_path)
    again, info = Phi3EmbedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(again(**images).last_hidden_state, wanted.last_hidden_state)


@pytest.mark.parametrize("max_views", [None, 7])
def test_only_real_views_go_through_the_tower_in_one_batch_and_twins_once(model, max_views):
    images = small_pixels((2, 1), (1, 1), (0, 0), max_views=max_views)
    views = images["pixel_values"][1] if max_views else images["pixel_values"][3:]
    batches = []
    hook = model.vision_embed_tokens.img_processor.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    model(**images)
    views[1] = views[0]
    twin = model(**images)
    hook.remove()
    assert [len(batch) for batch in batches] == [3 + 2 + 1, 3 + 1 + 1]
    assert all(batch.flatten(1).any(-1).all() for batch in batches)
    crop, global_view = twin.image_outputs.pooler_output[1].split([6, 7])
    assert torch.equal(crop, global_view[1:])
    features = twin.image_outputs.last_hidden_state  # one row a view all the same
    assert len(features) == 6 and torch.equal(features[3], features[4])
    assert_same(twin.pooler_output[1], global_view[1:].view(2, 3, 48)[:, :2].flatten(0, 1).mean(0))
    pixel_values = images["pixel_values"].requires_grad_()
    outputs = model(pixel_values=pixel_values, image_sizes=images["image_sizes"])
    (gradient,) = torch.autograd.grad(outputs.pooler_output.sum(), pixel_values)
    gradient = gradient[1, :2] if max_views else gradient[3:5]
    assert gradient.flatten(1).any(-1).all()  # where it is asked for, each of the two has its own


def test_views_one_after_another_and_padded_views_give_the_same(model):
    packed, padded = (small_pixels((2, 2), (1, 3), (0, 0), pad_views=pad) for pad in (False, True))
    ids = torch.tensor([[*run(2, 2), 1, *run(1, 3), *run(0, 0)]])
    assert_same(model(ids, **packed).last_hidden_state, model(ids, **padded).last_hidden_state)
    left, right = model.get_image_features(**packed), model.get_image_features(**padded)
    assert torch.equal(left.last_hidden_state, right.last_hidden_state)
    assert torch.equal(left.image_embeds, right.image_embeds) and torch.equal(left.grids, right.grids)


def test_hidden_states_and_attentions_of_the_tower_on_request_only():
    model, images = small_model(), small_pixels((1, 2))
    model.set_attn_implementation("eager")
    outputs = model(**images, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(3, 17, 32)] * 3
    assert [attention.shape for attention in outputs.attentions] == [(3, 2, 17, 17)] * 2
    features = model.get_image_features(**images)
    assert features.hidden_states is None and features.attentions is None
    assert torch.equal(outputs.hidden_states[-1][:, 1:], features.last_hidden_state)


def test_sdpa_equals_eager_and_a_dict_sets_the_tower_alone():
    images = small_pixels((2, 2), (1, 2))
    sdpa = small_model()
    weights = sdpa.state_dict()
    eager = Phi3EmbedModel.from_pretrained(
        None, config=small_config(), state_dict=weights, attn_implementation={"vision_config": "eager"}
    )
    assert sdpa.vision_embed_tokens.img_processor.config._attn_implementation == "sdpa"
    assert eager.vision_embed_tokens.img_processor.config._attn_implementation == "eager"
    assert_same(sdpa(**images).last_hidden_state, eager(**images).last_hidden_state)


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("clip", "builds CLIPModel, which takes `input_ids`"),
        ("siglip2_vision_model", "builds Siglip2VisionModel, which needs pixel_values, pixel_attention_mask"),
    ],
)
def test_a_tower_that_takes_more_or_else_than_pixels_is_an_error(model_type, message):
    with pytest.raises(ValueError, match=message):
        build_vision_tower(small_config({"model_type": model_type}))


def test_no_code_that_a_part_names_is_run(monkeypatch):
    code = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel"), "someone/other--code.Class")}
    fetch = "transformers.models.auto.auto_factory.get_class_from_dynamic_module"
    monkeypatch.setattr(fetch, lambda *_, **__: pytest.fail("code was asked for"))
    model = whole_model(text=code, tower=code)
    for part in (model.model.vision_embed_tokens.img_processor, model.model.language_model):
        assert type(part).__module__.startswith("transformers.models.")
        assert part.config.auto_map == code["auto_map"]


# Training


def gradients(model, images, **checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    model(**images).pooler_output.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    images = small_pixels((2, 1), (1, 1))
    wanted = gradients(small_model(), images)
    checkpointed = gradients(small_model(), images, use_reentrant=use_reentrant)
    for name, gradient in wanted.items():
        # The pooled vector passes neither the separators nor the word embeddings.
        assert (gradient is None or not gradient.any()) == any(part in name for part in ("wte", "_GN")), name
        torch.testing.assert_close(checkpointed[name], gradient)


def test_all_weights_learn_from_texts_with_images():
    model = small_model().train()
    model(torch.tensor([[1, *run(1, 2), 3]]), **small_pixels((1, 2))).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_dropout_acts_in_training_only():
    model, ids = small_model(embd_pdrop=0.5), torch.tensor([[1, 2, 3]])
    assert not (model(ids).last_hidden_state == 0).any()
    assert (model.train()(ids).last_hidden_state == 0).any()
    assert (model(**small_pixels((1, 2))).last_hidden_state == 0).any()


# States of the model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    images, ids = small_pixels((1, 2)), torch.tensor([[1, *run(1, 2)]])
    wanted = small_model()(ids, **images)
    outputs = small_model().to(dtype)(ids, **images)
    assert outputs.last_hidden_state.dtype == outputs.pooler_output.dtype == dtype
    cosine = torch.cosine_similarity(outputs.last_hidden_state.float(), wanted.last_hidden_state, dim=-1)
    assert cosine.min() > 0.99


def test_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.tensor([[1, *run(1, 2)]]), **small_pixels((1, 2)))
    assert outputs.last_hidden_state.isfinite().all()


def test_image_sizes_as_a_list_of_pairs(model):
    images = small_pixels((1, 2), (2, 1))
    wanted = model(**images).last_hidden_state
    pairs = [tuple(pair) for pair in images["image_sizes"].tolist()]
    assert torch.equal(model(pixel_values=images["pixel_values"], image_sizes=pairs).last_hidden_state, wanted)


def test_get_image_features_compiles_to_one_graph_and_agrees(model):
    torch._dynamo.reset()
    # What our code can break is the graph, which is traced here; tests/test_export.py compiles one.
    compiled = torch.compile(model.get_image_features, fullgraph=True, dynamic=True, backend="eager")
    for grids in ([(2, 2), (1, 3), (4, 1)], [(1, 8), (2, 1)], [(3, 2), (0, 0), (1, 1), (1, 2)]):
        images = small_pixels(*grids)
        wanted, outputs = model.get_image_features(**images), compiled(**images)
        assert len(outputs.last_hidden_state) == len(images["pixel_values"])  # no padding is encoded
        for pair in zip(outputs.pooler_output, wanted.pooler_output, strict=True):
            assert_same(*pair)
        assert_same(outputs.image_embeds, wanted.image_embeds)


def test_resize_token_embeddings_moves_the_end_of_the_vocabulary():
    model = small_model()
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match="hold 104, but the vocabulary ends at 99"):
        model(torch.tensor([[104]]))
    model.resize_token_embeddings(105)
    assert model.config.vocab_size == 105
    assert model(torch.tensor([[104]])).last_hidden_state.shape == (1, 1, 48)
    assert torch.equal(model.get_input_embeddings().weight[:100], before)


def test_a_fresh_model_is_initialised_completely_also_from_meta():
    with torch.device("meta"):
        model = Phi3EmbedModel(small_config())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
        tensor._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not (tensor == 7).all(), name
    assert model(**small_pixels((1, 2))).last_hidden_state.isfinite().all()


# Checkpoints that do not fit


def test_a_checkpoint_of_another_size_is_an_error(tmp_path):
    small_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="(?s)size mismatch|mismatched"):
        Phi3EmbedModel.from_pretrained(tmp_path, config=small_config(hidden_size=64))


# Bad input


GOOD = small_pixels((1, 2), (2, 1), pad_views=True)
PIXELS, SIZES = GOOD["pixel_values"], GOOD["image_sizes"]
NO_IMAGES = {"pixel_values": None, "image_sizes": None}
BEYOND = torch.cat((PIXELS, torch.ones_like(PIXELS[:, :1])), dim=1)
NAN = PIXELS.clone()
NAN[0, 0, 0, 0, 0] = math.nan


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"pixel_values": PIXELS[0, 0]},
            r"shape \(3, 56, 56\), but this model takes the views of all images \(num_views, 3, 56, 56\), .*16, 32\)",
        ),
        ({"pixel_values": PIXELS[..., :28, :28]}, "shape .* 28, 28.*takes"),
        ({"pixel_values": PIXELS[:, :, :1]}, "shape .*takes"),
        ({"pixel_values": PIXELS[:0], "image_sizes": SIZES[:0]}, "shape .*takes"),
        ({"pixel_values": PIXELS.long()}, "dtype torch.int64, but must be floating point"),
        ({"pixel_values": NAN}, "NaN"),
        ({"image_sizes": None}, "`image_sizes` are missing"),
        ({"image_sizes": SIZES[:1]}, r"shape \(1, 2\) .* but must be ints of shape \(2, 2\)"),
        ({"image_sizes": SIZES.float()}, "float32, but must be ints"),
        ({"image_sizes": SIZES + 1}, "say 57 x 113 for image 0, but must be multiples of the crop size, 56"),
        ({"image_sizes": -SIZES}, "must be multiples of the crop size"),
        ({"image_sizes": SIZES * torch.tensor([1, 0])}, "must be multiples of the crop size"),
        ({"image_sizes": SIZES * 2}, "112 x 224 for image 0, which is 9 views, the global view counted, .* have 3"),
        ({"pixel_values": BEYOND}, "Image 0 has 3 views .* hold more"),
        ({"pixel_values": PIXELS.flatten(0, 1)[:5]}, "say 6 views of 2 images, .* `pixel_values` have 5"),
        ({"pixel_values": PIXELS.flatten(0, 1), "image_sizes": SIZES[:0]}, r"must be ints of shape \(num_images, 2\)"),
        ({"image_sizes": SIZES.bool()}, "torch.bool, but must be ints"),
        ({"image_sizes": [[2**70, 56], [56, 56]]}, "but must be ints"),
        ({"pixel_values": PIXELS.to("meta")}, "on the meta device, so without values"),
        ({"pixel_values": PIXELS.to_sparse()}, "a tensor of layout torch.sparse_coo"),
        ({"pixel_values": torch.nested.nested_tensor([PIXELS[0], PIXELS[1]])}, "a nested tensor"),
        ({"pixel_values": PIXELS.to(torch.float8_e4m3fn)}, "float8_e4m3fn, but must be floating point .float32"),
        ({"image_sizes": SIZES.to("meta")}, "`image_sizes` are on the meta device"),
        ({"input_ids": torch.tensor([[100]])}, "hold 100, but the vocabulary ends at 99"),
        ({"input_ids": torch.tensor([[1.0]])}, "must be int64 or int32"),
        ({"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 48)}, "Both"),
        ({"image_sizes": [[56, 112], [56]]}, r"are \[\[56, 112\], \[56\]\], but must be ints of shape \(2, 2\)"),
        ({"image_sizes": "336x336"}, "are '336x336', but must be ints"),
        ({"inputs_embeds": [[0.0] * 48], "input_ids": None}, "`inputs_embeds` are of type list, but must be a tensor"),
        ({"pixel_values": None}, "without `pixel_values`"),
        (
            NO_IMAGES | {"input_ids": torch.tensor([run(1, 1)])},
            r"13 .* in runs of \[13\], but the images take 0 tokens",
        ),
        (NO_IMAGES, "Nothing was given"),
    ],
)
def test_bad_input_is_an_error_of_ours(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model(**GOOD | changes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint64])
def test_image_sizes_of_any_whole_number(model, dtype):
    images = small_pixels((1, 2), (2, 1))
    wanted = model(**images).last_hidden_state
    assert torch.equal(model(**images | {"image_sizes": images["image_sizes"].to(dtype)}).last_hidden_state, wanted)


@pytest.mark.parametrize("unknown", [{"pixel_value": PIXELS}, {"num_crops": 4}])
def test_misspelt_arguments_are_an_error_that_names_what_is_accepted(model, unknown):
    (name,) = unknown
    for call in (model, model.get_image_features, Phi3EmbedForImageClassification(small_config(num_labels=3))):
        with pytest.raises(TypeError, match=f"got `{name}`. Accepted are .*`pixel_values`, .*`output_hidden_states`"):
            call(**small_pixels((1, 1)), **unknown)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (GOOD, r"takes \(num_images, 3, 56, 56\), or \(num_images, num_tokens, 32\) for features"),
        ({"pixel_values": PIXELS[:, 0], "image_sizes": SIZES}, "without the HD transform. Leave them out, or .*=0"),
        ({"pixel_values": torch.zeros(2, 5, 31)}, "or .*32.* for features"),
    ],
)
def test_bad_input_without_hd_transform(inputs, message):
    with pytest.raises(ValueError, match=message):
        small_model(use_hd_transform=False)(**inputs)


def test_inputs_embeds_without_an_image_token_id_are_an_error():
    with pytest.raises(ValueError, match="need an `image_token_id`"):
        small_model(image_token_id=None)(inputs_embeds=torch.zeros(1, 3, 48))


def test_the_default_is_phi_3_vision_to_the_last_weight():
    with torch.device("meta"):
        model = Phi3EmbedModel(Phi3EmbedConfig())
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if "wte" not in name)
    assert count == 290_909_184 + 22_026_240 + 8_192  # needed layers of the tower, projection, separators
    assert model.get_input_embeddings().weight.shape == (32064, 3072)
    assert model.config.vision_config.num_hidden_layers == CLIP_VIT_LARGE_PATCH14_336["num_hidden_layers"] == 24
