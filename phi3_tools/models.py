"""
A MODEL as it is named, found, loaded, and asked for vectors.

A MODEL is written `NAME[@REVISION][:POOLING]`. NAME is a folder or a Hub id of

- our model, with the poolings `mean` (all tokens of crops and global view), `global` (the global view's tokens) and
  `tower` (the tower's patches of the global view, before the projection: CLIP's side); without one, what its recipe
  for sentence-transformers says of texts and images, or the config's own;
- CLIP, SigLIP, DINOv2, ViT and whatever else transformers' `AutoModel` and `AutoImageProcessor` load;
- a sentence-transformers model that takes images;

or it is `pixels`, the image itself at 32 x 32 pixels.

Vectors are comparable between tools: weights are in float32 unless another dtype is asked for, on the machine's
accelerator where it has one, and code and weights are of one and the same commit.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedConfig

from phi3_tools.results import check_no_pointer, one_line, write_text

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3-embed"
PIXELS, PIXELS_SIDE = "pixels", 32
PHI3_EMBED, TRANSFORMERS, SENTENCE_TRANSFORMERS = "phi3_embed", "transformers", "sentence-transformers"
POOLINGS = ("mean", "global", "tower")
ACCEPTED = (
    f"a folder with a model or a Hub id: NAME[@REVISION][:POOLING], with one of {', '.join(POOLINGS)} as POOLING of a "
    "phi3_embed model"
)
PATTERN = re.compile(rf"(?P<name>.+?)(@(?P<revision>[\w./-]+))?(:(?P<pooling>{'|'.join(POOLINGS)}))?")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
DTYPES = ("float32", "bfloat16", "float16")
BATCH_SIZE = 8
CLASS_TOKENS = ("cls_token", "class_embedding")  # what towers call it
WEIGHTS = (".safetensors", ".bin")
# A folder of what aligning trained: the projection, and what it belongs between.
PROJECTION, PARTS = "projection.safetensors", "parts.json"
RECIPE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
# A text of more bytes is embedded alone, because Phi-3's rope factors change at 4,096 tokens for a whole batch:
# shorter texts beside it would get other vectors. No token has less than a byte; the rest is for the template.
MAX_BYTES_TOGETHER = 3072
# What of a folder makes its vectors: a change of any makes them others.
COUNTED = (*WEIGHTS, ".json", ".jinja", ".py", ".txt", ".model")


class Model(NamedTuple):
    """
    A model that is there. `text` is as it was named; `revision` pins weights and code to a commit of the Hub;
    `version` is that commit, or a hash of what a folder's vectors follow from. `has_recipe`: ours, with a recipe by
    which sentence-transformers embeds texts and images into one space.
    """

    text: str
    name: str
    pooling: str | None
    kind: str
    revision: str | None
    version: str
    has_recipe: bool = False

    @property
    def label(self) -> str:
        """The name in tables: that of a folder without its path."""
        name = Path(self.name).resolve().name if Path(self.name).is_dir() else self.name
        return f"{name} ({self.pooling})" if self.pooling else name

    @property
    def pinned_text(self) -> str:
        """The MODEL as one names this very version from anywhere."""
        return (
            self.name + (f"@{self.revision}" if self.revision else "") + (f":{self.pooling}" if self.pooling else "")
        )

    @property
    def pinned(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that load this version of weights and code."""
        return {
            "pretrained_model_name_or_path": self.name,
            "revision": self.revision,
            "code_revision": self.revision,
            "trust_remote_code": self.kind == PHI3_EMBED,
        }


def _open_image(content: bytes) -> Image.Image:
    from phi3_tools.images import open_image  # here, because it needs `datasets`

    return open_image(content)


