"""
Pictures embedded by any model, and the vectors kept on disk.

A model is written `SOURCE[@REVISION][:POOLING]`. SOURCE is a folder or a Hub id of

- our model, with the poolings `mean` (all tokens of crops and global view), `global` (the global view's tokens) and
  `tower` (the tower's patches of the global view, before the projection: CLIP's side); without one, the config's own;
- CLIP, SigLIP, DINOv2, ViT and whatever else transformers' `AutoModel` and `AutoImageProcessor` load;
- a sentence-transformers model that takes images;

or it is `pixels`, the picture itself at 32 x 32 pixels.
"""

import functools
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3-embed" / "vectors.sqlite"
PIXELS, PIXELS_SIDE = "pixels", 32
POOLINGS = ("mean", "global", "tower")
SPEC = re.compile(rf"(?P<source>.+?)(@(?P<revision>[\w./-]+))?(:(?P<pooling>{'|'.join(POOLINGS)}))?")
BATCH_SIZE = 8
TIMED_PICTURES = 8
CLASS_TOKENS = ("cls_token", "class_embedding")  # what towers call it
# What of a folder makes its vectors: a change of any makes them others.
COUNTED_SUFFIXES = {".json", ".safetensors", ".bin", ".py", ".txt", ".model"}


class Spec(NamedTuple):
    """A model as it is named: see the module's docstring."""

    text: str
    source: str
    revision: str | None
    pooling: str | None

    @property
    def label(self) -> str:
        """The name in tables: that of a folder without its path."""
        name = Path(self.source).resolve().name if Path(self.source).is_dir() else self.source
        return f"{name} ({self.pooling})" if self.pooling else name


class Picture(NamedTuple):
    """What is embedded: `key` tells equal pictures, `read` gives a PIL image in RGB."""

    key: str
    read: Callable[[], Image.Image]


@dataclass
class Loaded:
    """
    A model in memory.

    `encode(images, poolings)` gives {pooling: (vectors `(n, d)`, tokens of each image `(n,)` or None)}. `encode_texts`
    gives vectors `(n, d)` in the images' space; None for a model without such.
    """

    encode: Callable
    parameters: int
    encode_texts: Callable | None = None


@dataclass
class Embedded:
    """
    Vectors of pictures by one model, `(n, d)` float32 in the pictures' order; NaN where the model gave such, or did
    not take a picture: `refused` has the keys of these and why.

    `cost`: parameters, dimensions, tokens an image, milliseconds an image on the machine that embedded them, bytes a
    vector. `texts`: the same of texts, where there were some and the model has a text side.
    """

    spec: Spec
    version: str
    vectors: np.ndarray
    cost: dict = field(default_factory=dict)
    texts: np.ndarray | None = None
    refused: dict = field(default_factory=dict)


def parse_spec(text) -> Spec:
    """
    Raises:
        ValueError: there is no such folder, or the pooling is none.
    """
    found = SPEC.fullmatch(text)
    if Path(text).is_dir() or not found:
        return Spec(text, text, None, None)
    spec = Spec(text, found["source"], found["revision"], found["pooling"])
    if not Path(spec.source).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec.source):
        raise ValueError(
            f"{text}: there is no folder {spec.source}, and it is no Hub id. Give {PIXELS!r}, or SOURCE[@REVISION]"
            f"[:POOLING] with a folder or Hub id as SOURCE and one of {', '.join(POOLINGS)} as POOLING."
        )
    return spec


class Source(NamedTuple):
    """Where the weights are: `version` is a commit, or a hash of the folder's files."""

    name: str
    kind: str
    version: str
    revision: str | None


def find_source(name, revision) -> Source:
    """
    What kind of model a folder or Hub id is, and which version, without reading its weights into memory.

    Raises:
        ValueError: it is not there, or no model that can embed images.
    """
    if name == PIXELS:
        return Source(name, PIXELS, str(PIXELS_SIDE), None)
    if Path(name).is_dir():
        folder, version = Path(name), _hash_folder(Path(name))
    else:
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is no folder, and not to be had from the Hub: {_one_line(error)}") from error
        version = revision = folder.name
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    if "img_processor" in config:
        raise ValueError(
            f"{name} is in Microsoft's layout. Take the image embedding out of it by "
            f"`python convert_phi3_vision.py {name} OUTPUT`, and compare OUTPUT."
        )
    if config.get("model_type") == "phi3_embed":
        kind = "phi3_embed"
    elif (folder / "modules.json").exists():
        kind = "sentence-transformers"
    elif config:
        kind = "transformers"
    else:
        raise ValueError(f"{name} holds no model: it has neither a config.json nor a modules.json.")
    return Source(name, kind, version, revision)


