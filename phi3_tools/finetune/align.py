"""
Aligning: the projection alone is trained, so that a language model which stays as it is speaks of images.

Tower and language model are frozen, so what they give is computed once: the features of each image, and the keys and
values of what all conversations begin with. With `--words` the tokens of an image are first drawn to the words of its
answer, without the language model and in seconds an epoch; then the loss is that of the answers.

This is transformers' Trainer and not TRL's, because TRL's works out logits of the whole vocabulary at every place of a
text, and takes images where these batches hold features.
"""

import inspect
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DynamicCache, Phi3Model, PreTrainedModel, Trainer, get_cosine_schedule_with_warmup

from phi3_tools.finetune.conversations import encode
from phi3_tools.finetune.data import FEATURES, SIZES, ValidatesAll, keep_features
from phi3_tools.models import PARTS, PROJECTION
from phi3_tools.results import write_beside, write_text

KEPT = "kept"
WORDS, ALIGNED = "words.safetensors", "aligned"
WORDS_EPOCHS, WORDS_BATCH, WORDS_LEARNING_RATE, WORDS_WARMUP = 12, 32, 1e-3, 40
WORDS_TEMPERATURE, WORDS_SMOOTHING = 0.05, 0.05
MEASURED_IMAGES = 500  # for the mean and spread of features
CACHE_NAME = "cache" if "cache" in inspect.signature(Phi3Model.forward).parameters else "past_key_values"


def with_features(rows: Dataset, model: PreTrainedModel, processor, num_crops: int | None, folder: Path) -> Dataset:
    """
    Conversations -> what aligning takes of them, on disk and found there by the next run: `input_ids`, `labels`, the
    features of all views `(views, patches, C)` in float32 and `image_sizes` `(images, 2)`.
    """
    longest = model.config.text_config.max_position_embeddings

    def of(row):
        inputs = encode(row, processor, num_crops, longest)
        if "pixel_values" not in inputs:
            raise ValueError(f"{row['name']} has no image, and aligning learns from images alone. Leave it out.")
        sizes = inputs[SIZES]
        features = model.get_image_features(inputs["pixel_values"].to(model.device), sizes).last_hidden_state
        return {
            "input_ids": inputs["input_ids"].tolist(),
            "labels": inputs["labels"].tolist(),
            FEATURES: features.float().numpy(force=True),
            SIZES: sizes.tolist(),
        }

    numbers = datasets.List(datasets.Value("int64"))
    columns = {"input_ids": numbers, "labels": numbers, SIZES: datasets.List(numbers)}
    about = f"{num_crops} {processor.chat_template}"
    return keep_features(rows, of, model, about, columns, folder, writer_batch_size=16)


class AlignCollator:
    """Rows of [`with_features`] -> a batch, padded on the right, with a share of the image tokens left out."""

    def __init__(self, pad_token_id: int, image_token_id: int, token_dropout: float = 0.0):
        self.pad_token_id, self.image_token_id, self.token_dropout = pad_token_id, image_token_id, token_dropout

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts, answers, kept = [], [], []
        for row in rows:
            input_ids, labels = (torch.as_tensor(np.asarray(row[name])) for name in ("input_ids", "labels"))
            is_image = input_ids == self.image_token_id
            stays = ~is_image
            number = int(is_image.sum())
            is_kept = torch.zeros(number, dtype=torch.bool)
            is_kept[torch.randperm(number)[: max(1, round(number * (1 - self.token_dropout)))]] = True
            stays[is_image] = is_kept
            texts.append(input_ids[stays])
            answers.append(labels[stays])
            kept.append(is_kept)
        return {
            "input_ids": nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
            "labels": nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100),
            FEATURES: torch.cat([torch.as_tensor(np.asarray(row[FEATURES])) for row in rows]),
            SIZES: torch.cat([torch.as_tensor(np.asarray(row[SIZES])) for row in rows]),
            KEPT: torch.cat(kept),
        }


