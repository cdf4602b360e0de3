"""Phi-3-vision: configuration."""

import inspect
import json
import math
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

# The HD transform merges every 2 x 2 neighbouring patches into one token.
MERGE_SIZE = 2

# The language model of Phi-3-vision and Phi-3.5-vision is transformers' own.
TEXT_MODEL_TYPE = "phi3"

# The one vector of an image, see `Phi3EmbedConfig`.
POOLING_MODES = ("mean", "global", "tower")

# openai/clip-vit-large-patch14-336, the tower of Phi-3-vision and Phi-3.5-vision.
CLIP_VIT_LARGE_PATCH14_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}

# What Microsoft's config.json has that the image embedding and the language model need. All else there (`auto_map`,
# `model_type`, `_attn_implementation`) must not leak in.
MICROSOFT_KEYS = (
    "hidden_size",
    "n_embd",
    "vocab_size",
    "embd_pdrop",
    "embed_pdrop",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "img_processor",
    "embd_layer",
    "vision_config",
)
MICROSOFT_TEXT_KEYS = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "resid_pdrop",
    "attention_dropout",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
MICROSOFT_TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_VIT_LARGE_PATCH14_336}

# What sentence-transformers reads beside a checkpoint: images only, each by its pooled vector, normalised. Without
# these files it would take the mean over separators and padding too, and texts, of which there is no one vector.
SENTENCE_TRANSFORMERS_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.sentence_transformer.modules.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Normalize",
            "type": "sentence_transformers.sentence_transformer.modules.Normalize",
        },
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": {"method": "forward", "method_output_name": "pooler_output"}},
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": "cosine",
        "requirements": {
            "transformers": {
                "specifier": ">=5.18",
                "reason": "Earlier releases want huggingface_hub below 2, and some of them torchvision.",
            }
        },
    },
}


def hd_num_tokens(rows, cols, tokens_per_side):
    """
    Tokens of an image whose crops form a grid of `rows` x `cols` (ints or tensors; 0 x 0 is the global view alone).

    Every crop and the global view give `tokens_per_side ** 2` tokens, every line of tokens ends in a `sub_GN`, and one
    `glb_GN` parts the crops from the global view.
    """
    return (rows * cols + 1) * tokens_per_side**2 + 1 + (rows + 1) * tokens_per_side


def _require(condition, name, value, accepted):
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {accepted}.")


def _is_int(value, low):
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _square(name, value):
    """`value` as one int; vision configs write a side as an int or as a pair."""
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 2
    _require(
        len(sides) == 2 and sides[0] == sides[1] and _is_int(sides[0], 1), name, value, "a positive int (square only)"
    )
    return sides[0]


def _one_of_two_names(name, value, other_name, other):
    if value is not None and other is not None and value != other:
        raise ValueError(
            f"`{other_name}` is another name of `{name}`, but they are {other!r} and {value!r}. Give one."
        )
    return other if value is None else value


def _from_microsoft(img_processor, embd_layer, vision_config):
    """
    Microsoft's `img_processor` and `embd_layer` -> our arguments, with the defaults of Microsoft's code. Microsoft's
    config names the tower; a `vision_config` beside describes one that has no name there.
    """
    for name, value in (("img_processor", img_processor), ("embd_layer", embd_layer)):
        _require(isinstance(value, dict), name, value, "a dict")
    _require(isinstance(vision_config, (dict, type(None))), "vision_config", vision_config, "a dict")
    tower = img_processor.get("model_name", next(iter(MICROSOFT_TOWERS)))
    if vision_config is None:
        _require(
            img_processor.get("name", "clip_vision_model") == "clip_vision_model",
            "img_processor['name']",
            img_processor.get("name"),
            "'clip_vision_model'; describe any other tower by `vision_config`",
        )
        _require(
            tower in MICROSOFT_TOWERS,
            "img_processor['model_name']",
            tower,
            f"one of {sorted(MICROSOFT_TOWERS)}; describe any other tower by `vision_config`",
        )
        vision_config = MICROSOFT_TOWERS[tower]
    image_dim_out = img_processor.get("image_dim_out")
    width = vision_config.get("hidden_size", image_dim_out)
    _require(
        image_dim_out in (None, width), "img_processor['image_dim_out']", image_dim_out, f"{width}, the tower's width"
    )
    embedding_cls = embd_layer.get("embedding_cls", "image")
    _require(embedding_cls == "image", "embd_layer['embedding_cls']", embedding_cls, "'image'")
    use_hd_transform = embd_layer.get("use_hd_transform", False)
    return {
        "vision_config": dict(vision_config),
        "layer_idx": img_processor.get("layer_idx", -2),
        "type_feature": img_processor.get("type_feature", "patch"),
        "num_img_tokens": img_processor.get("num_img_tokens"),
        "use_hd_transform": use_hd_transform,
        "with_learnable_separator": embd_layer.get("with_learnable_separator", use_hd_transform),
        "hd_transform_order": embd_layer.get("hd_transform_order", "glb_sub"),
        "projection_cls": embd_layer.get("projection_cls", "linear"),
    }


