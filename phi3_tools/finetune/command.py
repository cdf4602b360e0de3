"""
Fine-tunes phi3-embed on your pictures, as a classifier or as an embedding for search, measures it, and may push it.

    phi3-embed finetune --model . --data digits --train head --output_dir finetuned
    accelerate launch --num_processes 4 -m phi3_tools finetune --model FOLDER_OR_HUB_ID --data FOLDER --bf16

Beside the options below it takes all of transformers' TrainingArguments. Killed, the same command goes on from the
last checkpoint. OUTPUT_DIR gets the best checkpoint, metrics.json, pictures of curves and confusions, and a card.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
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
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from phi3_tools.finetune.data import FEATURES, SIZE, Collator, Pairs, Pictures, Stream, load_splits, with_features
from phi3_tools.finetune.report import (
    CONFUSION,
    CURVES,
    MAX_CONFUSED,
    draw_confusion,
    draw_curves,
    table_of,
    write_card,
)
from phi3_tools.images import ACCEPTED, LABEL
from phi3_tools.results import push, push_target, without_path, write_text

# The probe is fitted on at most this many pictures of the training.
PROBE = 5000
# Of transformers' arguments those that a training must keep to the end.
KEPT = ("num_train_epochs", "max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "seed")
ADAPTER, ARGUMENTS, METRICS = "adapter", "arguments.json", "metrics.json"


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
    streaming: bool = field(
        default=False,
        metadata={
            "help": "For data that the disk cannot hold. Asks --max_steps. Of unknown length, it has no epochs: it is "
            "evaluated and saved every --save_steps. Resumed, it reads again what it has had."
        },
    )
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
        _require(0 <= self.rotate <= 180, "rotate", self.rotate, "degrees from 0 to 180")
        _require(
            self.early_stopping is None or self.early_stopping > 0, "early_stopping", self.early_stopping, "1 or more"
        )
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
            **where, **classes, ignore_mismatched_sizes=path is None, problem_type="single_label_classification"
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
        # Neither loss is scaled by the labels of all accumulated batches: the trainer has to divide it.
        self.model_accepts_loss_kwargs = False

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
    write_text(path, json.dumps(now, indent=2) + "\n")
    return now


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
    last = last_checkpoint(output)
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
    if options.streaming and last and int(last.name.rpartition("-")[2]) >= arguments.max_steps:
        # Of a stream the trainer would take one more step before it sees that none is left.
        trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        trainer._load_from_checkpoint(trainer.state.best_model_checkpoint or str(last))
    else:
        trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(output / ADAPTER) if options.train == "lora" else arguments.output_dir)
    if trainer.is_world_process_zero():
        if options.train == "lora":
            adapted = PeftModel.from_pretrained(load_model(options, names), output / ADAPTER)
            adapted.merge_and_unload().save_pretrained(output)
            processor.save_pretrained(output)
            # peft writes down where the model lay, and a card that says nothing else.
            (output / ADAPTER / "README.md").unlink()
            config = json.loads((output / ADAPTER / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = without_path(options.model)
            write_text(output / ADAPTER / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        for path in (output, output / ADAPTER):
            (path / "training_args.bin").unlink(missing_ok=True)  # a pickle; arguments.json says it too
    return trainer.state.log_history


# Figures


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
    if options.streaming:
        for name in ("eval_strategy", "save_strategy"):
            if (strategy := getattr(arguments, name)) == "epoch":
                setattr(arguments, name, type(strategy)("steps"))
        arguments.eval_steps = arguments.eval_steps or arguments.save_steps
    if options.words and arguments.fsdp:
        raise ValueError("--words reads the word embeddings beside the model's forward, which --fsdp shards. Use DDP.")
    arguments.remove_unused_columns = False  # the collator makes the model's inputs of them
    arguments.label_names = ["labels"]
    return options, arguments


def run(arguments=None):
    options, arguments = parse_arguments(arguments)
    pushes, arguments.push_to_hub = arguments.push_to_hub, False  # in one commit at the end, and not by the trainer
    if pushes:
        name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
        arguments.hub_model_id = push_target(name, arguments.hub_token)
    splits, names = load_splits(options, arguments.seed)
    if options.early_stopping and ("validation" not in splits or arguments.eval_strategy == "no"):
        raise ValueError("--early_stopping looks at pictures of a validation split. Give --validation more than 0.")
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
    write_text(
        output / METRICS,
        json.dumps({"held out": rows, "held-out pictures": num_held_out, "history": history}, indent=2) + "\n",
    )
    write_card(options, arguments, splits, names, rows, num_held_out, about, output / "README.md")
    print(table_of(rows))
    if pushes:
        # ARGUMENTS says where model and data lie; the card has the same without.
        ignore = [ARGUMENTS, "checkpoint-*/**", f"{FEATURES}/**", "runs/**"]
        title = "Fine-tune by phi3-embed finetune"
        private, token = arguments.hub_private_repo, arguments.hub_token
        print(f"Pushed to {push(output, arguments.hub_model_id, title, private, token, ignore)}")


MEMORY = (
    "A batch does not fit in memory. Give a smaller --per_device_train_batch_size (with as much more "
    "--gradient_accumulation_steps a classifier trains the same; an embedding compares fewer pictures), "
    "--gradient_checkpointing, --bf16, or fewer --num_crops. Checkpoints are kept."
)


def main(arguments):
    transformers_logging.set_verbosity_error()
    try:
        run(arguments)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
            raise ValueError(MEMORY) from error
        raise