class Alignment(nn.Module):
    """
    A whole model of which the projection alone is trained -> the loss of a batch of [`AlignCollator`].

    The projection is trained on features of mean 0 and spread 1, channel by channel: a tower's own differ by tenfold,
    and a feature that is dropped should be an ordinary one. [`finish`] makes it one of the features as they are.
    """

    def __init__(
        self, model: PreTrainedModel, dropout: float, prefix: torch.LongTensor, rows: Dataset, is_fresh: bool
    ):
        super().__init__()
        self.model, self.dropout, self.prefix, self.kept_keys = model, dropout, prefix, None
        model.requires_grad_(False)
        self.projector.requires_grad_(True)
        mean, std = mean_and_spread(rows)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        for module in self.projector.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._drop)
        if not is_fresh:
            self._change_features(-mean / std, 1 / std)
        self.to(model.device)

    def _drop(self, layer, inputs):
        """What a layer of the projection takes, while training with a share of it dropped at random."""
        return F.dropout(inputs[0], self.dropout, self.training)

    @torch.no_grad()
    def _change_features(self, mean, std):
        """The projection for features whose `(features - mean) / std` are what it takes now: it gives the same."""
        projection = self.projector.img_projection
        first = projection if isinstance(projection, nn.Linear) else projection[0]
        merged = first.in_features // len(mean)  # patches
        mean, std = (values.to(first.weight).repeat(merged) for values in (mean, std))
        first.weight /= std
        first.bias -= first.weight @ mean
        for separator in self.projector.parameters(recurse=False):
            separator.mul_(std).add_(mean)

    def finish(self) -> PreTrainedModel:
        """The whole model, its projection one of the tower's own features."""
        self._change_features(self.mean, self.std)
        self.mean.zero_()
        self.std.fill_(1)
        return self.model

    @property
    def projector(self) -> nn.Module:
        return self.model.model.vision_embed_tokens.projector

    def tokens(self, features, image_sizes, kept):
        """What [`get_image_features`] gives, of the tokens that are kept."""
        images = self.model.get_image_features((features - self.mean) / self.std, image_sizes)
        lengths = [len(tokens) for tokens in images.pooler_output]
        images.pooler_output = tuple(
            tokens[is_kept] for tokens, is_kept in zip(images.pooler_output, kept.split(lengths))
        )
        return images

    def forward(self, input_ids, attention_mask, labels, features, image_sizes, kept):
        images = self.tokens(features, image_sizes, kept)
        start, cache = self._beginning(len(input_ids))
        hidden = self.model.model(
            input_ids=input_ids[:, start:],
            attention_mask=attention_mask,
            mm_encoder_outputs={"image": images},
            **cache,
        ).last_hidden_state
        labels = labels[:, start + 1 :]
        is_answer = labels != -100
        logits = self.model.lm_head(hidden[:, :-1][is_answer]).float()
        return {"loss": F.cross_entropy(logits, labels[is_answer])}

    def _beginning(self, batch_size):
        """How many tokens all conversations begin with, and their keys and values."""
        if not len(self.prefix) or self.model.model.language_model.gradient_checkpointing:
            return 0, {"use_cache": False}
        if self.kept_keys is None:
            with torch.inference_mode(False), torch.no_grad():
                output = self.model.model(self.prefix[None].to(self.model.device), use_cache=True)
                self.kept_keys = [(layer.keys, layer.values) for layer in output[CACHE_NAME].layers]
        cache = DynamicCache(config=self.model.config.text_config)
        for number, states in enumerate(self.kept_keys):
            cache.update(*(state.expand(batch_size, -1, -1, -1) for state in states), number)
        return len(self.prefix), {CACHE_NAME: cache}


