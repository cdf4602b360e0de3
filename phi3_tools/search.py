"""
An index of images on disk, in LanceDB, and the images in it that are nearest to another.

Images are told apart by the content of their files, so that a copy or a moved file is not embedded again. Each batch
is one transaction: killed at any time, the same command goes on where it stopped. One process at a time writes.
"""

import hashlib
import io
import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock, Timeout
from lancedb.table import Table
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table as RichTable
from tqdm import tqdm

from phi3_tools import ROOT
from phi3_tools.images import IMAGE, NAME, image_hash, is_image_name, load_rows, read_image
from phi3_tools.measures import unit
from phi3_tools.models import BATCH_SIZE, Embedder, Model, encode_or_refuse, find_model, load_embedder, recipe
from phi3_tools.results import (
    THUMBNAIL,
    check_png,
    check_writable,
    console,
    draw_rows,
    new_figure,
    one_line,
    save_figure,
    say_left_out,
    thumbnail,
)

TABLE, MADE_BY, LOCK = "images", b"made_by", ".lock"
PER_ROW = 6


# The commands


def make_index(source, index, model=None, num_crops=None, image_column=None, dtype="float32", device=None) -> None:
    """Makes an index of a SOURCE, or brings one in line with it: what is gone from the source leaves the index."""
    index = Path(index)
    made_by = _read_made_by(index, required=False)
    rows = load_rows(source, image_column=image_column)
    found, made_by = _agree(index, made_by, model, num_crops, dtype)
    check_writable(index)
    embedder = load_embedder(found, made_by["num_crops"], made_by["dtype"], device)
    with _written(index, made_by, embedder) as table:
        read = _embed_rows(table, rows, _place(source), embedder)
        _follow(table, read, _place(source))


def add_images(sources, index, image_column=None, device=None) -> None:
    """Adds the images of several SOURCEs to an index."""
    index = Path(index)
    found, made_by = _agree(index, _read_made_by(index))
    rows = {_place(source): load_rows(source, image_column=image_column) for source in sources}
    embedder = load_embedder(found, made_by["num_crops"], made_by["dtype"], device)
    with _written(index, made_by, embedder) as table:
        for place, images in rows.items():
            _embed_rows(table, images, place, embedder)


def remove_images(paths, index) -> None:
    """Removes images from an index, each by its file, by its folder, or by a copy of its file."""
    index = Path(index)
    made_by = _read_made_by(index)
    with _written(index, made_by) as table:
        held, hashes = _held(table), set()
        for path in map(Path, paths):
            place = _place(path)
            digest = image_hash({"path": place, "bytes": None}) if path.is_file() else None
            found = {key for key, kept in held.items() if key == digest or _lies_in(kept, place)}
            if not found:
                raise ValueError(f"{path} is not in {index}. Nothing was removed.")
            hashes |= found
        _delete(table, hashes)
        console.print(f"Removed {len(hashes)}.")


def query_index(
    query, index, text=None, count=5, exclude_self=True, output=Path("neighbours.png"), device=None
) -> None:
    """Prints and draws the images of an index that are nearest to an image, to words, or to both."""
    made_by = _read_made_by(Path(index))
    image, text = _part(query, text)
    if image:
        try:
            read_image(image)  # a wrong one is told before the model is loaded
        except ValueError as error:
            raise ValueError(f"{query}: {error}") from error
    output = check_png(output)
    table = _open_table(Path(index))
    if not table.count_rows():
        raise ValueError(f"{index} holds no images. Add some: phi3-embed search add SOURCE {index}")
    found, made_by = _agree(Path(index), made_by)
    embedder = load_embedder(found, made_by["num_crops"], made_by["dtype"], device)
    opened = image and read_image(image, embedder.open_image)
    rows = _nearest(
        table, _embed_query(embedder, opened, text), count, image_hash(image) if image and exclude_self else None
    )
    printed = RichTable(title=f"Nearest to {' and '.join(filter(None, [image and query, text and repr(text)]))}")
    for column, justify in (("", "right"), ("cosine", "right"), ("image", "left")):
        printed.add_column(column, justify=justify, overflow="fold")
    for number, row in enumerate(rows, start=1):
        printed.add_row(str(number), f"{row['cosine']:.3f}", row["path"])
    Console(markup=False, emoji=False).print(printed)
    _draw(opened or _draw_words(text), rows, output)
    console.print(f"Drawn: {output}")


