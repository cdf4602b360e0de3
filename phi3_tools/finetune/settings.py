"""What a training is told: our options, transformers' TrainingArguments, and what a resumed training must keep."""

import argparse
import difflib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import HfArgumentParser, TrainerState, TrainingArguments

from phi3_tools.images import ACCEPTED, LABEL, TEXT

VALIDATION_SHARE, MIN_VALIDATION = 0.1, 100
ARGUMENTS, FIGURES = "arguments.json", "metrics.json"
TRANSFORMERS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"

# Learning rate and epochs that learn where nobody chose others, see benchmarks/finetuning.md.
RATES = {"all": 1e-4, "head": 1e-3, "lora": 1e-3}
EPOCHS = {"all": 10, "head": 20, "lora": 10}
# The figures of a validation; the first chooses the best checkpoint.
METRICS = {
    "classification": ("accuracy", "macro F1", "loss"),
    "embedding": ("recall@1", "recall@5", "mAP"),
    "align": ("loss",),
    "instruct": ("loss",),
}
# What is trained in each task where nobody chose otherwise.
TRAINED = {"classification": "all", "embedding": "all", "align": "head", "instruct": "lora"}
TALK = ("align", "instruct")
TALK_RATES, TALK_EPOCHS = {"align": 1e-3, "instruct": 2e-4}, {"align": 4, "instruct": 2}
QUESTIONS = {LABEL: "What is this?", TEXT: "Describe this image."}

ONCE = "--train head computes each image's features once"
AT_ONCE = "figures are of all validation images at once"
IN_ONE_COMMIT = "the result is pushed once, in one commit at the end; --push-to-hub and --hub-model-id say where"
# TrainingArguments that would do nothing here, or harm, and why; any value but the default is an error.
REFUSED = {
    "resume_from_checkpoint": "the same command goes on from the last checkpoint in OUTPUT by itself",
    "remove_unused_columns": "the columns are those that the batches are made of",
    "label_names": "the labels are those of --label-column",
    "prediction_loss_only": "it leaves out the figures that the best checkpoint is chosen by",
    "include_for_metrics": AT_ONCE,
    "batch_eval_metrics": AT_ONCE,
    "eval_do_concat_batches": AT_ONCE,
    "fp16_full_eval": "evaluation takes the precision of the training: --bf16 or --fp16",
    "bf16_full_eval": "evaluation takes the precision of the training: --bf16 or --fp16",
    "neftune_noise_alpha": "it changes word embeddings, which images do not pass",
    "use_liger_kernel": "Liger has no kernels for this model",
    "length_column_name": "images have no lengths to be grouped by",
    "hub_strategy": IN_ONE_COMMIT,
    "hub_always_push": IN_ONE_COMMIT,
    "hub_revision": IN_ONE_COMMIT,
}
REFUSED_OF_EMBEDDING = {
    "label_smoothing_factor": "the loss of an embedding has no classes to smooth",
    "auto_find_batch_size": "images are compared within a batch, so a smaller one trains otherwise",
    "train_sampling_strategy": "batches hold two images of a label side by side",
}
# TrainingArguments that may change while a training is interrupted, because they do not change what it computes.
FREE = {
    *("output_dir", "run_name", "project", "report_to", "log_level", "log_level_replica", "log_on_each_node"),
    *("disable_tqdm", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug", "local_rank"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "save_total_limit", "save_on_each_node"),
    # `record` keeps the images of a step instead.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "mini_batch_size"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object", "torch_empty_cache_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "ddp_timeout"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "use_cpu", "skip_memory_metrics"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "ddp_backend", "ddp_bucket_cap_mb"),
    *("do_train", "do_eval", "do_predict", "enable_jit_checkpoint", "ignore_data_skip", "save_only_model"),
    *("include_num_input_tokens_seen", "restore_callback_states_from_checkpoint", "ddp_find_unused_parameters"),
}


def _option(default, help):
    return field(default=default, metadata={"help": help})


def _require(condition: bool, name: str, value, accepted: str) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} is {value!r}, but must be {accepted}.")


@dataclass
class DataOptions:
    """The images."""

    _argument_group_name = "the data"
    image_column: str | None = _option(None, "The column of images. Default: the first one that holds images.")
    label_column: str | None = _option(None, "The column of classes. Default: label.")
    text_column: str | None = _option(None, "The column of captions. Default: text or caption. Classes need none.")
    held_out: float = _option(0.2, "Share of the images to measure on, where the data has no test split.")
    validation: float | None = _option(
        None,
        "Share of the training images that choose the best checkpoint, where the data has no validation split; 0: the "
        f"last checkpoint is taken. Default: {VALIDATION_SHARE}, or 0 where that is fewer than {MIN_VALIDATION} "
        "images, because these would choose by chance.",
    )
    num_crops: int | None = _option(None, "The most crops of an image. Default: the image processor's.")
    skip_broken: bool = _option(False, "Leave out images that cannot be read.")
    streaming: bool = _option(
        False,
        "For data that the disk cannot hold. Needs --max-steps; it is evaluated and saved every --save-steps. "
        "Resumed, it reads again what it has had.",
    )

    def __post_init__(self):
        _require(0 < self.held_out < 1, "held_out", self.held_out, "a share between 0 and 1")
        _require(
            self.validation is None or 0 <= self.validation < 1, "validation", self.validation, "a share in [0, 1)"
        )


