"""
Images -> views. `limit` is the least work that gives the same views of an image: one resize in uint8, one write
of each crop, and the global view from the pixels that it needs. `original scheme` is the published computation.
"""

from functools import partial

import numpy as np
import torch
from measure import ROOT, figures, fresh, in_turns, peak_bytes
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

CASE = "8 mixed images at 16 crops"
NUM_CROPS = 16
SIZES = ((4000, 3000), (3000, 4000), (1920, 1080), (640, 480), (1366, 768), (500, 1500), (1024, 1024), (336, 336))
CONTENDERS = ("limit", "ours, 1 thread", "ours, 2 threads", "original scheme")
TOLERANCE = 2e-6

MEAN = np.float32(OPENAI_CLIP_MEAN).reshape(3, 1, 1)
STD = np.float32(OPENAI_CLIP_STD).reshape(3, 1, 1)
SCALE, BIAS = 1 / (255 * STD), -MEAN / STD


def load_images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for width, height in SIZES]


def contender(name):
    """A function of the images that gives `pixel_values`, with one torch thread unless the name says two."""
    threads = 2 if name.endswith("2 threads") else 1
    processor = AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True)
    compute = {"limit": limit, "original scheme": original_scheme}.get(
        name, lambda images: processor(images, num_crops=NUM_CROPS, return_tensors="pt").pixel_values
    )

    def call(images):
        torch.set_num_threads(threads)
        return compute(images)

    return call


def target_size(width, height):
    """Width and height of an image, no taller than wide, that fills the widest grid of crops."""
    cols = max(n for n in range(1, NUM_CROPS + 1) if n * np.ceil(n * height / width) <= NUM_CROPS)
    return cols * 336, int(cols * 336 / (width / height))


def num_views(image):
    width, height = target_size(max(image.size), min(image.size))
    return width // 336 * -(-height // 336) + 1


def limit(images):
    counts = [num_views(image) for image in images]
    pixel_values = np.empty((sum(counts), 3, 336, 336), np.float32)
    for image, views in zip(images, np.split(pixel_values, np.cumsum(counts)[:-1])):
        pixels = padded(resized(image))
        rows, cols = pixels.shape[0] // 336, pixels.shape[1] // 336
        write(shrunk(shrunk(pixels, rows, axis=0), cols, axis=1), views[0])
        for number in range(rows * cols):
            y, x = number // cols * 336, number % cols * 336
            write(pixels[y : y + 336, x : x + 336], views[number + 1])
    return pixel_values


def resized(image):
    if image.width >= image.height:
        return image.resize(target_size(*image.size), Image.Resampling.BILINEAR)
    # A tall image is resized lying on its side in the original: its columns first, here without turning it.
    height, width = target_size(image.height, image.width)
    image = image.resize((image.width, height), Image.Resampling.BILINEAR)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def padded(image):
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    if height % 336 == width % 336 == 0:
        return pixels
    canvas = np.full((-(-height // 336) * 336, -(-width // 336) * 336, 3), 255, np.uint8)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def shrunk(pixels, factor, axis):
    """Bicubic, of only the lines that it weighs: one at odd factors, four at even ones, with a = -0.75 at 0.5."""
    middle = np.arange(factor // 2, pixels.shape[axis], factor)
    if factor % 2:
        return pixels.take(middle, axis)
    far, near = (
        np.add(*(pixels.take(middle + shift, axis, mode="clip") for shift in pair), dtype=np.float32)
        for pair in ((-2, 1), (-1, 0))
    )
    far *= -0.09375
    near *= 0.59375
    near += far
    return near


def write(view, target):
    np.multiply(view.transpose(2, 0, 1), SCALE, out=target)
    target += BIAS


def original_scheme(images):
    """With zeros behind the views of each image: `(num_images, 17, 3, 336, 336)`."""
    return torch.stack([original_views(image) for image in images])


def original_views(image):
    is_tall = image.width < image.height
    if is_tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    image = image.resize(target_size(*image.size), Image.Resampling.BILINEAR)
    rows, cols = -(-image.height // 336), image.width // 336
    canvas = Image.new("RGB", (image.width, rows * 336), (255, 255, 255))
    canvas.paste(image, (0, (canvas.height - image.height) // 2))
    if is_tall:
        canvas, rows, cols = canvas.transpose(Image.Transpose.TRANSPOSE), cols, rows
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous().float().div(255)
    pixels = pixels.sub(torch.from_numpy(MEAN)).div(torch.from_numpy(STD))
    global_view = interpolate(pixels[None], (336, 336), mode="bicubic")
    crops = pixels.view(3, rows, 336, cols, 336).permute(1, 3, 0, 2, 4).reshape(-1, 3, 336, 336)
    padding = torch.zeros(NUM_CROPS - len(crops), 3, 336, 336)
    return torch.cat((global_view, crops, padding))


def measure_seconds(rounds):
    images = load_images()
    calls = {name: partial(contender(name), images) for name in CONTENDERS}
    return in_turns(calls, rounds, CASE, check_agreement)


def check_agreement(results):
    counts = [num_views(image) for image in load_images()]
    padded_views = results["original scheme"]
    results = results | {"original scheme": np.concatenate([row[:n] for row, n in zip(padded_views, counts)])}
    for name, pixel_values in results.items():
        np.testing.assert_allclose(pixel_values, results["limit"], atol=TOLERANCE, rtol=0, err_msg=name)


def measure_peak(name):
    images, call = load_images(), contender(name)
    call(images[-1:])
    return peak_bytes(lambda: call(images))


def run(quick):
    seconds = fresh(measure_seconds, 3 if quick else 21)
    return {CASE: figures(seconds, {name: fresh(measure_peak, name) for name in CONTENDERS})}
