"""
Microsoft's layout of Phi-3-vision beside ours: names of weights, and which keys of its JSON files are taken over.

A source gives weights, numbers and texts. What is not named here, such as an `auto_map`, could name code, files or
addresses that act here or wherever the result is loaded, so it is left behind.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from phi3_tools import ROOT

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, ADAPTER, ADAPTER_WEIGHTS = "preprocessor_config.json", "adapter_config.json", "adapter_model.safetensors"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
TEXTS = ("README.md", "LICENSE*")  # not needed, so left out where they cannot be read
SMALL_FILES = (
    *(*TEXTS, "config.json", PREPROCESSOR, INDEX, PICKLE_INDEX, ADAPTER, ADAPTER_WEIGHTS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)

# How our names of weights begin, without the `model.` that a head or a whole model puts before them, and how
# Microsoft's do. The word embeddings are one module under two names there, and a file may hold either or both. The
# image embedding reads `wte`, so that comes first: where training has replaced the other alone, `wte` is still what
# images were embedded with.
WORDS = "vision_embed_tokens.wte."
IMAGE_NAMES = {
    WORDS: ("model.vision_embed_tokens.wte.", "model.embed_tokens."),
    "vision_embed_tokens.img_processor.": ("model.vision_embed_tokens.img_processor.vision_model.",),
    "vision_embed_tokens.projector.": ("model.vision_embed_tokens.",),
}
LANGUAGE_NAMES = {
    "language_model.layers.": ("model.layers.",),
    "language_model.norm.": ("model.norm.",),
    "lm_head.": ("lm_head.",),
}
NAMES = IMAGE_NAMES | LANGUAGE_NAMES
# What the published names of the image embedding begin with, and of the language model.
IMAGE_EMBEDDING = ("model.vision_embed_tokens.", "model.embed_tokens.")
LANGUAGE_MODEL = tuple(theirs for (theirs,) in LANGUAGE_NAMES.values())
# Parts of the tower behind the feature layer: they do not reach the output. `position_ids` are no weights.
(TOWER,) = IMAGE_NAMES["vision_embed_tokens.img_processor."]
BEHIND_FEATURES = re.compile(
    re.escape(TOWER) + r"(post_layernorm\.|embeddings\.position_ids|encoder\.layers\.(\d+)\.)"
)

# Settings that decide which embeddings come of the same weights, beside shapes.
COMPUTATION = ("layer_idx", "type_feature", "use_hd_transform", "hd_transform_order", "projection_cls")
TOWER_COMPUTATION = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
TEXT_COMPUTATION = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "sliding_window"),
    "tie_word_embeddings",
)

# What of Microsoft's config.json describes the language model.
TEXT_SETTINGS = (
    *TEXT_COMPUTATION[:7],
    *("max_position_embeddings", "original_max_position_embeddings", "rope_theta", "rope_scaling", "sliding_window"),
    *("attention_dropout", "resid_pdrop", "use_cache", "tie_word_embeddings"),
)
# Towers whose configs name nothing to load.
TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
MAX_LAYERS = 500
MAX_NUMBER = 10**7  # of widths, rows of tables, positions
IMAGE_SETTINGS = ("num_crops", "image_mean", "image_std")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKENIZER_SETTINGS = {"model_max_length": int, "padding_side": str, "clean_up_tokenization_spaces": bool}


def published_names(name: str) -> list[str]:
    """Our name of a weight -> its names in a published checkpoint, the one to prefer first."""
    name = name.removeprefix("model.")
    ours = next(ours for ours in NAMES if name.startswith(ours))
    return [theirs + name.removeprefix(ours) for theirs in NAMES[ours]]


def is_of_the_layout(name: str) -> bool:
    """Whether a weight of ours has a place in Microsoft's layout, which has none for a classifier's."""
    return name.removeprefix("model.").startswith(tuple(f"{ours.partition('.')[0]}." for ours in NAMES))


def is_behind_features(name: str, config) -> bool:
    """Whether a published weight lies in the tower behind the feature layer."""
    match = BEHIND_FEATURES.match(name)
    layer = match and match[2]
    return bool(match) and (
        layer is None or config.num_feature_layers <= int(layer) < config.vision_config.num_hidden_layers
    )


def from_module(reference: str) -> Any:
    """A name of the repository's modules, such as `"modeling_phi3_embed.Phi3EmbedModel"`, as Auto classes load it."""
    return get_class_from_dynamic_module(reference, ROOT)


