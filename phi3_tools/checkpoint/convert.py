"""
Microsoft's layout -> a complete phi3-embed folder.

A conversion goes on in `OUTPUT.partial`: `source/` and `base/` take what is fetched, `output/` takes the result and is
renamed to OUTPUT when it is complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from filelock import Timeout
from huggingface_hub import ModelCardData, split_torch_state_dict_into_shards
from huggingface_hub.utils import WeakFileLock
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from phi3_tools import ROOT, results
from phi3_tools.checkpoint import layout, recipes
from phi3_tools.checkpoint import source as sources
from phi3_tools.checkpoint.adapter import Adapter
from phi3_tools.checkpoint.layout import ADAPTER, DTYPES, INDEX, PICKLE, PICKLE_INDEX, PREPROCESSOR, WEIGHTS
from phi3_tools.checkpoint.source import Entry, Source, library_errors

MAX_SHARD_SIZE = "5GB"
CHUNK = 2**22
WORK = {"lock", "source", "base", "weights", "output", "offload"}  # what the command makes in `OUTPUT.partial`


def convert(
    source_name: str,
    output: Path,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    base: str | None = None,
    name: str | None = None,
    command: str = "phi3_tools.checkpoint.convert.convert",
    whole: bool = False,
    recipe: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """
    Microsoft's layout -> a complete phi3-embed folder.

    Args:
        source_name: a Hub id or a folder; also of a LoRA adapter.
        output: a folder that does not exist yet.
        dtype: of the weights; the source's own by default.
        revision: of a Hub id.
        base: in place of the base that an adapter names.
        name, command: what the model card calls the model and says how it was made.
        whole: with the language model, not the image embedding alone.
        recipe: how the whole embeds, by a name or the path of a JSON file; by default that of a known Hub id.
        allow_pickle: read weights of a `.bin` file where there are no others.

    Raises:
        ValueError: with what is wrong and how to mend it.
    """
    way = _choose_recipe(recipe, source_name, whole)
    with work_folder(output) as partial:
        source, adapter = sources.open_source(source_name, revision, partial / "source"), None
        if ADAPTER in source.files and {WEIGHTS, INDEX, PICKLE, PICKLE_INDEX} & source.files and base is None:
            raise ValueError(
                f"{source_name} has weights, and an adapter beside them. Move {ADAPTER} away to convert the weights "
                f"as they are, or give `--base {source_name}` to merge the adapter into them."
            )
        if ADAPTER in source.files:
            adapter = Adapter(source)
            source = _open_base(adapter, base, partial / "base")
        elif base is not None:
            raise ValueError(f"`--base` is the base of an adapter, but {source_name} has no {ADAPTER}.")
        origin, config = source, read_config(source, whole)
        if whole and way is None:
            print(
                f"No recipe is known for {source_name}, so nothing is written for sentence-transformers. If it was "
                f"trained to embed, give the way by `--recipe`: one of {', '.join(recipes.names())}, or a JSON file."
            )
        crops = _write_processor(source, config, way, partial / "output")
        with sources.hub_errors(source.name):
            source, selected = _select(source, config, adapter, allow_pickle)
        made_of = _made_of(origin, adapter, dtype, whole)
        written = _write_weights(source, selected, dtype, adapter, partial / "weights" / made_of, partial / "output")
        _write_config(config, written, way, partial / "output")
        _write_card(origin, adapter, selected, config, crops, command, name or output.name, way, partial / "output")
        numbers = _compute_once(partial / "output", partial / "offload")
        finish(partial, output)
    print(f"{output} is complete. Its embedding of a fixed image begins {', '.join(f'{x:.4f}' for x in numbers)}.")


def _choose_recipe(name, source_name, whole):
    """The recipe that was asked for, or that of a known checkpoint; None where there is neither."""
    known = recipes.known_for(source_name)
    if name is None:
        return known if whole else None
    if not whole:
        raise ValueError("`--recipe` says how the language model embeds, so it goes with `--whole`.")
    recipe = recipes.load(name)
    if known and known.name != recipe.name:
        print(f"Warning: {source_name} was trained by the recipe {known.name}, but is converted by {recipe.name}.")
    return recipe


def _select(source, config, adapter, allow_pickle):
    """The weights of our model, and where they lie now: what is on the Hub is fetched."""
    whole = config.text_config is not None
    begins = ("",) if whole else layout.IMAGE_EMBEDDING
    files = source.weight_files(begins, allow_pickle)
    is_pickled = not files[0].endswith(".safetensors")
    if is_pickled and source.commit is not None:
        source = sources.fetch_files(source, files)
    entries = sources.read_entries(source, begins, allow_pickle)
    selected = layout.select_published(entries, config, source.name)
    _check_words(source, entries, whole)
    if adapter:
        adapter.select(selected, config)
    if source.commit is None:
        return source, selected
    source = sources.fetch(source, selected, sum(map(source.size, source.weight_files())))
    return source, layout.select_published(sources.read_entries(source), config, source.name)


def _check_words(source, entries, whole):
    """Raises where a whole model would have to choose between two tables of words."""
    tables = [entries[name] for name in layout.published_names(f"{layout.WORDS}weight") if name in entries]
    if whole and len(tables) == 2 and _digest(source, tables[0]) != _digest(source, tables[1]):
        raise ValueError(
            f"{source.name} has two different tables of word embeddings, {tables[0].name} and {tables[1].name}, which "
            "are one module in the model. Remove the one that was not trained."
        )


def _digest(source, entry):
    digest = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
    if entry.tensor is not None:
        digest.update(entry.tensor.contiguous().view(torch.uint8).numpy())
    for chunk in source.read(entry.file, entry.start, entry.stop):
        digest.update(chunk)
    return digest.digest()


def _made_of(source, adapter, dtype, whole):
    """A name for what weights are made of: what was written of the same goes on to be used."""
    parts = [str(dtype), whole]
    for part in (source, adapter and adapter.source):
        if part:
            files = {name: (part.folder / name).stat() for name in part.files} if part.commit is None else {}
            stats = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items())
            parts += [part.name, part.commit, stats]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """`OUTPUT.partial`, for one process at a time; what becomes OUTPUT begins empty in it."""
    if os.path.lexists(output):
        raise ValueError(f"{output} exists already. Give another folder, or move it away.")
    if output.name == "..":
        raise ValueError(f"{output} does not end in a name. Give a folder to make.")
    partial = output.with_name(f"{output.name}.partial")
    results.check_writable(output.absolute().parent)
    partial.mkdir(exist_ok=True)
    held = {path.name for path in partial.iterdir()}
    if held and not {"lock"} <= held <= WORK:  # what is deleted here is the command's own
        raise ValueError(
            f"{partial}, where the work would go on, holds {', '.join(sorted(held - WORK) or sorted(held))}, not made "
            "by this command. Move it away."
        )
    try:
        with WeakFileLock(partial / "lock", timeout=1):
            shutil.rmtree(partial / "output", ignore_errors=True)
            (partial / "output").mkdir()
            try:
                yield partial
            except BaseException:
                kept = [f"{place}/{file}" for place in ("source", "base") for file in (WEIGHTS, PICKLE)]
                is_begun = any(any(partial.glob(pattern)) for pattern in (*kept, "weights/*/*.safetensors"))
                shutil.rmtree(partial / "output" if is_begun else partial)
                raise
    except Timeout as error:
        raise ValueError(f"Another process is at work in {partial}.") from error


def finish(partial: Path, output: Path) -> None:
    (partial / "output").rename(output)
    shutil.rmtree(partial)


def _open_base(adapter, base, folder):
    """The base that was given, a folder or a Hub id, or else the one on the Hub that the adapter names."""
    if base is None:
        if adapter.base is None:
            raise ValueError(f"{adapter.source.name} does not name its base. Give it by `--base`.")
        named = f"{adapter.base}@{adapter.base_revision or 'main'}"
        if not re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}@\w[\w./-]{0,200}", named):
            raise ValueError(
                f"{adapter.source.name} names {str(adapter.base)[:200]!r} as its base, which is no Hub id. Give the "
                "base by `--base`, if you trust it."
            )
        print(f"The base is {adapter.base}, as {adapter.source.name} names it.")
    try:
        if base:
            return sources.open_source(base, None, folder)
        return sources.open_source(adapter.base, adapter.base_revision, folder, is_on_hub=True)
    except ValueError as error:
        raise ValueError(f"{error} (It is the base of {adapter.source.name}; `--base` gives another.)") from error


def read_config(source: Source, whole: bool = False):
    """The source's own config -> ours, with the language model if it is `whole`."""
    about = source.json("config.json")
    if about.get("model_type") == "phi3_embed":
        raise ValueError(f"{source.name} is a phi3-embed model already; AutoModel loads it as it is.")
    if "img_processor" not in about:
        raise ValueError(
            f"{source.name} is not in Phi-3-vision's layout: its config.json is of type {about.get('model_type')!r} "
            "and has no `img_processor`. Give Phi-3-vision, Phi-3.5-vision or a fine-tune of them; other towers "
            "are put before a language model by `phi3-embed assemble`."
        )
    with library_errors(f"{source.name}: config.json"):
        config = layout.parse_config(about, whole)
    if whole and config.text_config is None:
        raise ValueError(f"{source.name}: config.json describes no language model, so there is no whole to convert.")
    if not config.use_hd_transform:
        raise ValueError(f"{source.name} works without the HD transform, for which there is no image processor.")
    return config