@dataclass
class Embedder:
    """
    A model in memory.

    `encode_poolings(images, poolings)` takes PIL images in RGB and gives {pooling: (vectors `(n, d)` in float32,
    tokens of each image `(n,)` or None)}, where `None` is the model's own pooling. `encode_texts(texts)` gives vectors
    `(n, d)` of queries (or with `is_query=False` of what is searched) in the images' space, `encode_pairs(texts,
    images)` those of texts with an image each; they are None for a model without such. `open_image` opens a file as
    the model's own image processor does. `dimensions`: to what lengths vectors may be cut, where the model is trained
    for that.
    """

    model: Model
    encode_poolings: Callable[[list[Image.Image], Sequence[str | None]], dict]
    parameters: int
    encode_texts: Callable[..., np.ndarray] | None = None
    encode_pairs: Callable[..., np.ndarray] | None = None
    open_image: Callable[[bytes], Image.Image] = _open_image
    dimensions: tuple[int, ...] = ()

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        """Vectors `(n, d)` in float32 by the pooling that the model was named with."""
        return self.encode_poolings(images, [self.model.pooling])[self.model.pooling][0]


def in_batches(items: Sequence, batch_size: int = BATCH_SIZE, title: str = "Embedding") -> Iterator[Sequence]:
    """`items` in batches, with a bar where there are several."""
    starts = range(0, len(items), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=len(starts) < 2):
        yield items[start : start + batch_size]


def embed(encode: Callable, items: Sequence, batch_size: int = BATCH_SIZE, title: str = "Embedding") -> np.ndarray:
    """Vectors `(n, d)` of many images or texts by `encode_images` or `encode_texts`, batch by batch, with a bar."""
    return np.concatenate([encode(batch) for batch in in_batches(items, batch_size, title)])


def encode_or_refuse(encode: Callable, items: Sequence) -> list[np.ndarray | ValueError]:
    """The vector of each item of a batch, or why the model refuses this one, so that one stops no others."""
    try:
        return list(encode(items)) if items else []
    except ValueError as error:
        if len(items) == 1:
            return [error]
    return [encode_or_refuse(encode, [item])[0] for item in items]


# Which model


def find_model(text: str) -> Model:
    """
    A MODEL as it is named -> where it is, of what kind, and which version, without loading its weights.

    Raises:
        ValueError: it is not there, cannot embed images, or has no such pooling.
    """
    found = None if Path(text).is_dir() else PATTERN.fullmatch(text)
    name, revision, pooling = found.group("name", "revision", "pooling") if found else (text, None, None)
    if name == PIXELS and not Path(name).is_dir():
        folder, revision, version = None, None, str(PIXELS_SIDE)
    elif Path(name).is_dir():
        if revision:
            raise ValueError(f"{text}: {name} is a folder, which has no revisions. Leave out @{revision}.")
        name = str(Path(name).resolve())
        folder, revision, version = Path(name), None, _folder_version(Path(name))
    else:
        if not HUB_ID.fullmatch(name):
            raise ValueError(f"There is no folder {name}. Give {ACCEPTED}.")
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.jinja"]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no folder {name}, and no model of that name to be had from the Hub: {one_line(error)}. "
                f"Give {ACCEPTED}."
            ) from error
        revision = version = folder.name
    kind = PIXELS if folder is None else _kind(folder, name)
    model = Model(text, name, pooling, kind, revision, version, not pooling and _has_recipe(kind, folder))
    if pooling and model.kind != PHI3_EMBED:
        raise ValueError(f"{name} is no phi3_embed model, but of {model.kind}: it has no pooling {pooling!r}.")
    return model


def _kind(folder, name):
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    if "img_processor" in config:
        raise ValueError(
            f"{name} is in Microsoft's layout. Take the image embedding out of it by `phi3-embed convert {name} "
            "OUTPUT`, and give OUTPUT."
        )
    if config.get("model_type") == "phi3_embed":
        return PHI3_EMBED
    if (folder / "modules.json").exists():
        return SENTENCE_TRANSFORMERS
    if config:
        return TRANSFORMERS
    raise ValueError(f"{name} holds no model: it has neither a config.json nor a modules.json. Give {ACCEPTED}.")


def _has_recipe(kind, folder):
    path = folder and folder / "sentence_bert_config.json"
    if kind != PHI3_EMBED or not path.exists():
        return False
    return bool({"text", "message"} & json.loads(path.read_text("utf-8")).get("modality_config", {}).keys())