def parse_config(about: dict, whole: bool = False):
    """
    A config.json, Microsoft's or ours -> our config, of the numbers and texts that describe the image embedding, and
    the language model if it is `whole`.

    Raises:
        ValueError: a value is wrong, or such as no checkpoint has, which is noticed before anything is built.
    """
    config_class = from_module("modeling_phi3_embed.Phi3EmbedConfig")
    known = {*inspect.signature(config_class).parameters, "img_processor", "embd_layer"}
    if not whole:
        known -= {"text_config"}
    elif "img_processor" in about:
        known |= {*TEXT_SETTINGS}
    taken = {key: value for key, value in about.items() if key in known}
    if isinstance(taken.get("vision_config"), dict):
        taken["vision_config"] = _own_settings(taken["vision_config"], TOWERS)
    if isinstance(taken.get("text_config"), dict):
        taken["text_config"] = _own_settings(taken["text_config"], ("phi3",))
    for part in (taken, *(part for part in taken.values() if isinstance(part, dict))):
        _check_numbers(part)
    config = config_class.from_dict(taken)
    model_shapes(config)  # the tower's own checks
    return config


def _own_settings(about, model_types):
    """The settings of a model of one of these types, without those of a config of any model."""
    model_type = about.get("model_type", model_types[0])
    if model_type not in model_types:
        raise ValueError(f"a part of it is of type {model_type!r}, but must be of one of {', '.join(model_types)}.")
    known = CONFIG_MAPPING[model_type]().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    return {key: about[key] for key in known & about.keys()} | {"model_type": model_type}


def _check_numbers(about):
    for key, value in about.items():
        limit = MAX_LAYERS if "layers" in key else MAX_NUMBER
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and abs(number) > limit:
                raise ValueError(f"`{key}` is {number}, but must be {limit} at most.")


def model_class(config) -> Any:
    """The model of a config: the whole Phi-3-vision where that has a language model, else the image embedding."""
    is_whole = getattr(config, "text_config", None) is not None
    return from_module(f"modeling_phi3_embed.{'Phi3VisionForConditionalGeneration' if is_whole else 'Phi3EmbedModel'}")


def model_shapes(config) -> dict[str, tuple[int, ...]]:
    """Our names of a model's weights, and their shapes."""
    with torch.device("meta"):
        model = model_class(config)(config)
    tied = model.all_tied_weights_keys if getattr(config, "tie_word_embeddings", False) else ()
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}


def computation(config) -> dict:
    """The settings that make results of weights, those of the tower and the language model under their own names."""
    settings = {name: getattr(config, name) for name in COMPUTATION}
    # The same layer, however it is counted.
    settings["layer_idx"] = config.num_feature_layers - config.vision_config.num_hidden_layers - 1
    for part, names in (("vision_config", TOWER_COMPUTATION), ("text_config", TEXT_COMPUTATION)):
        settings |= {f"{part}.{name}": getattr(getattr(config, part, None), name, None) for name in names}
    return settings


def select(
    entries: dict,
    shapes: dict[str, tuple[int, ...]],
    checkpoint: str,
    names_of: Callable[[str], list[str]],
    is_left_out: Callable[[str], bool],
) -> dict:
    """
    The entry of each of our weights, in the order of their bytes.

    Args:
        entries: a checkpoint's, by their names there.
        shapes: of our weights, by our names.
        checkpoint: what messages call it.
        names_of: our name of a weight -> its names there, the one to prefer first.
        is_left_out: whether an entry may be there without being one of ours.

    Raises:
        ValueError: weights are missing, extra or misshapen; the message has the names of all of them.
    """
    selected, problems = {}, defaultdict(list)
    for name, shape in shapes.items():
        entry = next((entries[known] for known in names_of(name) if known in entries), None)
        if entry is None:
            problems["missing"].append(" or ".join(names_of(name)))
            continue
        selected[name] = entry
        if entry.shape != shape:
            problems["wrong shape"].append(f"{entry.name} is {entry.shape}, not {shape}")
        if entry.dtype not in DTYPES:
            problems["wrong dtype"].append(f"{entry.name} is {entry.dtype}, not one of {', '.join(DTYPES)}")
    known = {known for name in shapes for known in names_of(name)}
    problems["extra"] = [name for name in entries if name not in known and not is_left_out(name)]
    raise_problems(checkpoint, problems)
    return dict(sorted(selected.items(), key=lambda item: (item[1].file, item[1].start)))


def select_published(entries: dict, config, checkpoint: str) -> dict:
    """[`select`] among the entries of a checkpoint in Microsoft's layout."""
    shapes = model_shapes(config)
    return select(entries, shapes, checkpoint, published_names, lambda name: is_behind_features(name, config))


def raise_problems(checkpoint: str, problems: dict[str, list[str]]) -> None:
    """Raises ValueError with all that is wrong with a checkpoint's weights, by kind."""
    lines = [f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError("\n".join([f"The weights of {checkpoint} are not as they should be.", *lines]))