# Weights


def write_tensor(file, tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Writes a tensor's bytes in this dtype, and says whether all its values are finite there."""
    is_finite = True
    for part in tensor.flatten().split(CHUNK):
        part = part.to(dtype)
        is_finite &= bool(torch.stack(part.aminmax()).isfinite().all())  # NaN comes through; ten times as fast as all
        file.write(part.view(torch.uint8).numpy())
    return is_finite


def _write_weights(source, selected: dict[str, Entry], dtype, adapter, work, output):
    """
    The selected weights under our names -> safetensors, one tensor in memory at a time -> the config's dtype.

    Shards are whole or not there in `work`, where they stay until all are written: what was killed goes on.
    """
    dtypes = {name: dtype or DTYPES[entry.dtype] for name, entry in selected.items()}
    # safetensors' own order, in which each tensor is aligned.
    order = sorted(selected, key=lambda name: (-dtypes[name].itemsize, name))
    shapes = {name: torch.empty(selected[name].shape, dtype=dtypes[name], device="meta") for name in order}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD_SIZE)
    for other in work.parent.glob("*"):
        if other != work:
            shutil.rmtree(other)
    work.mkdir(parents=True, exist_ok=True)
    not_finite = []
    total = sum(tensor.nbytes for tensor in shapes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing") as bar:
        for shard, names in split.filename_to_tensors.items():
            if (work / shard).exists():
                bar.update(sum(shapes[name].nbytes for name in names))
                continue
            bad = _write_shard(work / f"{shard}.part", names, source, selected, dtypes, adapter, bar)
            not_finite += bad
            if not bad:
                (work / f"{shard}.part").rename(work / shard)
    as_what = f" as {str(dtype).removeprefix('torch.')}" if dtype else ""
    layout.raise_problems(source.name, {f"NaN or infinite{as_what}": not_finite})
    for shard in split.filename_to_tensors:
        (work / shard).rename(output / shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return reduce(torch.promote_types, dtypes.values())


def _write_shard(path, names, source, selected, dtypes, adapter, bar):
    """Writes one file -> the published names of the weights in it that are not finite."""
    not_finite = []
    with open(path, "wb") as file:
        header = {name: (layout.DTYPE_NAMES[dtypes[name]], selected[name].shape) for name in names}
        file.write(sources.safetensors_header(header))
        for name in names:
            tensor = source.tensor(selected[name])
            if adapter:
                tensor = adapter.merge(selected[name].name, tensor)
            if not write_tensor(file, tensor, dtypes[name]):
                not_finite.append(selected[name].name)
            bar.update(tensor.numel() * dtypes[name].itemsize)
    return not_finite


# Config and processor


def _write_config(config, dtype, recipe, output):
    """The configs, the model's code, and how sentence-transformers takes it."""
    whole = config.text_config is not None
    config.architectures, config.dtype = [layout.model_class(config).__name__], dtype
    config.auto_map = dict(layout.from_module(f"modeling_phi3_embed.{'WHOLE_AUTO_MAP' if whole else 'AUTO_MAP'}"))
    if recipe:
        recipes.write_files(recipe, config.hidden_size, output)
    config.save_pretrained(output)
    if recipe is None and whole:  # the image embedding's, which are not what such a checkpoint was trained for
        for file in layout.from_module("configuration_phi3_embed.SENTENCE_TRANSFORMERS_FILES"):
            (output / file).unlink(missing_ok=True)


def _write_generation_config(tokenizer, output):
    """Chats end in <|end|>, other texts in one of the other two; an image's token is nothing to say."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|endoftext|>", "<|end|>")]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end for end in ends if end is not None],
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[tokenizer.convert_tokens_to_ids("<|image|>")],
    ).save_pretrained(output)


def _write_processor(source, config, recipe, output):
    """Image processor and tokenizer, and their code -> the most crops of an image, as the card says it."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if file not in source.files:
            raise ValueError(f"{source.name} has no {file}. Put the base model's tokenizer files beside it.")
    tokenizer = _read_tokenizer(source)
    if tokenizer.convert_tokens_to_ids("<|image|>") != config.image_token_id:
        raise ValueError(f"The tokenizer of {source.name} has no <|image|> with the id {config.image_token_id}.")
    about = source.json(PREPROCESSOR) if PREPROCESSOR in source.files else {}
    settings = {key: about[key] for key in layout.IMAGE_SETTINGS if key in about}
    size = {"height": config.crop_size, "width": config.crop_size}
    processor_class = layout.from_module("processing_phi3_embed.Phi3EmbedProcessor")
    image_processor_class = layout.from_module("processing_phi3_embed.Phi3EmbedImageProcessor")
    with library_errors(f"{source.name}: {PREPROCESSOR}"):
        image_processor = image_processor_class(size=size, num_img_tokens=config.num_img_tokens, **settings)
    processor_class.register_for_auto_class("AutoProcessor")
    processor = processor_class(image_processor, tokenizer)
    if config.text_config is not None:
        tokenizer.padding_side = "left"
        templates = recipes.chat_templates((ROOT / "chat_template.jinja").read_text(), recipe)
        tokenizer.chat_template, processor.chat_template = None, templates
        _write_generation_config(tokenizer, output)
    processor.save_pretrained(output)
    crops = f"at most {image_processor.num_crops}"
    if "num_crops" in settings:
        return crops
    print(
        f"{source.name} does not say `num_crops` in a {PREPROCESSOR}: {crops} are assumed, as Phi-3-vision has them. "
        "Phi-3.5-vision has 4."
    )
    return f"{crops}; assumed, because the source does not say"


def _read_tokenizer(source):
    """The tokenizer of tokenizer.json, with the settings that are known; its tokens say there how they are matched."""
    about, vocabulary = source.json("tokenizer_config.json"), source.text("tokenizer.json")
    if "special_tokens_map.json" in source.files:
        about = source.json("special_tokens_map.json") | about
    settings = {key: about[key] for key, kind in layout.TOKENIZER_SETTINGS.items() if isinstance(about.get(key), kind)}
    for key in layout.NAMED_TOKENS:
        token = about.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, (str, type(None))):
            raise ValueError(
                f"{source.name}: tokenizer_config.json: `{key}` is {str(token)[:100]!r}, but must be a text."
            )
        settings |= {key: token} if token else {}
    template = about.get("chat_template")
    if "chat_template.jinja" in source.files:
        template = source.text("chat_template.jinja")
    if not isinstance(template, (str, type(None))):
        raise ValueError(f"{source.name}: tokenizer_config.json: `chat_template` must be one text.")
    with library_errors(f"{source.name}: its tokenizer cannot be read"):
        tokenizer = Tokenizer.from_str(vocabulary)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **settings)


