"""Rows of a data set as the models take them: splits, changes at random, batches, and features kept on disk."""

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from transformers.dynamic_module_utils import init_hf_modules

from phi3_tools.finetune.settings import MIN_VALIDATION, VALIDATION_SHARE, Changes, DataOptions
from phi3_tools.images import IMAGE, LABEL, NAME, load_images, read_image, readable
from phi3_tools.results import name_some, one_line

FEATURES, SIZES, NUMBER = "features", "image_sizes", "number"
VALIDATION, TEST = ("validation", "valid", "val", "dev"), ("test", "held_out")
SHUFFLE_BUFFER = 1000
PROBE = 5000

# A worker that is not forked unpickles the image processor, whose module lies where this makes it found.
init_hf_modules()


def load_splits(
    source: str, options: DataOptions, seed: int, least: int, found: DatasetDict | None = None
) -> tuple[dict[str, Dataset | IterableDataset], list[str]]:
    """
    The splits "train" (its rows numbered), "validation" (where one is wanted) and "test", and the classes' names.
    Splits that the data lacks are made of its "train", class by class, with `least` images of each at least. `found`:
    the data with its labels, where it is loaded already.

    Raises:
        ValueError: the data does not serve; what is wrong and how to mend it.
    """
    found = found or load_images(
        source, options.image_column, options.label_column, streaming=options.streaming, needs_labels=True
    )
    feature = (next(iter(found.values())).features or {}).get(LABEL)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The labels of {source} are {feature}, but must be classes: words or whole numbers"
            f"{'; streamed, a ClassLabel' if options.streaming else ''}."
        )
    splits = _name_splits(found, source)
    if options.streaming:
        return _stream_splits(splits, source, options.skip_broken), feature.names
    for name, split in splits.items():
        splits[name] = readable(split, options.skip_broken)
        if not len(splits[name]):
            raise ValueError(f"The split {name!r} of {source} is empty.")
    _check_labels(splits, feature.names, source, least)
    splits = _hold_out(splits, options, lambda split, share: split_by_class(split, share, seed, least))
    splits["train"] = splits["train"].add_column(NUMBER, range(len(splits["train"])))
    return splits, feature.names


def split_at_random(found: dict[str, Dataset], source: str, options: DataOptions, seed: int) -> dict[str, Dataset]:
    """As [`load_splits`] does, but the splits that are lacking are drawn from all rows alike."""

    def draw(split, share):
        if len(split) < 2:
            raise ValueError("The data has too few rows to hold some out.")
        return split.train_test_split(share, seed=seed).values()

    return _hold_out(_name_splits(found, source), options, draw)


def _name_splits(found, source):
    """The splits that the data has, by the names that they have here."""
    if len(found) == 1:  # whatever its name, the others are taken out of it
        return {"train": next(iter(found.values()))}
    if "train" not in found:
        raise ValueError(f"{source} has the splits {', '.join(found)}, but none of the name 'train'.")
    splits = {"train": found["train"]}
    for ours, theirs in (("validation", VALIDATION), ("test", TEST)):
        if name := next((name for name in theirs if name in found), None):
            splits[ours] = found[name]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return splits


def _hold_out(splits, options, divide):
    """Makes the splits that are lacking; `divide(split, share)` gives what remains of a split, and a share of it."""
    for name, share in (("test", options.held_out), ("validation", options.validation)):
        if share is None:
            share = VALIDATION_SHARE if VALIDATION_SHARE * len(splits["train"]) >= MIN_VALIDATION else 0
        if name not in splits and share:
            splits["train"], splits[name] = divide(splits["train"], share)
    return splits


def check_texts(names: Iterable[str], texts: Sequence[str | None], source: str) -> None:
    """Raises ValueError if images have no text, and names them, or something else in its place."""
    if others := [text for text in texts if not isinstance(text, str | None)]:
        raise ValueError(
            f"The captions of {source} hold {others[0]!r:.80}, but each must be a text. Name a column of texts by "
            "--text-column."
        )
    if nothing := [name for name, text in zip(names, texts) if not (text or "").strip()]:
        raise ValueError(f"{len(nothing)} images of {source} have no text:\n{name_some(nothing)}")


def _check_labels(splits, names, source, least):
    # Whole numbers become classes, and so does -1. It hides labels, unless images to train with have it.
    hidden = {None, -1}
    if "-1" in names and (minus := names.index("-1")) not in splits["train"].unique(LABEL):
        hidden.add(minus)
    sets = {}
    for name, split in splits.items():
        labels = split[LABEL][:]
        without = next((number for number, label in enumerate(labels) if label in hidden), None)
        if without is not None:
            raise _no_label(split[without][NAME], name, source)
        sets[name] = set(labels)
    if len(set.union(*sets.values())) < 2:
        raise ValueError(f"All images of {source} have one and the same label. Give two classes or more.")
    if least == 1:  # a classifier can only name what it was trained on
        for name in sets:
            if unknown := sets[name] - sets["train"]:
                listed = ", ".join(sorted(names[label] for label in unknown))
                raise ValueError(
                    f"The labels differ between splits: {name!r} has {listed}, which 'train' lacks. Add images of "
                    "them there, or remove them here."
                )


