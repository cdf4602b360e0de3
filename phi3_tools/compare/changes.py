"""What is done to an image, each of an everyday strength, to see how far its vector moves."""

import functools
import io

from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def _crop(image):
    width, height = image.size
    x, y = (-(-side // 10) if side > 2 else 0 for side in image.size)
    return image.crop((x, y, width - x, height - y))


def _blur(image):
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 60))


def _jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=15)
    return Image.open(buffer).convert("RGB")


def shrink(image, factor):
    return image.resize([max(round(side / factor), 1) for side in image.size], Image.Resampling.BOX)


CHANGES = {
    "crop": _crop,
    "flip": ImageOps.mirror,
    "blur": _blur,
    "JPEG": _jpeg,
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.5),
    "downscaling": lambda image: shrink(image, 2).resize(image.size, Image.Resampling.BILINEAR),
}
# Images at a share of their width and height.
SHRINKS = {"1/2 size": 2, "1/4 size": 4, "1/8 size": 8}
SHRINKS = {name: functools.partial(shrink, factor=factor) for name, factor in SHRINKS.items()}
# To be raised when a change becomes another one: kept vectors of changed images are then not taken.
CHANGES_VERSION = 1
