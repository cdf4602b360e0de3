"""
Phi-3-vision image embedding: checks of what callers give to the models.

They raise ValueError (TypeError for unknown arguments), and say what was given and what is accepted. Those that read
values are left out of a traced graph (`torch.compile`, `torch.export`), which knows none.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers.utils import ModelOutput, TransformersKwargs, torch_compilable_check

from .configuration_phi3_embed import POOLING_MODES, Phi3EmbedConfig

# Images of this label do not count in the loss: `ignore_index` of PyTorch's cross-entropy.
IGNORED_LABEL = -100

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

FLOATING_POINT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def parameter_names(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def check_arguments(function: Callable, kwargs: dict, passed_on_to: Callable | None = None) -> None:
    """A misspelt argument would pass in silence among those that go on to the tower or the language model."""
    if torch.compiler.is_compiling():
        return
    unknown = kwargs.keys() - TransformersKwargs.__annotations__.keys() - {"return_dict"}
    if unknown and passed_on_to is not None:
        unknown -= parameter_names(getattr(passed_on_to, "__func__", passed_on_to))
    if unknown:
        named = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        raise TypeError(
            f"{function.__name__}() got {', '.join(f'`{name}`' for name in sorted(unknown))}. Accepted are "
            f"{', '.join(f'`{name}`' for name in named)}, and transformers' own, such as `output_hidden_states`."
        )


def check_weight_files(folder: str | Path) -> None:
    """A folder that was cloned without Git LFS has pointers in place of its weights. A Hub id has no such files."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ValueError(
                        f"{path} is a Git LFS pointer in place of the weights. Run `git lfs pull` in its folder."
                    )


def check_tensor(name: str, value: torch.Tensor) -> None:
    """A plain tensor with values."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"`{name}` are of type {type(value).__name__}, but must be a tensor: call the processor with "
            "`return_tensors='pt'`."
        )
    if torch.compiler.is_compiling():
        return
    kind = None
    if value.is_nested:
        kind = "a nested tensor"
    elif value.layout != torch.strided:
        kind = f"a tensor of layout {value.layout}"
    elif value.is_quantized:
        kind = "a quantized tensor"
    elif value.is_meta:
        kind = "on the meta device, so without values"
    if kind:
        raise ValueError(f"`{name}` are {kind}, but must be a dense tensor, on a device that holds its values.")


def check_pooling_mode(config: Phi3EmbedConfig, pooling_mode: str | None) -> str:
    """The mode that applies: the call's, or else the config's."""
    pooling_mode = config.pooling_mode if pooling_mode is None else pooling_mode
    if pooling_mode not in POOLING_MODES:
        raise ValueError(f"`pooling_mode` is {pooling_mode!r}, but must be one of {POOLING_MODES}.")
    return pooling_mode


def is_features(config: Phi3EmbedConfig, pixel_values: torch.Tensor) -> bool:
    """Whether these are the tower's features `(..., num_patches, C)`, and not pixels `(..., 3, H, W)`."""
    pixels = (config.vision_config.num_channels, config.crop_size, config.crop_size)
    return pixel_values.ndim == 3 or tuple(pixel_values.shape[-3:]) != pixels


def is_padded(config: Phi3EmbedConfig, pixel_values: torch.Tensor) -> bool:
    """Whether the views come one row an image, with padding, as Microsoft's do, and not one after another."""
    return config.use_hd_transform and pixel_values.ndim == (4 if is_features(config, pixel_values) else 5)


