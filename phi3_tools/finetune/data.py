"""Pictures as examples/finetune.py trains on them: splits, changes at random, batches, and features on disk."""

import functools
import hashlib
import itertools
import math

import datasets
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from phi3_tools.images import IMAGE, LABEL, NAME, load_images, read_image, readable

FEATURES, SIZE = "features", "image_sizes"
VALIDATION, TEST = ("validation", "valid", "val", "dev"), ("test", "held_out")
SHUFFLE_BUFFER = 1000


def load_splits(options, seed):
    """
    -> {"train", "validation", "test"} and the classes' names; no "validation" where none is wanted. Splits that the
    data lacks are made of its "train", class by class.

    Raises:
        ValueError: the data does not serve the task; what is wrong and how to mend it.
    """
    found = load_images(
        options.data,
        options.image_column,
        options.label_column,
        streaming=options.streaming,
        needs_labels=True,
    )
    first = next(iter(found.values()))
    feature = (first.features or {}).get(LABEL)
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"The labels of {options.data} are {feature}, but must be classes: words or whole numbers"
            f"{'; streamed, a ClassLabel' if options.streaming else ''}."
        )
    train = found.get("train", first if len(found) == 1 else None)
    if train is None:
        raise ValueError(f"{options.data} has the splits {', '.join(found)}, but none of the name 'train'.")
    splits = {"train": train}
    for ours, theirs in (("validation", VALIDATION), ("test", TEST)):
        if name := next((name for name in theirs if name in found), None):
            splits[ours] = found[name]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if options.streaming:
        if "test" not in splits:
            raise ValueError("A stream cannot be split: --streaming needs data with a test or validation split.")
        for name, split in splits.items():
            check = functools.partial(_labelled, split=name, data=options.data)
            splits[name] = split.map(check, features=split.features)
            next(iter(splits[name]), None)  # labels that are hidden are so from the first; said before the training
        return splits, feature.names
    for name, split in splits.items():
        split = readable(split, options.skip_broken)
        if not len(split):
            raise ValueError(f"The split {name!r} of {options.data} is empty.")
        splits[name] = split
    # Where whole numbers are made classes -1 is one too; it hides labels unless pictures to train with have it.
    hidden = {None, -1}
    if "-1" in feature.names and (minus := feature.names.index("-1")) not in splits["train"].unique(LABEL):
        hidden.add(minus)
    for name, split in splits.items():
        for number, label in enumerate(split[LABEL][:]):
            if label in hidden:
                raise _no_label(split[number][NAME], name, options.data)
    _check_labels(splits, options.task, feature.names)
    least = 1 if options.task == "classification" else 2  # an embedding is searched for another of the class
    if "test" not in splits:
        splits["train"], splits["test"] = split_by_class(splits["train"], options.held_out, seed, feature.names, least)
    if "validation" not in splits and options.validation:
        splits["train"], splits["validation"] = split_by_class(
            splits["train"], options.validation, seed, feature.names, least
        )
    return splits, feature.names


def _labelled(row, split, data):
    if row[LABEL] in (None, -1):
        raise _no_label(row[NAME], split, data)
    return row


def _no_label(name, split, data):
    return ValueError(
        f"{name} in the split {split!r} of {data} has no label, or one hidden as -1. Give every picture a label, or "
        "give the data without this split."
    )


def _check_labels(splits, task, names):
    sets = {name: set(split[LABEL][:]) for name, split in splits.items()}
    if len(set.union(*sets.values())) < 2:
        raise ValueError("All pictures have one and the same label. Give two classes or more.")
    for name in sets if task == "classification" else ():
        if unknown := sets[name] - sets["train"]:
            listed = ", ".join(sorted(names[label] for label in unknown))
            raise ValueError(
                f"The labels differ between splits: {name!r} has {listed}, which 'train' lacks. Add pictures of them "
                "there, or remove them here."
            )


def split_by_class(split, share, seed, names, least):
    """A split -> what remains of it, and a share of every class, `least` pictures at least."""
    rng, labels, chosen = np.random.default_rng(seed), np.array(split[LABEL][:]), []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) <= least:
            raise ValueError(
                f"The class {names[label]!r} has {len(members)} left to train on and to hold out, of which {least} "
                f"must be held out. Give it more pictures ({least + 1}, and {least} more for --validation unless that "
                "is 0), or give a split of your own."
            )
        chosen += members[: max(least, round(share * len(members)))].tolist()
    return split.select(sorted(set(range(len(labels))) - set(chosen))), split.select(sorted(chosen))


def augment(picture, rng, options, crop_size):
    """
    A picture changed at random. It keeps its proportions, so the HD transform gives it the same grid of crops. A small
    one is enlarged on the way, which the HD transform would do next, so that it is resampled once.
    """
    if options.flip and rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if options.zoom or options.shift or options.rotate:
        width, height = picture.size
        factor = max(1, crop_size // (2 * max(width, height)))
        angle = math.radians(rng.uniform(-options.rotate, options.rotate))
        zoom = (1 + options.zoom) ** rng.uniform(-1, 1) * factor
        right, down = rng.uniform(-options.shift, options.shift, 2)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        # Where the point (x, y) of the result lies in the picture; both turn about their centres.
        x, y = width * factor / 2, height * factor / 2
        rows = (
            (cos, sin, width * (0.5 - right) - cos * x - sin * y),
            (-sin, cos, height * (0.5 - down) + sin * x - cos * y),
        )
        border = np.asarray(picture)
        border = np.concatenate((border[0], border[-1], border[:, 0], border[:, -1]))
        picture = picture.transform(
            (width * factor, height * factor),
            Image.Transform.AFFINE,
            (*rows[0], *rows[1]),
            Image.Resampling.BICUBIC,
            fillcolor=tuple(np.median(border, axis=0).astype(int).tolist()),
        )
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color) if options.color else ():
        picture = kind(picture).enhance(rng.uniform(1 - options.color, 1 + options.color))
    return picture