def _folder_version(folder):
    digest = hashlib.sha256()
    # Below the folder itself only the modules of sentence-transformers, as 1_Pooling, and chat templates.
    for path in sorted(path for pattern in ("*", "[0-9]_*/*", "*chat_templates/*") for path in folder.glob(pattern)):
        if path.is_file() and path.suffix in COUNTED:
            digest.update(f"{path.relative_to(folder)}\0{file_hash(path)}".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """
    SHA-256 of a file, as hex digits. That of weights is kept, with the file's size and time, in the user's cache.

    Raises:
        ValueError: it is a Git LFS pointer.
    """
    path = Path(path).resolve()
    check_no_pointer(path)
    with path.open("rb") as file:
        if path.suffix not in WEIGHTS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        stat, kept = path.stat(), CACHE / "hashes" / hashlib.sha256(str(path).encode()).hexdigest()
        key = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        try:
            known, _, digest = kept.read_text().rpartition("\n")
            if known == key:
                return digest
        except OSError:
            pass
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a cache that cannot be written only costs time
        write_text(kept, f"{key}\n{digest}")
    return digest


def recipe(model: Model, num_crops: int | None = None) -> dict[str, Any]:
    """
    What decides the vector of an image, and not how its files are written: `weights`, a hash of theirs; `settings`,
    what config, image processor and sentence-transformers' files say; and `num_crops`. Models of other kinds have a
    `version`.
    """
    if model.kind != PHI3_EMBED:
        return {"version": model.version}
    folder, patterns = Path(model.name), ["*.json", "*.jinja", "*.safetensors"]
    if not folder.is_dir():
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    digest = hashlib.sha256("".join(file_hash(path) for path in sorted(folder.glob("*.safetensors"))).encode())
    # What every config has tells of the file, the classes' names or the output, and nothing of the vectors.
    of_all = PreTrainedConfig().to_dict().keys() | {"auto_map", "bos_token_id", "eos_token_id", "pad_token_id"}
    config = json.loads(AutoConfig.from_pretrained(**model.pinned).to_json_string(use_diff=False))
    settings = {key: value for key, value in config.items() if key not in of_all}
    for part in {"vision_config", "text_config"} & settings.keys():
        settings[part] = {key: value for key, value in (config[part] or {}).items() if key not in of_all}
    processing = json.loads(AutoImageProcessor.from_pretrained(**model.pinned).to_json_string())
    names = ("size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "transparency")
    settings |= {name: processing[name] for name in names if name in processing}
    settings["pooling_mode"] = model.pooling or settings["pooling_mode"]
    if model.has_recipe:
        paths = [
            *recipe_files(folder),
            *sorted(folder.glob("*.jinja")),
            *sorted(folder.glob("*chat_templates/*.jinja")),
        ]
        settings["recipe"] = {str(path.relative_to(folder)): path.read_text("utf-8") for path in paths}
        its_own = json.loads((folder / RECIPE_FILES[1]).read_text("utf-8")).get("processing_kwargs", {})
        processing |= its_own.get("image", {})
    num_crops = processing["num_crops"] if num_crops is None else num_crops
    return {"weights": digest.hexdigest(), "settings": settings, "num_crops": num_crops}


def recipe_files(folder: Path) -> list[Path]:
    """What sentence-transformers reads beside a checkpoint, but chat templates."""
    named = [folder / name for name in RECIPE_FILES]
    return [*filter(Path.exists, named), *sorted(folder.glob("[0-9]_*/config.json"))]


def copy_recipe(model: Model, output: Path, num_crops: int | None) -> None:
    """
    Puts the recipe of a checkpoint beside what was trained of it, with the crops of the training where they are given;
    its chat template goes with the processor.
    """
    folder = Path(model.name)
    if not folder.is_dir():
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=["*.json"]))
    for path in recipe_files(folder):
        content = json.loads(path.read_text("utf-8"))
        if num_crops is not None and path.name == RECIPE_FILES[1]:
            content.setdefault("processing_kwargs", {}).setdefault("image", {})["num_crops"] = num_crops
        write_text(output / path.relative_to(folder), json.dumps(content, indent=2) + "\n")


# Loading