def _no_label(name, split, source):
    return ValueError(
        f"{name} in the split {split!r} of {source} has no label, or one hidden as -1. Give every image a label, or "
        "give the data without this split."
    )


def split_by_class(split: Dataset, share: float, seed: int, least: int) -> tuple[Dataset, Dataset]:
    """
    What remains of a split, and a share of it with its classes in proportion, `least` of each unless it is rare.
    """
    counts = Counter(split[LABEL])
    names = split.features[LABEL].names
    rarest, count = min(counts.items(), key=lambda item: item[1])
    if count <= least:
        raise ValueError(
            f"The class {names[rarest]!r} has {count} left to train on and to hold out, of which {least} must be held "
            f"out. Give it more images ({least + 1}, and {least} more for --validation unless that is 0), or give a "
            "split of your own."
        )
    size = max(round(share * len(split)), least * len(counts))
    parts = split.train_test_split(size, stratify_by_column=LABEL, seed=seed)
    held_out = Counter(parts["test"][LABEL])
    if rare := [names[label] for label in counts if held_out[label] < least]:
        print(f"Rare classes, of which fewer than {least} images are held out: {', '.join(sorted(rare))}.")
    return parts["train"], parts["test"]


def _stream_splits(splits, source, skip_broken):
    if "test" not in splits:
        raise ValueError("A stream cannot be split: --streaming needs data with a test or validation split.")
    for name, split in splits.items():
        if skip_broken:
            split = split.filter(_is_readable)
        split = split.map(functools.partial(_labelled, split=name, source=source), features=split.features)
        if next(iter(split), None) is None:  # labels that are hidden are so from the first; said before the training
            raise ValueError(f"The split {name!r} of {source} has no image that can be read.")
        splits[name] = split
    return splits


def _is_readable(row):
    try:
        read_image(row[IMAGE])
    except ValueError as error:
        print(f"Left out {row[NAME]}: {error}")
        return False
    return True


def _labelled(row, split, source):
    if row[LABEL] in (None, -1):
        raise _no_label(row[NAME], split, source)
    return row


def endless(split: IterableDataset, seed: int) -> IterableDataset:
    """
    A stream pass after pass, each in another order, its rows numbered: so a resumed training, which leaves out as many
    rows as it has had, finds the pass and place where it was.
    """
    features = datasets.Features({**split.features, NUMBER: datasets.Value("int64")})
    split = split.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return IterableDataset.from_generator(_passes, features, gen_kwargs={"split": split})


def sample(split: Dataset | IterableDataset, seed: int) -> Dataset | IterableDataset:
    """The rows of a split that a linear probe is fitted on, drawn at random where there are many."""
    if isinstance(split, IterableDataset):
        return split.take(PROBE)
    return split.select(np.random.default_rng(seed).permutation(len(split))[:PROBE]) if len(split) > PROBE else split


def _passes(split: IterableDataset) -> Iterator[dict]:
    numbers = itertools.count()
    for epoch in itertools.count():
        split.set_epoch(epoch)
        for row in split:
            yield {**row, NUMBER: next(numbers)}


def change(image: Image.Image, rng: np.random.Generator, changes: Changes, crop_size: int) -> Image.Image:
    """
    An RGB image changed at random. It keeps its proportions, so the HD transform gives it the same grid of crops. A
    small one is enlarged on the way, which the HD transform would do next, so that it is resampled once.
    """
    if changes.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if changes.zoom or changes.shift or changes.rotate:
        width, height = image.size
        factor = max(1, crop_size // (2 * max(width, height)))
        angle = math.radians(rng.uniform(-changes.rotate, changes.rotate))
        zoom = (1 + changes.zoom) ** rng.uniform(-1, 1) * factor
        right, down = rng.uniform(-changes.shift, changes.shift, 2)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        # The place in the image of the result's point (x, y); both turn about their centres.
        x, y = width * factor / 2, height * factor / 2
        rows = (
            (cos, sin, width * (0.5 - right) - cos * x - sin * y),
            (-sin, cos, height * (0.5 - down) + sin * x - cos * y),
        )
        border = np.asarray(image)
        border = np.concatenate((border[0], border[-1], border[:, 0], border[:, -1]))
        image = image.transform(
            (width * factor, height * factor),
            Image.Transform.AFFINE,
            (*rows[0], *rows[1]),
            Image.Resampling.BICUBIC,
            fillcolor=tuple(np.median(border, axis=0).astype(int).tolist()),
        )
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color) if changes.color else ():
        image = kind(image).enhance(rng.uniform(1 - changes.color, 1 + changes.color))
    return image


