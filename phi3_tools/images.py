"""
Images of a SOURCE as rows, and the one way that the tools open them.

A SOURCE is `digits` or `small-text` (built in), a folder of images (subfolders are classes; or a metadata.csv, .jsonl
or .parquet with a column `file_name`), one image, a parquet file or a folder of them, a webdataset (a tar file or a
folder of them), or the id of a dataset on the Hub, `NAME[@REVISION]`. Names are taken as they stand, never as
patterns. Whatever is left out is counted and named.
"""

import functools
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

from phi3_tools import ROOT
from phi3_tools.results import LFS_POINTER, name_some, one_line, say_left_out

DIGITS, SMALL_TEXT = "digits", "small-text"
ACCEPTED = (
    f"{DIGITS!r} or {SMALL_TEXT!r} (built in), a folder of images (subfolders are classes, or a metadata.csv or "
    "metadata.jsonl with a column `file_name`), a parquet file, a webdataset's tar file, a folder of either, or the "
    "id of a dataset on the Hub, NAME[@REVISION]"
)
NAME, IMAGE, LABEL, TEXT = "name", "image", "label", "text"
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "held_out"}  # names of folders, words in files' names
UNDECODED = datasets.Image(decode=False)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Images by their names whether Pillow opens them here or not: those that it does not are told, not passed over.
NOT_BY_PILLOW = {".heic", ".heif", ".hif", ".jxl", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf"}
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats that Pillow knows by name and cannot open

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?")

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SEED, HELD_OUT = 0, 0.2
DIGIT_CROPS = 0  # A digit has 8 x 8 pixels: the global view shows all of it.
WORDS = ("anchor", "basket", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket")
PAGES_A_WORD, PAGE_SIZE, LETTER_SIZE, TIMES = 10, 672, 9, 80


# Opening an image


@functools.cache
def _image_processor():
    from transformers import AutoImageProcessor  # here, because it is slow to import

    return AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True)


def open_image(image: str | Path | bytes | Image.Image) -> Image.Image:
    """
    A path, a file's bytes or a PIL image -> a PIL image in RGB, as the image processor's `open_image` opens it:
    upright by a file's EXIF, 16 bits scaled to 8. Formats of pillow-heif are known where it is installed.

    Raises:
        ValueError: it cannot be read.
    """
    _known_suffixes()  # which registers the plugins
    return _image_processor().open_image(image)


def image_bytes(image: dict | None) -> bytes:
    """
    The file of an undecoded image, `{"bytes": ..., "path": ...}`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        raise ValueError("the row holds no image, or names a file outside of the data's own folder")
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"]
    try:
        if path.startswith("hf://"):  # of a stream from the Hub
            from huggingface_hub import HfFileSystem

            return HfFileSystem().cat_file(path)
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read as an image: {error.strerror or one_line(error)}") from error
    if content.startswith(LFS_POINTER):
        raise ValueError("it is a Git LFS pointer in place of the file: run `git lfs pull`")
    return content


def image_hash(image: dict | None) -> str:
    """SHA-256 of the file of an undecoded image, as hex digits. Raises ValueError as [`image_bytes`] does."""
    return hashlib.sha256(image_bytes(image)).hexdigest()


def read_image(image: dict | None, opener: Callable[[bytes], Image.Image] = open_image) -> Image.Image:
    """
    An undecoded image -> a PIL image in RGB, by [`open_image`] or the `open_image` of a model's own image processor.

    Raises:
        ValueError: it cannot be read; the reason, without the image's name.
    """
    content = image_bytes(image)
    try:
        return opener(content)
    except ValueError as error:
        reason = one_line(error.__cause__ or error)
        if isinstance(error.__cause__, UnidentifiedImageError):
            reason = "its format is not known here"
            if content[4:8] == b"ftyp":
                reason += ". Photographs of phones (HEIC) take: pip install pillow-heif"
        raise ValueError(f"it cannot be read as an image: {reason}") from error


def readable(split: Dataset, skip_broken: bool = False) -> Dataset:
    """
    The rows of a split whose images can be read, each of which is read for that.

    Raises:
        ValueError: some cannot, and `skip_broken` is off; they are counted and named.
    """
    broken = {}
    for number, row in enumerate(tqdm(split, desc="Checking", unit="image")):
        try:
            read_image(row[IMAGE])
        except ValueError as error:
            broken[number] = f"{row[NAME]}: {error}"
    if not broken:
        return split
    if not skip_broken:
        raise ValueError(
            f"{len(broken)} of {len(split)} images are broken. Mend or remove them, or skip them by --skip-broken:\n"
            f"{name_some(list(broken.values()))}"
        )
    say_left_out(list(broken.values()), len(split))
    return split.select([number for number in range(len(split)) if number not in broken])


# SOURCE -> rows


def load_images(
    source: str | Path,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    streaming: bool = False,
    needs_labels: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """
    Images and what is known of them.

    Args:
        source: see the module's docstring.
        image_column, label_column, text_column: their names in the data; by default its only column of images,
            `label`, and `text` or `caption`, where there are such.
        streaming: give streams, for data that the disk cannot hold.
        needs_labels: raise where the data has no labels, and say what would give it some.

    Returns:
        The data's splits, with the columns `image` (undecoded: see [`read_image`]); `name`, which tells the row; and
        where the data has them `text` and `label`: a `ClassLabel` for words, whole numbers and truth values, else as
        in the data.

    Raises:
        ValueError: the source cannot be read as images, or lacks a column.
    """
    source, columns = str(source), {IMAGE: image_column, LABEL: label_column, TEXT: text_column}
    if source in (DIGITS, SMALL_TEXT) and not Path(source).exists():
        splits = _load_digits() if source == DIGITS else _load_small_text()
        for name, split in splits.items():
            names = [f"row {number}" for number in range(len(split))]
            splits[name] = split.cast_column(IMAGE, UNDECODED).add_column(NAME, names)
    elif Path(source).exists():
        splits = _load_path(Path(source), columns, streaming)
    else:
        splits = _load_hub(source, columns, streaming)
    first = next(iter(splits.values()))
    if needs_labels and LABEL not in (first.features or {}):
        raise ValueError(f"{source} has no labels. {_why_no_labels(source)}")
    if not any(isinstance(split, IterableDataset) for split in splits.values()):
        splits = _with_classes(DatasetDict(splits))
    if streaming:
        return IterableDatasetDict(
            {
                name: split if isinstance(split, IterableDataset) else split.to_iterable_dataset()
                for name, split in splits.items()
            }
        )
    return splits


def load_rows(source: str | Path, **columns: str | None) -> Dataset:
    """
    The rows of all splits of a SOURCE one after another, with `image`, `name` and, where there are such, `text`; where
    there are several splits their names stand before the rows'. Arguments are those of [`load_images`].
    """
    splits = load_images(source, **columns)
    kept = [name for name in (IMAGE, NAME, TEXT) if name in next(iter(splits.values())).column_names]
    parts = []
    for split, rows in splits.items():
        rows = rows.select_columns(kept)
        if len(splits) > 1:
            rows = rows.add_column("of_split", [f"{split}/{name}" for name in rows[NAME]])
            rows = rows.remove_columns(NAME).rename_column("of_split", NAME)
        parts.append(rows)
    return datasets.concatenate_datasets(parts)


def _why_no_labels(source):
    if Path(source).is_dir() and _find_files(Path(source)).images:
        return (
            "Its images lie in no subfolders, or not all at one depth. Put those of each class into a folder of its "
            "own, or write a metadata.csv with the columns file_name and label (or another, by --label-column)."
        )
    return f"Name its column of labels by --label-column, or give {ACCEPTED}."


def _with_classes(splits):
    """Labels that are words, whole numbers or truth values as one `ClassLabel` for all splits."""
    feature = next(iter(splits.values())).features.get(LABEL)
    if not isinstance(feature, Value) or feature.dtype.startswith(("float", "double", "decimal")):
        return splits
    labels = sorted({label for split in splits.values() for label in split.unique(LABEL)} - {None})
    numbers, classes = {label: number for number, label in enumerate(labels)}, ClassLabel(names=[*map(str, labels)])
    return DatasetDict(
        {
            name: split.remove_columns(LABEL).add_column(
                LABEL, [numbers.get(label) for label in split[LABEL]], feature=classes
            )
            for name, split in splits.items()
        }
    )


# What is built in


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    scikit-learn's handwritten digits as the small checkpoint was trained on them: uint8 images `(n, 8, 8)` to train
    with and held out, and labels `(n,)` of each.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return train_test_split(images, labels, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels)


def _load_digits():
    training, held_out, training_labels, held_out_labels = digits_split()
    features = Features({IMAGE: datasets.Image(), LABEL: ClassLabel(names=list(DIGIT_NAMES))})
    halves = {"train": (training, training_labels), "test": (held_out, held_out_labels)}
    return {
        name: Dataset.from_dict({IMAGE: [Image.fromarray(image) for image in images], LABEL: labels}, features)
        for name, (images, labels) in halves.items()
    }


def _load_small_text():
    """
    Pages strewn with one word each, in letters that can be read at 672 x 672 pixels and not at half of that: HD crops
    show them, and a single view does not.
    """
    rng, font = np.random.default_rng(0), ImageFont.load_default(LETTER_SIZE)
    pages, labels = [], []
    for label in np.repeat(range(len(WORDS)), PAGES_A_WORD).tolist():
        page = Image.new("L", (PAGE_SIZE, PAGE_SIZE), int(rng.integers(200, 256)))
        for x, y in rng.integers(0, PAGE_SIZE - LETTER_SIZE, (TIMES, 2)).tolist():
            ImageDraw.Draw(page).text((x, y), WORDS[label], int(rng.integers(100)), font)
        pages.append(page)
        labels.append(label)
    features = Features({IMAGE: datasets.Image(), LABEL: ClassLabel(names=list(WORDS))})
    return {"train": Dataset.from_dict({IMAGE: pages, LABEL: labels}, features)}


# Files and folders


class Files(NamedTuple):
    """What a folder or file holds; `left_out` are names with reasons."""

    images: list[Path]
    tables: list[Path]
    tars: list[Path]
    metadata: list[Path]
    left_out: list[str]


def _find_files(source: Path) -> Files:
    """All files of a folder in the order of their names; links are followed. Hidden files are passed over."""
    files = Files([], [], [], [], [])
    for path in _walk(source, files.left_out):
        name, suffix = str(path), path.suffix.lower()
        try:
            name.encode()
        except UnicodeEncodeError:
            files.left_out.append(f"{name.encode('utf-8', 'replace').decode()}: its name is not UTF-8")
            continue
        if not path.is_file():
            reason = "no regular file" if path.exists() else "a link that leads nowhere"
            files.left_out.append(f"{name}: it is {reason}")
        elif path.name in METADATA:
            files.metadata.append(path)
        elif suffix == ".parquet":
            files.tables.append(path)
        elif suffix == ".tar":
            files.tars.append(path)
        elif is_image_name(path) or _looks_like_an_image(path):
            files.images.append(path)
        else:
            files.left_out.append(f"{name}: it is no image by its name or content")
    if files.images and files.tables + files.tars:
        reason = "it lies beside images. Give it by itself"
        files.left_out.extend(f"{path}: {reason}" for path in files.tables + files.tars)
        files = files._replace(tables=[], tars=[])
    return files


def _walk(source, left_out) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    visited = {}  # {real folder: its name here}

    def unreadable(error):
        left_out.append(f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(source, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            left_out.append(
                f"{folder}: its images are taken already, because it is the same folder as {visited[real]}"
            )
            subfolders.clear()
            continue
        visited[real] = folder
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


@functools.cache
def _known_suffixes():
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    registered = Image.registered_extensions().items()
    return NOT_BY_PILLOW | {suffix for suffix, kind in registered if kind in Image.OPEN and kind not in STUBS}


def is_image_name(name: str | Path) -> bool:
    """Whether a file of this name is taken for an image, whether it is there or not."""
    return Path(name).suffix.lower() in _known_suffixes()


def _looks_like_an_image(path):
    try:
        with Image.open(path) as image:
            return image.format not in STUBS
    except Exception:  # decoders raise errors of every kind
        return False


def _load_path(source, columns, streaming):
    files = _find_files(source)
    splits = _load_image_files(source, files, columns) if files.images else {}
    if files.tables or files.tars:
        splits = _load_tables(source, files, columns, streaming)
    if not splits:
        raise _no_images(source, files)
    say_left_out(files.left_out, len(files.left_out) + sum(map(len, files[:3])), "files")
    return splits


def _no_images(source, files):
    named = f":\n{name_some(files.left_out)}" if files.left_out else "."
    return ValueError(f"{source} holds no images{named}\nGive {ACCEPTED}.")


def _load_image_files(source, files, columns):
    root = source if source.is_dir() else source.parent
    described = _read_metadata(files, columns)
    splits = {}
    for split, folder in _split_folders(root, files.images).items():
        paths = [path for path in files.images if path.is_relative_to(folder)]
        rows = [
            {
                IMAGE: {"path": str(path.absolute()), "bytes": None},
                NAME: "/".join(path.relative_to(root).parts[-2:]),
            }
            | described.get(path, {})
            for path in paths
        ]
        is_of_class = not described and len({len(path.parts) for path in paths}) == 1 and paths[0].parent != folder
        names = {NAME: None} | ({LABEL: None} if is_of_class else dict.fromkeys(n for row in rows for n in row))
        for row, path in zip(rows, paths):
            row |= {LABEL: path.parent.name} if is_of_class else {}
        split_rows = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names if name != IMAGE})
        splits[split] = split_rows.add_column(IMAGE, [row[IMAGE] for row in rows], feature=UNDECODED)
        # Content counts too: what was kept of files that have changed since is not theirs.
        about = [(*_version(path), row.get(LABEL)) for path, row in zip(paths, rows)]
        splits[split]._fingerprint = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]
    return splits


def _version(path):
    stat = path.stat()
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


def _split_folders(source, paths):
    """{split: its folder}, of which there are several only where all subfolders with images are named as splits."""
    inside = [path.relative_to(source).parts for path in paths]
    names = {parts[0] for parts in inside if len(parts) > 1}
    if not names or len(names) < len({parts[0] for parts in inside}) or not names <= SPLITS:
        return {"train": source}
    return {name: source / name for name in sorted(names)}


def _read_metadata(files, columns):
    """{path: {our column: value}} of the images that metadata files describe; the others of theirs are left out."""
    described, listed_by = {}, {}
    images = set(files.images)
    for path in files.metadata:
        try:
            rows = _read_rows(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8. Save it so: {one_line(error)}") from error
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
        if rows and "file_name" not in rows[0]:
            raise ValueError(f"{path} has no column 'file_name', but {', '.join(map(repr, rows[0]))}.")
        names = _named_columns(list(rows[0]) if rows else [], columns, path) if rows else {}
        for row in rows:
            image = Path(os.path.normpath(path.parent / str(row["file_name"])))
            if image in described:
                raise ValueError(
                    f"{row['file_name']} of {path} is listed more than once. Leave one row of it, or give each row a "
                    "copy of the image, under a name of its own."
                )
            if image in images:
                described[image] = {ours: row[theirs] for ours, theirs in names.items()}
            else:
                files.left_out.append(f"{row['file_name']}: {path} lists it, but there is no such image")
        listed_by[path.parent] = path
    for ours in (LABEL, TEXT):
        if columns[ours] and not files.metadata:
            raise ValueError(
                f"There is no column {columns[ours]!r} in a folder of images without a metadata.csv. Leave out "
                f"--{ours}-column, or write one."
            )
    for image in list(files.images):
        above = next((listed_by[folder] for folder in image.parents if folder in listed_by), None)
        if above and image not in described:
            files.left_out.append(f"{image}: {above} does not list it")
            files.images.remove(image)
    if not files.images:
        raise ValueError(f"{files.metadata[0]} lists no image of its folder. Mend or remove it.")
    return described


def _read_rows(path) -> list[dict]:
    if path.suffix == ".csv":
        path.read_text("utf-8")  # raises, where pyarrow would make bytes of other encodings
        options = pyarrow.csv.ConvertOptions(
            column_types={"file_name": pa.string()}, strings_can_be_null=True, null_values=[""]
        )
        parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return pyarrow.csv.read_csv(path, convert_options=options, parse_options=parsing).to_pylist()
    read = pyarrow.json.read_json if path.suffix == ".jsonl" else pq.read_table
    return read(path).to_pylist()


def _named_columns(names, wanted, source):
    """{our name: name in the data} of label and text; `wanted`: {our name: name or None}."""
    found = {}
    for ours, guesses in ((LABEL, [LABEL]), (TEXT, [TEXT, "caption"])):
        name = wanted[ours] or next((guess for guess in guesses if guess in names), None)
        if name is not None and name not in names:
            raise _no_column(source, name, names, ours)
        if name is not None:
            found[ours] = name
    return found


def _no_column(source, name, names, ours):
    named, there = repr(name) if name else f"of {ours}s", ", ".join(map(repr, names))
    return ValueError(f"{source} has no column {named}, but {there}. Name the one of the {ours}s by --{ours}-column.")


def _load_tables(source, files, columns, streaming):
    by_split = {}
    for path in files.tables + files.tars:
        words = re.split(r"[^a-z_]+", str(path.relative_to(source)).lower()) if path != source else []
        by_split.setdefault(next((word for word in words if word in SPLITS), None), []).append(path)
    if None in by_split:
        by_split = {"train": files.tables + files.tars}
    splits = {}
    for split, paths in by_split.items():
        # No larger than a row group, which is read at once.
        shards = [shard for path in paths for shard in _shards_of_table(path, source, columns, 2**20)]
        if not shards or (shards[0]["kind"] == "parquet" and IMAGE not in shards[0]["columns"]):
            raise ValueError(f"{paths[0]} holds no images.")
        features = _features(shards)
        build = IterableDataset.from_generator if streaming else Dataset.from_generator
        splits[split] = build(_rows_of_shards, features=features, gen_kwargs={"shards": shards})
    return splits


def _rows_of_shards(shards):
    for shard in shards:
        for row in read_shard(shard):
            path = row[IMAGE] and row[IMAGE]["path"]
            yield row | {NAME: _row_name(path, row[NAME].rpartition("#")[2])}


def _features(shards):
    columns = {IMAGE: UNDECODED, NAME: Value("string")}
    if shards[0]["kind"] == "tar":
        present = {ours for shard in shards for row in shard["rows"] for ours in row}
        return Features(columns | {ours: Value("string") for ours in (LABEL, TEXT) if ours in present})
    known = Features.from_arrow_schema(pq.read_schema(shards[0]["path"]))
    return Features({ours: known[theirs] for ours, theirs in shards[0]["columns"].items() if ours != IMAGE} | columns)


# Shards: where the rows of a SOURCE lie, for what is too much to be loaded


def make_shards(source: str | Path, shard_size: int, **columns: str | None) -> list[dict[str, Any]]:
    """
    The images of a folder, parquet or webdataset in numbered shards of at most `shard_size`, the same whenever the
    source is, for [`read_shard`]. Each has a `number`, a `size` and the `path` of its file; all of it can be JSON.

    Args:
        columns: as of [`load_images`]. A parquet file without images is one of texts where `text_column` names it.

    Raises:
        ValueError: there are none, or a file cannot be read.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"There is no {source}. Give a folder of images, a parquet file or a tar file.")
    columns = {ours: columns.get(f"{ours}_column") for ours in (IMAGE, LABEL, TEXT)}
    files, shards = _find_files(source), []
    described = _read_metadata(files, columns) if files.images else {}
    for start in range(0, len(files.images), shard_size):
        paths = files.images[start : start + shard_size]
        rows = [{NAME: str(path.absolute())} | described.get(path, {}) for path in paths]
        shards.append({"kind": "files", "path": str(source), "rows": rows, "size": len(rows)})
    for path in tqdm(files.tables + files.tars, desc="Listing", unit="file", disable=not files.tables + files.tars):
        shards += _shards_of_table(path, source, columns, shard_size)
    if not shards:
        raise _no_images(source, files)
    say_left_out(files.left_out, len(files.left_out) + sum(map(len, files[:3])), "files")
    return [shard | {"number": number} for number, shard in enumerate(shards)]


