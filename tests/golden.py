"""The golden data: outputs of the original computation, under weights and images that are made by rules."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parent / "golden"


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight that belongs to a name of the published checkpoint."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    normal = generator.standard_normal(shape, dtype=np.float32)
    *_, owner, last = f".{name}".split(".")
    gains = {"q_proj": 2.0, "k_proj": 2.0, "out_proj": 0.5, "fc2": 0.5, "qkv_proj": 1.2, "lm_head": 4.0}
    if last in ("glb_GN", "sub_GN", "class_embedding") or owner == "wte":
        return normal
    if "norm" in owner or last == "bias":
        scale = 0.02
    elif owner == "position_embedding":
        scale = 0.5
    else:
        scale = gains.get(owner, 1.0) / math.sqrt(math.prod(shape[1:]))
    normal *= np.float32(scale)  # in place, because full size makes billions of values
    if "norm" in owner:
        normal += np.float32(last == "weight")
    return normal


def published(name: str) -> str:
    """A weight of the whole model -> its name in the published checkpoint."""
    for ours, theirs in (
        ("vision_embed_tokens.img_processor.", "vision_embed_tokens.img_processor.vision_model."),
        ("vision_embed_tokens.projector.", "vision_embed_tokens."),
        ("model.language_model.", "model."),
    ):
        name = name.replace(ours, theirs)
    return name


def image(seed: int, height: int, width: int) -> np.ndarray:
    """The uint8 image (height, width, 3) that belongs to a seed."""
    generator = np.random.Generator(np.random.PCG64(seed))
    blocks = generator.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), dtype=np.int64)
    grain = generator.integers(-30, 31, (height, width, 3), dtype=np.int64)
    y, x, c = np.arange(height)[:, None, None], np.arange(width)[None, :, None], np.arange(3)
    ramp = (x * (160 - 40 * c) // width + y * (40 + 30 * c) // height) % 256
    return np.clip((blocks[y // 32, x // 32, c] + ramp) // 2 + grain + 20, 0, 255).astype(np.uint8)


def case(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of one case of a golden file, without the case's name."""
    return {key.removeprefix(f"{name}."): arrays[key] for key in arrays if key.startswith(f"{name}.")}


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """A golden file's arrays, and its note: images, num_crops, cases."""
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        note = json.loads(file.metadata()["note"])
        return {key: file.get_tensor(key) for key in list(file.keys())}, note