def _part(query, text):
    """The words after a command -> an undecoded image or None, and a text or None."""
    if text is None and not os.path.isfile(query) and not is_image_name(query):  # Path fails on long words
        return None, query
    return {"path": query, "bytes": None}, text


def _embed_query(embedder, image, text):
    """The unit vector `(d,)` of an image, of words, or of both."""
    if text is None:
        return unit(embedder.encode_images([image]))[0]
    if embedder.encode_texts is None:
        raise ValueError(
            f"{embedder.model.label}, of which the index is made, has no text side: it holds no words. Query it by "
            "the file of an image, or make an index by a model that embeds words too."
        )
    if image is None:
        return unit(embedder.encode_texts([text]))[0]
    if embedder.encode_pairs is not None:
        return unit(embedder.encode_pairs([text], [image]))[0]
    # A model of two towers has no vector of both: the middle between the two.
    return unit(unit(embedder.encode_images([image])) + unit(embedder.encode_texts([text])))[0]


# What an index is made by


def _agree(index, made_by, model=None, num_crops=None, dtype=None) -> tuple[Model, dict[str, Any]]:
    """
    The model asked for, by default that of the index, and by what the index is made, or will be.

    Raises:
        ValueError: the index is made by another model, with other settings, pooling, crops or dtype.
    """
    found = find_model(model or (made_by["model"] if made_by else str(ROOT)))
    if made_by and num_crops is None:
        num_crops = made_by["num_crops"]
    given = {
        "model": found.pinned_text,
        "num_crops": num_crops,
        "dtype": dtype or (made_by or {}).get("dtype", "float32"),
        "recipe": recipe(found, num_crops),
    }
    if made_by and any(given[key] != made_by.get(key) for key in ("dtype", "recipe")):
        raise ValueError(
            f"{index} is made by {_described(made_by)}, but this is {_described(given)}. Their vectors cannot be "
            "compared. Give the same model and number of crops, or make another index."
        )
    return found, made_by or given


def _described(made_by):
    recipe = made_by.get("recipe", {"version": "of an earlier phi3-embed"})
    about = []
    for name, value in {**recipe, "dtype": made_by.get("dtype")}.items():
        text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
        about.append(
            f"{name} {hashlib.sha256(text.encode()).hexdigest()[:12] if isinstance(value, dict) else text[:20]}"
        )
    return f"{made_by['model']} ({', '.join(about)})"


def _read_made_by(index, required=True) -> dict[str, Any] | None:
    """What the index in a folder is made by; `None` where there is none yet and none is `required`."""
    if (index / f"{TABLE}.lance").is_dir():
        return json.loads(_open_table(index).schema.metadata[MADE_BY])
    if required:
        raise ValueError(f"There is no index {index}. Make one: phi3-embed search index SOURCE {index}")
    if index.is_file() or (index.is_dir() and any(path.name != LOCK for path in index.iterdir())):
        raise ValueError(f"{index} is no index, and not an empty folder. Give one that is, or that does not exist.")
    return None


# The table


def _open_table(index) -> Table:
    try:
        return lancedb.connect(index).open_table(TABLE)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"The index {index} cannot be read: {one_line(error)}") from error


@contextmanager
def _written(index: Path, made_by: dict[str, Any], embedder: Embedder | None = None) -> Iterator[Table]:
    """The table of an index for one process to write, made if there is none; packed at the end, and counted."""
    check_writable(index)
    lock = FileLock(index / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"Another process writes to {index}. Waiting for it.")
        lock.acquire()
    try:
        if not (index / f"{TABLE}.lance").is_dir():
            width = len(embedder.encode_images([Image.new("RGB", (8, 8))])[0])
            fields = {"hash": pa.string(), "path": pa.string(), "thumbnail": pa.binary()}
            fields["vector"] = pa.list_(pa.float32(), width)
            schema = pa.schema(list(fields.items()), {MADE_BY: json.dumps(made_by)})
            lancedb.connect(index).create_table(TABLE, schema=schema, exist_ok=True)
        if (now := _read_made_by(index)) != json.loads(json.dumps(made_by)):
            raise ValueError(f"{index} was made meanwhile by {_described(now)}. Give another folder for yours.")
        table = _open_table(index)
        _remove_duplicates(table)
        yield table
        table.optimize()
        console.print(f"{index} holds {table.count_rows()} images.")
    finally:
        lock.release()


def _remove_duplicates(table):
    """Leaves one row of each image, because two processes of an earlier version could write two."""
    hashes = table.search().select(["hash"]).to_arrow()["hash"].to_pylist()
    for digest in [digest for digest, count in Counter(hashes).items() if count > 1]:
        row = table.search().where(f"hash = '{digest}'").limit(1).to_arrow()
        table.delete(f"hash = '{digest}'")
        table.add(row)


