"""Phi-3-vision: image processor and processor."""

import copy
import io
import itertools
import math
import os
import re
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    SizeDict,
)
from transformers.processing_utils import MultiModalData, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import TensorType

from .configuration_phi3_embed import hd_num_tokens

# An image of 257 views is 350 MB of float32 and 37,000 tokens, more than a quarter of Phi-3's longest context.
MAX_NUM_CROPS = 256
WHITE = (255, 255, 255)
SURROGATE = re.compile("[\ud800-\udfff]")
IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
ACCEPTED_IMAGES = "PIL images, numpy or torch arrays, paths, bytes, binary files, or lists of these"
MAX_DEPTH = 8
TRANSPARENCY = ("drop", "white")


class Phi3EmbedImageProcessorKwargs(TypedDict, total=False):
    """What the image processor honours; any other argument of a call is an error."""

    num_crops: int
    num_img_tokens: int
    pad_views: bool
    transparency: str
    size: dict[str, int] | SizeDict
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    input_data_format: str | ChannelDimension | None
    return_tensors: str | TensorType | None


def hd_target_size(width: int, height: int, num_crops: int, crop_size: int) -> tuple[int, int]:
    """
    Width and height of an image resized for the HD transform: the widest multiple of `crop_size` (highest, for a tall
    image) at which it fits in `num_crops` crops, in Microsoft's order of float operations.
    """
    if width < height:
        return hd_target_size(height, width, num_crops, crop_size)[::-1]
    ratio = width / height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    # An image thinner than 1 pixel at that width keeps one line. The original fails there.
    return scale * crop_size, max(int(scale * crop_size / ratio), 1)


def hd_resize(image: Image.Image, num_crops: int, crop_size: int) -> Image.Image:
    """Resizes an RGB image and centres it on white, so that its sides are multiples of `crop_size`."""
    width, height = hd_target_size(*image.size, num_crops, crop_size)
    if image.width < image.height:
        # The original turns a tall image on its side. Pillow rounds between its two passes, so their order counts.
        image = image.resize((image.width, height), Image.Resampling.BILINEAR)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    corner, padded_size = zip(*_padded(image.size, crop_size))
    if padded_size == image.size:
        return image
    padded = Image.new("RGB", padded_size, WHITE)
    padded.paste(image, corner)
    return padded


