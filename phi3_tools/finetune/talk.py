"""Trainings of a whole model by what is said of images, and its answers on conversations held out."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer

from phi3_tools.finetune import align
from phi3_tools.finetune.conversations import MESSAGES, conversation, encode
from phi3_tools.finetune.data import ValidatesAll
from phi3_tools.finetune.report import verdict_of_answers
from phi3_tools.finetune.settings import Settings, as_class
from phi3_tools.images import NAME
from phi3_tools.models import Model, prompt_inputs, score_answer

OTHER = "(other)"  # an answer that names no class
# Held-out conversations that are answered, and of these how many are shown.
ANSWERED, SHOWN = 500, 12
LORA_TARGETS = r".*language_model.*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"


def load_talker(where: dict) -> PreTrainedModel:
    """
    A whole model in float32; `where` are arguments of `from_pretrained`.

    Raises:
        ValueError: it is the image embedding alone.
    """
    try:
        return AutoModelForImageTextToText.from_pretrained(**{"trust_remote_code": True, "dtype": "float32", **where})
    except ValueError as error:
        if "text_config" not in str(error) and "Unrecognized configuration" not in str(error):
            raise
        name = where["pretrained_model_name_or_path"]
        raise ValueError(f"{name} is an image embedding without a language model, so it cannot answer.") from error


def talk_trainer(settings: Settings, start: Model, splits: dict[str, Dataset], processor) -> Trainer:
    """The trainer of `--task align` or `instruct`, ready to train."""
    is_fresh = AutoConfig.from_pretrained(**start.pinned).untrained
    # Aligning mends what loading would warn of; instructing goes on from it.
    model = load_talker(start.pinned | ({"untrained": False} if settings.task.task == "align" else {}))
    model.config.untrained = False
    validation = splits.get("validation")
    if settings.task.task == "align":
        return _aligning(settings, model, splits["train"], validation, processor, is_fresh)
    return _instructing(settings, model, splits["train"], validation, processor)


def _aligning(settings, model, train, validation, processor, is_fresh):
    _, data, _, options, arguments = settings
    tokenizer, image_token_id = processor.tokenizer, model.config.image_token_id
    model.to(arguments.device)
    with arguments.main_process_first():
        folder = Path(arguments.output_dir) / align.FEATURES
        train, validation = (
            rows and align.with_features(rows, model, processor, data.num_crops, folder)
            for rows in (train, validation)
        )
    beginning = align.common_beginning(train, image_token_id)
    alignment = align.Alignment(model, options.feature_dropout, beginning, train, is_fresh)
    collate = align.AlignCollator(tokenizer.pad_token_id, image_token_id, options.token_dropout)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        arguments.gradient_checkpointing = arguments.activation_checkpointing = False  # its old name and its new one
    words = Path(arguments.output_dir) / align.WORDS
    if options.words and not words.exists():
        align.draw_to_words(alignment, train, collate, tokenizer.all_special_ids, arguments.seed)
        align.save_projector(alignment, words)
    if options.words:
        align.load_projector(alignment, words)
    arguments.prediction_loss_only = True
    return align.AlignTrainer(alignment, arguments, collate, train, validation)


class InstructCollator:
    """Rows of conversations -> a batch, padded on the right."""

    def __init__(self, processor, num_crops: int | None, longest: int):
        self.processor, self.num_crops, self.longest = processor, num_crops, longest

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        encoded = [encode(row, self.processor, self.num_crops, self.longest) for row in rows]
        pads = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        for inputs in encoded:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        batch = {
            name: nn.utils.rnn.pad_sequence([inputs[name] for inputs in encoded], batch_first=True, padding_value=pad)
            for name, pad in pads.items()
        }
        for name in ("pixel_values", "image_sizes"):
            if parts := [inputs[name] for inputs in encoded if name in inputs]:
                batch[name] = torch.cat(parts)
        return batch


class InstructTrainer(ValidatesAll, SFTTrainer):
    pass


def _instructing(settings, model, train, validation, processor):
    _, data, _, options, arguments = settings
    theirs = as_class(
        SFTConfig,
        arguments,
        prediction_loss_only=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    adapters = None
    if options.train == "lora":
        rank = options.lora_rank
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, modules_to_save=["projector"])
    return InstructTrainer(
        model,
        theirs,
        # TRL's own batches leave out the starts of sequence that our processor puts around images.
        data_collator=InstructCollator(processor, data.num_crops, model.config.text_config.max_position_embeddings),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        peft_config=adapters,
    )


@torch.inference_mode()
def ask(model: PreTrainedModel, processor, rows: Dataset, num_crops: int | None, batch_size: int, title: str):
    """
    The answers `(n,)` that a model gives at the last turn of conversations, by the likeliest token at each step, and
    the loss a token of what is said there in truth, as the mean of the conversations.
    """
    longest = model.config.text_config.max_position_embeddings
    answers, losses = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc=title, unit="batch"):
        batch = rows.select(range(start, min(start + batch_size, len(rows))))
        asked = [conversation(row, processor)[:-1] for row in batch]
        inputs = prompt_inputs(processor, asked, num_crops, add_generation_prompt=True).to(model.device)
        truths = [said(row) for row in batch]
        most = 8 + max(len(processor.tokenizer(text).input_ids) for text in truths)
        output = model.generate(**inputs, max_new_tokens=most, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row in batch:
            losses.append(score_answer(model, encode(row, processor, num_crops, longest))[1])
    return [answer.strip() for answer in answers], float(np.mean(losses))


def said(row: dict, turn: int = -1) -> str:
    """What is said at a turn of a conversation, by default the last."""
    return "".join(part["text"] or "" for part in row[MESSAGES][turn]["content"]).strip()


def measure_answers(settings: Settings, start: Model, splits: dict[str, Dataset], names: list[str], processor) -> dict:
    """Figures on the held-out conversations of the model before (unless its projection is fresh) and after."""
    _, data, _, _, arguments = settings
    rows = splits["test"].filter(lambda row: row[MESSAGES][-1]["role"] == "assistant")
    if len(rows) > ANSWERED:
        rows = rows.shuffle(seed=arguments.seed).select(range(ANSWERED))
    truths, figures, answers = [said(row) for row in rows], {}, {}
    for name, where in (
        ("before", start.pinned),
        ("fine-tuned", {"pretrained_model_name_or_path": arguments.output_dir}),
    ):
        if AutoConfig.from_pretrained(**{"trust_remote_code": True, **where}).untrained:
            continue
        model = load_talker(where).eval().to(arguments.device)
        answers[name], loss = ask(model, processor, rows, data.num_crops, arguments.eval_batch_size, name)
        right = float(np.mean([answer == text for answer, text in zip(answers[name], truths)]))
        figures[name] = {"exact answers": right, "loss": loss}
    confusion = None
    if names:
        number = {name: place for place, name in enumerate(names)}
        named = [number.get(answer, len(names)) for answer in answers["fine-tuned"]]
        confusion = {"is": [number[text] for text in truths], "named": named}
    shown = [
        {"image": row[NAME], "question": said(row, -2), "truth": text}
        | {name: given[place] for name, given in answers.items()}
        for place, (row, text) in enumerate(zip(rows, truths))
    ]
    return {
        "held out": figures,
        "held-out images": f"{len(rows)} conversations (one is {1 / len(rows):.1%})",
        "verdict": verdict_of_answers(figures, truths),
        "confusion": confusion,
        "answers": shown[:SHOWN],
    }
