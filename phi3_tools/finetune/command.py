"""`phi3-embed finetune`: trains, measures on images held out, and may push."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, set_seed
from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from phi3_tools.finetune import pairs, report
from phi3_tools.finetune.conversations import load_conversations
from phi3_tools.finetune.data import FEATURES, ImageCollator, load_splits, sample
from phi3_tools.finetune.settings import (
    ARGUMENTS,
    FIGURES,
    TALK,
    Settings,
    batch_size,
    check_same_training,
    parse,
    record,
)
from phi3_tools.finetune.talk import OTHER, measure_answers
from phi3_tools.finetune.train import (
    embed,
    fit_probe,
    has_head,
    load_model,
    set_head,
    start_arguments,
    train,
    word_ids,
    word_vectors,
)
from phi3_tools.images import TEXT
from phi3_tools.models import PHI3_EMBED, Model, find_model, load_embedder
from phi3_tools.results import folder_beside, push, push_target, write_text

START = "start"
MEMORY = (
    "A batch does not fit in memory. The same command goes on from the last checkpoint with --gradient-checkpointing, "
    "with half the --per-device-train-batch-size and twice the --gradient-accumulation-steps (a classifier), or with "
    "--mini-batch-size (an embedding). With --bf16 or fewer --num-crops it begins anew, in another --output."
)


def find_start(text: str) -> Model:
    """
    A MODEL as it is named, pinned to a commit.

    Raises:
        ValueError: it cannot be trained.
    """
    model = find_model(text)
    if model.kind != PHI3_EMBED:
        raise ValueError(
            f"--model is {text}, a model of {model.kind}, but must be a phi3_embed model, as `phi3-embed convert` and "
            "`phi3-embed assemble` write."
        )
    if model.pooling == "tower":
        raise ValueError(
            f"--model is {text}, but the vectors of the tower do not train the projection. Leave out :tower, or give "
            "mean or global."
        )
    return model


def image_embedding(start: Model, folder: Path) -> Model:
    """
    `start` where it is an image embedding; that of a whole checkpoint, which is named with a pooling, is put into
    `folder` first, with what sentence-transformers needs.
    """
    if start.pooling is None or AutoConfig.from_pretrained(**start.pinned).text_config is None:
        return start
    if not folder.exists():
        model_class = _own_class("modeling_phi3_embed.Phi3EmbedModel", start)
        with folder_beside(folder) as beside:
            model = model_class.from_pretrained(start.name, revision=start.revision, dtype="auto")
            model.save_pretrained(beside)
            load_processor(start, None).save_pretrained(beside)
    return find_model(str(folder))._replace(pooling=start.pooling)


def load_processor(start: Model, num_crops: int | None):
    """The processor around the image processor where the model has a tokenizer, else the image processor alone."""
    image_processor = AutoImageProcessor.from_pretrained(**start.pinned)
    if num_crops is not None:
        image_processor.num_crops = num_crops
        image_processor(Image.new("L", (8, 8)))  # raises unless it is a number of crops
    try:
        tokenizer = AutoTokenizer.from_pretrained(**start.pinned)
    except (OSError, ValueError):
        return image_processor
    processor_class = _own_class("processing_phi3_embed.Phi3EmbedProcessor", start)
    return processor_class(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def _own_class(reference, start):
    return get_class_from_dynamic_module(reference, start.name, revision=start.revision)


def measure(settings: Settings, start: Model, splits: dict, names: list[str], processor) -> dict:
    """Figures on the held-out images of the untrained and of the fine-tuned model, and what was taken for what."""
    _, data, _, options, arguments = settings
    collate = ImageCollator(getattr(processor, "image_processor", processor), data.num_crops)
    few = sample(splits["train"], arguments.seed)
    rows, named = {}, None
    for row, where in (
        ("untrained", start_arguments(start)),
        ("fine-tuned", {"pretrained_model_name_or_path": arguments.output_dir}),
    ):
        model = load_model(where, options.task, names).eval().to(arguments.device)
        (vectors, labels), fitted = (
            embed(model.base_model, split, collate, arguments.eval_batch_size, f"{row}: {title}")
            for split, title in ((splits["test"], "held out"), (few, "for the probe"))
        )
        probe, rows[row] = fit_probe(*fitted, len(names)), {}
        if options.task == "classification":
            if not has_head(where, names):
                set_head(model, probe)
            with torch.inference_mode():
                logits = model.classifier(torch.from_numpy(vectors).to(model.device))
            named = logits.argmax(-1).numpy(force=True)
        elif options.words:
            words = word_vectors(model.get_input_embeddings(), word_ids(processor.tokenizer, names).to(model.device))
            named = (vectors @ words.numpy(force=True).T).argmax(-1)
        if named is not None:
            rows[row] |= report.figures_of_classes(labels, named)
        rows[row] |= report.with_cuts(partial(report.figures_of_search, vectors, labels), options.matryoshka)
        weight, bias = probe
        rows[row]["linear probe"] = float(((vectors @ weight.T + bias).argmax(-1) == labels).mean())
    labels = labels.tolist()
    return {
        "held out": rows,
        "held-out images": report.describe(labels),
        "verdict": report.verdict(rows, labels, options.task),
        "confusion": None if named is None else {"is": labels, "named": named.tolist()},
    }


def measure_pairs(settings: Settings, start: Model, splits: dict) -> dict:
    """Figures of search by words on the held-out images, of the untrained and of the fine-tuned model."""
    _, data, _, options, arguments = settings
    rows, split = {}, splits["test"]
    for row, where in (("untrained", start), ("fine-tuned", arguments.output_dir)):
        embedder = load_embedder(where, data.num_crops, device=str(arguments.device))
        collate = ImageCollator(None)
        found = pairs.figures(
            embedder.encode_texts, embedder.encode_images, split, collate, arguments.eval_batch_size, row
        )
        rows[row] = report.with_cuts(found, options.matryoshka)
    texts, (before, trained) = len(set(split[TEXT])), (row[report.TO_TEXT] for row in rows.values())
    return {
        "held out": rows,
        "held-out images": f"{len(split)} images with {texts} texts (one drawn at random is right in {1 / texts:.1%})",
        "verdict": report.against_chance(report.TO_TEXT, trained, before, 1 / texts, "a text at random"),
        "confusion": None,
    }


def run(arguments: list[str]) -> None:
    settings = parse(arguments)
    source, data, _, options, arguments = settings
    pushes, arguments.push_to_hub = arguments.push_to_hub, False  # in one commit at the end, and not by the trainer
    output, is_main = Path(arguments.output_dir), arguments.process_index == 0
    if pushes:
        arguments.hub_model_id = push_target(arguments.hub_model_id or output.resolve().name, arguments.hub_token)
    start = find_start(options.model)
    of_pairs = options.task == "embedding" and start.has_recipe
    if of_pairs:
        pairs.check(settings)
        splits, names = pairs.load_pairs(source, data, arguments.seed), []
    elif options.hard_negatives:
        raise ValueError("--hard-negatives goes with whole checkpoints that embed texts and images by a recipe.")
    elif options.task in TALK:
        splits, names = load_conversations(source, data, arguments.seed, options.question)
    else:
        splits, names = load_splits(source, data, arguments.seed, least=1 if options.task == "classification" else 2)
    if options.early_stopping and ("validation" not in splits or arguments.eval_strategy == "no"):
        raise ValueError("--early-stopping looks at images of a validation split. Give --validation more than 0.")
    counts = None if data.streaming else {name: len(split) for name, split in splits.items()}
    if counts and arguments.dataloader_drop_last and counts["train"] < batch_size(options, arguments):
        raise ValueError(
            f"--dataloader-drop-last leaves out batches that are not full, and the {counts['train']} images to train "
            f"with do not fill one of {batch_size(options, arguments)}. Give a smaller batch."
        )
    about = record(settings, counts)
    check_same_training(output, about)
    processor = load_processor(start, data.num_crops)
    is_finished, history = (output / FIGURES).exists(), []
    if is_finished and is_main:
        print(f"{output} holds what this command makes: it has finished already.")
    elif not is_finished:
        if is_main:
            write_text(output / ARGUMENTS, json.dumps(about, indent=2) + "\n")
        set_seed(arguments.seed)
        if options.task == "embedding":
            with arguments.main_process_first():
                start = image_embedding(start, output / START)
        history = train(settings, start, splits, names, processor, of_pairs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main:
        return
    if not is_finished:
        if of_pairs:
            metrics = measure_pairs(settings, start, splits)
        else:
            find = measure_answers if options.task in TALK else measure
            metrics = find(settings, start, splits, names, processor)
        metrics["history"] = history
        report.draw_curves(history, output / report.CURVES)
        if metrics["confusion"] and len(names) <= report.MAX_CONFUSED:
            report.draw_confusion(*metrics["confusion"].values(), [*names, OTHER], output / report.CONFUSION)
        write_text(output / FIGURES, json.dumps(metrics, indent=2) + "\n")
        shutil.rmtree(output / START, ignore_errors=True)
    metrics = json.loads((output / FIGURES).read_text())
    report.write_card(settings, about, metrics, names)
    table = report.table_of(metrics["held out"])
    print(f"Held out: {metrics['held-out images']}.", table, *metrics["verdict"], sep="\n")
    if pushes:
        # ARGUMENTS says where model and data lie; the card has the same without.
        ignore = [ARGUMENTS, "checkpoint-*/**", f"{FEATURES}/**", f"{START}/**", "runs/**"]
        private, token = arguments.hub_private_repo, arguments.hub_token
        print(f"Pushed to {push(output, arguments.hub_model_id, 'Fine-tune by phi3-embed', private, token, ignore)}")


def main(arguments: list[str]) -> None:
    """[`run`] with the words for full memory; phi3_tools.cli has those for other errors."""
    transformers_logging.set_verbosity_error()
    try:
        run(arguments)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
            raise ValueError(MEMORY) from error
        raise
