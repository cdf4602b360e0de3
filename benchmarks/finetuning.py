"""
Does fine-tuning beat the frozen embedding? On patches of scikit-learn's two photographs, by what they show: sky,
water, temple, trees, petals, leaves; grey and of equal contrast, so that colour and brightness tell nothing.

    python benchmarks/finetuning.py [--quick]

Training and held-out patches are of different parts of the photographs. Writes finetuning.json and finetuning.md
beside this file; a quick run writes nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from measure import ROOT, command, listed, machine, table
from PIL import Image, ImageOps
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
TRAININGS = {
    "all": "--num-crops 0 --train all --flip",
    "lora": "--num-crops 0 --train lora --flip",
    "head": "--num-crops 0 --train head",
    "head, embedding": "--num-crops 0 --train head --task embedding",
}


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
    seconds = command("finetune", source, "--model", model, "--output", output, *arguments.split())
    return json.loads(Path(output, "metrics.json").read_text())["held out"], seconds


def table_of(measured):
    """A row of figures each for the untrained model and for each training."""
    rows = {"frozen": next(iter(measured.values()))["held out"]["untrained"]}
    rows |= {f"fine-tuned: {name}": part["held out"]["fine-tuned"] for name, part in measured.items()}
    columns = list(rows["frozen"])
    cells = {name: [f"{row[column]:.1%}" if column in row else "" for column in columns] for name, row in rows.items()}
    return table(["", *columns], [[name, *row] for name, row in cells.items()])


def markdown(measured, setting):
    lines = [
        "Written by `benchmarks/finetuning.py`: the small checkpoint, which knows digits alone, fine-tuned by "
        "`phi3-embed finetune` to tell what a grey patch of a photograph shows, at the command's own learning rates "
        f"and epochs; {setting['training']} patches to train with and {setting['held_out']} held out.",
        "",
        *table_of(measured),
    ]
    seconds = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in measured.items())
    about = listed(setting["machine"])
    return "\n".join([*lines, "", f"Evaluation included it took: {seconds}. Machine: {about}.", ""])


def main():
    parser = argparse.ArgumentParser(description="Fine-tuning beside the frozen embedding, on photographs.")
    parser.add_argument("--quick", action="store_true", help="few patches, nothing written")
    quick = parser.parse_args().quick
    training, held_out = (6, 4) if quick else (60, 30)
    measured = {}
    for name, arguments in TRAININGS.items():
        figures, seconds = run(training, held_out, arguments)
        measured[name] = {"held out": figures, "seconds": seconds}
    setting = {"training": training * len(PARTS), "held_out": held_out * len(PARTS), "machine": machine()}
    print(markdown(measured, setting))
    if not quick:
        (FOLDER / "finetuning.json").write_text(json.dumps({"trainings": measured, **setting}, indent=1) + "\n")
        (FOLDER / "finetuning.md").write_text(markdown(measured, setting))


if __name__ == "__main__":
    main()
