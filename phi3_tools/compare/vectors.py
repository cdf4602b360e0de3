"""Vectors of images and texts by several models, kept on disk as they are made."""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lancedb
import numpy as np
import pyarrow as pa
import transformers
from PIL import Image

from phi3_tools.models import BATCH_SIZE, CACHE, Model, encode_or_refuse, in_batches, load_embedder, recipe
from phi3_tools.results import one_line

VECTORS = CACHE / "vectors"
TIMED_IMAGES = 8
Opener = Callable[[bytes], Image.Image]


class Key(NamedTuple):
    """Tells equal images: the hash of an image's file, and what was done to it since."""

    digest: str
    change: str = ""

    def __str__(self):
        return f"{self.digest} {self.change}".rstrip()


@dataclass
class Embedded:
    """
    What one model makes of images and texts: vectors `(d,)` in float32, NaN where the model gave such. `texts` is None
    for a model without a text side. `refused`: the images that the model does not take, and why. `cost`: parameters,
    dimensions, tokens an image, milliseconds an image on the machine that first embedded, bytes a vector.
    """

    images: dict[Key, np.ndarray]
    texts: dict[str, np.ndarray] | None
    refused: dict[Key, str]
    cost: dict[str, Any]


def embed(
    models: Sequence[Model],
    images: dict[Key, Callable[[Opener], Image.Image]],
    texts: Sequence[str] = (),
    num_crops: int | None = None,
    cache: Path = VECTORS,
    batch_size: int = BATCH_SIZE,
) -> dict[Model, Embedded]:
    """
    Images and texts by each of the models, batch by batch, with progress. What `cache` holds is not computed again; it
    gets every batch when it is done, so that an interrupted run goes on where it stopped.

    Args:
        images: for each what opens it, given how the model opens a file.
        texts: for models with a text side.
        num_crops: the most crops of an image for our model; by default its image processor's own.
        cache: a folder.

    Raises:
        ValueError: a model cannot be loaded or takes none of the images, or what is kept cannot be read.
    """
    groups: dict[tuple, list[Model]] = {}
    for model in models:
        groups.setdefault((model.name, model.revision, model.has_recipe), []).append(model)
    embedded: dict[Model, Embedded] = {}
    for members in groups.values():
        embedded |= _embed_group(members, images, list(dict.fromkeys(texts)), num_crops, cache, batch_size)
    return {model: embedded[model] for model in models}


def _embed_group(members, images, texts, num_crops, cache, batch_size):
    """[`embed`] for one model by several poolings, which come from one pass. It is loaded only if something is new."""
    embedder = functools.cache(lambda: load_embedder(members[0], num_crops))
    timed = [open_image for key, open_image in images.items() if not key.change][:TIMED_IMAGES]
    tables = {
        model: Kept(cache, model, num_crops, functools.partial(_measure_cost, embedder, model, timed))
        for model in members
    }
    # One pooling may be named twice: as it is, and as the model's own.
    written = {kept.name: (model, kept) for model, kept in tables.items()}.values()

    def encode(opened):  # -> for each image {model: vector}
        found = _encode(embedder(), members, opened)
        return [{model: found[model.pooling][0][number] for model in members} for number in range(len(opened))]

    refused: dict[Key, str] = {}
    held = set.intersection(*(kept.keys() for kept in tables.values()))
    missing = [key for key in images if str(key) not in held]
    for keys in in_batches(missing, batch_size, f"Embedding by {members[0].name}"):
        made = {}
        for key, found in zip(keys, encode_or_refuse(encode, [images[key](embedder().open_image) for key in keys])):
            if isinstance(found, ValueError):
                refused[key] = str(found)
            else:
                made[key] = found
        for model, kept in written:
            kept.add({str(key): vectors[model] for key, vectors in made.items()})
    embedded = {}
    for model, kept in tables.items():
        vectors, of_texts = kept.read(), None
        if kept.cost["has_texts"]:
            of_texts = _embed_texts(model, texts, embedder, num_crops, cache, batch_size)
        of_images = {key: vectors[str(key)] for key in images if str(key) in vectors}
        embedded[model] = Embedded(of_images, of_texts, refused, kept.cost)
    return embedded