class Pictures(torch.utils.data.Dataset):
    """
    Rows of a split as the collator takes them. How a picture is changed follows from seed, epoch and number, so that a
    training that was resumed, or runs in several processes, sees the same.
    """

    def __init__(self, split, options, seed, crop_size, trains=False):
        self.split, self.options, self.seed, self.crop_size, self.trains = split, options, seed, crop_size, trains
        self.epoch = 0

    def __len__(self):
        return len(self.split)

    def __getitem__(self, number):
        row = self.split[number]
        return row if FEATURES in row else self.prepare(row, number)

    def prepare(self, row, number):
        try:
            picture = read_image(row[IMAGE])
        except ValueError as error:
            raise ValueError(f"{row[NAME]}: {error}. Leave such pictures out by --skip_broken.") from error
        if self.trains and self.options.augments:
            rng = np.random.default_rng((self.seed, self.epoch, number))
            picture = augment(picture, rng, self.options, self.crop_size)
        return {IMAGE: picture, LABEL: row[LABEL]}


class Stream(torch.utils.data.IterableDataset):
    """
    The same of a split that streams. One to train with goes on pass after pass, shuffled within a buffer anew in each:
    so a resumed training, which leaves out as many batches as it has had, finds the pass and place where it was.
    """

    def __init__(self, pictures):
        self.pictures = pictures
        if pictures.trains:
            pictures.split = pictures.split.shuffle(seed=pictures.seed, buffer_size=SHUFFLE_BUFFER)

    def __iter__(self):
        for epoch in itertools.count() if self.pictures.trains else (0,):
            self.pictures.epoch = epoch
            self.pictures.split.set_epoch(epoch)
            is_empty = True
            for number, row in enumerate(self.pictures.split):
                try:
                    prepared = self.pictures.prepare(row, number)
                except ValueError as error:
                    if not self.pictures.options.skip_broken:
                        raise
                    print(f"Left out {error}")
                    continue
                is_empty = False
                yield prepared
            if is_empty:
                raise ValueError(f"A split of {self.pictures.options.data} has no picture that can be read.")


class Collator:
    """Rows -> what the model's forward takes, and the labels."""

    def __init__(self, image_processor, num_crops):
        self.image_processor, self.num_crops = image_processor, num_crops

    def __call__(self, rows):
        labels = torch.tensor([row[LABEL] for row in rows])
        if FEATURES not in rows[0]:
            pictures = [row[IMAGE] for row in rows]
            inputs = self.image_processor(pictures, num_crops=self.num_crops, pad_views=True, return_tensors="pt")
            return {"pixel_values": inputs["pixel_values"], SIZE: inputs[SIZE], "labels": labels}
        features = [torch.as_tensor(row[FEATURES]) for row in rows]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)  # (images, most views, patches, C)
        return {"pixel_values": padded, SIZE: torch.as_tensor(np.stack([row[SIZE] for row in rows])), "labels": labels}


class Pairs(torch.utils.data.Sampler):
    """Numbers of all pictures, two of a label side by side, so that each has its like in an even batch."""

    def __init__(self, pictures, labels):
        self.pictures, self.labels = pictures, np.asarray(labels)

    def __len__(self):
        return len(self.labels)

    def __iter__(self):
        rng = np.random.default_rng((self.pictures.seed, self.pictures.epoch))
        pairs, single = [], []
        for label in np.unique(self.labels):
            members = rng.permutation(np.flatnonzero(self.labels == label)).tolist()
            single += members[len(members) // 2 * 2 :]
            pairs += zip(members[::2], members[1::2])
        for number in rng.permutation(len(pairs)):
            yield from pairs[number]
        yield from single


def with_features(split, model, collate, folder, batch_size):
    """
    A split with the tower's features in place of pictures: `(views, patches, C)` in float32, on disk, and found there
    by the next run. A view of Phi-3-vision takes 2.4 MB.
    """
    digest = hashlib.sha256(f"{split._fingerprint} {collate.num_crops}".encode())
    for weight in model.vision_embed_tokens.img_processor.state_dict().values():
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    side, width = model.config.patches_per_side, model.config.vision_config.hidden_size

    @torch.inference_mode()
    def encode(rows):
        rows = [{IMAGE: read_image(image), LABEL: label} for image, label in zip(rows[IMAGE], rows[LABEL])]
        inputs = collate(rows)
        pixels, views = inputs["pixel_values"].to(model.device), (inputs[SIZE] // model.config.crop_size).prod(-1) + 1
        features = [
            model.vision_embed_tokens.get_img_features(each[:count]).float().cpu().numpy()
            for each, count in zip(pixels, views.tolist())
        ]
        return {FEATURES: features, SIZE: inputs[SIZE].tolist(), LABEL: inputs["labels"].tolist()}

    folder.mkdir(parents=True, exist_ok=True)
    return split.map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=[name for name in split.column_names if name != LABEL],
        features=datasets.Features(
            {
                LABEL: split.features[LABEL],
                FEATURES: datasets.Array3D((None, side**2, width), "float32"),
                SIZE: datasets.List(datasets.Value("int64")),
            }
        ),
        writer_batch_size=batch_size,
        cache_file_name=str(folder / f"{digest.hexdigest()[:16]}.arrow"),
        new_fingerprint=digest.hexdigest()[:16],
        desc="Tower",
    ).with_format("numpy")
