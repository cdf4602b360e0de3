"""The trainings: a classifier by transformers' Trainer, an embedding by sentence-transformers'."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.util import all_gather_with_grad
from sentence_transformers.util.distributed import all_gather
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from phi3_tools.finetune import pairs
from phi3_tools.finetune.align import save_aligned
from phi3_tools.finetune.data import FEATURES, ImageCollator, ValidatesAll, endless, sample, with_features
from phi3_tools.finetune.report import figures_of_classes, figures_of_search
from phi3_tools.finetune.settings import TALK, Settings, TaskOptions, as_class, last_checkpoint, steps_done
from phi3_tools.finetune.talk import load_talker, talk_trainer
from phi3_tools.images import IMAGE, LABEL, TEXT
from phi3_tools.measures import check_finite
from phi3_tools.models import Model, copy_recipe, load_sentence_transformer
from phi3_tools.results import without_path, write_text

ADAPTER = "adapter"


def start_arguments(start: Model) -> dict:
    """The arguments of `from_pretrained` that load what a training starts from, with its pooling."""
    return start.pinned | ({"pooling_mode": start.pooling} if start.pooling else {})


def has_head(where: dict, names: list[str]) -> bool:
    """Whether a checkpoint classifies into these classes; otherwise the head of a training starts fresh."""
    return AutoConfig.from_pretrained(**{**where, "trust_remote_code": True}).id2label == dict(enumerate(names))


def load_model(where: dict, task: str, names: list[str]) -> PreTrainedModel:
    """A model for the task, in float32; `where` are arguments of `from_pretrained`."""
    where = {"trust_remote_code": True, "dtype": "float32", **where}
    if task == "embedding":
        model = AutoModel.from_pretrained(**where)
    else:
        classes = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        is_fresh = not has_head(where, names)
        model = AutoModelForImageClassification.from_pretrained(
            **where, **classes, ignore_mismatched_sizes=is_fresh, problem_type="single_label_classification"
        )
    if not model.config.use_hd_transform:
        raise ValueError(f"{where['pretrained_model_name_or_path']} works without the HD transform, which this needs.")
    return model


def choose_trained(model: PreTrainedModel, options: TaskOptions) -> PreTrainedModel | PeftModel:
    """The model with what is not to be trained frozen; with adapters for LoRA."""
    model.config.untrained = False
    is_whole = hasattr(model, "language_model")
    for name, weight in model.named_parameters():
        # They do not reach the vector of an image unless there is a language model.
        trained = is_whole or not name.endswith(("wte.weight", "_GN"))
        weight.requires_grad_(trained and not (options.train == "head" and ".img_processor." in name))
    model.get_input_embeddings().weight.requires_grad_(options.words or is_whole)
    if options.train != "lora":
        return model
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"^language_model\.|\.img_processor\.|\.img_projection", name)
    ]
    saved = ["classifier"] if options.task == "classification" else None
    rank = options.lora_rank
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=saved)
    )


def fit_probe(vectors: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(num_classes, d)` and biases `(num_classes,)` of a logistic regression."""
    scaler = StandardScaler().fit(vectors)
    regression = LogisticRegression(max_iter=1000).fit(scaler.transform(vectors), labels)
    coefficients, intercepts = regression.coef_ / scaler.scale_, regression.intercept_
    if len(regression.classes_) == 2:  # of which it has one row, for the second
        coefficients, intercepts = np.vstack((-coefficients, coefficients)) / 2, np.tile(intercepts, 2) * (-0.5, 0.5)
    weight, bias = np.zeros((num_classes, vectors.shape[1])), np.full(num_classes, min(intercepts.min(), 0) - 100)
    weight[regression.classes_] = coefficients
    bias[regression.classes_] = intercepts - coefficients @ scaler.mean_
    return weight, bias


def set_head(model: PreTrainedModel, probe: tuple[np.ndarray, np.ndarray]) -> None:
    with torch.no_grad():
        for parameter, values in zip((model.classifier.weight, model.classifier.bias), probe):
            parameter.copy_(torch.from_numpy(values))


def word_ids(tokenizer, names: list[str]) -> torch.LongTensor:
    """Token ids of each class's name, `(classes, most tokens)`, -1 behind shorter ones."""
    ids = [torch.tensor(tokenizer(name, add_special_tokens=False).input_ids) for name in names]
    unknown = [name for name, row in zip(names, ids) if not len(row) or (row == tokenizer.unk_token_id).any()]
    if unknown:
        raise ValueError(f"--words: the tokenizer does not know the names {', '.join(unknown)}.")
    return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)


def word_vectors(table: nn.Embedding, ids: torch.LongTensor) -> torch.FloatTensor:
    """The mean word embedding of each name, `(classes, hidden_size)`, of length 1."""
    is_word = (ids >= 0)[..., None]
    return F.normalize((table(ids.clamp(min=0)) * is_word).sum(1).float(), dim=-1)