@dataclass
class Changes:
    """Changes of the training images at random. Proportions stay, and with them the grid of crops."""

    _argument_group_name = "changes of the training images"
    flip: bool = _option(False, "Mirror half of the images. Not for digits or writing.")
    zoom: float = _option(0.0, "Enlarge or shrink by up to this share.")
    shift: float = _option(0.0, "Move by up to this share of the sides.")
    rotate: float = _option(0.0, "Turn by up to so many degrees.")
    color: float = _option(0.0, "Change brightness, contrast and colour by up to this share.")

    def __post_init__(self):
        for name in ("zoom", "shift", "color"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share in [0, 1)")
        _require(0 <= self.rotate <= 180, "rotate", self.rotate, "degrees from 0 to 180")

    @property
    def any(self) -> bool:
        return any(asdict(self).values())


@dataclass
class TaskOptions:
    """What is trained, and how."""

    _argument_group_name = "the training"
    model: str = field(
        metadata={"help": "A folder or Hub id of phi3-embed, NAME[@REVISION][:mean|global]. Its code is run."}
    )
    task: Literal["classification", "embedding", "align", "instruct"] = _option(
        "classification",
        "embedding: images of one label are drawn together and others apart, for search; of a whole model that embeds "
        "by a recipe, images and their texts (captions or classes). For whole models: align: the projection learns to "
        "speak to the frozen language model; instruct: the model learns to answer. Both take conversations, captions "
        "or classes.",
    )
    train: Literal["all", "head", "lora"] = _option(
        "all",
        "head: the projection and the classifier alone; the tower's features are computed once and kept in OUTPUT. "
        "lora: adapters on tower and projection, and the classifier; of a whole model on the language model, which is "
        "what instruct does where nothing else is said. align is head.",
    )
    lora_rank: int = _option(8, "The rank of the adapters.")
    temperature: float = _option(0.1, "The temperature of the embedding's loss.")
    matryoshka: list[int] = field(
        default_factory=list,
        metadata={"help": "In the embedding task, dimensions that are to serve alone when vectors are cut to them."},
    )
    mini_batch_size: int | None = _option(
        None,
        "In the embedding task, so many images of a batch are in memory at once; all of it are still compared "
        "(GradCache, at 1.5 times the work).",
    )
    hard_negatives: int = _option(
        0,
        "In the embedding task of texts and images, so many images that lie near each text and are not its own; the "
        "untrained model finds them among the training images.",
    )
    words: bool = _option(
        False,
        "In the embedding task, draw images to the word embedding of their class's name too; in align, draw image "
        "tokens to the words of the answer first, without the language model.",
    )
    question: str | None = _option(
        None, f"Asked of images with captions or classes. Default: {' or '.join(map(repr, QUESTIONS.values()))}"
    )
    feature_dropout: float = _option(
        0.0, "In align, the share of what each layer of the projection takes that a step does without."
    )
    token_dropout: float = _option(
        0.0, "In align, the share of an image's tokens that a step does without, which takes less time too."
    )
    early_stopping: int | None = _option(None, "Stop after so many evaluations without a better result.")

    def __post_init__(self):
        for name in ("lora_rank", "mini_batch_size", "early_stopping"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "1 or more")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0")
        _require(self.hard_negatives >= 0, "hard_negatives", self.hard_negatives, "0 or more")
        for name in ("feature_dropout", "token_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share in [0, 1)")
        if self.task != "embedding" and (self.matryoshka or self.mini_batch_size or self.hard_negatives):
            raise ValueError("--matryoshka, --mini-batch-size and --hard-negatives go with --task embedding.")
        if self.task not in ("embedding", "align") and self.words:
            raise ValueError("--words goes with --task embedding or align.")
        if self.task != "align" and (self.feature_dropout or self.token_dropout):
            raise ValueError("--feature-dropout and --token-dropout go with --task align.")
        if self.task not in TALK and self.question is not None:
            raise ValueError("--question goes with --task align or instruct.")
        if self.task == "align" and self.train != "head":
            raise ValueError("--task align trains the projection alone: --train head. To train more, --task instruct.")
        if self.task == "instruct" and self.train == "head":
            raise ValueError("--task instruct trains all or lora. The projection alone is trained by --task align.")
        if self.words and self.train == "lora":
            raise ValueError("--words trains the word embeddings of the names, so it goes with --train all or head.")


class Settings(NamedTuple):
    source: str
    data: DataOptions
    changes: Changes
    task: TaskOptions
    arguments: TrainingArguments


class _Parser(HfArgumentParser):
    def error(self, message):
        hint = " Or put SOURCE before the options." if "Truthy value expected" in message else ""
        raise ValueError(f"{message[0].upper()}{message[1:].rstrip('.')}.{hint} See `phi3-embed finetune --help`.")


def _parser(*groups) -> _Parser:
    parser = _Parser(
        groups,
        prog="phi3-embed finetune",
        usage="%(prog)s SOURCE --model MODEL [--output OUTPUT] [options]",
        formatter_class=argparse.HelpFormatter,
        description="Fine-tune phi3-embed on your images, as a classifier or as an embedding for search, and measure "
        "it on images held out. Killed, the same command goes on from the last checkpoint. OUTPUT gets the best "
        "checkpoint, metrics.json, drawings of curves and confusions, and a card.",
        epilog="All of transformers' TrainingArguments are options too, such as --learning-rate, --num-train-epochs, "
        f"--per-device-train-batch-size, --bf16 and --push-to-hub: see --help-all, or {TRANSFORMERS}.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=f"{ACCEPTED[0].upper()}{ACCEPTED[1:]}.")
    parser.add_argument(
        "--output", metavar="OUTPUT", default="finetuned", help="The folder of the results. Default: finetuned."
    )
    return parser


def _print_help(*groups) -> None:
    parser = _parser(*groups)
    for action in parser._actions:
        action.option_strings = [option for option in action.option_strings if "_" not in option]
    parser.print_help()
    raise SystemExit


def parse(arguments: list[str] | None = None) -> Settings:
    """
    The settings that a command line gives (`sys.argv` by default).

    Raises:
        ValueError: an argument is unknown, out of range, without effect, or does not go with another.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    ours = TaskOptions, DataOptions, Changes
    if "--help-all" in arguments:
        _print_help(*ours, TrainingArguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        _print_help(*ours)
    parser = _parser(*ours, TrainingArguments)
    parser.set_defaults(**dict.fromkeys((*_defaults(argparse.Namespace()), "load_best_model_at_end")))
    named, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(_unknown(unknown[0].partition("=")[0], [*parser._option_string_actions]))
    for name, value in _defaults(named).items():
        if getattr(named, name) is None:
            setattr(named, name, value)
    if named.fp16 and named.use_cpu:
        raise ValueError("--fp16 needs an accelerator. On a CPU give --bf16, or neither.")
    task, data, changes, theirs = parser.parse_dict(vars(named), allow_extra_keys=True)
    _check(data, changes, task, theirs)
    return Settings(named.source, data, changes, task, theirs)


def _defaults(named: argparse.Namespace) -> dict:
    """TrainingArguments where none are given; some follow from what is (`named`)."""
    task = getattr(named, "task", "classification")
    train = getattr(named, "train", None) or TRAINED[task]
    strategy = "steps" if getattr(named, "streaming", False) else "epoch"
    return {
        "output_dir": getattr(named, "output", None),
        "train": train,
        "learning_rate": TALK_RATES.get(task, RATES[train]),
        "num_train_epochs": TALK_EPOCHS.get(task, EPOCHS[train]),
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "metric_for_best_model": METRICS[task][0],
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        # A CPU without this takes no --bf16, and warns in each epoch of memory that it cannot pin.
        "use_cpu": not torch.accelerator.is_available(),
    }


def _unknown(name: str, options: list[str]) -> str:
    # Options that end so (--epochs) or have these initials (--lr) are meant more often than those spelt alike.
    word = name.lstrip("-").replace("_", "-")
    options = {option: option.lstrip("-").split("-") for option in options if "_" not in option}
    near = [option for option in options if option.endswith(f"-{word}")]
    near += [option for option, words in options.items() if "".join(part[:1] for part in words) == word]
    near = near or difflib.get_close_matches(f"--{word}", options, 3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"There is no option {name}. {hint}See `phi3-embed finetune --help-all`."


def _check(data: DataOptions, changes: Changes, task: TaskOptions, arguments: TrainingArguments) -> None:
    plain = {argument.name: argument.default for argument in fields(TrainingArguments)}
    plain |= {"remove_unused_columns": False, "include_for_metrics": []}
    refused = REFUSED | (REFUSED_OF_EMBEDDING if task.task == "embedding" else {})
    for name, reason in refused.items():
        if getattr(arguments, name, plain.get(name)) != plain.get(name):
            raise ValueError(f"--{name.replace('_', '-')} is not taken: {reason}.")
    if arguments.train_sampling_strategy == "group_by_length":
        raise ValueError("--train-sampling-strategy group_by_length is not taken: images have no lengths.")
    if arguments.metric_for_best_model not in METRICS[task.task]:
        accepted = ", ".join(map(repr, METRICS[task.task]))
        raise ValueError(f"--metric-for-best-model is {arguments.metric_for_best_model!r}, but must be {accepted}.")
    if arguments.accelerator_config.split_batches or arguments.accelerator_config.dispatch_batches:
        raise ValueError("--accelerator-config: split_batches and dispatch_batches cut batches of unequal images.")
    # Each process reads a stream by itself, and takes its own images of it.
    arguments.accelerator_config.dispatch_batches = False
    if (task.train == "head" or task.task in TALK) and (changes.any or data.streaming):
        once = f"--task {task.task} takes images as they are and at once" if task.task in TALK else ONCE
        raise ValueError(
            f"{once}, so it goes with no change of images (--flip, --zoom, --shift, --rotate, --color) and not with "
            "--streaming."
        )
    reentrant = (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if task.train == "lora" and arguments.gradient_checkpointing and reentrant:
        raise ValueError(
            "--gradient-checkpointing-kwargs: with use_reentrant true the adapters of the tower get no gradients, "
            "because its pixels have none. Leave it out, or give false."
        )
    if data.streaming and (arguments.max_steps <= 0 or arguments.dataloader_num_workers):
        raise ValueError("--streaming needs --max-steps (nobody knows the length), and --dataloader-num-workers 0.")
    if data.streaming and "epoch" in (arguments.eval_strategy, arguments.save_strategy):
        raise ValueError("--streaming: a stream has no epochs. Give --eval-strategy and --save-strategy steps.")
    if data.streaming and arguments.eval_steps == arguments.logging_steps:
        arguments.eval_steps = arguments.save_steps
    if task.words and (arguments.fsdp or task.mini_batch_size):
        raise ValueError(
            "--words reads the word embeddings beside the model's forward, so it goes neither with --fsdp nor with "
            "--mini-batch-size."
        )
    batch = arguments.train_batch_size
    # A stream comes as it lies, and not two by two.
    if task.task == "embedding" and (batch < 4 or (batch % 2 and not data.streaming)):
        raise ValueError(
            f"--per-device-train-batch-size is {batch}, but an embedding compares the images of a batch, two of a "
            "label: give an even number, 4 or more."
        )


def as_class(arguments_class: type, arguments: TrainingArguments, **more):
    """Arguments as those of a class that adds some of its own."""
    given = {field.name: getattr(arguments, field.name) for field in fields(TrainingArguments) if field.init}
    return arguments_class(**given | more)


def batch_size(task: TaskOptions, arguments: TrainingArguments) -> int:
    """
    The images of a step. Those of an embedding are compared with each other, so there batches that are accumulated
    are no larger batch.
    """
    accumulated = 1 if task.task == "embedding" else arguments.gradient_accumulation_steps
    return arguments.train_batch_size * arguments.world_size * accumulated


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last whole checkpoint: the trainer's state is what it writes last."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def steps_done(checkpoint: Path) -> tuple[int, int]:
    """The steps that a checkpoint has had, and those that its training takes in all."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step, state.max_steps


def record(settings: Settings, counts: dict[str, int] | None) -> dict:
    """All that a training's result depends on; `counts` are the images of each split."""
    source, data, changes, task, arguments = settings
    about = {
        **{"source": source, "images": counts, "images a step": batch_size(task, arguments)},
        **{**asdict(task), **asdict(data), **asdict(changes), **arguments.to_dict()},
    }
    about = {name: value for name, value in about.items() if name not in FREE}
    if task.task == "embedding":
        about["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    return json.loads(json.dumps(about, default=str))


def check_same_training(folder: str | Path, now: dict) -> None:
    """
    Raises:
        ValueError: `folder` holds a training that began otherwise, or a checkpoint that none can go on from.
    """
    path, last = Path(folder) / ARGUMENTS, last_checkpoint(folder)
    if not path.exists() or not (last or (path.parent / FIGURES).exists()):
        return
    then = json.loads(path.read_text())
    if changed := [name for name in now if name in then and now[name] != then[name]]:
        was = ", ".join(f"{name} was {then[name]} and is {now[name]}" for name in changed)
        hint = ""
        if "images a step" in changed:
            hint = " The images of a step are --per-device-train-batch-size, times --gradient-accumulation-steps (not "
            hint += "of an embedding), times the processes."
        raise ValueError(f"{folder} holds a training that began otherwise: {was}.{hint} Give another --output.")
    step, steps = steps_done(last) if last else (0, 0)
    if step < steps and not list(last.glob("optimizer*")):
        raise ValueError(
            f"{last} holds the weights alone (--save-only-model), and without the optimizer no training goes on as it "
            "was. Give another --output, or remove this one."
        )