def _held(table) -> dict[str, str]:
    """{content hash: path} of an index."""
    columns = table.search().select(["hash", "path"]).to_arrow()
    return dict(zip(columns["hash"].to_pylist(), columns["path"].to_pylist()))


def _delete(table, hashes):
    table.delete(f"hash IN ({', '.join(repr(digest) for digest in sorted(hashes))})")


def _place(source) -> str:
    """What the paths of a source's images begin with: its absolute path, or its name."""
    return str(Path(source).absolute()) if Path(source).exists() else str(source)


def _lies_in(path, place):
    return path == place or path.startswith((f"{place}/", f"{place}#"))


def _embed_rows(table: Table, rows: Dataset, place: str, embedder: Embedder) -> dict[str, set[str]]:
    """Embeds what the index does not hold yet, batch by batch -> {content hash: paths} of what can be read."""
    held, read, added, left_out, batch = _held(table), {}, 0, [], []

    def write():
        vectors = encode_or_refuse(embedder.encode_images, [image for *_, image in batch])
        entries = []
        for (digest, path, image), vector in zip(batch, vectors):
            if isinstance(vector, ValueError) or not np.isfinite(vector).all():
                left_out.append(f"{path}: {vector if isinstance(vector, ValueError) else 'its vector is not finite'}")
                continue
            entry = {"hash": digest, "path": path, "thumbnail": thumbnail(image), "vector": unit(vector[None])[0]}
            entries.append(entry)
        batch.clear()
        if entries:
            table.add(entries)
        return len(entries)

    for row in tqdm(rows, desc="Indexing", unit="image"):
        path = f"{place}#{row[NAME]}" if not row[IMAGE] or row[IMAGE]["bytes"] is not None else row[IMAGE]["path"]
        try:
            digest = image_hash(row[IMAGE])
            if digest not in read and digest not in held:
                batch.append((digest, path, read_image(row[IMAGE], embedder.open_image)))
            read.setdefault(digest, set()).add(path)
        except ValueError as error:
            left_out.append(f"{path}: {error}")
        if len(batch) == BATCH_SIZE:
            added += write()
    if batch:
        added += write()
    copies = sum(map(len, read.values())) - len(read)
    console.print(f"Added {added}. Already there: {len(held.keys() & read.keys())}. Further copies: {copies}.")
    say_left_out(left_out, len(rows))
    if not added and not held.keys() & read.keys():
        raise ValueError(f"Not one of the {len(rows)} images of {place} can be embedded. Nothing was changed.")
    return read


def _follow(table, read, place):
    """Gives images that have moved their new paths, and removes those that their source does not hold any more."""
    gone = set()
    for digest, path in _held(table).items():
        if digest in read:
            is_stale = path not in read[digest] if _lies_in(path, place) else not Path(path.partition("#")[0]).exists()
            if is_stale:
                table.update(where=f"hash = '{digest}'", values={"path": min(read[digest])})
        elif _lies_in(path, place):
            gone.add(digest)
    if gone:
        _delete(table, gone)
        console.print(f"Removed {len(gone)} that {place} does not hold any more.")


def _nearest(table, vector, count, excluded=None) -> list[dict[str, Any]]:
    """The `count` nearest images, nearest first: dicts of `path`, `thumbnail` and `cosine`."""
    search = table.search(vector).distance_type("cosine").limit(count)
    if excluded:
        search = search.where(f"hash != '{excluded}'")
    return [row | {"cosine": 1 - row["_distance"]} for row in search.to_list()]


def _draw_words(text):
    image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    lines = textwrap.wrap(text, 20)
    ImageDraw.Draw(image).multiline_text((8, 8), "\n".join(lines), "black", ImageFont.load_default(20))
    return image


def _draw(image, rows, output):
    """A query and its neighbours as one PNG."""
    cells = [(image, "query", "black")]
    for number, row in enumerate(rows, start=1):
        title = f"{number}.  {row['cosine']:.3f}\n{Path(row['path']).name[-22:]}"
        cells.append((Image.open(io.BytesIO(row["thumbnail"])), title, "black"))
    lines = [cells[start : start + PER_ROW] for start in range(0, len(cells), PER_ROW)]
    figure = new_figure(figsize=(2 * len(lines[0]), 2.5 * len(lines)))
    draw_rows(figure, lines)
    save_figure(figure, output)
