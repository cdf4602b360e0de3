"""
Does fine-tuning beat the frozen embedding? On patches of scikit-learn's two photographs, by what they show: sky,
water, temple, trees, petals, leaves; grey and of equal contrast, so that colour and brightness tell nothing.

    python benchmarks/finetuning.py [--quick]

Training and held-out patches are of different parts of the photographs. Writes finetuning.json and finetuning.md
beside this file; a quick run writes nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import ROOT, machine
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sklearn.datasets import load_sample_images

from phi3_tools import train_tiny

FOLDER = Path(__file__).resolve().parent
SIDE = 40
# Class: photograph, and the (left, top, right, bottom) of the parts to train on and to hold out.
PARTS = {
    "leaves": (1, (0, 0, 150, 420), (460, 0, 640, 380)),
    "petals": (1, (195, 110, 310, 340), (310, 110, 425, 340)),
    "sky": (0, (340, 0, 480, 140), (480, 0, 640, 130)),
    "temple": (0, (95, 110, 205, 330), (205, 110, 315, 330)),
    "trees": (0, (400, 330, 540, 427), (575, 190, 640, 427)),
    "water": (0, (345, 238, 440, 290), (440, 238, 540, 280)),
}
TRAININGS = {
    "all": "--num-crops 0 --train all --flip",
    "lora": "--num-crops 0 --train lora --flip",
    "head": "--num-crops 0 --train head",
    "head, embedding": "--num-crops 0 --train head --task embedding",
}
WORDS = "--task embedding --num-crops 0 --validation 0 --per-device-train-batch-size 10"
WORD_TRAININGS = {"all": f"{WORDS} --learning-rate 1e-3", "lora": f"{WORDS} --train lora --learning-rate 3e-3"}
WORD_STEPS = 60


def make_patches(folder, num_training, num_held_out):
    """`folder`/train and /test with a subfolder of PNG files a class."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for name, (photograph, *boxes) in PARTS.items():
        for split, count, (left, top, right, bottom) in zip(("train", "test"), (num_training, num_held_out), boxes):
            target = Path(folder) / split / name
            target.mkdir(parents=True)
            for number in range(count):
                x, y = rng.integers((left, top), (right - SIDE + 1, bottom - SIDE + 1)).tolist()
                patch = photographs[photograph].crop((x, y, x + SIDE, y + SIDE)).convert("L")
                ImageOps.equalize(patch).save(target / f"{number}.png")


def run(num_training, num_held_out, arguments):
    """Figures on the held-out patches, as metrics.json has them, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        make_patches(Path(folder) / "photographs", num_training, num_held_out)
        return finetune(f"{folder}/photographs", f"{ROOT}:mean", f"{folder}/out", arguments)


def finetune(source, model, output, arguments):
    """Figures on the held-out images, as metrics.json has them, and the seconds."""
    command = [sys.executable, "-m", "phi3_tools", "finetune", source, "--model", model, "--output", output]
    start = time.perf_counter()
    subprocess.run([*command, *arguments.split()], check=True)
    return json.loads(Path(output, "metrics.json").read_text())["held out"], time.perf_counter() - start


def make_wordless(folder):
    """The small checkpoint with a fresh language model and fresh word embeddings: its tower knows digits, no words."""
    embedder = SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu")
    model_class = train_tiny.from_module("modeling_phi3_embed.Phi3EmbedModel")
    embedder[0].model = train_tiny.make_whole(model_class.from_pretrained(ROOT), embedder.tokenizer)
    words = embedder[0].model.get_input_embeddings().weight
    torch.nn.init.normal_(words, std=words.std().item())
    embedder.save_pretrained(folder, create_model_card=False)


def run_words(max_steps, arguments):
    """[`finetune`] of the digits with their names: texts and images in one space."""
    with tempfile.TemporaryDirectory() as folder:
        make_wordless(f"{folder}/start")
        return finetune("digits", f"{folder}/start", f"{folder}/out", f"{arguments} --max-steps {max_steps}")


def rows_of(measured):
    """A row of figures each for the untrained model and for each training."""
    first = next(iter(measured.values()))["held out"]
    return {"frozen": first["untrained"]} | {
        f"fine-tuned: {name}": part["held out"]["fine-tuned"] for name, part in measured.items()
    }


def markdown(measured, setting):
    rows = rows_of(measured)
    columns = list(rows["frozen"])
    lines = [
        "Written by `benchmarks/finetuning.py`: the small checkpoint, which knows digits alone, fine-tuned by "
        "`phi3-embed finetune` to tell what a grey patch of a photograph shows, at the command's own learning rates "
        f"and epochs; {setting['training']} patches to train with and {setting['held_out']} held out.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    cells = {name: [f"{row[column]:.1%}" if column in row else "" for column in columns] for name, row in rows.items()}
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    seconds = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in measured.items())
    about = ", ".join(f"{key} {value}" for key, value in setting["machine"].items())
    lines += [
        "",
        f"Evaluation included it took: {seconds}. Machine: {about}.",
        "",
        *words_markdown(setting["words"]),
        "",
    ]
    return "\n".join(lines)


def words_markdown(measured):
    rows = rows_of(measured)
    columns = list(rows["frozen"])
    seconds = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in measured.items())
    return [
        "Digits and their names in one space, by the last token: the small checkpoint with a fresh language model and "
        f"fresh word embeddings, fine-tuned for {WORD_STEPS} steps of ten digits; 360 digits are held out. Chance is "
        f"10% but for recall@5. It took: {seconds}.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(f"| {name} | {' | '.join(f'{row[column]:.1%}' for column in columns)} |" for name, row in rows.items()),
    ]


def main():
    parser = argparse.ArgumentParser(description="Fine-tuning beside the frozen embedding, on photographs.")
    parser.add_argument("--quick", action="store_true", help="few patches, nothing written")
    quick = parser.parse_args().quick
    training, held_out = (6, 4) if quick else (60, 30)
    measured = {}
    for name, arguments in TRAININGS.items():
        figures, seconds = run(training, held_out, arguments)
        measured[name] = {"held out": figures, "seconds": seconds}
    words = {}
    for name, arguments in WORD_TRAININGS.items():
        figures, seconds = run_words(2 if quick else WORD_STEPS, arguments)
        words[name] = {"held out": figures, "seconds": seconds}
    rows = rows_of(measured)
    table = Table("", *rows["frozen"], title="Patches of photographs")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.1%}" if column in row else "" for column in rows["frozen"]))
    Console().print(table)
    if not quick:
        setting = {
            "words": words,
            "training": training * len(PARTS),
            "held_out": held_out * len(PARTS),
            "machine": machine(),
        }
        (FOLDER / "finetuning.json").write_text(json.dumps({"trainings": measured, **setting}, indent=1) + "\n")
        (FOLDER / "finetuning.md").write_text(markdown(measured, setting))


if __name__ == "__main__":
    main()
