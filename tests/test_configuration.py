"""The configuration: defaults, names, round trips, Microsoft's config.json, and wrong values."""

import json
import math

import pytest
from conftest import ROOT, SMALL_TEXT, SMALL_TOWER, small_config
from phi3_embed.configuration_phi3_embed import Phi3EmbedConfig, hd_num_tokens
from transformers import AutoModel, LlamaConfig, SiglipVisionConfig

FACTORS = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "original_max_position_embeddings": 64}
MICROSOFT = ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.config.json"


def settings(config):
    """What a config says, without what a class or a file adds."""
    said = json.loads(config.to_json_string(use_diff=False))
    return {
        key: said[key] for key in said if key not in ("architectures", "auto_map", "transformers_version", "dtype")
    }


def test_the_default_is_phi_3_visions_geometry_and_the_root_has_it_with_narrow_layers():
    default, root = Phi3EmbedConfig(), Phi3EmbedConfig.from_pretrained(ROOT)
    for name in (
        "crop_size",
        "patches_per_side",
        "num_img_tokens",
        "layer_idx",
        "hd_transform_order",
        "projection_cls",
    ):
        assert getattr(root, name) == getattr(default, name)
    assert (default.hidden_size, default.vision_config.num_hidden_layers) == (3072, 24)
    assert root.hidden_size < default.hidden_size


def test_microsofts_config_is_read_as_it_stands_for_the_image_embedding_alone():
    config = Phi3EmbedConfig.from_pretrained(MICROSOFT, text_config=None)
    said = settings(config)
    token_ids = {name: said.pop(name) for name in ("bos_token_id", "eos_token_id")}
    assert token_ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert said == settings(Phi3EmbedConfig())
    assert config._attn_implementation is None
    assert not hasattr(config, "rope_scaling") and not hasattr(config, "img_processor")


def test_microsofts_config_is_read_whole():
    microsoft = json.loads(MICROSOFT.read_text())
    config = Phi3EmbedConfig.from_pretrained(MICROSOFT)
    text, rope = config.text_config, config.text_config.rope_parameters
    assert text.model_type == "phi3" and text.sliding_window is None and not config.tie_word_embeddings
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(text, name) == microsoft[name]
    assert (rope["rope_type"], rope["original_max_position_embeddings"], rope["rope_theta"]) == ("longrope", 4096, 1e4)
    for name in ("short_factor", "long_factor"):
        assert rope[name] == microsoft["rope_scaling"][name]
    alone = settings(Phi3EmbedConfig.from_pretrained(MICROSOFT, text_config=None))
    assert settings(config) == alone | {"text_config": settings(config)["text_config"], "tie_word_embeddings": False}


@pytest.mark.parametrize(
    "settings_, said",
    [
        ({"sliding_window": 64}, {"sliding_window": 64}),  # shorter than the longest text
        ({"rope_scaling": FACTORS | {"type": "yarn"}}, {"attention_factor": 0.1 * math.log(4) + 1}),
        ({"rope_scaling": FACTORS | {"type": "longrope"}}, {"short_factor": [1.0] * 6}),
        ({"rope_scaling": None, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
    ],
)
def test_microsofts_words_for_a_language_model(settings_, said):
    text = small_config(text_config=SMALL_TEXT | settings_).text_config
    assert {name: text.rope_parameters.get(name, getattr(text, name, None)) for name in said} == said


def test_width_vocabulary_and_ties_follow_from_the_language_model(tmp_path):
    config = Phi3EmbedConfig(
        vision_config=SMALL_TOWER, text_config=SMALL_TEXT | {"tie_word_embeddings": True}, image_token_id=5
    )
    assert (config.hidden_size, config.vocab_size, config.tie_word_embeddings) == (48, 100, True)
    assert config.get_text_config() is config.text_config
    config.save_pretrained(tmp_path)
    assert settings(Phi3EmbedConfig.from_pretrained(tmp_path)) == settings(config)
    wider = Phi3EmbedConfig.from_pretrained(tmp_path, text_config={"vocab_size": 120})
    assert wider.vocab_size == 120 and wider.text_config.num_hidden_layers == config.text_config.num_hidden_layers
    alone = Phi3EmbedConfig.from_pretrained(tmp_path, text_config=None)
    assert alone.text_config is None and alone.get_text_config() is alone


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"text_config": {"model_type": "llama"}}, r"`text_config\['model_type'\]` is 'llama', but must be 'phi3'"),
        (
            {"text_config": LlamaConfig()},
            "`text_config` is LlamaConfig .* but must be a dict, or a PreTrainedConfig of type",
        ),
        ({"text_config": "phi3"}, "`text_config` is 'phi3', but must be a dict"),
        (
            {"text_config": SMALL_TEXT, "hidden_size": 64},
            "`hidden_size` is 64, but must be 48, the one of `text_config`",
        ),
        ({"text_config": SMALL_TEXT, "vocab_size": 99}, "`vocab_size` is 99, but must be 100"),
        ({"text_config": SMALL_TEXT | {"num_hidden_layers": "2"}}, "`text_config` is no config of a 'phi3': "),
        ({"text_config": SMALL_TEXT | {"rope_scaling": {"type": "su"}}}, "`text_config` is no config of a 'phi3': "),
        ({"text_config": SMALL_TEXT | {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "no config of a 'phi3': "),
    ],
)
def test_language_models_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        Phi3EmbedConfig(**{"vision_config": SMALL_TOWER, "image_token_id": 5} | wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_processor": {"name": "siglip"}}, "'siglip', but must be 'clip_vision_model'"),
        ({"img_processor": {"model_name": "openai/other"}}, "'openai/other', but must be one of"),
        ({"img_processor": {"image_dim_out": 768}}, "768, but must be 1024"),
        ({"img_processor": {"num_img_tokens": 100}}, "`num_img_tokens` is 100, but must be 144"),
        ({"embd_layer": {"embedding_cls": "audio"}}, "'audio', but must be 'image'"),
        ({"embd_layer": {"with_learnable_separator": False}}, "`with_learnable_separator` is False, but must be True"),
    ],
)
def test_what_microsofts_config_may_not_say(change, message):
    microsoft = json.loads(MICROSOFT.read_text())
    for key, values in change.items():
        microsoft[key] |= values
    with pytest.raises(ValueError, match=message):
        Phi3EmbedConfig.from_dict(microsoft)


