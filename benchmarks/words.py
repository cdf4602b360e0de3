"""
Does fine-tuning put digits and their names into one space? The small checkpoint with a fresh language model and fresh
word embeddings, so that its tower knows digits and nothing knows a word, trained by `phi3-embed finetune`.

    python benchmarks/words.py [--quick]

Writes words.json and words.md beside this file, after each training; a quick run writes nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from finetuning import finetune, rows_of
from measure import ROOT, machine
from sentence_transformers import SentenceTransformer

from phi3_tools import train_tiny

FOLDER = Path(__file__).resolve().parent
COMMON = "--task embedding --num-crops 0 --validation 0 --per-device-train-batch-size 10 --max-steps"
STEPS = 40
TRAININGS = {"all": "--learning-rate 1e-3", "lora": "--train lora --learning-rate 3e-3"}


def make_wordless(folder):
    """The checkpoint to begin with, with the recipe of the small one."""
    embedder = SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu")
    model_class = train_tiny.from_module("modeling_phi3_embed.Phi3EmbedModel")
    embedder[0].model = train_tiny.make_whole(model_class.from_pretrained(ROOT), embedder.tokenizer)
    words = embedder[0].model.get_input_embeddings().weight
    torch.nn.init.normal_(words, std=words.std().item())
    embedder.save_pretrained(folder, create_model_card=False)


def markdown(measured, about):
    rows = rows_of(measured)
    columns = list(rows["frozen"])
    seconds = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in measured.items())
    machine_line = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join(
        [
            "Written by `benchmarks/words.py`: digits and their names in one space, by the last token. The small "
            f"checkpoint with a fresh language model and fresh word embeddings, trained for {STEPS} steps of ten "
            "digits by `phi3-embed finetune --task embedding`. 360 digits are held out; ten names search them "
            "(recall, mAP), and each of them searches the names (image to text). Chance is 10% but for recall@5.",
            "",
            f"| | {' | '.join(columns)} |",
            f"|---|{'---:|' * len(columns)}",
            *(f"| {name} | {' | '.join(f'{row[column]:.1%}' for column in columns)} |" for name, row in rows.items()),
            "",
            f"Evaluation included it took: {seconds}. Machine: {machine_line}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description="Digits and their names in one space, before and after training.")
    parser.add_argument("--quick", action="store_true", help="two steps, nothing written")
    quick, measured, about = parser.parse_args().quick, {}, machine()
    for name, arguments in TRAININGS.items():
        with tempfile.TemporaryDirectory() as folder:
            make_wordless(f"{folder}/start")
            arguments = f"{COMMON} {2 if quick else STEPS} {arguments}"
            figures, seconds = finetune("digits", f"{folder}/start", f"{folder}/out", arguments)
        measured[name] = {"held out": figures, "seconds": seconds}
        print(markdown(measured, about))
        if not quick:
            (FOLDER / "words.json").write_text(json.dumps({"trainings": measured, "machine": about}, indent=1) + "\n")
            (FOLDER / "words.md").write_text(markdown(measured, about))


if __name__ == "__main__":
    main()