def pick_device(device: str | None = None) -> torch.device:
    """
    The device that was asked for, or else the machine's accelerator, or its CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"--device is {device}, which cannot be used here: {one_line(error)}. Give cpu, or leave it out."
        ) from error
    return torch.device(device)


def load_embedder(
    model: Model | str,
    num_crops: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    loaded: torch.nn.Module | None = None,
) -> Embedder:
    """
    Args:
        model: a MODEL, found or as it is named.
        num_crops: the most crops of an image for our model; by default its image processor's own.
        dtype: of weights and computation.
        device: by default the machine's accelerator.
        loaded: our model of this checkpoint where it is in memory already, so that its weights are not there twice.

    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    model = find_model(model) if isinstance(model, str) else model
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    try:
        loader = _load_sentence_transformers if model.has_recipe else LOADERS[model.kind]
        return loader(model, num_crops, getattr(torch, dtype), pick_device(device), loaded)
    except ModuleNotFoundError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"{model.name} cannot be loaded: {one_line(error)}") from error


def load_model(model: Model | str, dtype: str = "float32", device: str | None = None, **settings) -> tuple:
    """
    Our model itself, in evaluation mode, and its image processor with these settings, for what an [`Embedder`] does
    not give.

    Raises:
        ValueError: it is not there, or no phi3_embed model.
    """
    model = find_model(model) if isinstance(model, str) else model
    if model.kind != PHI3_EMBED:
        raise ValueError(
            f"{model.text} is no phi3_embed model, but of {model.kind}. Give one, as `phi3-embed convert` writes."
        )
    image_processor = AutoImageProcessor.from_pretrained(**model.pinned, **settings)
    loaded = AutoModel.from_pretrained(**model.pinned, dtype=getattr(torch, dtype), device_map=pick_device(device))
    loaded.config.pooling_mode = model.pooling or loaded.config.pooling_mode
    return loaded.eval(), image_processor


@torch.inference_mode()
def embed_words(model, tokenizer, words: Sequence[str]) -> np.ndarray:
    """One unit vector a word, `(n, hidden_size)`: its row of our model's word embeddings."""
    ids = tokenizer(list(words), add_special_tokens=False, return_tensors="pt").input_ids  # (n, 1)
    vectors = model(input_ids=ids.to(model.device)).last_hidden_state[:, 0].float()
    return torch.nn.functional.normalize(vectors, dim=-1).numpy(force=True)


def prompt_inputs(processor, conversations: list[list[dict]], num_crops: int | None = None, **settings):
    """
    Conversations as a chat template takes them -> what a whole model takes of them, several padded to one length;
    `settings` are more arguments of `apply_chat_template`.
    """
    processing = {"return_tensors": "pt", "padding": len(conversations) > 1}
    processing |= {} if num_crops is None else {"num_crops": num_crops}
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, processor_kwargs=processing, **settings
    )


def encode_conversation(messages: list[dict], processor, num_crops: int | None = None) -> dict[str, torch.Tensor]:
    """
    Messages as a chat template takes them -> `input_ids` and `labels` `(length,)`, -100 where the assistant says
    nothing, and their images' pixels.

    Raises:
        ValueError: the template marks no answers.
    """
    inputs = prompt_inputs(processor, [messages], num_crops, return_assistant_tokens_mask=True)
    input_ids = inputs.pop("input_ids")[0]
    is_answer = torch.as_tensor(inputs.pop("assistant_masks"))[0].bool()
    if not is_answer.any():
        raise ValueError("The processor's chat template marks no answers: it needs {% generation %}.")
    return {**inputs, "input_ids": input_ids, "labels": input_ids.masked_fill(~is_answer, -100)}