def test_microsofts_code_has_other_defaults_where_its_config_is_silent():
    config = Phi3EmbedConfig.from_dict({"img_processor": {"num_img_tokens": 576}, "n_embd": 64, "embed_pdrop": 0.1})
    assert (config.hidden_size, config.embd_pdrop) == (64, 0.1)
    assert (config.use_hd_transform, config.projection_cls, config.hd_transform_order) == (False, "linear", "glb_sub")


def test_other_names():
    config = Phi3EmbedConfig(n_embd=64, embed_pdrop=0.25)
    assert config.hidden_size == config.n_embd == 64 and config.embd_pdrop == config.embed_pdrop == 0.25
    assert Phi3EmbedConfig(n_embd=64, hidden_size=64).hidden_size == 64
    with pytest.raises(ValueError, match="`n_embd` is another name of `hidden_size`, but they are 64 and 65"):
        Phi3EmbedConfig(n_embd=64, hidden_size=65)


@pytest.mark.parametrize(
    "config",
    [
        small_config(),
        small_config(layer_idx=1, hd_transform_order="glb_sub", projection_cls="linear", pooling_mode="global"),
        small_config(use_hd_transform=False, type_feature="cls_patch", embd_pdrop=0.5, image_token_id=None),
        small_config(use_hd_transform=False, num_img_tokens=50),
        Phi3EmbedConfig(vision_config=SiglipVisionConfig(image_size=224, patch_size=16)),
    ],
)
def test_save_and_reload_is_exact(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert settings(Phi3EmbedConfig.from_pretrained(tmp_path)) == settings(config)


def test_geometry_is_derived():
    config = small_config({"image_size": 112, "patch_size": 7})
    assert (config.crop_size, config.patches_per_side, config.tokens_per_side) == (112, 16, 8)
    assert config.num_img_tokens == 64
    assert small_config(use_hd_transform=False).num_img_tokens == 16
    assert small_config(use_hd_transform=False, type_feature="cls_patch").num_img_tokens == 17


# (h * w + 1) * 144 + 1 + (h + 1) * 12, in the figures that users of the original know.
@pytest.mark.parametrize(
    "grid, tokens", [((1, 1), 313), ((2, 2), 757), ((4, 4), 2509), ((1, 16), 2473), ((16, 1), 2653)]
)
def test_hd_num_tokens(grid, tokens):
    assert hd_num_tokens(*grid, tokens_per_side=12) == tokens


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"hidden_size": 0}, "`hidden_size` is 0, but must be a positive int"),
        ({"hidden_size": "3072"}, "`hidden_size` is '3072'"),
        ({"vocab_size": -1}, "`vocab_size` is -1"),
        ({"image_token_id": 100}, r"`image_token_id` is 100, but must be an id below `vocab_size` \(100\)"),
        ({"image_token_id": -1}, "`image_token_id` is -1"),
        ({"layer_idx": 4}, "`layer_idx` is 4, but must be an int from -4 to 3"),
        ({"layer_idx": -5}, "`layer_idx` is -5"),
        ({"layer_idx": 1.0}, "`layer_idx` is 1.0"),
        ({"type_feature": "cls"}, "`type_feature` is 'cls', but must be one of .*patch.*cls_patch"),
        ({"type_feature": "cls_patch"}, "'cls_patch', but must be 'patch' when `use_hd_transform` is True"),
        ({"hd_transform_order": "sub"}, "`hd_transform_order` is 'sub', but must be one of .*sub_glb.*glb_sub"),
        ({"projection_cls": "conv"}, "`projection_cls` is 'conv'"),
        ({"pooling_mode": "cls"}, "`pooling_mode` is 'cls', but must be one of .*mean.*global"),
        ({"use_hd_transform": "yes"}, "`use_hd_transform` is 'yes'"),
        ({"with_learnable_separator": False}, "the separators belong to the HD transform"),
        ({"embd_pdrop": 1.0}, "`embd_pdrop` is 1.0, but must be a probability"),
        ({"num_img_tokens": 144}, "`num_img_tokens` is 144, but must be 4, which the tower gives for a crop"),
        ({"use_hd_transform": False, "num_img_tokens": 0}, "`num_img_tokens` is 0"),
        (
            {"tower": {"model_type": "no_such_tower"}},
            "'no_such_tower', but must be a model type that transformers knows",
        ),
        ({"vision_config": {"model_type": "clip"}}, "of type 'clip' has no `image_size`"),
        ({"vision_config": {"model_type": "bert"}}, "of type 'bert' has no `image_size`"),
        ({"vision_config": "clip"}, "`vision_config` is 'clip', but must be a dict or a PreTrainedConfig"),
        ({"vision_config": {"model_type": "swin"}}, "of type 'swin' has `depths`, .* plain vision transformer"),
        ({"vision_config": {"model_type": "videomae"}}, "of type 'videomae' has `num_frames`"),
        ({"vision_config": {"model_type": "vit_mae"}}, "of type 'vit_mae' has `mask_ratio`"),
        ({"initializer_range": "a"}, "`initializer_range` is 'a', but must be a standard deviation"),
        ({"initializer_range": -1.0}, "`initializer_range` is -1.0, but must be a standard deviation"),
        ({"tower": {"num_attention_heads": 7}}, "(?s)is no config of a 'clip_vision_model': .*attention heads"),
        (
            {"img_processor": {"layer_idx": -1}},
            r"Microsoft's \['img_processor'\] are read by `Phi3EmbedConfig.from_dict`",
        ),
        ({"tower": {"image_size": 60}}, "`vision_config.image_size` is 60, but must be a multiple of .*14"),
        ({"tower": {"image_size": 70}}, "70, but must be a multiple of 28 when `use_hd_transform` is True"),
        ({"tower": {"model_type": "vit", "image_size": [56, 112]}}, "square only"),
    ],
)
def test_wrong_and_contradictory_values_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        small_config(**wrong)