def _native_text_settings(settings: dict) -> dict:
    """Settings of a Phi-3 language model, in Microsoft's words or in transformers', -> transformers'."""
    settings = dict(settings)
    longest = settings.get("max_position_embeddings", 4096)
    original = settings.get("original_max_position_embeddings", longest)
    # A window as long as the longest text cuts nothing, but every cache would be one of windows.
    if (settings.get("sliding_window") or 0) >= longest:
        settings["sliding_window"] = None
    scaling = settings.pop("rope_scaling", None) or {}
    kind = scaling.get("type") or scaling.get("rope_type")
    if kind in ("su", "yarn", "longrope"):
        rope = {"rope_type": "longrope", "rope_theta": settings.pop("rope_theta", 10000.0)}
        rope["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings", original)
        rope |= {name: list(scaling[name]) for name in ("short_factor", "long_factor") if name in scaling}
        # "yarn" is Microsoft's name for the same factors with another scale of attention.
        if kind == "yarn" and longest > original:
            rope["attention_factor"] = 0.1 * math.log(longest / original) + 1
        settings["rope_parameters"] = rope
    elif scaling:
        settings["rope_scaling"] = scaling
    return settings


def _arguments(config_class):
    return list(inspect.signature(config_class.__init__).parameters)[1:-1]  # without self and kwargs


def _changed(config_dict, changes):
    """A saved config with arguments of `from_pretrained`; what follows from those is derived anew."""
    stale = set()
    for names in ({"hidden_size", "n_embd"}, {"embd_pdrop", "embed_pdrop"}):
        stale |= names if names & changes.keys() else set()
    if {"vision_config", "use_hd_transform", "type_feature"} & changes.keys():
        stale |= {"num_img_tokens", "with_learnable_separator"}
    if changes.get("text_config") is not None:
        stale |= {"hidden_size", "n_embd", "vocab_size", "tie_word_embeddings"}
    kept = {name: value for name, value in config_dict.items() if name not in stale}
    # As everywhere, a dict changes single settings of a sub-config of the same kind.
    for name in ("vision_config", "text_config"):
        saved, given = kept.get(name), changes.get(name)
        if isinstance(saved, dict) and isinstance(given, dict):
            is_same_kind = given.get("model_type") in (None, saved.get("model_type"))
            changes = changes | {name: saved | given if is_same_kind else given}
    return kept | changes