def _padded(size: tuple[int, int], crop_size: int) -> list[tuple[int, int]]:
    """For each side: where the image begins on it, and its length with the padding."""
    lengths = [math.ceil(side / crop_size) * crop_size for side in size]
    return [((length - side) // 2, length) for side, length in zip(size, lengths)]


def bicubic_shrink(pixels: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """
    Shrinks one axis by a whole factor as `torch.nn.functional.interpolate(mode="bicubic")` does: no smoothing,
    half-pixel centres, a = -0.75. An odd factor hits pixels; an even one falls half-way between two, and weighs four.
    """
    length = pixels.shape[axis]
    first = np.arange(factor // 2, length, factor)
    if factor % 2:
        return pixels.take(first, axis)
    a = -0.75
    outer, inner = np.float32(a / 8), np.float32(0.5 - a / 8)
    taps = [pixels.take((first + shift).clip(0, length - 1), axis) for shift in (-2, -1, 0, 1)]
    return (np.add(taps[0], taps[3], dtype=np.float32)) * outer + (np.add(taps[1], taps[2], dtype=np.float32)) * inner


def _infer_channel_dimension(shape) -> ChannelDimension:
    # 1 channel is the weaker sign: a colour image may be 1 pixel high or wide.
    for counts in ((3, 4), (1,)):
        is_first, is_last = shape[0] in counts, shape[-1] in counts
        if is_first and is_last:
            raise ValueError(
                f"An image array of shape {shape} may have its channels first or last. Say which by "
                "`input_data_format='channels_first'` or 'channels_last'."
            )
        if is_first or is_last:
            return ChannelDimension.FIRST if is_first else ChannelDimension.LAST
    raise ValueError(f"An image array is of shape {shape}, but must have 1, 3 or 4 channels.")


def _array_to_pil(array: np.ndarray, input_data_format) -> Image.Image:
    if array.ndim == 2:
        array, input_data_format = array[..., None], ChannelDimension.LAST
    if array.ndim != 3 or array.size == 0:
        raise ValueError(
            f"An image array is of shape {array.shape}, but must be (height, width), (height, width, channels) or "
            "(channels, height, width), and not empty."
        )
    if input_data_format is None:
        input_data_format = _infer_channel_dimension(array.shape)
    if ChannelDimension(input_data_format) == ChannelDimension.FIRST:
        array = array.transpose(1, 2, 0)
    if np.issubdtype(array.dtype, np.floating):
        # NaN fails this comparison too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"A float image array has values from {array.min()} to {array.max()}, but must be in [0, 1]. "
                "Divide by its range, or pass uint8."
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"An image array is of dtype {array.dtype}, but must be uint8, or float in [0, 1].")
    if array.shape[2] not in (1, 3, 4):
        raise ValueError(f"An image array has {array.shape[2]} channels (last), but must have 1, 3 or 4.")
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array))


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    try:
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy(force=True)
    except (TypeError, RuntimeError) as error:  # NotImplementedError among them: meta, sparse, nested, packed dtypes
        raise ValueError(
            f"An image is a tensor of dtype {tensor.dtype}, layout {tensor.layout} and device {tensor.device}, but "
            "must be dense, on a device that holds its values, and of uint8, or floating point in [0, 1]."
        ) from error


def _check_kind(image):
    if not isinstance(image, (str, Path, bytes, Image.Image, np.ndarray, torch.Tensor)) and not hasattr(image, "read"):
        raise ValueError(f"An image is of type {type(image).__name__}. Accepted are {ACCEPTED_IMAGES}.")


def _check_path(path):
    """Pillow would wait for ever for what a pipe may bring."""
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", str(path), re.IGNORECASE):
        raise ValueError(f"{str(path)[:80]!r} is a URL. Fetch it first: `transformers.image_utils.load_image` does.")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"There is no image file {str(path)!r}.") from error
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{str(path)!r} is not a regular file, but a folder, a pipe or a device.")


def _name(image) -> str:
    if isinstance(image, (str, Path)):
        return repr(str(image))
    if isinstance(image, bytes):
        return f"An image of {len(image)} bytes"
    return f"An image ({getattr(image, 'filename', '') or getattr(image, 'name', '') or repr(image):.200})"


