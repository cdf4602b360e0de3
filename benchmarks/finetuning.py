"""
Does fine-tuning beat the frozen embedding? On patches of scikit-learn's two photographs, by what they show: sky,
water, temple, trees, petals, leaves; grey and of equal contrast, so that colour and brightness tell nothing.

    python benchmarks/finetuning.py [--quick]

Training and held-out patches are of different parts of the photographs. Writes finetuning.json and finetuning.md
beside this file; a quick run writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import ROOT, machine
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

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
ARGUMENTS = "--validation 0 --num_crops 0 --flip --learning_rate 1e-3 --per_device_train_batch_size 16"


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


def run(num_training, num_held_out, epochs):
    """Figures on the held-out patches, as finetune.py's metrics.json has them, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        make_patches(Path(folder) / "photographs", num_training, num_held_out)
        command = [sys.executable, ROOT / "examples" / "finetune.py", "--model", ROOT / "tiny", "--data"]
        command += [f"{folder}/photographs", "--output_dir", f"{folder}/out", *ARGUMENTS.split()]
        start = time.perf_counter()
        subprocess.run([*command, "--num_train_epochs", str(epochs)], check=True, env=os.environ)
        seconds = time.perf_counter() - start
        return json.loads(Path(folder, "out", "metrics.json").read_text())["held out"], seconds


def markdown(rows, seconds, setting):
    columns = list(rows["fine-tuned"])
    lines = [
        "Written by `benchmarks/finetuning.py`: tiny/ fine-tuned by `examples/finetune.py` to tell what a grey patch "
        f"of a photograph shows; {setting['training']} patches to train with and {setting['held_out']} held out.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    lines += [f"| {name} | {' | '.join(f'{row[column]:.1%}' for column in columns)} |" for name, row in rows.items()]
    about = ", ".join(f"{key} {value}" for key, value in setting["machine"].items())
    return "\n".join([*lines, "", f"It took {seconds:.0f} s, evaluation included. Machine: {about}.", ""])


def main():
    parser = argparse.ArgumentParser(description="Fine-tuning beside the frozen embedding, on photographs.")
    parser.add_argument("--quick", action="store_true", help="few patches, nothing written")
    quick = parser.parse_args().quick
    training, held_out, epochs = (6, 4, 1) if quick else (60, 30, 8)
    rows, seconds = run(training, held_out, epochs)
    table = Table("", *rows["fine-tuned"], title="Patches of photographs")
    for name, row in rows.items():
        table.add_row(name, *(f"{figure:.1%}" for figure in row.values()))
    Console().print(table)
    if not quick:
        setting = {"training": training * len(PARTS), "held_out": held_out * len(PARTS), "machine": machine()}
        result = {"held out": rows, "seconds": seconds, "epochs": epochs, **setting}
        (FOLDER / "finetuning.json").write_text(json.dumps(result, indent=1) + "\n")
        (FOLDER / "finetuning.md").write_text(markdown(rows, seconds, setting))


if __name__ == "__main__":
    main()