def _hash_folder(folder):
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*"), *folder.glob("[!.]*/*")]):
        if path.is_file() and path.suffix in COUNTED_SUFFIXES:
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _one_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load(source: Source, num_crops=None) -> Loaded:
    """
    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    try:
        return LOADERS[source.kind](source, num_crops)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"{source.name} cannot be loaded: {_one_line(error)}") from error


def _load_pixels(source, num_crops):
    def encode(images, poolings):
        small = [image.convert("RGB").resize((PIXELS_SIDE,) * 2, Image.Resampling.BILINEAR) for image in images]
        return {None: (np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small]), None)}

    return Loaded(encode, parameters=0)


def _load_phi3_embed(source, num_crops):
    where = {"revision": source.revision, "code_revision": source.revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained(source.name, dtype=torch.float32, device_map="auto", **where).eval()
    image_processor = AutoImageProcessor.from_pretrained(source.name, **where)
    default, model.config.pooling_mode = model.config.pooling_mode, "mean"
    return Loaded(
        functools.partial(_encode_phi3_embed, model, image_processor, num_crops, default), model.num_parameters()
    )


@torch.inference_mode()
def _encode_phi3_embed(model, image_processor, num_crops, default, images, poolings):
    """All poolings from one pass through the tower; the crops go through it only where they are pooled."""
    asked = {pooling: pooling or default for pooling in poolings}
    needs_crops = model.config.use_hd_transform and "mean" in asked.values()
    inputs = image_processor(images, num_crops=num_crops if needs_crops else 0, return_tensors="pt").to(model.device)
    pixel_values, image_sizes = inputs.pixel_values, inputs.image_sizes
    output = model.get_image_features(pixel_values, image_sizes)
    first = output.global_features
    of_global = model.get_image_features(first, torch.zeros_like(image_sizes)).image_embeds
    global_tokens = model.config.num_img_tokens
    found = {
        "mean": (output.image_embeds, [len(tokens) for tokens in output.pooler_output]),
        "global": (of_global, [global_tokens] * len(images)),
        "tower": (first.mean(1), [first.shape[1]] * len(images)),
    }
    return {pooling: (found[name][0].float().numpy(force=True), found[name][1]) for pooling, name in asked.items()}


def _load_transformers(source, num_crops):
    model, report = AutoModel.from_pretrained(
        source.name, revision=source.revision, dtype=torch.float32, device_map="auto", output_loading_info=True
    )
    # A pooler that the checkpoint lacks would be random: the class token stands for it.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} weights: {', '.join(missing[:3])}, ...")
    has_pooler = not report["missing_keys"]
    if getattr(model.config, "mask_ratio", None) is not None:
        raise ValueError(f"{type(model).__name__} hides patches at random, so that it has no one vector of a picture")
    has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in model.named_parameters())
    image_processor = AutoImageProcessor.from_pretrained(source.name, revision=source.revision)
    is_dual = hasattr(model, "get_image_features")
    if not is_dual and model.main_input_name != "pixel_values":
        raise ValueError(f"{type(model).__name__} takes `{model.main_input_name}`, not images")

    @torch.inference_mode()
    def encode(images, poolings):
        pixel_values = image_processor(images, return_tensors="pt").pixel_values.to(model.device)
        output = (model.get_image_features if is_dual else model)(pixel_values=pixel_values)
        tokens, vectors = output.last_hidden_state, output.get("pooler_output")
        if vectors is None or not has_pooler:
            # Tokens (n, length, d), or a map (n, d, height, width).
            tokens_last = tokens if tokens.ndim == 3 else tokens.flatten(2).mT
            vectors = tokens[:, 0] if has_class_token else tokens_last.mean(1)
        num_tokens = [tokens.shape[1] if tokens.ndim == 3 else tokens[0, 0].numel()] * len(images)
        return {None: (vectors.flatten(1).float().numpy(force=True), num_tokens)}

    encode_texts = None
    if hasattr(model, "get_text_features"):
        tokenizer = AutoTokenizer.from_pretrained(source.name, revision=source.revision)
        length = model.config.text_config.max_position_embeddings

        @torch.inference_mode()
        def encode_texts(texts):
            inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            return model.get_text_features(**inputs.to(model.device)).pooler_output.float().numpy(force=True)

    return Loaded(encode, model.num_parameters(), encode_texts)


def _load_sentence_transformers(source, num_crops):
    from sentence_transformers import SentenceTransformer  # here, as it is slow to import

    model = SentenceTransformer(source.name, revision=source.revision)
    if not model.supports("image"):
        raise ValueError(f"it takes {', '.join(map(str, model.modalities))}, not images")

    def encode_any(each):
        return model.encode(each, batch_size=len(each), show_progress_bar=False, convert_to_numpy=True)

    return Loaded(
        lambda images, poolings: {None: (encode_any(images), None)},
        sum(parameter.numel() for parameter in model.parameters()),
        encode_any if model.supports("text") else None,
    )


LOADERS = {
    PIXELS: _load_pixels,
    "phi3_embed": _load_phi3_embed,
    "transformers": _load_transformers,
    "sentence-transformers": _load_sentence_transformers,
}


def embed(specs, pictures, texts=(), num_crops=None, cache=CACHE, batch_size=BATCH_SIZE) -> list[Embedded]:
    """
    Pictures by each of the models, batch by batch, with progress. What `cache` holds is not computed again; it gets
    every batch when it is done, so that an interrupted run goes on where it stopped.

    Args:
        specs: models as text or `Spec`.
        pictures: a list of [`Picture`].
        texts: for models with a text side.
        num_crops: the most crops of an image for our model; by default its image processor's own.
        cache: a file.

    Raises:
        ValueError: a model cannot be loaded or takes none of the pictures, or the cache cannot be used.
    """
    specs = [parse_spec(spec) if isinstance(spec, str) else spec for spec in specs]
    groups = {}
    for spec in specs:
        groups.setdefault((spec.source, spec.revision), {}).setdefault(spec.pooling, None)
    done = {}
    with closing(open_cache(cache)) as database:
        # Every model is looked for before the first one works.
        sources = {group: find_source(*group) for group in groups}
        for group, poolings in groups.items():
            if sources[group].kind != "phi3_embed" and any(poolings):
                raise ValueError(
                    f"{group[0]} is no phi3_embed model, but of {sources[group].kind}: it has no pooling "
                    f"{next(filter(None, poolings))!r}."
                )
        for group, poolings in groups.items():
            found = _embed_group(database, sources[group], list(poolings), pictures, texts, num_crops, batch_size)
            done |= {(*group, pooling): each for pooling, each in found.items()}
    return [
        Embedded(spec, sources[spec[1:3]].version, *done[spec.source, spec.revision, spec.pooling]) for spec in specs
    ]


def _embed_group(database, source, poolings, pictures, texts, num_crops, batch_size):
    """{pooling: (vectors, cost, vectors of texts or None, refused)}; the model is loaded only if something is new."""
    crops = f"{num_crops} crops" if source.kind == "phi3_embed" else ""
    version = f"{source.kind} {source.version} {crops} transformers {transformers.__version__}"
    keys = {pooling: f"{version} {pooling}" for pooling in poolings}
    loaded = functools.cache(lambda: load(source, num_crops))
    costs, refused = {}, {}
    for pooling, key in keys.items():
        costs[pooling] = _read_cost(database, key)
        if costs[pooling] is None:
            costs[pooling] = _measure_cost(loaded(), source, pictures, pooling)
            database.execute("INSERT INTO costs VALUES (?, ?)", (key, json.dumps(costs[pooling])))
            database.commit()

    wanted = {picture.key: picture for picture in pictures}
    missing = set().union(*(wanted.keys() - _known(database, key) for key in keys.values()))
    missing = [picture for key, picture in wanted.items() if key in missing]
    for batch in _batches(missing, batch_size, f"Embedding by {source.name}"):
        accepted, found = _encode_accepted(loaded(), source, batch, poolings, refused)
        for pooling, (vectors, _) in found.items():
            _store(database, keys[pooling], [picture.key for picture in accepted], vectors)

    text_keys = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts}
    if has_texts := texts and all(cost["has_texts"] for cost in costs.values()):
        known = _known(database, f"{version} texts")
        missing = [text for text, key in text_keys.items() if key not in known]
        for batch in _batches(missing, batch_size, f"Texts by {source.name}"):
            _store(database, f"{version} texts", [text_keys[text] for text in batch], loaded().encode_texts(batch))
    return {
        pooling: (
            _fetch(database, key, [picture.key for picture in pictures]),
            costs[pooling],
            _fetch(database, f"{version} texts", [text_keys[text] for text in texts]) if has_texts else None,
            refused,
        )
        for pooling, key in keys.items()
    }


def _batches(items, batch_size, description):
    if items:
        for start in tqdm(range(0, len(items), batch_size), desc=description, unit="batch"):
            yield items[start : start + batch_size]


def _encode_accepted(loaded, source, batch, poolings, refused):
    """The pictures of a batch that the model takes, and their vectors; `refused` gets the others' keys and why."""
    try:
        return batch, _encode(loaded, source, batch, poolings)
    except ValueError as error:
        if len(batch) == 1:
            refused[batch[0].key] = str(error)
            return [], {}
    accepted = [each for each in batch if _encode_accepted(loaded, source, [each], poolings, refused)[0]]
    return accepted, _encode(loaded, source, accepted, poolings) if accepted else {}


def _encode(loaded, source, pictures, poolings):
    try:
        return loaded.encode([picture.read() for picture in pictures], poolings)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{source.name} does not take it: {_one_line(error)}") from error


def _measure_cost(loaded, source, pictures, pooling):
    timed, _ = _encode_accepted(loaded, source, pictures[:TIMED_PICTURES], [pooling], refused := {})
    if not timed:
        raise ValueError(next(iter(refused.values())))
    _encode(loaded, source, timed[:1], [pooling])  # the first time is slower
    start = time.perf_counter()
    vectors, tokens = _encode(loaded, source, timed, [pooling])[pooling]
    seconds = time.perf_counter() - start
    return {
        "parameters": loaded.parameters,
        "dimensions": vectors.shape[1],
        "tokens": None if tokens is None else float(np.mean(tokens)),
        "milliseconds": 1000 * seconds / len(timed),
        "bytes": vectors.shape[1] * 4,
        "has_texts": loaded.encode_texts is not None,
    }


def open_cache(path):
    """
    Raises:
        ValueError: the file cannot be written, or is no such cache.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=60)
        database.execute("CREATE TABLE IF NOT EXISTS costs (model TEXT PRIMARY KEY, cost TEXT)")
        database.execute(
            "CREATE TABLE IF NOT EXISTS vectors (model TEXT, key TEXT, vector BLOB, PRIMARY KEY (model, key))"
        )
        database.execute("PRAGMA user_version = 1")  # which writes
        database.commit()
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"The cache {path} cannot be used: {error}. Give another file, or remove it.") from error
    return database


def _known(database, model):
    return {key for (key,) in database.execute("SELECT key FROM vectors WHERE model = ?", (model,))}


def _read_cost(database, model):
    row = database.execute("SELECT cost FROM costs WHERE model = ?", (model,)).fetchone()
    return row and json.loads(row[0])


def _store(database, model, keys, vectors):
    rows = [(model, key, np.asarray(vector, np.float32).tobytes()) for key, vector in zip(keys, vectors)]
    database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
    database.commit()


def _fetch(database, model, keys):
    """`(n, d)`, with NaN for keys that are not there."""
    found = dict(database.execute("SELECT key, vector FROM vectors WHERE model = ?", (model,)))
    nothing = np.full(len(next(iter(found.values()), b"")) // 4, np.nan, np.float32)
    return np.stack([np.frombuffer(found[key], np.float32) if key in found else nothing for key in keys])


# The cookbook's comparison calls these two: https://github.com/microsoft/PhiCookBook


def load_phi3_model(fine_tuned=False):
    """
    Our model from the folder `phi3-vision-embed`, as the README converts it; `fine_tuned`: a folder or Hub id, or True
    for `tiny/`, which is trained on digits. Its `get_image_features` takes what `process_for_phi3_model` gives.
    """
    source = {False: "phi3-vision-embed", True: str(ROOT / "tiny")}.get(fine_tuned, fine_tuned)
    if fine_tuned is False and not Path(source).is_dir():
        raise ValueError(
            "There is no folder phi3-vision-embed. Make it by `python convert_phi3_vision.py "
            "microsoft/Phi-3-vision-128k-instruct phi3-vision-embed`, or give `fine_tuned`."
        )
    model = AutoModel.from_pretrained(source, device_map="auto", trust_remote_code=True).eval()
    of_pixels = model.get_image_features
    model.get_image_features = lambda inputs: of_pixels(**inputs.to(model.device)).image_embeds
    return model


def process_for_phi3_model(images, num_crops=None):
    """Images -> `pixel_values` and `image_sizes` in Phi-3-vision's geometry, which fine-tunes share."""
    image_processor = AutoImageProcessor.from_pretrained(str(ROOT), trust_remote_code=True)
    inputs = image_processor(images, num_crops=num_crops, return_tensors="pt")
    del inputs["num_img_tokens"]
    return inputs