def _embed_texts(model, texts, embedder, num_crops, cache, batch_size):
    if not texts:
        return {}
    kept = Kept(cache, model, num_crops, lambda: {"dimensions": embedder().encode_texts(texts[:1]).shape[1]}, "texts")
    held = kept.keys()
    for batch in in_batches([text for text in texts if text not in held], batch_size, f"Texts by {model.name}"):
        kept.add(dict(zip(batch, embedder().encode_texts(batch))))
    vectors = kept.read()
    return {text: vectors[text] for text in texts}


def _encode(embedder, members, opened):
    try:
        return embedder.encode_poolings(opened, [model.pooling for model in members])
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{members[0].label} does not take it: {one_line(error)}") from error


def _measure_cost(embedder, model, readers):
    embedder = embedder()
    opened = [open_image(embedder.open_image) for open_image in readers]
    found = encode_or_refuse(lambda images: _encode(embedder, [model], images)[model.pooling][0], opened)
    taken = [image for image, vector in zip(opened, found) if not isinstance(vector, ValueError)]
    if not taken:
        raise ValueError(str(found[0]))
    start = time.perf_counter()
    vectors, tokens = _encode(embedder, [model], taken)[model.pooling]
    seconds = time.perf_counter() - start
    return {
        "parameters": embedder.parameters,
        "dimensions": vectors.shape[1],
        "tokens": None if tokens is None else float(np.mean(tokens)),
        "milliseconds": 1000 * seconds / len(taken),
        "bytes": vectors.shape[1] * 4,
        "has_texts": embedder.encode_texts is not None,
    }


class Kept:
    """
    Vectors by one model on disk: a LanceDB table of `key` and `vector`, whose schema says what made them and at what
    `cost`. A table that is not there is made, at what `cost_of()` gives, which has the vectors' `dimensions`. Vectors
    that are not finite are kept as nulls, as LanceDB takes no others.
    """

    def __init__(
        self, folder: Path, model: Model, num_crops: int | None, cost_of: Callable[[], dict], of: str = "images"
    ):
        made_by = {"of": of, "recipe": recipe(model, num_crops), "transformers": transformers.__version__}
        text = json.dumps({"kind": model.kind} | made_by, sort_keys=True)
        self.name = hashlib.sha256(text.encode()).hexdigest()
        database = lancedb.connect(folder)
        if not (Path(folder) / f"{self.name}.lance").is_dir():
            cost = cost_of()
            fields = [("key", pa.string()), ("vector", pa.list_(pa.float32(), cost["dimensions"]))]
            schema = pa.schema(fields, {"made_by": text, "cost": json.dumps(cost)})
            with suppress(ValueError):  # another process may have made it meanwhile
                database.create_table(self.name, schema=schema)
        try:
            self.table = database.open_table(self.name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"The vectors kept in {folder} cannot be read: {one_line(error)}. Remove that folder, or give another "
                "--cache."
            ) from error
        self.cost: dict[str, Any] = json.loads(self.table.schema.metadata[b"cost"])

    def keys(self) -> set[str]:
        return set(self.table.search().select(["key"]).to_arrow()["key"].to_pylist())

    def add(self, vectors: dict[str, np.ndarray]) -> None:
        if vectors:
            rows = [vector.astype(np.float32) if np.isfinite(vector).all() else None for vector in vectors.values()]
            self.table.add(pa.table({"key": list(vectors), "vector": rows}, schema=self.table.schema))

    def read(self) -> dict[str, np.ndarray]:
        rows = self.table.to_arrow()
        width = rows["vector"].type.list_size
        vectors = rows["vector"].combine_chunks().fill_null([np.nan] * width).flatten().to_numpy()
        return dict(zip(rows["key"].to_pylist(), vectors.reshape(-1, width)))