def read_shard(shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a shard: `image`, undecoded; `name`, which no other row has; and `label` and `text` where known."""
    if shard["kind"] == "files":
        for row in shard["rows"]:
            yield row | {IMAGE: {"path": row[NAME], "bytes": None}}
    elif shard["kind"] == "tar":
        with open(shard["path"], "rb") as file:

            def read(place):
                file.seek(place[0])
                return file.read(place[1])

            for row in shard["rows"]:
                texts = {
                    ours: read(row[ours]).decode("utf-8", "replace").strip() for ours in (LABEL, TEXT) if ours in row
                }
                yield texts | {
                    IMAGE: {"bytes": read(row[IMAGE]), "path": row[NAME]},
                    NAME: f"{shard['path']}#{row[NAME]}",
                }
    else:
        columns = shard["columns"]
        table = pq.ParquetFile(shard["path"]).read_row_group(shard["row_group"], list(dict.fromkeys(columns.values())))
        table = table.slice(shard["start"], shard["size"])
        for number, row in enumerate(table.to_pylist(), start=shard["first"] + shard["start"]):
            values = {ours: row[theirs] for ours, theirs in columns.items()}
            image = own_image(values.get(IMAGE), shard["root"])
            yield values | {IMAGE: image, NAME: f"{shard['path']}#{number}"}


def _shards_of_table(path, source, columns, shard_size):
    """Shards of a parquet file, none beyond its row group, or of a tar file."""
    about = {"path": str(path), "root": str(source if source.is_dir() else source.parent), "version": _version(path)}
    if path.suffix == ".parquet":
        try:
            file, first = pq.ParquetFile(path), 0
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {one_line(error)}. Mend or remove it.") from error
        names = _table_columns(file.schema_arrow, columns, path)
        for row_group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(row_group).num_rows
            for start in range(0, num_rows, shard_size):
                where = {"row_group": row_group, "first": first, "start": start}
                size = min(shard_size, num_rows - start)
                yield about | where | {"kind": "parquet", "columns": names, "size": size}
            first += num_rows
        return
    try:
        with tarfile.open(path, "r:") as tar:
            listed = [member for member in tar if not member.isdir()]
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar file: {error}. Mend or remove it.") from error
    members = {member.name: [member.offset_data, member.size] for member in listed if member.isfile()}
    images = [name for name in members if is_image_name(name)]
    stems = {os.path.splitext(name)[0] for name in images}
    left_out = [
        f"{path}#{member.name}: it is no image by its name, or no regular file"
        for member in listed
        if not (member.isfile() and os.path.splitext(member.name)[0] in stems)
    ]
    say_left_out(left_out, len(listed), "members")
    rows = []
    for name in images:
        stem = os.path.splitext(name)[0]
        beside = {LABEL: members.get(f"{stem}.cls"), TEXT: members.get(f"{stem}.txt")}
        rows.append({NAME: name, IMAGE: members[name]} | {ours: place for ours, place in beside.items() if place})
    for start in range(0, len(rows), shard_size):
        part = rows[start : start + shard_size]
        yield about | {"kind": "tar", "rows": part, "size": len(part)}


def _table_columns(schema, columns, source):
    """{our name: name in the data} of a parquet file's schema."""
    name = _find_image_column(schema, columns[IMAGE], source, columns[TEXT])
    others = _named_columns([column for column in schema.names if column != name], columns, source)
    return ({IMAGE: name} if name else {}) | others


def _find_image_column(schema, name, source, text_column):
    def holds_images(kind):
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    features = Features.from_arrow_schema(schema)
    marked = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = marked[:1] or [column.name for column in schema if holds_images(column.type)]
    if IMAGE in candidates:
        candidates = [IMAGE]
    if name is None and (len(candidates) == 1 or (text_column and not candidates)):
        return next(iter(candidates), None)
    if name is None or name not in schema.names:
        raise _no_column(source, name, schema.names, IMAGE)
    if not holds_images(schema.field(name).type):
        raise ValueError(f"The column {name!r} of {source} holds no images, but {schema.field(name).type}.")
    return name


def own_image(image: dict | bytes | None, root: str | Path | None) -> dict | None:
    """
    A cell of a table -> an undecoded image, or `None`. The data does not decide which files are opened: a path counts
    only if there are no bytes, and if it lies in the data's own folder, `root`, where it has one.
    """
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if not image or (image["bytes"] is None and not image.get("path")):
        return None
    if image["bytes"] is not None:
        return {"bytes": image["bytes"], "path": image.get("path")}
    if root is None:
        return None
    path = Path(root, image["path"]).resolve()
    return {"bytes": None, "path": str(path)} if path.is_relative_to(Path(root).resolve()) else None


# The Hub


def _load_hub(source, columns, streaming):
    found = HUB_ID.fullmatch(source)
    if not found or Path(source).suffix in (".parquet", ".tar", ".zip"):
        raise ValueError(f"There is no {source}. Give {ACCEPTED}.")
    try:
        splits = datasets.load_dataset(found["name"], revision=found["revision"], streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        raise ValueError(
            f"There is no folder {source}, and no dataset of that name to be had from the Hub: "
            f"{one_line(error.__cause__ or error)}. Give {ACCEPTED}."
        ) from error
    return {split: _own_columns(rows, columns, found["name"]) for split, rows in splits.items()}


def _own_columns(split, columns, dataset):
    features = split.features or split._resolve_features().features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = columns[IMAGE] or next(iter(images), None)
    if image not in images:
        raise _no_column(dataset, image, features, IMAGE)
    names = {IMAGE: image} | _named_columns([name for name in features if name != image], columns, dataset)
    # Undecoded from the start: in a stream each step that follows would decode, and fail at a broken image.
    split = split.cast_column(image, UNDECODED).select_columns(list(names.values()))
    split = split.rename_columns({theirs: ours for ours, theirs in names.items() if ours != theirs})

    def own(row, number=None):
        image = row[IMAGE]
        is_own = image and (image["bytes"] is not None or _is_of_dataset(image["path"], dataset))
        return {IMAGE: image if is_own else None}

    if isinstance(split, IterableDataset):
        features = split.features and Features({**split.features, NAME: Value("string")})
        return split.map(
            lambda row, number: own(row) | {NAME: _row_name(row[IMAGE] and row[IMAGE]["path"], number)},
            with_indices=True,
            features=features,
        )
    images = split.data.column(IMAGE)
    paths = pc.struct_field(images, "path").to_pylist()
    is_empty = pc.is_null(pc.struct_field(images, "bytes")).to_pylist()
    if any(empty and not _is_of_dataset(path, dataset) for empty, path in zip(is_empty, paths)):
        split = split.map(own, features=split.features, desc="Leaving out paths")
    return split.add_column(NAME, [_row_name(path, number) for number, path in enumerate(paths)])


def _is_of_dataset(path, dataset):
    """Whether a file is one of the dataset's own: in a stream on the Hub, else where its client keeps them."""
    if path and path.startswith("hf://"):
        return path.startswith(f"hf://datasets/{dataset}@")
    kept = (
        Path(HF_HUB_CACHE, f"datasets--{dataset.replace('/', '--')}"),
        Path(datasets.config.DOWNLOADED_DATASETS_PATH),
    )
    return bool(path) and any(Path(os.path.normpath(path)).is_relative_to(folder) for folder in kept)


def _row_name(path, number):
    return "/".join(Path(path).parts[-2:]) if path else f"row {number}"
