"""
Fine-tunes phi3-embed on your pictures, as a classifier or as an embedding for search, measures it, and may push it.

    python examples/finetune.py --model tiny --data digits --train head --output_dir finetuned
    accelerate launch --num_processes 4 examples/finetune.py --model FOLDER_OR_HUB_ID --data FOLDER --bf16

Beside the options below it takes all of transformers' TrainingArguments. Killed, the same command goes on from the
last checkpoint. OUTPUT_DIR gets the best checkpoint, metrics.json, pictures of curves and confusions, and a card.
"""

import errno
import hashlib
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import matplotlib
import numpy as np
import torch
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from pictures import ACCEPTED, DIGITS, IMAGE, LABEL, NAME, SMALL_TEXT, load_pictures, read_picture, readable
from PIL import Image, ImageEnhance, ImageOps
from safetensors import SafetensorError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FEATURES, SIZE = "features", "image_sizes"
VALIDATION, TEST = ("validation", "valid", "val", "dev"), ("test", "held_out")
# The probe is fitted on at most this many pictures of the training.
PROBE = 5000
SHUFFLE_BUFFER = 1000
MAX_CONFUSED = 40  # classes that a picture of confusions can show
# Of transformers' arguments those that a training must keep to the end.
KEPT = ("num_train_epochs", "max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "seed")
ADAPTER, ARGUMENTS, METRICS = "adapter", "arguments.json", "metrics.json"
CURVES, CONFUSION = "curves.png", "confusion.png"


@dataclass
class Options:
    """What transformers' TrainingArguments do not say."""

    model: str = field(metadata={"help": "A folder or Hub id of phi3-embed. Its code is run."})
    data: str = field(metadata={"help": f"{ACCEPTED[0].upper()}{ACCEPTED[1:]}."})
    task: Literal["classification", "embedding"] = field(
        default="classification",
        metadata={"help": "embedding: pictures of one label are drawn together and others apart, for search."},
    )
    train: Literal["all", "head", "lora"] = field(
        default="all",
        metadata={
            "help": "head: the projection and the classifier alone; the tower's features are computed once and kept "
            "in OUTPUT_DIR. lora: adapters on tower and projection, and the classifier."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the first of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: label."})
    held_out: float = field(default=0.2, metadata={"help": "Share of the pictures, where the data has no test split."})
    validation: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training pictures that choose the best checkpoint, where the data has no validation "
            "split; 0: the last checkpoint is taken."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "For data that the disk cannot hold. Asks --max_steps."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that cannot be read."})
    num_crops: int | None = field(default=None, metadata={"help": "The most crops. Default: the image processor's."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the pictures. Not for digits or writing."})
    zoom: float = field(default=0.0, metadata={"help": "Enlarge or shrink by up to this share."})
    shift: float = field(default=0.0, metadata={"help": "Move by up to this share of the sides."})
    rotate: float = field(default=0.0, metadata={"help": "Turn by up to so many degrees."})
    color: float = field(default=0.0, metadata={"help": "Change brightness, contrast and colour by up to this share."})
    lora_rank: int = field(default=8, metadata={"help": "Of the adapters."})
    temperature: float = field(default=0.1, metadata={"help": "Of the embedding's loss."})
    words: bool = field(
        default=False,
        metadata={"help": "In the embedding task, draw pictures to the word embedding of their class's name too."},
    )
    matryoshka: list[int] = field(
        default_factory=list,
        metadata={"help": "In the embedding task, dimensions that are to serve alone when vectors are cut to them."},
    )
    early_stopping: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better result."}
    )

    def __post_init__(self):
        shares = {name: getattr(self, name) for name in ("held_out", "validation", "zoom", "shift", "color")}
        for name, value in shares.items():
            _require(0 <= value < 1, name, value, "a share in [0, 1)")
        _require(self.held_out > 0, "held_out", self.held_out, "above 0: something must be held out")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0")
        _require(self.lora_rank > 0, "lora_rank", self.lora_rank, "1 or more")
        if self.task == "classification" and (self.words or self.matryoshka):
            raise ValueError("--words and --matryoshka go with --task embedding.")
        if self.train == "head" and (self.augments or self.streaming):
            raise ValueError(
                "--train head computes each picture's features once, so it goes with no change of pictures (--flip, "
                "--zoom, --shift, --rotate, --color) and not with --streaming."
            )
        if self.words and self.train == "lora":
            raise ValueError("--words trains the word embeddings of the names, so it goes with --train all or head.")

    @property
    def augments(self):
        return self.flip or any((self.zoom, self.shift, self.rotate, self.color))


def _require(condition, name, value, accepted):
    if not condition:
        raise ValueError(f"--{name} is {value!r}, but must be {accepted}.")


# Data


def load_splits(options, seed):
    """
    -> {"train", "validation", "test"} and the classes' names; no "validation" where none is wanted. Splits that the
    data lacks are made of its "train", class by class.

    Raises:
        ValueError: the data does not serve the task; what is wrong and how to mend it.
    """
    found = load_pictures(options.data, options.image_column, options.label_column, streaming=options.streaming)
    first = next(iter(found.values()))
    feature = (first.features or {}).get(LABEL)
    if feature is None:
        raise ValueError(f"{options.data} has no column of labels. Name it by --label_column, or give {ACCEPTED}.")
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
        return splits, feature.names
    for name, split in splits.items():
        split = readable(split, options.skip_broken)
        if not len(split):
            raise ValueError(f"The split {name!r} of {options.data} is empty.")
        if None in (labels := split[LABEL][:]):
            raise ValueError(f"{split[labels.index(None)][NAME]} has no label. Give it one, or remove it.")
        splits[name] = split
    _check_labels(splits, options.task, feature.names)
    if "test" not in splits:
        splits["train"], splits["test"] = split_by_class(splits["train"], options.held_out, seed, feature.names)
    if "validation" not in splits and options.validation:
        splits["train"], splits["validation"] = split_by_class(
            splits["train"], options.validation, seed, feature.names
        )
    return splits, feature.names


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


def split_by_class(split, share, seed, names):
    """A split -> what remains of it, and a share of every class, one picture at least."""
    rng, labels, chosen = np.random.default_rng(seed), np.array(split[LABEL][:]), []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) == 1:
            raise ValueError(
                f"The class {names[label]!r} has one picture left for training and none to hold out. Give it more "
                "pictures (two, and one more for --validation unless that is 0), or give a split of your own."
            )
        chosen += members[: max(1, round(share * len(members)))].tolist()
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
            picture = read_picture(row[IMAGE])
        except ValueError as error:
            raise ValueError(f"{row[NAME]}: {error}. Leave such pictures out by --skip_broken.") from error
        if self.trains and self.options.augments:
            rng = np.random.default_rng((self.seed, self.epoch, number))
            picture = augment(picture, rng, self.options, self.crop_size)
        return {IMAGE: picture, LABEL: row[LABEL]}


class Stream(torch.utils.data.IterableDataset):
    """The same of a split that streams; shuffled within a buffer, anew in each epoch, when it trains."""

    def __init__(self, pictures):
        self.pictures = pictures
        if pictures.trains:
            pictures.split = pictures.split.shuffle(seed=pictures.seed, buffer_size=SHUFFLE_BUFFER)

    def __iter__(self):
        self.pictures.split.set_epoch(self.pictures.epoch)
        for number, row in enumerate(self.pictures.split):
            try:
                prepared = self.pictures.prepare(row, number)
            except ValueError as error:
                if not self.pictures.options.skip_broken:
                    raise
                print(f"Left out {error}")
                continue
            yield prepared


class Collator:
    """Rows -> what the model's forward takes, and the labels."""

    def __init__(self, image_processor, num_crops):
        self.image_processor, self.num_crops = image_processor, num_crops

    def __call__(self, rows):
        labels = torch.tensor([row[LABEL] for row in rows])
        if FEATURES not in rows[0]:
            pictures = [row[IMAGE] for row in rows]
            inputs = self.image_processor(pictures, num_crops=self.num_crops, return_tensors="pt")
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
        rows = [{IMAGE: read_picture(image), LABEL: label} for image, label in zip(rows[IMAGE], rows[LABEL])]
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


# Model and training


def load_image_processor(options):
    image_processor = AutoImageProcessor.from_pretrained(options.model, trust_remote_code=True)
    if options.num_crops is not None:
        image_processor.num_crops = options.num_crops
        image_processor(Image.new("L", (8, 8)))  # says so if that is no number of crops
    return image_processor


def load_processor(options, image_processor):
    """The processor around the image processor where the model has a tokenizer, else the image processor alone."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    except (OSError, ValueError):
        return image_processor
    return get_class_from_dynamic_module("processing_phi3_embed.Phi3EmbedProcessor", options.model)(
        image_processor, tokenizer
    )


def load_model(options, names, path=None):
    """A model for the task, its weights in float32; of `options.model` a classifier starts fresh."""
    where = {"pretrained_model_name_or_path": path or options.model, "trust_remote_code": True, "dtype": "float32"}
    if options.task == "embedding":
        model = AutoModel.from_pretrained(**where)
    else:
        classes = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
        model = AutoModelForImageClassification.from_pretrained(
            **where, **classes, ignore_mismatched_sizes=True, problem_type="single_label_classification"
        )
    if not model.config.use_hd_transform:
        raise ValueError(f"{options.model} works without the HD transform, which this training needs.")
    return model


def choose_trained(model, options):
    """The model with what is not to be trained frozen; with adapters for LoRA."""
    embedding = model.base_model
    for name, weight in model.named_parameters():
        trained = not name.endswith(("wte.weight", "_GN"))  # these do not reach the vector of an image
        if options.train == "head":
            trained &= ".img_processor." not in name
        weight.requires_grad_(trained)
    embedding.get_input_embeddings().weight.requires_grad_(options.words)
    if options.train != "lora":
        return model
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".img_processor." in name or ".img_projection" in name)
    ]
    saved = ["classifier"] if options.task == "classification" else None
    rank = options.lora_rank
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=saved)
    )


def word_ids(tokenizer, names):
    """Token ids of each class's name, `(classes, most tokens)`, -1 behind shorter ones."""
    ids = [torch.tensor(tokenizer(name, add_special_tokens=False).input_ids) for name in names]
    unknown = [name for name, each in zip(names, ids) if not len(each) or (each == tokenizer.unk_token_id).any()]
    if unknown:
        raise ValueError(f"--words: the tokenizer does not know the names {', '.join(unknown)}.")
    return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)


def word_vectors(table, ids):
    """The mean word embedding of each name, `(classes, hidden_size)`."""
    is_word = (ids >= 0)[..., None]
    return (table(ids.clamp(min=0)) * is_word).sum(1) / is_word.sum(1)


def contrastive_loss(vectors, labels, temperature, words=None):
    """
    Supervised contrastive loss (Khosla et al., 2020) of `vectors` `(n, d)` by `labels` `(n,)`: each picture should be
    nearer to those of its label than to all others; with pairs that is InfoNCE. With `words` `(classes, d)` the
    cross-entropy of its word among all words is added.
    """
    vectors = F.normalize(vectors.float(), dim=-1)
    alike = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_share = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    positive = alike & ~itself
    count = positive.sum(1)
    # Pictures whose like is in no place of the batch say nothing here.
    each = -log_share.masked_fill(~positive, 0).sum(1)[count > 0] / count[count > 0]
    loss = each.sum() / max(len(each), 1)
    if words is not None:
        loss = loss + F.cross_entropy(vectors @ F.normalize(words.float(), dim=-1).T / temperature, labels)
    return loss


class FineTuning(Trainer):
    """A Trainer that knows the embedding's loss; the classifier has its own."""

    def __init__(self, *args, options, ids=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.options, self.ids = options, ids

    def _get_train_sampler(self, train_dataset=None):
        pictures = train_dataset if train_dataset is not None else self.train_dataset
        if self.options.task == "classification" or isinstance(pictures, Stream):
            return super()._get_train_sampler(pictures)
        return Pairs(pictures, pictures.split[LABEL][:])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.options.task == "classification":
            return super().compute_loss(model, inputs, return_outputs)
        vectors = model(pixel_values=inputs["pixel_values"], image_sizes=inputs[SIZE]).pooler_output
        everywhere, labels = vectors, inputs["labels"]
        if self.args.world_size > 1:
            # The loss is that of all processes' pictures, in each of them, and its gradient goes to where they are.
            everywhere = torch.cat(torch.distributed.nn.functional.all_gather(vectors))
            labels = self.accelerator.gather(labels)
        words = None
        if self.ids is not None:
            table = self.accelerator.unwrap_model(model).get_input_embeddings()
            words = word_vectors(table, self.ids.to(labels.device))
        sizes = [everywhere.shape[1], *self.options.matryoshka]
        losses = [
            contrastive_loss(
                everywhere[:, :size], labels, self.options.temperature, None if words is None else words[:, :size]
            )
            for size in sizes
        ]
        loss = sum(losses) / len(losses)
        return (loss, {"loss": loss, "vectors": vectors}) if return_outputs else loss


class EpochOfPictures(TrainerCallback):
    """Tells the pictures which epoch it is."""

    def __init__(self, pictures):
        self.pictures = pictures

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.pictures.epoch = int(state.epoch or 0)


def recalls(vectors, labels):
    """Share of the pictures with one of their own label among the nearest, and among the five nearest, others."""
    vectors = F.normalize(torch.as_tensor(vectors).float(), dim=-1)
    labels = torch.as_tensor(labels)
    hits = []
    for start in range(0, len(vectors), 1024):  # all cosines at once would be too many
        cosines = vectors[start : start + 1024] @ vectors.T
        rows = torch.arange(len(cosines))
        cosines[rows, rows + start] = -torch.inf
        nearest = cosines.topk(min(5, len(vectors) - 1)).indices
        hits.append(labels[nearest] == labels[start : start + 1024, None])
    hits = torch.cat(hits)
    return {"recall@1": hits[:, 0].float().mean().item(), "recall@5": hits.any(1).float().mean().item()}


def of_classes(predicted, labels):
    return {
        "accuracy": accuracy_score(labels, predicted),
        "macro F1": f1_score(labels, predicted, average="macro", zero_division=0),
    }


def last_checkpoint(folder):
    """The last whole checkpoint: the trainer's state is what it writes last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_same_run(options, arguments, splits):
    """Writes down what is trained with what, or says how that differs from what OUTPUT_DIR was begun with."""
    now = asdict(options) | {name: getattr(arguments, name) for name in KEPT}
    now["pictures"] = None if options.streaming else {name: len(split) for name, split in splits.items()}
    now = json.loads(json.dumps(now, default=str))
    path = Path(arguments.output_dir) / ARGUMENTS
    if path.exists() and last_checkpoint(path.parent):
        then = json.loads(path.read_text())
        if changed := [name for name in now if now[name] != then.get(name)]:
            was = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in changed)
            raise ValueError(f"{path.parent} holds a training that began otherwise: {was}. Give another --output_dir.")
    write(path, json.dumps(now, indent=2) + "\n")
    return now


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def fine_tune(options, arguments, splits, names):
    """Trains, and leaves the best model whole in OUTPUT_DIR -> the trainer's history."""
    output = Path(arguments.output_dir)
    image_processor = load_image_processor(options)
    processor = load_processor(options, image_processor)
    model = load_model(options, names)
    collate = Collator(image_processor, options.num_crops)
    if options.words and not hasattr(processor, "tokenizer"):
        raise ValueError(f"--words needs a tokenizer, which {options.model} has none of.")
    if too_many := [size for size in options.matryoshka if not 0 < size < model.config.hidden_size]:
        raise ValueError(f"--matryoshka is {too_many}, but must be below the model's {model.config.hidden_size}.")
    ids = word_ids(processor.tokenizer, names) if options.words else None
    if options.train == "head":
        tower = model.base_model.to(arguments.device).eval()
        with arguments.main_process_first():
            splits = {
                name: with_features(split, tower, collate, output / FEATURES, arguments.eval_batch_size)
                for name, split in splits.items()
                if name != "test"
            }
    model = choose_trained(model, options)
    pictures = {
        name: Pictures(split, options, arguments.seed, model.config.crop_size, trains=name == "train")
        for name, split in splits.items()
    }
    wrap = Stream if options.streaming else lambda each: each
    metric = "accuracy" if options.task == "classification" else "recall@1"
    callbacks = [EpochOfPictures(pictures["train"])]
    if options.early_stopping:
        callbacks.append(EarlyStoppingCallback(options.early_stopping))
    has_validation = "validation" in splits and arguments.eval_strategy != "no"
    if not has_validation:
        arguments.eval_strategy = "no"
    elif arguments.eval_strategy != arguments.save_strategy:
        raise ValueError(
            f"--eval_strategy is {arguments.eval_strategy.value} and --save_strategy {arguments.save_strategy.value}: "
            "as the best checkpoint is kept, they must be the same."
        )
    arguments.load_best_model_at_end = has_validation
    arguments.metric_for_best_model, arguments.greater_is_better = metric, True
    trainer = FineTuning(
        model,
        arguments,
        collate,
        wrap(pictures["train"]),
        wrap(pictures["validation"]) if has_validation else None,
        processing_class=processor,
        compute_metrics=lambda predicted: (
            of_classes(predicted.predictions.argmax(-1), predicted.label_ids)
            if options.task == "classification"
            else recalls(predicted.predictions, predicted.label_ids)
        ),
        callbacks=callbacks,
        options=options,
        ids=ids,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model(str(output / ADAPTER) if options.train == "lora" else arguments.output_dir)
    if trainer.is_world_process_zero():
        if options.train == "lora":
            adapted = PeftModel.from_pretrained(load_model(options, names), output / ADAPTER)
            adapted.merge_and_unload().save_pretrained(output)
            processor.save_pretrained(output)
        for path in (output, output / ADAPTER):
            (path / "training_args.bin").unlink(missing_ok=True)  # a pickle; arguments.json says it too
    return trainer.state.log_history


# Report


@torch.inference_mode()
def embed(model, pictures, collate, batch_size, title):
    """Vectors `(n, hidden_size)` and labels `(n,)` of pictures."""
    vectors, labels = [], []
    loader = torch.utils.data.DataLoader(pictures, batch_size, collate_fn=collate)
    for batch in tqdm(loader, desc=title, unit="batch"):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels.append(batch.pop("labels").cpu())
        vectors.append(model(**batch).pooler_output.float().cpu())
    return torch.cat(vectors), torch.cat(labels)


def evaluate(options, arguments, splits, names):
    """Figures on the held-out pictures of the untrained and of the fine-tuned model, and how classes are confused."""
    output = Path(arguments.output_dir)
    collate = Collator(load_image_processor(options), options.num_crops)
    wrap = Stream if options.streaming else lambda each: each
    few = splits["train"]
    if options.streaming:
        few = few.take(PROBE)
    elif len(few) > PROBE:
        few = few.select(np.random.default_rng(arguments.seed).permutation(len(few))[:PROBE])
    rows, confusion = {}, None
    for row, path in (("untrained", None), ("fine-tuned", output)):
        set_seed(arguments.seed)  # the untrained classifier is the one that the training began with
        model = load_model(options, names, path).eval().to(arguments.device)
        test, fitted = (
            embed(
                model.base_model,
                wrap(Pictures(split, options, 0, model.config.crop_size)),
                collate,
                arguments.eval_batch_size,
                f"{row}: {title}",
            )
            for split, title in ((splits["test"], "held out"), (few, "for the probe"))
        )
        (vectors, labels), rows[row] = test, {}
        predicted = None
        if options.task == "classification":
            with torch.inference_mode():
                predicted = model.classifier(vectors.to(model.device)).argmax(-1).cpu()
        elif options.words:
            ids = word_ids(load_processor(options, collate.image_processor).tokenizer, names)
            words = word_vectors(model.get_input_embeddings().cpu(), ids).detach()
            predicted = (vectors @ F.normalize(words, dim=-1).T).argmax(-1)
        if predicted is not None:
            rows[row] |= of_classes(predicted, labels)
            confusion = labels, predicted
        rows[row] |= recalls(vectors, labels)
        for size in options.matryoshka:
            cut = recalls(vectors[:, :size], labels)
            rows[row] |= {f"{name}, {size} dimensions": value for name, value in cut.items()}
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(F.normalize(fitted[0], dim=-1), fitted[1])
        rows[row]["linear probe"] = accuracy_score(labels, probe.predict(F.normalize(vectors, dim=-1)))
    return rows, len(labels), confusion


def draw_curves(history, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figures = [f"eval_{name}" for name in ("accuracy", "macro F1", "recall@1", "recall@5")]
    for axis, keys in zip(axes, (("loss", "eval_loss"), figures)):
        for key in keys:
            if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
                axis.plot(*zip(*points), marker=".", label=key.replace("eval_", "validation: "))
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend()
    save_figure(figure, path)


def draw_confusion(confusion, names, path):
    shown = sorted(set(torch.cat(confusion).tolist()))
    size = 3 + 0.4 * len(shown)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        *confusion,
        labels=shown,
        display_labels=[names[label] for label in shown],
        xticks_rotation="vertical",
        colorbar=False,
        cmap="Blues",
        ax=axis,
    )
    axis.set(xlabel="said", ylabel="is")
    save_figure(figure, path)


def save_figure(figure, path):
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=110)
    beside.replace(path)
    plt.close(figure)


CARD = """---
{data}
---

# {title}

{base}, fine-tuned for {task} on {source} by phi3-embed's `examples/finetune.py`.

## Figures

On {num_held_out} pictures that took no part in the training. recall@k: a picture has one of its own label among the k
others that are nearest to it by cosine. Linear probe: logistic regression on the vectors of the training pictures.

{table}

![loss and validation](curves.png)
{confusion}
## Data

{about}

## Arguments

```json
{arguments}
```

## Use

```python
{use}
```

`trust_remote_code=True` runs the code in this repository: pin `revision` to a commit that you have read.
"""
USE = {
    "classification": """from transformers import pipeline

classify = pipeline("image-classification", model="{name}", trust_remote_code=True)
print(classify("picture.png"))""",
    "embedding": """from sentence_transformers import SentenceTransformer

embedder = SentenceTransformer("{name}", trust_remote_code=True)
vectors = embedder.encode(["one.png", "other.png"])
print(embedder.similarity(vectors, vectors))""",
}


def table_of(rows):
    columns = list(rows["fine-tuned"])
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[column]:.1%}' for column in columns)} |")
    return "\n".join(lines)


def write_card(options, arguments, splits, names, rows, num_held_out, about, path):
    title = arguments.hub_model_id or path.parent.resolve().name
    is_classifier = options.task == "classification"
    is_local = Path(options.model).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        base_model=None if is_local else options.model,
        datasets=None if Path(options.data).exists() or options.data in (DIGITS, SMALL_TEXT) else [options.data],
        tags=["custom_code", "phi3_embed"] + ([] if is_classifier else ["sentence-transformers"]),
    )
    has_confusion = (path.parent / CONFUSION).exists()
    counts = "" if options.streaming else ": " + ", ".join(f"{len(split)} in {name}" for name, split in splits.items())
    text = CARD.format(
        data=data.to_yaml(),
        title=title,
        base=Path(options.model).resolve().name if is_local else options.model,
        task=options.task,
        source=without_path(options.data),
        num_held_out=num_held_out,
        table=table_of(rows),
        confusion="\n![which class is taken for which](confusion.png)\n" if has_confusion else "",
        about=f"{without_path(options.data)}{counts}. Labels: {', '.join(names[:MAX_CONFUSED])}"
        f"{', ...' if len(names) > MAX_CONFUSED else ''}.",
        arguments=json.dumps(about | {name: without_path(about[name]) for name in ("model", "data")}, indent=2),
        use=USE[options.task].format(name=title),
    )
    write(path, text)


def without_path(source):
    """A folder's or file's own name: a card does not tell where it lay."""
    return Path(source).resolve().name if Path(source).exists() else source


# Pushing


def check_target(arguments):
    """The full name of the repository to push to, or why that cannot be, before the work."""
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        user = HfApi(token=arguments.hub_token).whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"--push_to_hub to {name} needs a valid token: log in by `hf auth login`.") from error
    return name if "/" in name else f"{user}/{name}"