@torch.inference_mode()
def score_answer(model, inputs: dict[str, torch.Tensor]) -> tuple[bool, float]:
    """
    What [`encode_conversation`] gives -> whether a whole model would answer so to the letter (each token of the
    answers is the likeliest after those before it), and their loss a token.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")[1:]
    places = (labels != -100).nonzero().squeeze(1)
    inputs["input_ids"] = inputs["input_ids"][None]
    logits, labels = model(**inputs, logits_to_keep=places).logits[0].float(), labels[places]
    ends = torch.isin(labels, torch.tensor(model.generation_config.eos_token_id, device=labels.device))
    is_before_end = ends.cumsum(0) - ends.long() == 0  # what a template says after the end, no model has to
    is_exact = ((logits.argmax(-1) == labels) | ~is_before_end).all().item()
    return is_exact, torch.nn.functional.cross_entropy(logits, labels).item()


def _load_pixels(model, num_crops, dtype, device, loaded):
    def encode(images, poolings):
        small = [image.convert("RGB").resize((PIXELS_SIDE,) * 2, Image.Resampling.BILINEAR) for image in images]
        return {None: (np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small]), None)}

    return Embedder(model, encode, parameters=0)


def _load_phi3_embed(model, num_crops, dtype, device, loaded):
    image_processor = AutoImageProcessor.from_pretrained(**model.pinned)
    if num_crops is not None:
        image_processor(Image.new("L", (8, 8)), num_crops=num_crops)  # raises unless it is a number of crops
    if loaded is None:
        loaded = AutoModel.from_pretrained(**model.pinned, dtype=dtype, device_map=device).eval()
    encode = functools.partial(_encode_phi3_embed, loaded, image_processor, num_crops)
    dimensions = tuple(getattr(loaded.config, "matryoshka_dimensions", None) or ())
    return Embedder(
        model, encode, loaded.num_parameters(), open_image=image_processor.open_image, dimensions=dimensions
    )


@torch.inference_mode()
def _encode_phi3_embed(model, image_processor, num_crops, images, poolings):
    """All poolings from one pass through the tower; the crops go through it only where they are pooled."""
    modes = {pooling: pooling or model.config.pooling_mode for pooling in poolings}
    inputs = image_processor(images, num_crops=num_crops, return_tensors="pt").to(model.device)
    views, image_sizes = inputs.pixel_values, inputs.image_sizes
    if "mean" not in modes.values():  # the global view alone, which is the first of each image
        num_views = (image_sizes // model.config.crop_size).prod(-1) + 1
        views, image_sizes = views[num_views.cumsum(0) - num_views], torch.zeros_like(image_sizes)
    num_tokens = {
        "mean": inputs.num_image_tokens.tolist(),
        "global": [model.config.num_img_tokens] * len(images),
        "tower": [model.config.patches_per_side**2] * len(images),
    }
    vectors = {}
    for pooling, mode in modes.items():
        output = model.get_image_features(views, image_sizes, pooling_mode=mode)
        vectors[pooling] = (output.image_embeds.float().numpy(force=True), num_tokens[mode])
        views = output.last_hidden_state  # the tower's features, which stand for pixels from here on
    return vectors


def _load_transformers(model, num_crops, dtype, device, loaded):
    loaded, report = AutoModel.from_pretrained(
        **model.pinned, dtype=dtype, device_map=device, output_loading_info=True
    )
    # A pooler that the checkpoint lacks would be random: the class token stands for it.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} weights: {', '.join(missing[:3])}, ...")
    has_pooler = not report["missing_keys"]
    if getattr(loaded.config, "mask_ratio", None) is not None:
        raise ValueError(f"{type(loaded).__name__} hides patches at random, so that it has no one vector of an image")
    has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in loaded.named_parameters())
    image_processor = AutoImageProcessor.from_pretrained(**model.pinned)
    is_dual = hasattr(loaded, "get_image_features")
    if not is_dual and loaded.main_input_name != "pixel_values":
        raise ValueError(f"{type(loaded).__name__} takes `{loaded.main_input_name}`, not images")

    @torch.inference_mode()
    def encode(images, poolings):
        pixel_values = image_processor(images, return_tensors="pt").pixel_values.to(device, dtype)
        output = (loaded.get_image_features if is_dual else loaded)(pixel_values=pixel_values)
        tokens, vectors = output.last_hidden_state, output.get("pooler_output")
        if vectors is None or not has_pooler:
            # Tokens (n, length, d), or a map (n, d, height, width).
            tokens_last = tokens if tokens.ndim == 3 else tokens.flatten(2).mT
            vectors = tokens[:, 0] if has_class_token else tokens_last.mean(1)
        num_tokens = [tokens.shape[1] if tokens.ndim == 3 else tokens[0, 0].numel()] * len(images)
        return {None: (vectors.flatten(1).float().numpy(force=True), num_tokens)}

    encode_texts = None
    if hasattr(loaded, "get_text_features"):
        tokenizer = AutoTokenizer.from_pretrained(**model.pinned)
        length = loaded.config.text_config.max_position_embeddings

        @torch.inference_mode()
        def encode_texts(texts, is_query=True):
            inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            return loaded.get_text_features(**inputs.to(device)).pooler_output.float().numpy(force=True)

    return Embedder(model, encode, loaded.num_parameters(), encode_texts)


def load_sentence_transformer(
    model: Model, num_crops: int | None = None, dtype=torch.float32, device=None, loaded: torch.nn.Module | None = None
):
    """The `SentenceTransformer` of a model, weights and code pinned to one commit; around `loaded`, if it is given."""
    from sentence_transformers import SentenceTransformer  # here, because it is slow to import

    code = {"code_revision": model.revision} if model.revision else {}
    made = SentenceTransformer(
        model.name,
        revision=model.revision,
        trust_remote_code=model.kind == PHI3_EMBED,
        device=None if loaded else str(pick_device(device)),
        model_kwargs={"dtype": dtype} | ({"device_map": "meta"} if loaded else {}) | code,
        config_kwargs=code | ({"pooling_mode": model.pooling} if model.pooling else {}),
        processor_kwargs=({} if num_crops is None else {"num_crops": num_crops}) | code,
    )
    if loaded is not None:  # in place of weights that were not read
        made[0].model = loaded
    if num_crops is not None and model.has_recipe:
        made[0].processing_kwargs.setdefault("image", {})["num_crops"] = num_crops
    return made


def _load_sentence_transformers(model, num_crops, dtype, device, loaded):
    from sentence_transformers.sentence_transformer.modules import Transformer

    loaded = load_sentence_transformer(model, num_crops if model.kind == PHI3_EMBED else None, dtype, device, loaded)
    if not loaded.supports("image"):
        raise ValueError(f"it takes {', '.join(map(str, loaded.modalities))}, not images")

    def encode_together(encode, items):
        vectors = encode(items, batch_size=len(items), show_progress_bar=False, convert_to_tensor=True)
        return vectors.float().numpy(force=True)

    def encode_images(images, poolings):
        return {None: (encode_together(loaded.encode_document, images), None)}

    def encode_texts(texts, is_query=True):
        if not all(text.strip() for text in texts):
            raise ValueError("A text is empty, so it has no vector. Give words.")
        if len(texts) > 1 and any(len(text.encode()) > MAX_BYTES_TOGETHER for text in texts):
            return np.concatenate([encode_texts([text], is_query) for text in texts])
        # Named as texts, because of a bare path or address of an image sentence-transformers would open the file.
        items = [{"text": text} for text in texts] if isinstance(loaded[0], Transformer) else texts
        return encode_together(loaded.encode_query if is_query else loaded.encode_document, items)

    def encode_pairs(texts, images, is_query=True):
        encode = loaded.encode_query if is_query else loaded.encode_document
        pairs = [{"text": text, "image": image} for text, image in zip(texts, images)]
        return np.concatenate([encode_together(encode, [pair]) for pair in pairs])

    return Embedder(
        model,
        encode_images,
        sum(parameter.numel() for parameter in loaded.parameters()),
        encode_texts if "text" in loaded.modalities else None,
        encode_pairs if ("image", "text") in loaded.modalities else None,
        dimensions=tuple(getattr(loaded[0].auto_model.config, "matryoshka_dimensions", None) or ()),
        **({"open_image": loaded[0].processor.image_processor.open_image} if model.has_recipe else {}),
    )


LOADERS = {
    PIXELS: _load_pixels,
    PHI3_EMBED: _load_phi3_embed,
    TRANSFORMERS: _load_transformers,
    SENTENCE_TRANSFORMERS: _load_sentence_transformers,
}