def mean_and_spread(rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of each channel of the features of [`with_features`], both `(C,)`, in float32."""
    total = 0
    for number in range(0, len(rows), max(1, len(rows) // MEASURED_IMAGES)):
        values = torch.from_numpy(np.asarray(rows[number][FEATURES])).double().flatten(0, 1)
        total = total + torch.stack((torch.ones_like(values[0]) * len(values), values.sum(0), values.square().sum(0)))
    count, first, second = total
    mean = first / count
    return mean.float(), (second / count - mean.square()).clamp(min=1e-8).sqrt().float()


def save_projector(alignment: Alignment, path: Path) -> None:
    """Projection and separators, in float32."""
    weights = {name: weight.contiguous() for name, weight in alignment.projector.state_dict().items()}
    write_beside(path, lambda beside: save_file(weights, beside))


def load_projector(alignment: Alignment, path: Path) -> None:
    alignment.projector.load_state_dict(load_file(path))


def save_aligned(alignment: Alignment, output: Path, num_crops: int) -> None:
    """
    The whole model, and in a folder of its own what was trained of it (on images of `num_crops` crops at most), which
    `phi3-embed assemble --aligned` takes where tower and language model are at hand.
    """
    alignment.finish().save_pretrained(output)
    save_projector(alignment, output / ALIGNED / PROJECTION)
    if parts := getattr(alignment.model.config, "assembled", None):
        write_text(output / ALIGNED / PARTS, json.dumps(parts | {"num_crops": num_crops}, indent=2) + "\n")


def common_beginning(rows: Dataset, image_token_id: int) -> torch.LongTensor:
    """The tokens that all rows begin with, before any image or answer."""
    first = torch.as_tensor(rows[0]["input_ids"])
    length = min(int((first == image_token_id).nonzero()[0]), len(first))
    for row in rows.select_columns("input_ids"):
        other = torch.as_tensor(row["input_ids"])[:length]
        same = (first[: len(other)] == other).long().cumprod(0)
        length = min(int(same.sum()), length)
    return first[:length]


class AlignTrainer(ValidatesAll, Trainer):
    """A Trainer whose checkpoints hold the projection alone."""

    def evaluate(self, *args, **kwargs):
        """As the parent's, with all image tokens."""
        dropout, self.data_collator.token_dropout = self.data_collator.token_dropout, 0.0
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.data_collator.token_dropout = dropout

    def _save(self, output_dir=None, state_dict=None):
        save_projector(self.model, Path(output_dir or self.args.output_dir) / PROJECTION)

    def _load_from_checkpoint(self, checkpoint, model=None):
        load_projector(self.model, Path(checkpoint) / PROJECTION)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def draw_to_words(
    alignment: Alignment, rows: Dataset, collate: AlignCollator, special_ids: list[int], seed: int
) -> None:
    """
    Trains the projection without the language model: the tokens of an image are to be nearer to the mean word
    embedding of its answer than to those of the other answers of a batch, by cosine from the mean of all words. How
    much a token counts is learnt too, because most of an image says nothing of its answer.

    Raises:
        ValueError: a conversation has several images.
    """
    if any(len(row[SIZES]) != 1 for row in rows.select_columns(SIZES)):
        raise ValueError("--words goes with conversations of one image each.")
    table = alignment.model.get_input_embeddings().weight.detach().float()
    centre, usual = table.mean(0), table.std()
    torch.manual_seed(seed)
    attend = nn.Linear(table.shape[1], 1).to(table.device)
    loader = DataLoader(rows, WORDS_BATCH, shuffle=True, collate_fn=collate, drop_last=len(rows) > WORDS_BATCH)
    parameters = [*alignment.projector.parameters(), *attend.parameters()]
    optimizer = torch.optim.AdamW(parameters, WORDS_LEARNING_RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, WORDS_WARMUP, WORDS_EPOCHS * len(loader))
    alignment.train()
    for _ in tqdm(range(WORDS_EPOCHS), desc="Words", unit="epoch"):
        for batch in loader:
            batch = {name: tensor.to(table.device) for name, tensor in batch.items()}
            is_word = ~torch.isin(batch["labels"], torch.tensor([-100, *special_ids], device=table.device))
            said = [table[labels[words]].mean(0) - centre for labels, words in zip(batch["labels"], is_word)]
            answers, targets = torch.unique(torch.stack(said), dim=0, return_inverse=True)
            images = alignment.tokens(batch[FEATURES], batch[SIZES], batch[KEPT]).pooler_output
            tokens = [image.float() - centre for image in images]
            directions = [F.normalize(image, dim=-1) for image in tokens]
            shares = [attend(image * image.shape[1] ** 0.5).softmax(0) for image in directions]  # (tokens, 1)
            vectors = torch.stack([(share * image).sum(0) for share, image in zip(shares, directions)])
            scores = vectors @ F.normalize(answers, dim=-1).T / WORDS_TEMPERATURE
            loss = F.cross_entropy(scores, targets, label_smoothing=WORDS_SMOOTHING)
            # Words' size is what the language model is used to, and a cosine says nothing of it.
            size = torch.cat(tokens).square().mean().sqrt() / usual
            (loss + 0.1 * (size - 1).square()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