def check_pixels(config: Phi3EmbedConfig, pixel_values: torch.Tensor) -> None:
    check_tensor("pixel_values", pixel_values)
    shape, channels, size = tuple(pixel_values.shape), config.vision_config.num_channels, config.crop_size
    width, patches = config.vision_config.hidden_size, config.patches_per_side**2
    pixels = (channels, size, size)
    if config.use_hd_transform:
        accepted = (
            f"the views of all images (num_views, {channels}, {size}, {size}), or padded (num_images, max_views, "
            f"{channels}, {size}, {size}), or features in place of pixels, (num_views, {patches}, {width}) or "
            f"(num_images, max_views, {patches}, {width})"
        )
        is_accepted = any(
            len(shape) - len(form) in (1, 2) and shape[-len(form) :] == form for form in (pixels, (patches, width))
        )
    else:
        accepted = f"(num_images, {channels}, {size}, {size}), or (num_images, num_tokens, {width}) for features"
        is_accepted = shape[1:] == pixels or (len(shape) == 3 and shape[2] == width)
    if not (is_accepted and shape[0] > 0 and shape[1] > 0):
        raise ValueError(f"`pixel_values` are of shape {shape}, but this model takes {accepted}.")
    if pixel_values.dtype not in FLOATING_POINT:
        raise ValueError(
            f"`pixel_values` are of dtype {pixel_values.dtype}, but must be floating point (float32, bfloat16 or "
            "float16), as the image processor makes them."
        )
    if not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
        raise ValueError("`pixel_values` hold NaN or infinite values.")


