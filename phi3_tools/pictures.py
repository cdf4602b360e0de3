"""Pictures of a folder, a parquet file, a Hub dataset or a built-in set, as `datasets` of one layout."""

import hashlib
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDatasetDict, load_dataset
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from phi3_tools.digits import NAMES, digits_split

DIGITS, SMALL_TEXT = "digits", "small-text"
ACCEPTED = (
    f"{DIGITS!r} or {SMALL_TEXT!r} (built in), a folder of pictures (subfolders are classes, or a metadata.csv or "
    "metadata.jsonl with a column `file_name`), a parquet file, or the id of a dataset on the Hub"
)
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "held_out"}  # names of folders
NAME, IMAGE, LABEL, TEXT = "name", "image", "label", "text"
MAX_NAMED = 10
WORDS = ["anchor", "basket", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket"]
PAGES_A_WORD, PAGE_SIZE, LETTER_SIZE, TIMES = 10, 672, 9, 80


def load_pictures(source, image_column=None, label_column=None, text_column=None, streaming=False):
    """
    Pictures and what is known of them.

    Args:
        source: see `ACCEPTED`.
        image_column, label_column, text_column: their names in the data; by default its first column of images,
            `label`, and `text` or `caption`, where there are such.

    Returns:
        A `DatasetDict` (with `streaming` an `IterableDatasetDict`) of the data's splits, with the columns `image`
        (undecoded: see `read_picture`); `name`, the file's or the row's number; and where the data has them `text` and
        `label`: a `ClassLabel` for words and whole numbers, else as in the data.

    Raises:
        ValueError: the source cannot be read as pictures, or lacks a column.
    """
    splits = _load(str(source), streaming)
    columns = _find_columns(splits, {IMAGE: image_column, LABEL: label_column, TEXT: text_column})
    for name, split in splits.items():
        # Undecoded from the start: in a stream each step that follows would decode, and fail at a broken picture.
        split = split.cast_column(columns[IMAGE], datasets.Image(decode=False)).select_columns(list(columns.values()))
        split = split.rename_columns({theirs: ours for ours, theirs in columns.items() if ours != theirs})
        splits[name] = _with_names(split)
    return splits if streaming or LABEL not in columns else _with_classes(splits)


def _load(source, streaming):
    if source in (DIGITS, SMALL_TEXT):
        splits = load_digits() if source == DIGITS else load_small_text()
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    path = Path(source)
    if not path.exists() and (path.suffix or path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise ValueError(f"There is no {source}. Give {ACCEPTED}.")
    try:
        if path.is_file():
            return load_dataset("parquet", data_files=source, streaming=streaming)
        if not path.is_dir() or any(path.rglob("*.parquet")):
            return load_dataset(source, streaming=streaming)
        return load_dataset("imagefolder", data_dir=source, data_files=_files_of_splits(path), streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        raise ValueError(
            f"{source} cannot be read as pictures: {error.__cause__ or error}. Give {ACCEPTED}."
        ) from error


def _files_of_splits(folder):
    """
    {split: patterns}, of which there are several only where all subfolders are named as splits. Left alone `datasets`
    takes every file with such a word in its name, as in red/test.png, for one of that split, and drops all the others.
    """
    subfolders = [path.name for path in folder.glob("[!.]*") if path.is_dir() and any(path.iterdir())]
    if not subfolders or not SPLITS.issuperset(subfolders):
        return {"train": ["**"]}
    described = [path.name for path in folder.glob("metadata.*")]
    return {name: [f"{name}/**", *described] for name in subfolders}


def load_digits():
    """scikit-learn's handwritten digits, 8 x 8 pixels, split as `digits_split` does."""
    training, held_out, training_labels, held_out_labels = digits_split()
    features = Features({IMAGE: datasets.Image(), LABEL: ClassLabel(names=list(NAMES))})
    return DatasetDict(
        {
            split: Dataset.from_dict({IMAGE: [Image.fromarray(each) for each in images], LABEL: labels}, features)
            for split, images, labels in (("train", training, training_labels), ("test", held_out, held_out_labels))
        }
    )


def load_small_text():
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
    features = Features({IMAGE: datasets.Image(), LABEL: ClassLabel(names=WORDS)})
    return DatasetDict({"train": Dataset.from_dict({IMAGE: pages, LABEL: labels}, features)})


def _find_columns(splits, asked):
    """{our name: name in the data} of what is there; {our name: name or None} is asked for."""
    first = next(iter(splits.values()))
    features = first.features or first._resolve_features().features
    guesses = {
        IMAGE: [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        LABEL: [LABEL],
        TEXT: [TEXT, "caption"],
    }
    columns = {}
    for ours, name in asked.items():
        found = [name] if name else [guess for guess in guesses[ours] if guess in features]
        if (ours == IMAGE and not found) or (name and name not in features):
            raise ValueError(
                f"The data has no column {name or 'of images'!r}, but {', '.join(map(repr, features))}. "
                f"Name the one of the {ours}s."
            )
        if found:
            columns[ours] = found[0]
    if not isinstance(features[columns[IMAGE]], datasets.Image):
        raise ValueError(f"The column {columns[IMAGE]!r} holds no images, but {features[columns[IMAGE]]}.")
    return columns


def _with_names(split):
    if isinstance(split, datasets.IterableDataset):
        features = split.features and Features({**split.features, NAME: datasets.Value("string")})
        return split.map(
            lambda row, number: {NAME: _name(row[IMAGE]["path"], number)}, with_indices=True, features=features
        )
    paths = pc.struct_field(split.data.column(IMAGE), "path").to_pylist()
    return split.add_column(NAME, [_name(path, number) for number, path in enumerate(paths)])


def _name(path, number):
    return "/".join(Path(path).parts[-2:]) if path else f"row {number}"


def _with_classes(splits):
    """Labels that are words or whole numbers as a `ClassLabel` of all splits."""
    feature = next(iter(splits.values())).features[LABEL]
    is_class = isinstance(feature, datasets.Value) and not feature.dtype.startswith(("float", "double", "decimal"))
    if not is_class:
        return splits
    labels = sorted({label for split in splits.values() for label in split.unique(LABEL)} - {None})
    classes = ClassLabel(names=[str(label) for label in labels])
    return splits.cast_column(LABEL, datasets.Value("string")).cast_column(LABEL, classes)


def picture_bytes(image):
    """The file of an undecoded `image`."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def picture_hash(image):
    """SHA-256 of the file of an undecoded `image`, as hex digits."""
    return hashlib.sha256(picture_bytes(image)).hexdigest()


def read_picture(image):
    """
    An undecoded `image` -> PIL image in RGB, upright as its EXIF says.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(picture_bytes(image)))))
    except UnidentifiedImageError as error:
        raise ValueError("it cannot be read as a picture: it is none, or of an unknown format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read as a picture: {error}") from error


def to_rgb(picture):
    """
    A PIL image -> the same in RGB. Greys of 16 bits are scaled, which `convert` would cut off at 255.

    Raises:
        ValueError: its numbers (mode I or F) do not span 0..255, and what they span is not known.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    elif picture.mode in ("I", "F"):
        low, high = picture.getextrema()
        if not (low >= 0 and high <= 255) or (picture.mode == "F" and 0 < high <= 1):
            raise ValueError(
                f"its values (mode {picture.mode}) go from {low} to {high}, but must be in 0..255: scale it first"
            )
    return picture.convert("RGB")


def readable(split, skip_broken=False):
    """
    The pictures of a split that can be read, each of which is read for that.

    Raises:
        ValueError: some cannot, and `skip_broken` is off; they are counted and named.
    """
    broken = {}
    for number, row in enumerate(tqdm(split, desc="Checking", unit="picture")):
        try:
            read_picture(row[IMAGE])
        except ValueError as error:
            broken[number] = f"{row[NAME]}: {error}"
    if not broken:
        return split
    named = "\n".join(list(broken.values())[:MAX_NAMED] + ["..."] * (len(broken) > MAX_NAMED))
    if not skip_broken:
        raise ValueError(
            f"{len(broken)} of {len(split)} pictures are broken. Mend or remove them, or skip them (--skip_broken):\n"
            f"{named}"
        )
    print(f"Left out {len(broken)} of {len(split)} pictures, which are broken:\n{named}")
    return split.select([number for number in range(len(split)) if number not in broken])