class Phi3EmbedConfig(PreTrainedConfig):
    r"""
    Configuration of a [`Phi3EmbedModel`], or with `text_config` of a [`Phi3VisionModel`]. The defaults are the
    geometry of Phi-3-vision's image embedding.

    `from_pretrained` and `from_dict` also read Microsoft's `config.json` as it stands (`img_processor`, `embd_layer`);
    with `text_config=None` they take of it the image embedding alone.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            The vision tower: any vision transformer that `AutoModel` builds. Defaults to CLIP ViT-L/14-336.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The language model, a `Phi3Config`. `None`: the image embedding alone. Microsoft's words for its rotary
            factors (`rope_scaling` of type `"su"` or `"yarn"`) are read too.
        hidden_size (`int`, *optional*, defaults to 3072):
            Width of the token space. Also called `n_embd`. Follows from `text_config`.
        vocab_size (`int`, *optional*, defaults to 32064):
            Rows of the word embedding table. Follows from `text_config`.
        image_token_id (`int`, *optional*, defaults to 32044):
            The id that stands for one image token in `input_ids`. `None`: only Microsoft's negative ids do.
        layer_idx (`int`, *optional*, defaults to -2):
            Which of the tower's `num_hidden_layers + 1` hidden states are the features; no later layer is built.
        type_feature (`str`, *optional*, defaults to `"patch"`):
            `"patch"`, or `"cls_patch"` to keep the class token (without the HD transform only).
        use_hd_transform (`bool`, *optional*, defaults to `True`):
            Whether an image is a grid of crops and a global view, or one view alone.
        hd_transform_order (`str`, *optional*, defaults to `"sub_glb"`):
            `"sub_glb"`: the crops' tokens before those of the global view; `"glb_sub"`: after them.
        projection_cls (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"` (two layers with a GELU between) or `"linear"`.
        num_img_tokens (`int`, *optional*):
            Tokens of a view, separators not counted; derived from the tower. Without the HD transform another number
            may be given, for features that come precomputed.
        embd_pdrop (`float`, *optional*, defaults to 0.0):
            Dropout on the merged embeddings. Also called `embed_pdrop`.
        pooling_mode (`str`, *optional*, defaults to `"mean"`):
            The one vector of an image: the mean over the tokens of all its crops and its global view (`"mean"`), over
            the tokens of its global view alone (`"global"`), or over the tower's patch features of its global view,
            before the projection (`"tower"`). Separators and padding do not count. Also an argument of each call.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of a fresh model's projection and word embeddings.
        untrained (`bool`, *optional*, defaults to `False`):
            Whether the projection has never been trained, so that image tokens say nothing yet. Loading tells it.

    Raises:
        ValueError: a value is wrong, or two contradict each other.

    Example:

    ```python
    >>> config = AutoConfig.from_pretrained(".", trust_remote_code=True)
    >>> config.crop_size, config.patches_per_side, config.num_img_tokens
    (336, 24, 144)
    ```"""

    model_type = "phi3_embed"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_outputs"]
    attribute_map = {"n_embd": "hidden_size", "embed_pdrop": "embd_pdrop"}

    # A plain `__init__` rather than strict dataclass fields: those raise their own error type, not ValueError.
    def __init__(
        self,
        vision_config=None,
        hidden_size=None,
        vocab_size=None,
        image_token_id=32044,
        layer_idx=-2,
        type_feature="patch",
        use_hd_transform=True,
        hd_transform_order="sub_glb",
        projection_cls="mlp",
        num_img_tokens=None,
        embd_pdrop=None,
        pooling_mode="mean",
        initializer_range=0.02,
        n_embd=None,
        embed_pdrop=None,
        with_learnable_separator=None,
        text_config=None,
        untrained=False,
        **kwargs,
    ):
        if microsoft := sorted({"img_processor", "embd_layer"} & kwargs.keys()):
            raise ValueError(f"Microsoft's {microsoft} are read by `Phi3EmbedConfig.from_dict`, not here.")
        hidden_size = _one_of_two_names("hidden_size", hidden_size, "n_embd", n_embd)
        embd_pdrop = _one_of_two_names("embd_pdrop", embd_pdrop, "embed_pdrop", embed_pdrop)
        self.vision_config = self._build_vision_config(vision_config)
        self.text_config = self._build_text_config(text_config)
        self.hidden_size = self._of_text_config("hidden_size", hidden_size, 3072)
        self.vocab_size = self._of_text_config("vocab_size", vocab_size, 32064)
        if self.text_config is not None:
            tied = self._of_text_config("tie_word_embeddings", kwargs.pop("tie_word_embeddings", None), False)
            kwargs["tie_word_embeddings"] = tied
        self.image_token_id = image_token_id
        self.layer_idx = layer_idx
        self.type_feature = type_feature
        self.use_hd_transform = use_hd_transform
        self.hd_transform_order = hd_transform_order
        self.projection_cls = projection_cls
        self.embd_pdrop = 0.0 if embd_pdrop is None else embd_pdrop
        self.pooling_mode = pooling_mode
        self.initializer_range = initializer_range
        self.untrained = untrained
        self._check_values()

        separator = use_hd_transform if with_learnable_separator is None else with_learnable_separator
        _require(
            separator == use_hd_transform,
            "with_learnable_separator",
            separator,
            f"{use_hd_transform}, the value of `use_hd_transform`: the separators belong to the HD transform",
        )
        self.num_img_tokens = self._tokens_per_crop() if num_img_tokens is None else num_img_tokens
        if use_hd_transform:
            accepted = f"{self._tokens_per_crop()}, which the tower gives for a crop"
            _require(self.num_img_tokens == self._tokens_per_crop(), "num_img_tokens", num_img_tokens, accepted)
        else:
            _require(_is_int(self.num_img_tokens, 1), "num_img_tokens", num_img_tokens, "a positive int")
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if "img_processor" in config_dict or "embd_layer" in config_dict:
            mixed = sorted({*_arguments(cls)} - {*MICROSOFT_KEYS} & {*config_dict})
            _require(not mixed, "config", mixed, "said in Microsoft's way alone, by `img_processor` and `embd_layer`")
            text_config = {key: config_dict[key] for key in MICROSOFT_TEXT_KEYS if key in config_dict}
            taken = {key: config_dict[key] for key in MICROSOFT_KEYS if key in config_dict}
            img_processor, embd_layer = (taken.pop(key, None) or {} for key in ("img_processor", "embd_layer"))
            config_dict = taken | _from_microsoft(img_processor, embd_layer, taken.pop("vision_config", None))
            if "num_hidden_layers" in text_config:
                config_dict["text_config"] = text_config
        # The base class would set these behind the checks of `__init__`.
        changes = {name: kwargs.pop(name) for name in _arguments(cls) if name in kwargs}
        return super().from_dict(_changed(config_dict, changes), **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As [`PreTrainedConfig.save_pretrained`], and the files of sentence-transformers where there are none yet."""
        super().save_pretrained(save_directory, **kwargs)
        for name, content in SENTENCE_TRANSFORMERS_FILES.items():
            path = Path(save_directory) / name
            if not path.exists():
                path.write_text(json.dumps(content, indent=2) + "\n")

    @staticmethod
    def _build_vision_config(vision_config):
        if vision_config is None:
            vision_config = CLIP_VIT_LARGE_PATCH14_336
        if isinstance(vision_config, dict):
            model_type = vision_config.get("model_type", CLIP_VIT_LARGE_PATCH14_336["model_type"])
            _require(
                model_type in CONFIG_MAPPING,
                "vision_config['model_type']",
                model_type,
                "a model type that transformers knows, such as 'clip_vision_model', 'siglip_vision_model' or 'dinov2'",
            )
            try:
                vision_config = CONFIG_MAPPING[model_type](**vision_config)
            except Exception as error:  # of many kinds, by tower
                raise ValueError(f"`vision_config` is no config of a {model_type!r}: {error}") from error
        _require(
            isinstance(vision_config, PreTrainedConfig), "vision_config", vision_config, "a dict or a PreTrainedConfig"
        )
        for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers"):
            if not hasattr(vision_config, name):
                raise ValueError(
                    f"`vision_config` of type {vision_config.model_type!r} has no `{name}`, but must be that of a "
                    "vision transformer alone, such as 'clip_vision_model', 'siglip_vision_model' or 'dinov2'."
                )
        # `mask_ratio`: it hides patches at random, or at 0 shuffles them.
        for name in ("depths", "num_frames", "mask_ratio"):
            if hasattr(vision_config, name):
                raise ValueError(
                    f"`vision_config` of type {vision_config.model_type!r} has `{name}`, but must be that of a plain "
                    "vision transformer, whose layers all have the same patches of one picture."
                )
        return vision_config

    @staticmethod
    def _build_text_config(text_config):
        if isinstance(text_config, dict):
            model_type = text_config.get("model_type", TEXT_MODEL_TYPE)
            _require(model_type == TEXT_MODEL_TYPE, "text_config['model_type']", model_type, repr(TEXT_MODEL_TYPE))
            try:
                text_config = CONFIG_MAPPING[TEXT_MODEL_TYPE](**_native_text_settings(text_config))
            except Exception as error:  # strict fields and the checks of rotary factors have types of their own
                raise ValueError(f"`text_config` is no config of a {TEXT_MODEL_TYPE!r}: {error}") from error
        if text_config is not None:
            _require(
                isinstance(text_config, PreTrainedConfig) and text_config.model_type == TEXT_MODEL_TYPE,
                "text_config",
                text_config,
                f"a dict, or a PreTrainedConfig of type {TEXT_MODEL_TYPE!r}",
            )
        return text_config

    def _of_text_config(self, name, value, default):
        if self.text_config is None:
            return default if value is None else value
        of_text = getattr(self.text_config, name)
        _require(value in (None, of_text), name, value, f"{of_text!r}, the one of `text_config`")
        return of_text

    def _check_values(self):
        for name in ("hidden_size", "vocab_size"):
            _require(_is_int(getattr(self, name), 1), name, getattr(self, name), "a positive int")
        for name, accepted in (
            ("type_feature", ("patch", "cls_patch")),
            ("hd_transform_order", ("sub_glb", "glb_sub")),
            ("projection_cls", ("mlp", "linear")),
            ("pooling_mode", POOLING_MODES),
            ("use_hd_transform", (True, False)),
            ("untrained", (True, False)),
        ):
            _require(getattr(self, name) in accepted, name, getattr(self, name), f"one of {accepted}")
        _require(
            isinstance(self.embd_pdrop, (int, float)) and 0 <= self.embd_pdrop < 1,
            "embd_pdrop",
            self.embd_pdrop,
            "a probability in [0, 1)",
        )
        _require(
            isinstance(self.initializer_range, (int, float)) and self.initializer_range >= 0,
            "initializer_range",
            self.initializer_range,
            "a standard deviation of 0 or more",
        )
        _require(
            self.image_token_id is None or (_is_int(self.image_token_id, 0) and self.image_token_id < self.vocab_size),
            "image_token_id",
            self.image_token_id,
            f"an id below `vocab_size` ({self.vocab_size}), or None for negative ids only",
        )
        layers = self.vision_config.num_hidden_layers
        _require(
            _is_int(self.layer_idx, -layers - 1) and self.layer_idx <= layers,
            "layer_idx",
            self.layer_idx,
            f"an int from {-layers - 1} to {layers}, because the tower has {layers} layers",
        )
        patch_size = _square("vision_config.patch_size", self.vision_config.patch_size)
        _require(
            self.crop_size % patch_size == 0,
            "vision_config.image_size",
            self.crop_size,
            f"a multiple of its `patch_size` ({patch_size})",
        )
        if self.use_hd_transform:
            _require(
                self.patches_per_side % MERGE_SIZE == 0,
                "vision_config.image_size",
                self.crop_size,
                f"a multiple of {MERGE_SIZE * patch_size} when `use_hd_transform` is True, which merges "
                f"{MERGE_SIZE} x {MERGE_SIZE} patches of {patch_size} pixels",
            )
            _require(
                self.type_feature == "patch",
                "type_feature",
                self.type_feature,
                "'patch' when `use_hd_transform` is True: a class token has no place among merged patches",
            )

    def _tokens_per_crop(self):
        if self.use_hd_transform:
            return self.tokens_per_side**2
        return self.patches_per_side**2 + (self.type_feature == "cls_patch")

    @property
    def crop_size(self) -> int:
        """Height and width of a crop in pixels."""
        return _square("vision_config.image_size", self.vision_config.image_size)

    @property
    def patches_per_side(self) -> int:
        return self.crop_size // _square("vision_config.patch_size", self.vision_config.patch_size)

    @property
    def tokens_per_side(self) -> int:
        """Lines, and tokens in a line, that a crop gives under the HD transform."""
        return self.patches_per_side // MERGE_SIZE

    @property
    def embed_dim(self) -> int:
        """Width of an image's vector, by `pooling_mode`."""
        return self.vision_config.hidden_size if self.pooling_mode == "tower" else self.hidden_size

    @property
    def num_feature_layers(self) -> int:
        """Layers of the tower that the features pass through."""
        return self.layer_idx % (self.vision_config.num_hidden_layers + 1)


# modeling_phi3_embed.py gives the class its own module's name, and says why.
Phi3EmbedConfig.register_for_auto_class()

__all__ = ["Phi3EmbedConfig"]
