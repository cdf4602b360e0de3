"""What tests of `phi3-embed finetune` share: images by colour, and trainings in this process."""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file
from spaces import make_image

from phi3_tools.finetune import command
from phi3_tools.finetune.settings import last_checkpoint

COLORS = ((30, 30, 200), (30, 200, 30), (200, 30, 30))


def make_images(folder, names, per_class=10, tint=0):
    """
    A folder of images for each name, each of another colour -> the folder. `tint`: how far the colours of a class lie
    from each other.
    """
    rng = np.random.default_rng(0)
    for name, color in zip(names, COLORS):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            make_image(rng.normal(color, tint) if tint else color, number, rng).save(folder / name / f"{number}.png")
    return folder


def arguments_of(model, source, output, options):
    return [str(source), "--model", str(model), "--output", str(output), *options.split()]


def finetune(model, source, output, options):
    """Trains in this process -> what metrics.json holds."""
    command.run(arguments_of(model, source, output, options))
    return read_metrics(output)


def read_metrics(output):
    return json.loads((output / "metrics.json").read_text())


def losses(output):
    """{step: loss} of a training that has finished."""
    return {entry["step"]: entry["loss"] for entry in read_metrics(output)["history"] if "loss" in entry}


def killed(finished, folder):
    """A copy of a training as it is where it was killed after the last checkpoint but one -> its folder."""
    shutil.copytree(finished, folder)
    shutil.rmtree(last_checkpoint(folder))
    (folder / "metrics.json").unlink()
    return folder


def assert_same_weights(one, other, file="model.safetensors"):
    """To the bit."""
    weights, others = load_file(one / file), load_file(other / file)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