# transformers sets the arguments of `from_pretrained` on a config that is made already, past the checks of `__init__`.
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pooling_mode": "globl"}, "`pooling_mode` is 'globl'"),
        ({"hd_transform_order": "subglb"}, "`hd_transform_order` is 'subglb'"),
        ({"layer_idx": -9}, "`layer_idx` is -9"),
        ({"type_feature": "cls_patch"}, "'cls_patch', but must be 'patch' when `use_hd_transform` is True"),
        ({"num_img_tokens": 100}, "`num_img_tokens` is 100"),
        ({"hidden_size": 64, "n_embd": 65}, "they are 65 and 64"),
    ],
)
def test_arguments_of_from_pretrained_are_checked_too(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(ROOT, trust_remote_code=True, **changes)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n_embd": 64}, {"hidden_size": 64}),
        ({"use_hd_transform": False}, {"num_img_tokens": 576}),
        ({"use_hd_transform": False, "type_feature": "cls_patch"}, {"num_img_tokens": 577}),
        ({"vision_config": {"image_size": 224}}, {"num_img_tokens": 64, "crop_size": 224}),
        ({"vision_config": {"model_type": "vit"}}, {"num_img_tokens": 49, "crop_size": 224}),
    ],
)
def test_what_follows_from_arguments_of_from_pretrained_is_derived_anew(changes, said, tmp_path):
    Phi3EmbedConfig().save_pretrained(tmp_path)
    config, unused = Phi3EmbedConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **changes, foo=1)
    assert {name: getattr(config, name) for name in said} == said and unused == {"foo": 1}
    assert config.vision_config.num_hidden_layers == (12 if config.vision_config.model_type == "vit" else 24)


def test_microsofts_config_is_not_mixed_with_ours():
    with pytest.raises(ValueError, match=r"\['layer_idx'\], but must be said in Microsoft's way alone"):
        Phi3EmbedConfig.from_dict(json.loads(MICROSOFT.read_text()) | {"layer_idx": -1})


def test_an_odd_number_of_patches_is_fine_without_the_hd_transform():
    assert small_config({"image_size": 70}, use_hd_transform=False).num_img_tokens == 25