def check_image_sizes(
    config: Phi3EmbedConfig,
    pixel_values: torch.Tensor,
    image_sizes: torch.Tensor | list[tuple[int, int]] | None,
) -> torch.LongTensor:
    """-> rows and columns of crops, `(num_images, 2)`, on the device of the pixels."""
    if image_sizes is None and config.use_hd_transform:
        raise ValueError("`image_sizes` are missing: the HD transform needs the size of each image's grid of crops.")
    if image_sizes is None:
        return torch.zeros(pixel_values.shape[0], 2, dtype=torch.int64, device=pixel_values.device)
    one_row_an_image = is_padded(config, pixel_values) or not config.use_hd_transform
    num_images = pixel_values.shape[0] if one_row_an_image else "num_images"
    sizes = _int_pairs(image_sizes, num_images)
    grids = (sizes // config.crop_size).to(pixel_values.device)
    if torch.compiler.is_compiling():
        return grids
    if not config.use_hd_transform:
        if sizes.any():
            raise ValueError(
                "`image_sizes` were given, but this model works without the HD transform. Leave them out, or make the "
                "inputs with `num_crops=0`, the global view alone."
            )
        return grids
    sizes = sizes.tolist()
    for number, (height, width) in enumerate(sizes):
        is_grid = height > 0 and width > 0 and height % config.crop_size == 0 and width % config.crop_size == 0
        if not (is_grid or height == width == 0):
            raise ValueError(
                f"`image_sizes` say {height} x {width} for image {number}, but must be multiples of the crop size, "
                f"{config.crop_size} (or 0 x 0 for the global view alone)."
            )
    num_views = [height * width // config.crop_size**2 + 1 for height, width in sizes]
    if not one_row_an_image:
        if sum(num_views) != len(pixel_values):
            raise ValueError(
                f"`image_sizes` say {sum(num_views)} views of {len(sizes)} images, the global views counted, but "
                f"`pixel_values` have {len(pixel_values)}."
            )
        return grids
    for number, ((height, width), used) in enumerate(zip(sizes, num_views)):
        if used > pixel_values.shape[1]:
            raise ValueError(
                f"`image_sizes` say {height} x {width} for image {number}, which is {used} views, the global view "
                f"counted, but `pixel_values` have {pixel_values.shape[1]}."
            )
        if pixel_values[number, used:].any():
            raise ValueError(
                f"Image {number} has {used} views by `image_sizes`, the global view counted, but `pixel_values` hold "
                "more. Views beyond them must be zero."
            )
    return grids


def _int_pairs(image_sizes, num_images) -> torch.LongTensor:
    if isinstance(image_sizes, torch.Tensor):
        check_tensor("image_sizes", image_sizes)
    try:
        sizes = torch.as_tensor(image_sizes)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`image_sizes` are {image_sizes!r:.80}, {_accepted_sizes(num_images)}") from error
    is_ints = not (sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool)
    is_count = sizes.numel() > 0 if num_images == "num_images" else sizes.numel() == 2 * num_images
    if not (is_ints and is_count and sizes.shape[-1:] == (2,)):
        raise ValueError(
            f"`image_sizes` are of shape {tuple(sizes.shape)} and dtype {sizes.dtype}, {_accepted_sizes(num_images)}"
        )
    # In 8 bits the arithmetic on grids would overflow, and uint64 has none.
    return sizes.to(torch.int64).reshape(-1, 2)


# Formatted on error only: a traced graph would make a constant of a number of images that it writes out.
def _accepted_sizes(num_images):
    return f"but must be ints of shape ({num_images}, 2), a height and a width for each image of `pixel_values`."


def check_input_ids(input_ids: torch.Tensor, num_embeddings: int) -> None:
    check_tensor("input_ids", input_ids)
    if input_ids.dtype not in (torch.int32, torch.int64) or input_ids.ndim not in (1, 2) or not input_ids.numel():
        raise ValueError(
            f"`input_ids` are of shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}, but must be int64 or "
            "int32 of shape (batch_size, sequence_length), and not empty."
        )
    if torch.compiler.is_compiling():
        return
    if (highest := input_ids.max().item()) >= num_embeddings:
        raise ValueError(f"`input_ids` hold {highest}, but the vocabulary ends at {num_embeddings - 1}.")


def check_inputs_embeds(inputs_embeds: torch.Tensor, width: int) -> None:
    check_tensor("inputs_embeds", inputs_embeds)
    shape = tuple(inputs_embeds.shape)
    if len(shape) != 3 or shape[-1] != width or 0 in shape or inputs_embeds.dtype not in FLOATING_POINT:
        raise ValueError(
            f"`inputs_embeds` are of shape {shape} and dtype {inputs_embeds.dtype}, but must be floating point of "
            f"shape (batch_size, sequence_length, {width}), and not empty."
        )
    if not torch.compiler.is_compiling() and not inputs_embeds.isfinite().all():
        raise ValueError("`inputs_embeds` hold NaN or infinite values.")


def check_placeholders(is_placeholder: torch.BoolTensor, number: torch.LongTensor, num_tokens: list[int]) -> None:
    """
    Placeholders `(batch_size, sequence_length)` of images that have so many tokens. `number`: the ids there, of which
    Microsoft's negative ones tell an image from the next, or one value for all placeholders.
    """
    if torch.compiler.is_compiling():
        torch_compilable_check(
            is_placeholder.sum() == sum(num_tokens), "placeholders and image tokens differ in number"
        )
        return
    if not num_tokens and not is_placeholder.any():  # most calls: a text without images
        return
    is_placeholder, number, ends = _run_ends(is_placeholder, number)
    run_ends = is_placeholder.cumsum()[ends.ravel()].tolist()
    token_ends = np.cumsum(num_tokens).tolist()
    if (run_ends[-1:] or [0]) != (token_ends[-1:] or [0]) or not set(run_ends) <= set(token_ends):
        runs = [end - start for start, end in zip([0, *run_ends], run_ends)]
        raise ValueError(
            f"The text has {sum(runs)} image placeholders, in runs of {runs}, but the images take {sum(num_tokens)} "
            f"tokens, {list(num_tokens)}. Each image's placeholders must stand together and be as many as its tokens."
        )
    _check_order(number, ends)


def check_placeholder_order(is_placeholder: torch.BoolTensor, number: torch.LongTensor) -> None:
    """Images are consumed in order of appearance, so Microsoft's numbers out of order would swap images."""
    _check_order(*_run_ends(is_placeholder, number)[1:])


def _run_ends(is_placeholder, number):
    """
    -> both as arrays, where many small steps are quicker; and whether a run of placeholders ends here, because the
    row does, the next id is none, or another image's number begins.
    """
    is_placeholder, number = is_placeholder.numpy(force=True), number.numpy(force=True)
    ends = is_placeholder.copy()
    ends[:, :-1] &= number[:, 1:] != number[:, :-1]
    return is_placeholder, number, ends


def _check_order(number, ends):
    text, numbers = ends.nonzero()[0], number[ends]
    if ((text[1:] == text[:-1]) & (numbers[1:] < 0) & (numbers[1:] >= numbers[:-1])).any():
        raise ValueError(
            f"The image placeholders are {numbers.tolist()}, but must be -1, -2, -3, ... in the order of their places "
            "in a text. Reorder the images to match the text."
        )


def check_encoded_images(mm_encoder_outputs: dict | None) -> ModelOutput | None:
    """The images of `mm_encoder_outputs`, which were encoded ahead; `None` where there are none."""
    given = {} if mm_encoder_outputs is None else mm_encoder_outputs
    is_plain = isinstance(given, dict) and not isinstance(given, ModelOutput)
    images = given.get("image") if is_plain else given
    if not is_plain or not (images is None or hasattr(images, "pooler_output")):
        raise ValueError(
            f"`mm_encoder_outputs` hold images as {type(images).__name__}, but must be `{{'image': outputs}}`, where "
            "`outputs` is what `get_image_features` gave."
        )
    return images


def check_image_features(image_tokens: tuple[torch.Tensor, ...], width: int) -> None:
    """Image tokens that were computed ahead, perhaps by another model."""
    for tokens in image_tokens:
        check_tensor("image tokens", tokens)
        if tokens.ndim != 2 or tokens.shape[1] != width:
            raise ValueError(
                f"Image tokens are of shape {tuple(tokens.shape)}, but this model takes (num_tokens, {width}): "
                "`pooler_output` of `get_image_features`, one tensor an image."
            )


def check_padding(attention_mask: torch.Tensor | None) -> None:
    """Raises where a batch ends in padding, because generation would go on behind it."""
    if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask[:, -1].all():
        raise ValueError(
            "The batch is padded on the right, but a text goes on where it ends: pad on the left "
            "(`processor.tokenizer.padding_side = 'left'`)."
        )


def check_length(length: int, max_position_embeddings: int) -> None:
    if length > max_position_embeddings:
        raise ValueError(
            f"The text has {length} tokens, those of its images counted, but the language model takes "
            f"{max_position_embeddings} (`max_position_embeddings`). Leave something out, or lower `num_crops`."
        )


def check_logits(logits: torch.Tensor) -> None:
    """Raises where logits are not finite, because generation would make words of them."""
    if not logits.isfinite().all():
        raise ValueError(
            f"The logits hold NaN or infinite values, in {logits.dtype}. Are the weights whole? Where float16 "
            "overflows, load them with `dtype=torch.bfloat16` or `torch.float32`."
        )


def check_image_tokens(tokens: torch.Tensor, grid: tuple[int, int], num_tokens: int) -> None:
    check_tensor("tokens", tokens)
    if tokens.ndim != 2 or len(tokens) != num_tokens:
        raise ValueError(
            f"`tokens` are of shape {tuple(tokens.shape)}, but must be of shape ({num_tokens}, hidden_size), without "
            f"padding, because an image of {grid[0]} x {grid[1]} crops has {num_tokens} tokens."
        )


def check_labels(config: Phi3EmbedConfig, labels: torch.Tensor, num_images: int) -> None:
    check_tensor("labels", labels)
    num_labels: int = config.num_labels
    is_single_label = num_labels > 1 and (
        config.problem_type == "single_label_classification"
        or (config.problem_type is None and not labels.is_floating_point())
    )
    shapes = [(num_images,)] if is_single_label else [(num_images, num_labels)]
    if num_labels == 1:
        shapes.append((num_images,))
    if tuple(labels.shape) not in shapes or labels.is_floating_point() == is_single_label:
        raise ValueError(
            f"`labels` are of shape {tuple(labels.shape)} and dtype {labels.dtype}, but with `num_labels` "
            f"{num_labels} and `problem_type` {config.problem_type!r} must be "
            f"{'ints' if is_single_label else 'floating point'} of shape {shapes[-1]}."
        )
    if not is_single_label or torch.compiler.is_compiling():
        return
    wrong = labels[(labels >= num_labels) | ((labels < 0) & (labels != IGNORED_LABEL))]
    if len(wrong):
        raise ValueError(
            f"`labels` hold {wrong[0].item()}, but must be from 0 to {num_labels - 1}, or {IGNORED_LABEL} for "
            "images that do not count."
        )