# The card


def _write_card(source, adapter, selected, config, crops, command, name, recipe, output):
    license = _read_licence(source)
    whole = config.text_config is not None
    tags = ["custom_code", "phi3_embed", *(() if whole else ("image-feature-extraction", "image-embedding"))]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if whole else "image-feature-extraction",
        base_model=[part.name for part in (source, adapter and adapter.source) if part and part.commit] or None,
        tags=[*tags, *(("sentence-transformers",) if recipe else ())],
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
    )
    table = next(entry.name for ours, entry in selected.items() if layout.WORDS in ours)
    from_adapter = (
        adapter and f"`{results.without_path(adapter.source.name)}` at {adapter.source.commit or 'a folder'}"
    )
    results.write_card(
        output / "README.md",
        "conversion_card.md",
        metadata,
        title=name.rpartition("/")[2],
        name=name,
        source=f"`{results.without_path(source.name)}`",
        revision=source.commit or "a folder",
        adapter=from_adapter or "none",
        license=license.get("license_name") or license.get("license") or "not stated by the source",
        command=command,
        count=len(selected),
        dtype=str(config.dtype).removeprefix("torch."),
        table=table,
        crops=crops,
        whole=whole,
        recipe=recipe,
    )
    for file in source.files:
        if sources.matches(file, ("LICENSE*",)):
            (output / file).write_text(source.text(file, errors="replace"), encoding="utf-8")