class LabelLoss(CachedLossMixin, nn.Module):
    """
    Supervised contrastive loss (Khosla et al., 2020): each image should be nearer to those of its label than to all
    others in the batches of all processes. With words, the cross-entropy of its label's word among all words is added.

    sentence-transformers has losses of pairs, to which another image of the same label is a negative, and of triplets,
    which take no gradient from most of a batch.

    Args:
        mini_batch_size: images that are in memory at once, by sentence-transformers' GradCache; all of them if `None`.
        words (`(classes, tokens)`): see `word_ids`.
    """

    def __init__(self, model: SentenceTransformer, temperature: float, mini_batch_size: int | None = None, words=None):
        super().__init__()
        self.model, self.temperature, self.mini_batch_size = model, temperature, mini_batch_size
        self.uses_gradient_cache = mini_batch_size is not None
        self.words, self.table = words, model[0].model.get_input_embeddings() if words is not None else None

    def forward(self, sentence_features, labels):
        if self.uses_gradient_cache:
            return self.forward_cached(sentence_features, labels)
        return self.calculate_loss(
            [[self.model(inputs)["sentence_embedding"]] for inputs in sentence_features], labels
        )

    def calculate_loss(self, reps, labels, *, with_backward=False):
        vectors, labels = F.normalize(torch.cat(reps[0]).float(), dim=-1), labels
        if torch.distributed.is_initialized():
            vectors, labels = all_gather_with_grad(vectors), all_gather(labels)
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        log_share = (vectors @ vectors.T / self.temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
        positive = (labels[:, None] == labels) & ~itself
        count = positive.sum(1)
        # Images whose label no other image of the batch has say nothing here.
        terms = -log_share.masked_fill(~positive, 0).sum(1)[count > 0] / count[count > 0]
        loss = terms.sum() / max(len(terms), 1)
        if self.words is not None:
            words = word_vectors(self.table, self.words.to(labels.device))[:, : vectors.shape[1]]
            loss = loss + F.cross_entropy(vectors @ F.normalize(words, dim=-1).T / self.temperature, labels)
        if with_backward:
            loss.backward()
        return loss


class EmbeddingCollator:
    """Batches as sentence-transformers' trainer takes them: labels, and what the model takes under a column's name."""

    valid_label_columns = (LABEL,)

    def __init__(self, collate: ImageCollator):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict:
        inputs = self.collate(rows)
        labels = inputs.pop("labels")
        columns = {f"{IMAGE}_{name}": tensor for name, tensor in inputs.items()}
        return {"label": labels, **columns, f"{IMAGE}_modality": "image"}


class SharedEpoch(TrainerCallback):
    """Tells the collator which epoch it is, because changes at random differ from one to the next."""

    def __init__(self, collate: ImageCollator):
        self.collate = collate

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collate.epoch.fill_(int(state.epoch or 0))


class LogAtCheckpoints(TrainerCallback):
    """Ends the logged mean loss at each checkpoint, because a training that goes on from there begins it anew."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or control.should_evaluate

    on_epoch_end = on_step_end


class ClassifierTrainer(ValidatesAll, Trainer):
    pass


class EmbeddingTrainer(SentenceTransformerTrainer):
    def get_train_dataloader(self):
        """The parent's, with as many batches in each process: one that has more would wait for the others."""
        if isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        rows = self.train_dataset.with_format(None)
        batches = self.get_batch_sampler(
            rows.select_columns(LABEL) if LABEL in rows.column_names else rows,
            args.train_batch_size,
            args.dataloader_drop_last,
            self.data_collator.valid_label_columns,
            torch.Generator(),
            args.seed,
        )
        if not len(batches):
            raise ValueError(f"No batch of {args.train_batch_size} images with two of a label fits. Give it smaller.")
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        return self.accelerator.prepare(loader)

    def add_model_card_callback(self, default_args_dict):
        """None: the card is ours."""

    def _save(self, output_dir=None, state_dict=None):
        model = self.model[0].model
        prefix = next(name for name, module in self.model.named_modules() if module is model) + "."
        weights = {name.removeprefix(prefix): weight for name, weight in (state_dict or {}).items()}
        model.save_pretrained(output_dir or self.args.output_dir, state_dict=weights or None)

    def _load_from_checkpoint(self, checkpoint, model=None):
        model = self.model[0].model
        if isinstance(model, PeftModel):
            set_peft_model_state_dict(model, load_peft_weights(checkpoint))
        else:
            model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class PairTrainer(EmbeddingTrainer):
    """A trainer of `whole.model`, whose result is saved with the head and the recipe of `whole`."""

    def __init__(self, *args, whole: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.processing_class = None  # by whose special tokens the config would be changed
        self.whole = whole

    def save_whole(self, output: Path) -> None:
        model = self.model[0].model
        self.whole.model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        self.whole.config.untrained, self.whole.config.text_config.use_cache = False, True
        self.model[0].model = self.whole
        self.model.save_pretrained(str(output), create_model_card=False)


class Evaluator(BaseEvaluator):
    """The figures that a function gives of a model."""

    def __init__(self, figures_of: Callable[[SentenceTransformer], dict[str, float]]):
        super().__init__()
        self.figures_of = figures_of

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return self.figures_of(model)


@torch.inference_mode()
def embed(
    model: PreTrainedModel, split: Dataset | IterableDataset, collate: ImageCollator, batch_size: int, title: str
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `(n, hidden_size)` and labels `(n,)` of a split's images."""
    vectors, labels = [], []
    for batch in tqdm(DataLoader(split, batch_size, collate_fn=collate), desc=title, unit="batch"):
        labels.append(batch.pop("labels").numpy())
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        vectors.append(model(**batch).pooler_output.float().numpy(force=True))
        check_finite(vectors[-1], model.name_or_path)
    return np.concatenate(vectors), np.concatenate(labels)


def train(
    settings: Settings, start: Model, splits: dict, names: list[str], processor, of_pairs: bool = False
) -> list[dict]:
    """
    Trains from `start`, and leaves the best model whole in OUTPUT -> the trainer's history. `of_pairs`: texts and
    images in one space.
    """
    options, arguments = settings.task, settings.arguments
    output = Path(arguments.output_dir)
    if arguments.eval_strategy == "no":
        splits = {name: split for name, split in splits.items() if name != "validation"}
    has_validation = "validation" in splits
    if arguments.load_best_model_at_end is None or not has_validation:
        strategy = arguments.eval_strategy if has_validation else "no"
        arguments = replace(arguments, eval_strategy=strategy, load_best_model_at_end=has_validation)
        settings = settings._replace(arguments=arguments)
    if settings.data.streaming:
        splits = splits | {"train": endless(splits["train"], arguments.seed)}
    collate = ImageCollator(
        getattr(processor, "image_processor", processor), settings.data.num_crops, settings.changes, arguments.seed
    )
    if options.task in TALK:
        trainer = talk_trainer(settings, start, splits, processor)
    elif options.task == "classification":
        trainer = _classifier_trainer(settings, start, splits, names, collate)
    elif of_pairs:
        trainer = _pair_trainer(settings, start, splits, collate)
    else:
        trainer = _embedding_trainer(settings, start, splits, names, collate, processor)
    trainer.add_callback(SharedEpoch(collate))
    trainer.add_callback(LogAtCheckpoints())
    if options.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping))
    last = last_checkpoint(output)
    step, steps = steps_done(last) if last else (0, 0)
    if last and trainer.is_world_process_zero():
        print(f"Going on from {last}: {step} of {steps} steps are done.")
    if last and step >= steps:
        trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        trainer._load_from_checkpoint(trainer.state.best_model_checkpoint or str(last))
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if options.train == "lora" or not (of_pairs or options.task == "align"):
        trainer.save_model(str(output / ADAPTER if options.train == "lora" else output))
    if trainer.is_world_process_zero():
        if of_pairs:
            trainer.save_whole(output)
        elif options.train == "lora":
            is_whole = options.task in TALK
            base = load_talker(start.pinned) if is_whole else load_model(start_arguments(start), options.task, names)
            base.config.untrained = False
            PeftModel.from_pretrained(base, output / ADAPTER).merge_and_unload().save_pretrained(output)
        elif options.task == "align":
            save_aligned(trainer.model, output, processor.image_processor.num_crops)
        processor.save_pretrained(output)
        if options.task in TALK and start.has_recipe:
            copy_recipe(start, output, settings.data.num_crops)
        if options.train == "lora":
            _clean_adapter(output / ADAPTER, options.model)
        for folder in (output, output / ADAPTER):
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; arguments.json says it too
    return trainer.state.log_history


def _clean_adapter(folder, base):
    """Its files say nothing of where the base model lay."""
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    about = json.loads(path.read_text()) | {"base_model_name_or_path": without_path(base)}
    write_text(path, json.dumps(about, indent=2))


def _classifier_trainer(settings, start, splits, names, collate):
    options, arguments = settings.task, settings.arguments
    model = load_model(start_arguments(start), options.task, names)
    splits = _frozen_features(model.base_model, splits, collate, options, arguments)
    if not has_head(start.pinned, names) and not last_checkpoint(arguments.output_dir):
        # A head that is fitted first does not distort what the model knows, as a random one does (Kumar et al., 2022).
        few = sample(splits["train"], arguments.seed)
        unchanged = ImageCollator(collate.image_processor, collate.num_crops)
        base = model.base_model.to(arguments.device).eval()
        set_head(model, fit_probe(*embed(base, few, unchanged, arguments.eval_batch_size, "Linear probe"), len(names)))
    trainer = ClassifierTrainer(
        choose_trained(model, options),
        arguments,
        collate,
        splits["train"],
        splits.get("validation"),
        compute_metrics=lambda output: figures_of_classes(output.label_ids, output.predictions.argmax(-1)),
    )
    # The loss is the mean of a batch: the trainer has to divide it where batches are accumulated.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def _embedding_trainer(settings, start, splits, names, collate, processor):
    options, arguments = settings.task, settings.arguments
    embedder, name = load_sentence_transformer(start, device=arguments.device), start.name
    if not embedder.supports("image") or len(embedder) > 2:
        raise ValueError(
            f"{name} has no modules.json of an image embedding, nor a recipe. Save an image embedding by "
            f"`save_pretrained`, convert a whole checkpoint with --recipe, or give {name}:mean, its image embedding."
        )
    embedder = SentenceTransformer(modules=[embedder[0]])  # the loss takes vectors of any length
    model = embedder[0].model
    _set_lengths(model.config, options)
    if options.words and not hasattr(processor, "tokenizer"):
        raise ValueError(f"--words needs a tokenizer, which {name} has none of.")
    splits = _frozen_features(model, splits, collate, options, arguments)
    validation, batch_size = splits.get("validation"), arguments.eval_batch_size

    def figures_of(embedder):
        return figures_of_search(*embed(embedder[0].model, validation, collate, batch_size, "Validation"))

    embedder[0].model = choose_trained(model, options)
    words = word_ids(processor.tokenizer, names) if options.words else None
    loss = LabelLoss(embedder, options.temperature, options.mini_batch_size, words)
    if options.matryoshka:
        loss = MatryoshkaLoss(embedder, loss, [*options.matryoshka, model.config.hidden_size])
    collate.pad_views = options.mini_batch_size is not None  # GradCache cuts batches by rows
    return EmbeddingTrainer(
        embedder,
        _their_arguments(arguments, BatchSamplers.GROUP_BY_LABEL),
        splits["train"],
        loss=loss,
        evaluator=Evaluator(figures_of) if validation else None,
        data_collator=EmbeddingCollator(collate),
    )


def _pair_trainer(settings, start, splits, collate):
    _, data, _, options, arguments = settings
    whole = load_talker(start.pinned).to(arguments.device)
    _set_lengths(whole.config, options)
    whole.config.text_config.use_cache = False
    embedder = load_sentence_transformer(start, data.num_crops, loaded=whole.model)
    with arguments.main_process_first():
        rows = pairs.rows_to_train(embedder, splits["train"], options.hard_negatives, arguments.eval_batch_size)
    most = len(set(rows[TEXT]))
    if arguments.world_size > 1 and most < len(rows):
        raise ValueError(
            "Several processes need a text of its own for each image: batches have each text once, but those of two "
            "processes are compared with each other."
        )
    if arguments.train_batch_size > most:
        print(f"Batches hold {most} images, because there are {most} texts, and a batch has each once.")
        arguments.per_device_train_batch_size = most
    prompts = {name: embedder.prompts.get("query" if name == TEXT else "document", "") for name in rows.column_names}
    validation = splits.get("validation")
    figures_of = partial(pairs.figures_of, split=validation, collate=collate, batch_size=arguments.eval_batch_size)
    embedder[0].model = choose_trained(whole.model, options)
    return PairTrainer(
        embedder,
        _their_arguments(arguments, BatchSamplers.NO_DUPLICATES),
        rows,
        loss=pairs.make_loss(embedder, options),
        evaluator=Evaluator(figures_of) if validation else None,
        data_collator=pairs.PairCollator(embedder, collate, splits["train"], prompts),
        whole=whole,
    )


def _set_lengths(config, options):
    """What vectors may be cut to, which `phi3-embed search` and others read."""
    if too_many := [size for size in options.matryoshka if not 0 < size < config.hidden_size]:
        raise ValueError(f"--matryoshka is {too_many}, but must be below the model's {config.hidden_size}.")
    if options.matryoshka:
        config.matryoshka_dimensions = options.matryoshka


def _their_arguments(arguments, batch_sampler):
    theirs = as_class(SentenceTransformerTrainingArguments, arguments, batch_sampler=batch_sampler)
    theirs.dataloader_drop_last = arguments.dataloader_drop_last  # which they turn on for several processes
    return theirs


def _frozen_features(model, splits, collate, options, arguments):
    if options.train != "head":
        return splits
    model, folder = model.to(arguments.device).eval(), Path(arguments.output_dir) / FEATURES
    with arguments.main_process_first():
        return {
            name: with_features(split, model, collate, folder, arguments.eval_batch_size)
            for name, split in splits.items()
            if name != "test"
        }
