"""`phi3-embed finetune`: trains, measures on images held out, and may push."""

import errno
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image
from safetensors import SafetensorError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoTokenizer, TrainingArguments, set_seed
from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from phi3_tools.finetune.data import FEATURES, Collator, load_splits
from phi3_tools.finetune.report import (
    CONFUSION,
    CURVES,
    MAX_CONFUSED,
    describe,
    draw_confusion,
    draw_curves,
    figures_of_classes,
    recalls,
    table_of,
    verdict,
    write,
    write_card,
)
from phi3_tools.finetune.settings import (
    ARGUMENTS,
    FIGURES,
    Settings,
    batch_size,
    check_same_training,
    parse,
    record,
)
from phi3_tools.finetune.train import embed, load_model, train, word_ids, word_vectors

# The probe is fitted on at most this many images of the training.
PROBE = 5000


def load_processor(path: str, num_crops: int | None):
    """The processor around the image processor where the model has a tokenizer, else the image processor alone."""
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
    if num_crops is not None:
        image_processor.num_crops = num_crops
        image_processor(Image.new("L", (8, 8)))  # says so if that is no number of crops
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError):
        return image_processor
    return get_class_from_dynamic_module("processing_phi3_embed.Phi3EmbedProcessor", path)(image_processor, tokenizer)


def measure(settings: Settings, splits: dict, names: list[str], processor) -> dict:
    """Figures on the held-out images of the untrained and of the fine-tuned model, and what was taken for what."""
    _, data, _, options, arguments = settings
    collate = Collator(getattr(processor, "image_processor", processor), data.num_crops)
    few = splits["train"]
    if data.streaming:
        few = few.take(PROBE)
    elif len(few) > PROBE:
        few = few.select(np.random.default_rng(arguments.seed).permutation(len(few))[:PROBE])
    rows, predicted = {}, None
    for row, path in (("untrained", options.model), ("fine-tuned", arguments.output_dir)):
        set_seed(arguments.seed)  # the untrained classifier is the one that the training began with
        model = load_model(path, options.task, names, is_start=row == "untrained").eval().to(arguments.device)
        (vectors, labels), (fitted, fitted_labels) = (
            embed(model.base_model, split, collate, arguments.eval_batch_size, f"{row}: {title}")
            for split, title in ((splits["test"], "held out"), (few, "for the probe"))
        )
        rows[row] = {}
        if options.task == "classification":
            with torch.inference_mode():
                predicted = model.classifier(vectors.to(model.device)).argmax(-1).cpu()
        elif options.words:
            words = word_vectors(model.get_input_embeddings().cpu(), word_ids(processor.tokenizer, names))
            predicted = (vectors @ words.detach().T).argmax(-1)
        if predicted is not None:
            rows[row] |= figures_of_classes(labels, predicted)
        rows[row] |= recalls(vectors, labels)
        for size in options.matryoshka:
            cut = recalls(vectors[:, :size], labels)
            rows[row] |= {f"{name}, {size} dimensions": value for name, value in cut.items()}
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(torch.nn.functional.normalize(fitted, dim=-1), fitted_labels)
        answers = probe.predict(torch.nn.functional.normalize(vectors, dim=-1))
        rows[row]["linear probe"] = accuracy_score(labels, answers)
    labels = labels.tolist()
    return {
        "held out": rows,
        "held-out images": describe(labels),
        "verdict": verdict(rows, labels, options.task),
        "confusion": None if predicted is None else {"is": labels, "named": predicted.tolist()},
    }


def check_target(arguments: TrainingArguments) -> str:
    """The full name of the repository to push to, or why that cannot be, before the work."""
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        user = HfApi(token=arguments.hub_token).whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"--push-to-hub to {name} needs a valid token: log in by `hf auth login`.") from error
    return name if "/" in name else f"{user}/{name}"


def push(arguments: TrainingArguments) -> None:
    """One commit with model, code, card and drawings, and without weights that an older one left."""
    api = HfApi(token=arguments.hub_token)
    name, output = arguments.hub_model_id, arguments.output_dir
    # ARGUMENTS says where model and data lie; the card has the same without.
    left_out = [ARGUMENTS, "checkpoint-*/**", f"{FEATURES}/**", "*.part*", "__pycache__/**", "runs/**"]
    try:
        api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=output,
            ignore_patterns=left_out,
            delete_patterns=["*.safetensors*"],
            commit_message="Fine-tune by phi3-embed",
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"Pushing to {name} failed: {error}. {output} is complete; run the same command again."
        ) from error
    print(f"Pushed to {commit.commit_url}")


def run(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    source, data, _, options, arguments = settings
    pushes, arguments.push_to_hub = arguments.push_to_hub, False  # in one commit at the end, and not by the trainer
    if pushes:
        arguments.hub_model_id = check_target(arguments)
    output, is_main = Path(arguments.output_dir), arguments.process_index == 0
    splits, names = load_splits(source, data, arguments.seed, least=1 if options.task == "classification" else 2)
    if options.early_stopping and ("validation" not in splits or arguments.eval_strategy == "no"):
        raise ValueError("--early-stopping looks at images of a validation split. Give --validation more than 0.")
    if not data.streaming and len(splits["train"]) < batch_size(options, arguments) and arguments.dataloader_drop_last:
        raise ValueError(
            f"--dataloader-drop-last leaves out batches that are not full, and the {len(splits['train'])} images to "
            f"train with do not fill one of {batch_size(options, arguments)}. Give a smaller batch."
        )
    about = record(settings, None if data.streaming else {name: len(split) for name, split in splits.items()})
    check_same_training(output, about)
    is_finished, history = (output / FIGURES).exists(), []
    processor = load_processor(options.model, data.num_crops)
    if is_finished and is_main:
        print(f"{output} holds what this command makes: it has finished already.")
    elif not is_finished:
        if is_main:
            write(output / ARGUMENTS, json.dumps(about, indent=2) + "\n")
        set_seed(arguments.seed)
        history = train(settings, splits, names, processor)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main:
        return
    if not is_finished:
        metrics = measure(settings, splits, names, processor) | {"history": history}
        draw_curves(history, output / CURVES)
        if metrics["confusion"] and len(names) <= MAX_CONFUSED:
            draw_confusion(*metrics["confusion"].values(), names, output / CONFUSION)
        write(output / FIGURES, json.dumps(metrics, indent=2) + "\n")
    metrics = json.loads((output / FIGURES).read_text())
    write_card(settings, about, metrics, names)
    print(f"Held out: {metrics['held-out images']}.", table_of(metrics["held out"]), *metrics["verdict"], sep="\n")
    if pushes:
        push(arguments)


def say(error):
    """What went wrong, and how to mend it, in words."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return (
            "A batch does not fit in memory. The same command goes on from the last checkpoint with "
            "--gradient-checkpointing, with half the --per-device-train-batch-size and twice the "
            "--gradient-accumulation-steps (a classifier), or with --mini-batch-size (an embedding). With --bf16 or "
            "fewer --num-crops it begins anew, in another --output."
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
        sys.exit("\nphi3-embed finetune: Interrupted. The same command goes on from the last checkpoint.")
    except (OSError, ValueError, MemoryError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and say(error) == str(error):
            raise
        sys.exit(f"phi3-embed finetune: {say(error)}")


if __name__ == "__main__":
    main()
