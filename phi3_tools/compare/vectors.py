"""Vectors of images by several models, kept on disk as they are made."""

import functools
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from PIL import Image

from phi3_tools.models import BATCH_SIZE, CACHE, PHI3_EMBED, Model, find_model, in_batches, load_embedder
from phi3_tools.results import one_line

VECTORS = CACHE / "vectors.sqlite"
TIMED_IMAGES = 8


class KeyedImage(NamedTuple):
    """What is embedded: `key` tells equal images, `read` gives a PIL image in RGB."""

    key: str
    read: Callable[[], Image.Image]


@dataclass
class Embedded:
    """
    Vectors of images by one model, `(n, d)` float32 in the images' order; NaN where the model gave such, or did not
    take an image: `refused` has the keys of these and why.

    `cost`: parameters, dimensions, tokens an image, milliseconds an image on the machine that embedded them, bytes a
    vector. `texts`: the same of texts, where there were some and the model has a text side.
    """

    model: Model
    vectors: np.ndarray
    cost: dict = field(default_factory=dict)
    texts: np.ndarray | None = None
    refused: dict = field(default_factory=dict)


def embed(models, images, texts=(), num_crops=None, cache=VECTORS, batch_size=BATCH_SIZE) -> list[Embedded]:
    """
    Images by each of the models, batch by batch, with progress. What `cache` holds is not computed again; it gets
    every batch when it is done, so that an interrupted run goes on where it stopped.

    Args:
        models: MODELs, found or as they are named.
        images: a list of [`KeyedImage`].
        texts: for models with a text side.
        num_crops: the most crops of an image for our model; by default its image processor's own.
        cache: a file.

    Raises:
        ValueError: a model cannot be loaded or takes none of the images, or the cache cannot be used.
    """
    models = [find_model(model) if isinstance(model, str) else model for model in models]
    groups, done = {}, {}
    for model in models:
        groups.setdefault((model.name, model.revision), []).append(model)
    with closing(open_cache(cache)) as database:
        for group, members in groups.items():
            poolings = list(dict.fromkeys(model.pooling for model in members))
            found = _embed_group(database, members[0], poolings, images, texts, num_crops, batch_size)
            done |= {(*group, pooling): vectors for pooling, vectors in found.items()}
    return [Embedded(model, *done[model.name, model.revision, model.pooling]) for model in models]


def _embed_group(database, model, poolings, images, texts, num_crops, batch_size):
    """{pooling: (vectors, cost, vectors of texts or None, refused)}; the model is loaded only if something is new."""
    crops = f"{num_crops} crops" if model.kind == PHI3_EMBED else ""
    version = f"{model.kind} {model.version} {crops} transformers {transformers.__version__}"
    keys = {pooling: f"{version} {pooling}" for pooling in poolings}
    loaded = functools.cache(lambda: load_embedder(model, num_crops))
    costs, refused = {}, {}
    for pooling, key in keys.items():
        costs[pooling] = _read_cost(database, key)
        if costs[pooling] is None:
            costs[pooling] = _measure_cost(loaded(), model, images, pooling)
            database.execute("INSERT INTO costs VALUES (?, ?)", (key, json.dumps(costs[pooling])))
            database.commit()

    wanted = {image.key: image for image in images}
    missing = set().union(*(wanted.keys() - _known(database, key) for key in keys.values()))
    missing = [image for key, image in wanted.items() if key in missing]
    for batch in in_batches(missing, batch_size, f"Embedding by {model.name}"):
        accepted, found = _encode_accepted(loaded(), model, batch, poolings, refused)
        for pooling, (vectors, _) in found.items():
            _store(database, keys[pooling], [image.key for image in accepted], vectors)

    text_keys = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts}
    if has_texts := texts and all(cost["has_texts"] for cost in costs.values()):
        known = _known(database, f"{version} texts")
        missing = [text for text, key in text_keys.items() if key not in known]
        for batch in in_batches(missing, batch_size, f"Texts by {model.name}"):
            _store(database, f"{version} texts", [text_keys[text] for text in batch], loaded().encode_texts(batch))
    return {
        pooling: (
            _fetch(database, key, [image.key for image in images]),
            costs[pooling],
            _fetch(database, f"{version} texts", [text_keys[text] for text in texts]) if has_texts else None,
            refused,
        )
        for pooling, key in keys.items()
    }


def _encode_accepted(loaded, model, batch, poolings, refused):
    """The images of a batch that the model takes, and their vectors; `refused` gets the others' keys and why."""
    try:
        return batch, _encode(loaded, model, batch, poolings)
    except ValueError as error:
        if len(batch) == 1:
            refused[batch[0].key] = str(error)
            return [], {}
    accepted = [image for image in batch if _encode_accepted(loaded, model, [image], poolings, refused)[0]]
    return accepted, _encode(loaded, model, accepted, poolings) if accepted else {}


def _encode(loaded, model, images, poolings):
    try:
        return loaded.encode_poolings([image.read() for image in images], poolings)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{model.name} does not take it: {one_line(error)}") from error


def _measure_cost(loaded, model, images, pooling):
    timed, _ = _encode_accepted(loaded, model, images[:TIMED_IMAGES], [pooling], refused := {})
    if not timed:
        raise ValueError(next(iter(refused.values())))
    _encode(loaded, model, timed[:1], [pooling])  # the first time is slower
    start = time.perf_counter()
    vectors, tokens = _encode(loaded, model, timed, [pooling])[pooling]
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