def open_image(image, input_data_format=None, transparency="drop") -> Image.Image:
    """Any one image -> a PIL image of mode RGB. See [`~Phi3EmbedImageProcessor.open_image`]."""
    _check_kind(image)
    if isinstance(image, torch.Tensor):
        image = _tensor_to_array(image)
    if isinstance(image, np.ndarray):
        return _to_rgb(_array_to_pil(image, input_data_format), transparency)
    if isinstance(image, (str, Path)):
        _check_path(image)
    try:
        if isinstance(image, Image.Image):
            image.load()
            return _to_rgb(image, transparency)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
            # Upright as the camera says, as transformers' pipelines open files.
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened, transparency)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{_name(image)} has too many pixels ({error}). If you trust it, raise `PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error
    except Exception as error:  # of any type, as decoders raise: KeyError, IndexError, struct.error, ...
        # Pillow's words name the file object that it was given.
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{_name(image)} cannot be read as an image: {reason or type(error).__name__}") from error


def _to_rgb(image: Image.Image, transparency: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"its size is {image.size}, so it has no pixels.")
    on_white = transparency == "white" and image.has_transparency_data
    if image.mode.startswith("I;16"):
        return _scale_16_bits(image, on_white)
    if image.mode in ("I", "F"):
        _check_range(image)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no way from grey with alpha multiplied in to RGB but by this
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        if on_white:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image)
        # `convert` would copy.
        return image if image.mode == "RGB" else image.convert("RGB")


def _scale_16_bits(image: Image.Image, on_white: bool) -> Image.Image:
    grey = np.array(image)
    is_transparent = grey == image.info["transparency"] if on_white else None
    # round(grey / 257) in whole numbers: as floats a large image would take 8 bytes a pixel.
    scaled = (grey // 257).astype(np.uint8)
    grey %= 257
    scaled += grey > 128
    if on_white:
        scaled[is_transparent] = 255
    return Image.fromarray(scaled).convert("RGB")


def _check_range(image: Image.Image) -> None:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # NaN fails this comparison too
        raise ValueError(
            f"mode {image.mode!r} has values from {low} to {high}, but must be in 0..255: scale it first."
        )
    if image.mode == "F" and 0 < high <= 1:
        raise ValueError(
            f"mode 'F' has values from {low} to {high}, but must be in 0..255. Values in [0, 1] are taken as an "
            "array: `np.asarray(image)`."
        )


def _is_float(array) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else np.issubdtype(array.dtype, np.floating)


def flatten_images(images, depth: int = 0) -> list:
    """Single, listed, nested or stacked images -> a flat list."""
    if isinstance(images, (list, tuple)):
        if depth == MAX_DEPTH:
            raise ValueError(f"Lists of images are nested more than {MAX_DEPTH} deep. Accepted are {ACCEPTED_IMAGES}.")
        return [flat for image in images for flat in flatten_images(image, depth + 1)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


class Phi3EmbedImageProcessor(BaseImageProcessor):
    r"""
    Phi-3-vision's HD transform: an image is resized to a grid of at most `num_crops` crops, padded with white, and
    preceded by a global view of one crop's size.

    Args:
        num_crops (`int`, *optional*, defaults to 16):
            The most crops of an image; 0 for the global view alone. Also an argument of every call.
        size (`dict`, *optional*, defaults to `{"height": 336, "width": 336}`):
            The size of a crop in pixels.
        num_img_tokens (`int`, *optional*, defaults to 144):
            Tokens that the model makes of a view, separators not counted.
        pad_views (`bool`, *optional*, defaults to `False`):
            Whether `pixel_values` have one row an image, as Microsoft's, with zeros behind its views: for tools that
            cut batches by rows. Also an argument of every call.
        transparency (`str`, *optional*, defaults to `"drop"`):
            `"drop"`: an alpha channel is left out, as in the original. `"white"`: the image is put on white, so that
            transparent pixels look as a page shows them. Also an argument of every call.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std (*optional*):
            As everywhere; defaults to 1 / 255 and CLIP's mean and standard deviation.

    Example:

    ```python
    >>> image_processor = AutoImageProcessor.from_pretrained(".", trust_remote_code=True)
    >>> inputs = image_processor(Image.new("RGB", (1366, 768)), return_tensors="pt")
    >>> inputs.pixel_values.shape, inputs.image_sizes.tolist(), inputs.num_image_tokens.tolist()
    (torch.Size([16, 3, 336, 336]), [[1008, 1680]], [2353])
    ```"""

    model_input_names = ["pixel_values", "image_sizes", "num_image_tokens"]
    valid_kwargs = Phi3EmbedImageProcessorKwargs

    num_crops = 16
    num_img_tokens = 144
    pad_views = False
    transparency = "drop"
    size = {"height": 336, "width": 336}
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def __init__(self, **kwargs: Unpack[Phi3EmbedImageProcessorKwargs]):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        _check_geometry(self.num_crops, self.size, self.num_img_tokens)
        _check_choices(self.pad_views, self.transparency)
        _affine(*(getattr(self, name) for name in AFFINE_KWARGS))  # raises

    def save_pretrained(self, save_directory, **kwargs):
        """As [`BaseImageProcessor.save_pretrained`]."""
        # An image processor taken from a processor keeps its `AutoProcessor` entry, with which loading this folder
        # needs a tokenizer.
        getattr(self, "auto_map", {}).pop("AutoProcessor", None)
        return super().save_pretrained(save_directory, **kwargs)

    def fetch_images(self, images):
        """Images as they are: unlike other image processors this one never reaches for the network."""
        return images

    def __call__(self, images, **kwargs: Unpack[Phi3EmbedImageProcessorKwargs]) -> BatchFeature:
        """See [`~Phi3EmbedImageProcessor.preprocess`]."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images, **kwargs: Unpack[Phi3EmbedImageProcessorKwargs]) -> BatchFeature:
        r"""
        Args:
            images:
                What [`~Phi3EmbedImageProcessor.open_image`] takes; one, or a list, or nested lists.
            num_crops, pad_views, transparency (*optional*):
                In place of the processor's own.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"`.

        Returns:
            `pixel_values` (`(num_views, 3, height, width)`, float32): the views of all images one after another, of
            each its global view, then its crops row by row; with `pad_views` `(num_images, max_views, 3, height,
            width)`, one row an image with zeros behind its views, `max_views` those of the image that has most.
            `image_sizes` (`(num_images, 2)`): height and width of each grid of crops in pixels; 0 x 0 for the global
            view alone. `num_image_tokens` (`(num_images,)`): the tokens that the model makes of each image.

        Raises:
            ValueError: an image cannot be read or is of a wrong kind, shape, dtype or range, or there is none.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if "num_crops" in kwargs:
            _check_num_crops(kwargs["num_crops"])
        return super().preprocess(images, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images,
        num_crops,
        num_img_tokens,
        size,
        pad_views,
        transparency,
        input_data_format=None,
        return_tensors=None,
        **kwargs,
    ):
        _check_geometry(num_crops, size, num_img_tokens)
        _check_choices(pad_views, transparency)
        images = flatten_images(images)
        if not images:
            raise ValueError(f"There are no images. Accepted are {ACCEPTED_IMAGES}.")
        for image in images:
            _check_kind(image)
            if not kwargs["do_rescale"] and isinstance(image, (np.ndarray, torch.Tensor)) and _is_float(image):
                raise ValueError(
                    "A float image array is in [0, 1] already and `do_rescale` is False, but resizing is done in "
                    "0..255. Leave `do_rescale` on: values come out as if they had not been rescaled."
                )
        scale, bias = _affine(**{name: kwargs[name] for name in AFFINE_KWARGS})

        def resize(number):
            try:
                image = open_image(images[number], input_data_format, transparency)
            except ValueError as error:
                raise ValueError(f"Image {number}: {error}") from error
            return hd_resize(image, max(num_crops, 1), size.height)

        # Pillow and numpy release the GIL. In the workers of a DataLoader torch has one thread, as this should.
        num_threads = min(len(images), torch.get_num_threads())
        with ThreadPoolExecutor(num_threads) as pool:
            run = map if num_threads == 1 else pool.map
            # Resized images are a quarter of their views' bytes, and tell how many views there are.
            resized = list(run(resize, range(len(images))))
            grids = np.array([(image.height, image.width) for image in resized]) // size.height * (num_crops > 0)
            num_views = grids.prod(1) + 1
            ends = num_views.cumsum()
            if pad_views:
                pixel_values = np.zeros((len(images), num_views.max(), 3, size.height, size.width), np.float32)
                targets = [views[:used] for views, used in zip(pixel_values, num_views)]
            else:
                pixel_values = np.empty((ends[-1], 3, size.height, size.width), np.float32)
                targets = np.split(pixel_values, ends[:-1])
            list(run(lambda image, target: _write_views(image, size.height, scale, bias, target), resized, targets))
        data = {
            "pixel_values": pixel_values,
            "image_sizes": grids * size.height,
            "num_image_tokens": hd_num_tokens(grids[:, 0], grids[:, 1], math.isqrt(num_img_tokens)),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def open_image(self, image, input_data_format=None, transparency: str | None = None) -> Image.Image:
        r"""
        One image of any kind as it is embedded, before it is resized: the only opener that is needed.

        Args:
            image:
                A path, bytes or a binary file, which are decoded and turned upright by their EXIF orientation; or a
                PIL image of any mode, taken as it stands (`PIL.ImageOps.exif_transpose` turns it); or a numpy or torch
                array in either channel order, uint8 or float in [0, 1]. Greys of 16 bits are scaled to 8.
            input_data_format (`str`, *optional*):
                `"channels_first"` or `"channels_last"`, where the shape of an array leaves it open.
            transparency (`str`, *optional*):
                In place of the processor's own.

        Returns:
            A PIL image of mode RGB.

        Raises:
            ValueError: it cannot be read, or is of a wrong kind, shape, dtype or range. The file is named. More than
                twice `PIL.Image.MAX_IMAGE_PIXELS` pixels are not decoded.
        """
        transparency = self.transparency if transparency is None else transparency
        _check_choices(self.pad_views, transparency)
        return open_image(image, input_data_format, transparency)

    def image_box(self, width: int, height: int, num_crops: int | None = None) -> tuple[int, int, int, int]:
        """
        Where an image of this size in pixels lies in its grid of crops (with `num_crops` 0 in its global view), around
        which the grid is white: left, upper, right, lower in pixels of the grid.
        """
        _check_sides(width, height)
        num_crops = self.num_crops if num_crops is None else num_crops
        _check_geometry(num_crops, self.size, self.num_img_tokens)
        inner = hd_target_size(width, height, max(num_crops, 1), self.size.height)
        left, upper = (start for start, _ in _padded(inner, self.size.height))
        return left, upper, left + inner[0], upper + inner[1]

    def num_image_tokens(self, width: int, height: int, num_crops: int | None = None) -> int:
        """Tokens that an image of this size in pixels takes, without touching a pixel."""
        _check_sides(width, height)
        rows, cols = self._grid(width, height, self.num_crops if num_crops is None else num_crops)
        return hd_num_tokens(rows, cols, math.isqrt(self.num_img_tokens))

    def _grid(self, width, height, num_crops):
        _check_geometry(num_crops, self.size, self.num_img_tokens)
        if num_crops == 0:
            return 0, 0
        (_, width), (_, height) = _padded(hd_target_size(width, height, num_crops, self.size.height), self.size.height)
        return height // self.size.height, width // self.size.height


AFFINE_KWARGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def _affine(do_rescale, rescale_factor, do_normalize, image_mean, image_std):
    """
    Rescaling and normalisation as one multiplication and one addition, each of shape (3, 1, 1) or (1, 1, 1). Raises
    ValueError unless mean and standard deviation are numbers, finite, and the latter positive.
    """
    factor = rescale_factor if do_rescale else 1.0
    mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
    mean, std = (_per_channel(name, value) for name, value in (("image_mean", mean), ("image_std", std)))
    if not (isinstance(factor, (int, float, np.floating)) and math.isfinite(factor)):
        raise ValueError(f"`rescale_factor` is {factor!r}, but must be a finite number.")
    if not (std > 0).all():
        raise ValueError(f"`image_std` is {image_std!r}, but must be positive.")
    return (factor / std).astype(np.float32), (-mean / std).astype(np.float32)


def _per_channel(name, value):
    try:
        array = np.asarray(value, np.float64).reshape(-1, 1, 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is {value!r}, but must be 3 numbers, one a channel, or one.") from error
    if len(array) not in (1, 3):
        raise ValueError(f"`{name}` has {len(array)} values, but must have 3, one a channel, or be a number.")
    if not np.isfinite(array).all():  # as None becomes
        raise ValueError(f"`{name}` is {value!r}, but must be finite.")
    return array


def _write_views(image: Image.Image, crop_size: int, scale: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """Writes the views of one resized image into `out` (num_views, 3, crop_size, crop_size)."""
    pixels = np.asarray(image)  # (rows * crop_size, cols * crop_size, 3)
    rows, cols = pixels.shape[0] // crop_size, pixels.shape[1] // crop_size
    global_view = bicubic_shrink(bicubic_shrink(pixels, rows, axis=0), cols, axis=1)
    corners = ((y * crop_size, x * crop_size) for y in range(rows) for x in range(cols))
    crops = (pixels[y : y + crop_size, x : x + crop_size] for y, x in corners)
    for target, view in zip(out, itertools.chain([global_view], crops)):
        np.multiply(view.transpose(2, 0, 1), scale, out=target)
        target += bias


def _check_sides(width, height):
    for name, side in (("width", width), ("height", height)):
        if not isinstance(side, (int, np.integer)) or side < 1:
            raise ValueError(f"`{name}` is {side!r}, but must be a positive whole number of pixels.")


def _check_choices(pad_views, transparency):
    if not isinstance(pad_views, (bool, np.bool_)):
        raise ValueError(f"`pad_views` is {pad_views!r}, but must be True or False.")
    if transparency not in TRANSPARENCY:
        raise ValueError(f"`transparency` is {transparency!r}, but must be one of {TRANSPARENCY}.")


def _check_num_crops(num_crops):
    if (
        not isinstance(num_crops, (int, np.integer))
        or isinstance(num_crops, bool)
        or not 0 <= num_crops <= MAX_NUM_CROPS
    ):
        raise ValueError(
            f"`num_crops` is {num_crops!r}, but must be an int from 0 (the global view alone) to {MAX_NUM_CROPS}."
        )


def _check_geometry(num_crops, size, num_img_tokens):
    _check_num_crops(num_crops)
    if not size.height or size.height != size.width:
        raise ValueError(
            f"`size` is {dict(size)}, but must have one and the same `height` and `width`, that of a crop, "
            "such as {'height': 336, 'width': 336}."
        )
    is_count = isinstance(num_img_tokens, (int, np.integer)) and num_img_tokens > 0
    if not is_count or math.isqrt(num_img_tokens) ** 2 != num_img_tokens:
        raise ValueError(f"`num_img_tokens` is {num_img_tokens!r}, but must be a square: the tokens of one view.")


class Phi3EmbedProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer as one. Images are named in a text by `<|image_1|>`, `<|image_2|>`, ..., in any order
    and again, or one after another by `image_token`; a tag becomes as many `image_token`s as its image has tokens.

    Args:
        image_processor ([`Phi3EmbedImageProcessor`]):
            The image processor.
        tokenizer ([`PreTrainedTokenizerFast`]):
            Phi-3's, or any that has `image_token` in its vocabulary.
        chat_template (`str`, *optional*):
            A Jinja template for conversations.
        image_token (`str`, *optional*, defaults to `"<|image|>"`):
            The token that stands for one image token.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_token="<|image|>", **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}. Add it, or say by `image_token` which one is for images."
            )
        # The original tokenizes the pieces between the images one by one, each with its own start of sequence.
        start = tokenizer("").input_ids[:1]
        if not set(start) <= set(tokenizer.all_special_ids):
            raise ValueError(
                f"The tokenizer begins a text with {tokenizer.convert_ids_to_tokens(start)[0]!r}, which is none of "
                "its special tokens. Is its tokenizer_config.json missing?"
            )
        self._after_image = tokenizer.bos_token if start == [tokenizer.bos_token_id] else ""

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            images (*optional*):
                As the image processor takes them: those of all texts, by number in each, or a list a text.
            text (`str` or `list[str]`, *optional*):
                One text or several, with as many tags as images: none, some or many in each.
            kwargs:
                Of the image processor (`num_crops`) and the tokenizer (`padding`, `return_tensors`, ...).

        Returns:
            What the tokenizer (`input_ids`, `attention_mask`) and the image processor give, the latter in the order of
            the tags; with a text without `num_image_tokens`.

        Raises:
            ValueError: tags and images differ in number, numbers leave a gap, or truncation cuts an image.
        """
        processor = self
        if not kwargs.get("add_special_tokens", kwargs.get("text_kwargs", {}).get("add_special_tokens", True)):
            processor = copy.copy(self)  # as the base class hands no such argument on to `replace_image_token`
            processor._after_image = ""
        inputs = super(Phi3EmbedProcessor, processor).__call__(images=images, text=text, **kwargs)
        if text is not None:  # which holds as many placeholders; a model of texts alone would refuse this key
            inputs.pop("num_image_tokens", None)
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return [name for name in super().model_input_names if name != "num_image_tokens"]

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        if text is not None:
            text = [text] if isinstance(text, str) else text
            if not isinstance(text, (list, tuple)) or not text or not all(isinstance(sample, str) for sample in text):
                raise ValueError(
                    f"`text` is {text!r:.80}, but must be a string or a list of strings, and not empty. Images are "
                    "the first argument; name both: `processor(images=..., text=...)`."
                )
            tags = [self._tags(number, sample) for number, sample in enumerate(text)]
            of_texts = self._images_of_texts(images, [max(own, default=0) for own in tags])
            # Images go in the order of their places in the texts, once a place. Without any it is a batch of texts.
            images = [own[tag - 1] for own, places in zip(of_texts, tags) for tag in places] or None
        return images, text, None, None

    def validate_inputs(self, images=None, text=None, **kwargs):
        if images is None and text is None:
            raise ValueError("Neither `images` nor `text` were given. Give one of them, or both.")

    def _tags(self, number, sample) -> list[int]:
        """The number of the image at each place of a text."""
        if half := SURROGATE.search(sample):  # which tokenizers refuse as a wrong type
            raise ValueError(
                f"Text {number} has {half[0]!r} at place {half.start()}, which is half of a character (a lone "
                "surrogate). Leave it out: `text.encode(errors='ignore').decode()`."
            )
        tags = [int(tag) for tag in IMAGE_TAG.findall(sample)]
        num_plain = sample.count(self.image_token)
        if tags and num_plain:
            raise ValueError(f"Text {number} has both numbered tags and {self.image_token!r}. Use one of the two.")
        if {*tags} != {*range(1, len({*tags}) + 1)}:
            raise ValueError(
                f"Text {number} has the image tags {tags}, but must number its images 1, 2, 3, ... without a gap."
            )
        return tags or list(range(1, num_plain + 1))

    @staticmethod
    def _images_of_texts(images, numbers) -> list[list]:
        """Images in a row or a list a text -> a list for each text, which names so many."""
        if isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images):
            if len(images) != len(numbers):
                raise ValueError(
                    f"There are {len(numbers)} texts, but {len(images)} lists of images. Give one list a text: the "
                    "image tokens in the prompts should be the same as the number of images."
                )
            of_texts = [flatten_images(entry) for entry in images]
            for number, (own, wanted) in enumerate(zip(of_texts, numbers)):
                if len(own) != wanted:
                    raise ValueError(f"Text {number} has tags of {wanted} images, but there are {len(own)} images.")
            return of_texts
        images = [] if images is None else flatten_images(images)
        if len(images) != sum(numbers):
            raise ValueError(f"The texts have tags of {sum(numbers)} images, but there are {len(images)} images.")
        images = iter(images)
        return [list(itertools.islice(images, number)) for number in numbers]

    def _process_images(self, images, **kwargs):
        image_inputs = self.image_processor(images, **kwargs)
        replacements = [
            self.replace_image_token(image_inputs, index) for index in range(len(image_inputs["image_sizes"]))
        ]
        return image_inputs, replacements

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """As [`ProcessorMixin.get_text_with_replacements`], but of numbered tags too."""
        plain = [IMAGE_TAG.sub(self.image_token, sample) for sample in text]
        expanded, offsets = super().get_text_with_replacements(plain, images_replacements, *args, **kwargs)
        # Assistant masks are found by the places in the text as it was given, where a numbered tag is longer.
        for sample, replacements in zip(text, offsets):
            for tag, replacement in zip(IMAGE_TAG.finditer(sample), replacements):
                replacement |= {"span": tag.span(), "text": tag.group()}
        return expanded, offsets

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        return self.image_token * int(image_inputs["num_image_tokens"][image_idx]) + self._after_image

    def _get_num_multimodal_tokens(self, image_sizes=None, num_crops=None, **kwargs) -> MultiModalData:
        """Tokens and views of images of these sizes, `(height, width)` in pixels."""
        if image_sizes is None:
            return MultiModalData()
        num_crops = self.image_processor.num_crops if num_crops is None else num_crops
        grids = [self.image_processor._grid(width, height, num_crops) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.image_processor.num_image_tokens(w, h, num_crops) for h, w in image_sizes],
            num_image_patches=[rows * cols + 1 for rows, cols in grids],
        )


Phi3EmbedImageProcessor.register_for_auto_class("AutoImageProcessor")
Phi3EmbedProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["Phi3EmbedImageProcessor", "Phi3EmbedProcessor"]