def push(arguments):
    """One commit with model, code, card and pictures, and without weights that an older one left."""
    api = HfApi(token=arguments.hub_token)
    name, output = arguments.hub_model_id, arguments.output_dir
    left_out = ["checkpoint-*/**", f"{FEATURES}/**", "*.part*", "__pycache__/**", "runs/**"]
    try:
        api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=output,
            ignore_patterns=left_out,
            delete_patterns=["*.safetensors*"],
            commit_message="Fine-tune by examples/finetune.py",
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"Pushing to {name} failed: {error}. {output} is complete; run the same command again."
        ) from error
    print(f"Pushed to {commit.commit_url}")


def parse_arguments(arguments=None):
    parser = HfArgumentParser((Options, TrainingArguments), description="Fine-tune phi3-embed.")
    parser.set_defaults(
        output_dir="finetuned",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=1e-4,
        warmup_steps=0.1,
        report_to=["none"],
        ddp_find_unused_parameters=False,
    )
    options, arguments = parser.parse_args_into_dataclasses(arguments)
    if options.streaming and (arguments.max_steps <= 0 or arguments.dataloader_num_workers):
        raise ValueError("--streaming needs --max_steps, as nobody knows the length, and --dataloader_num_workers 0.")
    if options.words and arguments.fsdp:
        raise ValueError("--words reads the word embeddings beside the model's forward, which --fsdp shards. Use DDP.")
    arguments.remove_unused_columns = False  # the collator makes the model's inputs of them
    arguments.label_names = ["labels"]
    return options, arguments