def _read_licence(source):
    """What a card says of its licence, by plain lines of its metadata: YAML can be a trap."""
    if "README.md" not in source.files:
        return {}
    metadata = re.match(r"\s*---\r?\n(.*?)\r?\n---", source.text("README.md", errors="replace"), re.DOTALL)
    line = r"^(license|license_name|license_link): *([\"']?)(\w[\w.:/+ -]{0,200})\2 *\r?$"
    return {key: text for key, _, text in re.findall(line, metadata[1] if metadata else "", re.MULTILINE)}


# The proof


def _compute_once(folder, offload):
    """
    Loads a model as users do and goes through all of it with an image: the first numbers of the image's vector. The
    weights stay on disk, and the tower's are widened to float32 as each module reads its own: many processors multiply
    in half precision several times slower.
    """
    where = {"trust_remote_code": True, "device_map": {"": "disk"}, "offload_folder": str(offload)}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto_class = AutoModel if config.text_config is None else AutoModelForImageTextToText
    model = auto_class.from_pretrained(folder, **where)
    for name in ("img_processor", "projector"):
        model.base_model.get_submodule(f"vision_embed_tokens.{name}").float()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="<|image_1|>", images=Image.linear_gradient("L"), num_crops=0, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    vector = outputs.image_outputs.image_embeds
    if not (vector.isfinite().all() and outputs[0].isfinite().all()):
        raise ValueError("The converted model gives values that are not finite.")
    return vector[0, :6].tolist()