class ImageCollator:
    """
    Rows -> what a model's forward takes, and the labels. Rows to train with carry a number: how their
    images are changed follows from seed, epoch and number, so that a training which was resumed, or runs in several
    processes, sees the same. With `pad_views` an image is a row of all that it gives.
    """

    def __init__(
        self,
        image_processor,
        num_crops: int | None = None,
        changes: Changes | None = None,
        seed: int = 0,
        pad_views: bool = False,
    ):
        self.image_processor, self.num_crops, self.pad_views = image_processor, num_crops, pad_views
        self.changes, self.seed = changes or Changes(), seed
        # Workers may live longer than an epoch, so the epoch lies in memory that they share.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        # Labels come first: Trainer takes the length of the first tensor for the number of images.
        labels = torch.tensor([row[LABEL] for row in rows])
        if FEATURES in rows[0]:
            features = [torch.as_tensor(row[FEATURES]) for row in rows]  # (views, patches, C) each
            pixels = nn.utils.rnn.pad_sequence(features, batch_first=True) if self.pad_views else torch.cat(features)
            sizes = torch.as_tensor(np.stack([row[SIZES] for row in rows]))
        else:
            inputs = self.image_processor(
                [self.open(row) for row in rows],
                num_crops=self.num_crops,
                pad_views=self.pad_views,
                return_tensors="pt",
            )
            pixels, sizes = inputs["pixel_values"], inputs[SIZES]
        return {"labels": labels, "pixel_values": pixels, SIZES: sizes}

    def open(self, row: dict) -> Image.Image:
        """The image of a row in RGB, changed where the row is one to train with."""
        try:
            image = read_image(row[IMAGE])
        except ValueError as error:
            raise ValueError(f"{row[NAME]}: {one_line(error)}. Leave such images out by --skip-broken.") from error
        if NUMBER in row and self.changes.any:
            rng = np.random.default_rng((self.seed, self.epoch.item(), row[NUMBER]))
            image = change(image, rng, self.changes, self.image_processor.size["height"])
        return image


class ValidatesAll:
    """A Trainer that validates on all rows, whatever `--dataloader-drop-last` says of those to train with."""

    def get_eval_dataloader(self, *args, **kwargs):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last


def with_features(split: Dataset, model, collate: ImageCollator, folder: Path, batch_size: int) -> Dataset:
    """
    A split with the tower's features in place of images: `(views, patches, C)` in float32, on disk, and found there by
    the next run. A view of Phi-3-vision takes 2.4 MB.
    """

    def encode(rows):
        inputs = collate([dict(zip(rows, values)) for values in zip(*rows.values())])
        sizes = inputs[SIZES]
        output = model.get_image_features(inputs["pixel_values"].to(model.device), sizes)
        views = ((sizes // model.config.crop_size).prod(-1) + 1).tolist()
        features = [part.float().numpy(force=True) for part in output.last_hidden_state.split(views)]
        return {FEATURES: features, SIZES: sizes.tolist(), LABEL: inputs["labels"].tolist()}

    columns = {LABEL: split.features[LABEL], SIZES: datasets.List(datasets.Value("int64"))}
    settings = {"batched": True, "batch_size": batch_size, "writer_batch_size": batch_size}
    return keep_features(split, encode, model, collate.num_crops, columns, folder, **settings)


def keep_features(split: Dataset, encode, model, about, columns: dict, folder: Path, **settings) -> Dataset:
    """
    What `encode` gives of rows: features `(views, patches, C)` in float32, and other `columns`. It is kept in a file,
    which is found by the rows, the tower's weights, and what else the features are `about`; `settings` are of `map`.
    """
    digest = hashlib.sha256(f"{split._fingerprint} {about}".encode())
    for weight in model.base_model.vision_embed_tokens.img_processor.state_dict().values():
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    shape = (None, model.config.patches_per_side**2, model.config.vision_config.hidden_size)
    folder.mkdir(parents=True, exist_ok=True)
    return split.map(
        torch.inference_mode()(encode),
        remove_columns=[name for name in split.column_names if name not in columns],
        features=datasets.Features(columns | {FEATURES: datasets.Array3D(shape, "float32")}),
        cache_file_name=str(folder / f"{digest.hexdigest()[:16]}.arrow"),
        new_fingerprint=digest.hexdigest()[:16],
        desc="Tower",
        **settings,
    ).with_format("numpy")
