"""LoRA and DoRA adapters over a published checkpoint, merged weight by weight as peft merges them."""

import re
from collections import defaultdict

import torch
from torch import nn

from phi3_tools.checkpoint import layout
from phi3_tools.checkpoint.layout import ADAPTER, ADAPTER_WEIGHTS, DTYPES, LANGUAGE_MODEL
from phi3_tools.checkpoint.source import Entry, Source, read_header

# The settings that decide what an adapter changes, and those that do not matter once it is trained.
NUMBERS, PATTERNS = ("r", "lora_alpha"), ("rank_pattern", "alpha_pattern")
SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora")
IGNORED = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("bias", "init_lora_weights", "eva_config", "megatron_config", "megatron_core", "runtime_config"),
)
# These begin from another base than the one that is given, and the adapter alone does not say how it was changed.
CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Names of layers, and plain patterns of them: at most two repetitions, which cannot take for ever to match.
LAYER_PATTERN = re.compile(r"[\w.\\^$|-]{0,200}([*+][\w.\\^$|-]{0,200}){0,2}")


class Adapter:
    """
    An adapter of a source, read and checked.

    Attributes:
        base, base_revision: what it was trained on, as it says itself.
        parts: its tensors by the published name of the weight that they change.

    Raises:
        ValueError: it is of a kind that is not merged here, or cannot be read.
    """

    def __init__(self, source: Source):
        about = source.json(ADAPTER)
        self.source = source
        self.base, self.base_revision = about.get("base_model_name_or_path"), about.get("revision")
        self.settings = _settings(source.name, about)
        if ADAPTER_WEIGHTS not in source.files:
            raise ValueError(f"{source.name} has no {ADAPTER_WEIGHTS} (pickles are not read).")
        if others := [file for file in source.files if file.startswith("non_lora")]:
            raise ValueError(
                f"{source.name} has {', '.join(others)}, weights that were trained beside the adapter. Merge them by "
                "the training's own script, and give the merged folder."
            )
        self.parts: dict[str, dict[str, Entry]] = defaultdict(dict)
        for key, entry in read_header(source, ADAPTER_WEIGHTS).items():
            if entry.dtype not in DTYPES:
                wrong = f"{key} is {entry.dtype}, not one of {', '.join(DTYPES)}"
                layout.raise_problems(source.name, {"wrong dtype": [wrong]})
            name = key.removeprefix("base_model.model.")
            module, lora, _ = name.partition(".lora_")
            self.parts[f"{module}.weight" if lora else name.replace(".base_layer.", ".")][key] = entry

    def select(self, selected: dict[str, Entry], config) -> None:
        """Leaves in `parts` what concerns the selected weights, and says how much else there is."""
        names = {entry.name: layout.published_names(ours) for ours, entry in selected.items()}
        # An adapter may call the word embeddings by either name, whichever the base has.
        own = {name: next((other for other in others if other in self.parts), None) for name, others in names.items()}
        left_out = self.parts.keys() - own.values()
        language = {name for name in left_out if name.startswith(LANGUAGE_MODEL)}
        behind = {name for name in left_out if layout.is_behind_features(name, config)}
        layout.raise_problems(self.source.name, {"extra": sorted(left_out - language - behind)})
        counts = [sum(len(self.parts[name]) for name in names) for names in (language, behind)]
        self.parts = {name: self.parts[other] for name, other in own.items() if other}
        print(
            f"The adapter changes {len(self.parts)} of the model's weights. Left out are {counts[0]} of its tensors "
            f"on the language model, and {counts[1]} on parts of the tower that do not reach the output."
        )

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A published weight with the adapter's change."""
        from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils.other import get_pattern_key

        tensors, path = {}, ""
        for key, entry in self.parts.get(name, {}).items():
            tensor = self.source.tensor(entry)
            before, lora, after = key.removeprefix("base_model.model.").partition(".lora_")
            if lora:
                path, tensors[f"base_model.model.layer.lora_{after}"] = before, tensor
            elif tensor.shape == weight.shape:  # a weight that was trained whole
                weight = tensor
            else:
                wrong = f"{key} is {tuple(tensor.shape)}, not {tuple(weight.shape)}"
                layout.raise_problems(self.source.name, {"wrong shape": [wrong]})
        if not tensors:
            return weight
        settings = {key: self.settings[key] for key in (*NUMBERS, *SWITCHES) if key in self.settings}
        for number, pattern in zip(NUMBERS, PATTERNS):
            numbers = self.settings.get(pattern, {})
            if (key := get_pattern_key(numbers, path)) in numbers:
                settings[number] = numbers[key]
        try:
            layer = nn.ModuleDict({"layer": _layer(path, weight)})
            model = PeftModel(layer, LoraConfig(target_modules=["layer"], **settings))
            expected = get_peft_model_state_dict(model)
            if expected.keys() != tensors.keys():
                has, expects = (
                    ", ".join(key.rpartition(".layer.")[2] for key in part) for part in (tensors, expected)
                )
                raise ValueError(f"it has {has} where peft expects {expects}")
            set_peft_model_state_dict(model, tensors)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.source.name} does not fit {name}: {error}") from error
        return model.merge_and_unload()["layer"].weight.detach()


def _layer(path, weight):
    """The layer that a weight is of."""
    if weight.ndim == 4:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")
    elif path.endswith(("wte", "embed_tokens", "position_embedding")):
        layer = nn.Embedding(*weight.shape, device="meta")
    else:
        layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _settings(name, about):
    """The settings of an adapter_config.json that decide what is merged, checked."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("Merging an adapter takes peft: `pip install peft`.") from error
    default = LoraConfig()
    known = (*NUMBERS, *SWITCHES, *PATTERNS, *IGNORED)
    unknown = [key for key in about if about[key] and key not in known and about[key] != getattr(default, key, None)]
    if str(about.get("init_lora_weights")).lower().startswith(CHANGED_BASES):
        unknown.append("init_lora_weights")
    if about.get("peft_type") != "LORA" or unknown:
        named = ", ".join(f"`{key}` {about[key]!r}"[:100] for key in unknown)
        kind = f"LoRA with {named}" if about.get("peft_type") == "LORA" else about.get("peft_type")
        raise ValueError(
            f"{name} is an adapter of type {kind}; LoRA and DoRA are merged here. Merge it by peft's "
            "`merge_and_unload` and `save_pretrained`, and give that folder."
        )
    settings = {key: about[key] for key in (*NUMBERS, *SWITCHES, *PATTERNS) if about.get(key) is not None}
    for key, value in settings.items():
        if key in SWITCHES:
            right, accepted = isinstance(value, bool), "true or false"
        elif key in NUMBERS:
            right, accepted = _is_number(value), "a positive number"
        else:
            right = isinstance(value, dict) and all(LAYER_PATTERN.fullmatch(path) for path in value)
            right, accepted = right and all(map(_is_number, value.values())), "positive numbers by names of layers"
        if not right:
            raise ValueError(f"{name}: {ADAPTER}: `{key}` is {str(value)[:200]!r}, but must be {accepted}.")
    return settings


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= layout.MAX_NUMBER