def run(arguments=None):
    options, arguments = parse_arguments(arguments)
    pushes, arguments.push_to_hub = arguments.push_to_hub, False  # in one commit at the end, and not by the trainer
    if pushes:
        arguments.hub_model_id = check_target(arguments)
    splits, names = load_splits(options, arguments.seed)
    set_seed(arguments.seed)
    output = Path(arguments.output_dir)
    is_main = arguments.process_index == 0
    about = check_same_run(options, arguments, splits) if is_main else None
    history = fine_tune(options, arguments, splits, names)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main:
        return
    rows, num_held_out, confusion = evaluate(options, arguments, splits, names)
    draw_curves(history, output / CURVES)
    if confusion and len(names) <= MAX_CONFUSED:
        draw_confusion(confusion, names, output / CONFUSION)
    write(
        output / METRICS,
        json.dumps({"held out": rows, "held-out pictures": num_held_out, "history": history}, indent=2) + "\n",
    )
    write_card(options, arguments, splits, names, rows, num_held_out, about, output / "README.md")
    print(table_of(rows))
    if pushes:
        push(arguments)


def say(error):
    """What went wrong, and how to mend it, in words."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return (
            "A batch does not fit in memory. Give a smaller --per_device_train_batch_size (and as much more "
            "--gradient_accumulation_steps), --gradient_checkpointing, --bf16, or fewer --num_crops. Checkpoints are "
            "kept."
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or re.search(
        "No space left|File too large|[Qq]uota|unexpected pos|file write failed", text
    ):
        return f"The disk is full: {text}. Free some space; the same command goes on from the last whole checkpoint."
    return text


def main():
    transformers_logging.set_verbosity_error()
    try:
        run()
    except KeyboardInterrupt:
        sys.exit("\nfinetune: Interrupted. The same command goes on from the last checkpoint.")
    except (OSError, ValueError, MemoryError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and say(error) == str(error):
            raise
        sys.exit(f"finetune: {say(error)}")


if __name__ == "__main__":
    main()
