"""
Phi-3-vision image embedding: model.

Pixels (images, crops, 3, H, W)
  -> the crops that are real, in one batch                                  (crops, 3, H, W)
  -> the tower, up to the feature layer                                     (crops, patches, C)
  -> 2 x 2 patches merged, separators appended, projected                   (crops * tokens + 2, hidden_size)
  -> gathered in reading order: lines across the whole picture, each closed by `sub_GN`, and one `glb_GN` between the
     crops and the global view                                              (num_tokens of each image, hidden_size)
  -> put in the place of the image placeholders among the word embeddings   (batch, length, hidden_size)
"""

import copy
import inspect
import shlex
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_phi3_embed import MERGE_SIZE, Phi3EmbedConfig, hd_num_tokens

# Microsoft's placeholders are the ids -1, -2, ... of an image's number; an id this low or lower is none.
MIN_PLACEHOLDER_ID = -(10**9)

# Images of this label do not count in the loss: `ignore_index` of PyTorch's cross-entropy.
IGNORED_LABEL = -100

# What towers call the modules behind their last layer. The features are taken before them.
CLOSING_MODULES = ("post_layernorm", "layernorm", "norm", "rms_norm", "head", "pooler")


@dataclass
class Phi3EmbedImageOutput(BaseModelOutputWithPooling):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_crops, num_patches, vision_config.hidden_size)`):
            The tower's features of every crop that went through it, at `config.layer_idx`; `None` where the features
            came precomputed.
        pooler_output (`tuple(torch.FloatTensor)`, one of shape `(num_tokens, hidden_size)` an image):
            The image tokens.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            The tower's, on request.
        image_embeds (`torch.FloatTensor` of shape `(num_images, hidden_size)`):
            One vector an image, by `config.pooling_mode`.
    """

    image_embeds: torch.FloatTensor | None = None


@dataclass
class Phi3EmbedModelOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The word embeddings with the image tokens in place of the placeholders. For images alone, of shape
            `(num_images, max_num_tokens, hidden_size)`: the image tokens, with zeros behind shorter images. In a
            traced graph (`torch.compile`, `torch.export`) its length follows from the shape of `pixel_values`.
        pooler_output (`torch.FloatTensor` of shape `(num_images, hidden_size)`, *optional*):
            One vector an image, by `config.pooling_mode`.
        image_hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            The image tokens, one tensor of shape `(num_tokens, hidden_size)` an image. `None` in a traced graph of
            images alone, which is one for any number of images.
        hidden_states (`tuple(torch.FloatTensor)` of shape `(num_crops, tower_length, tower_width)`, *optional*):
            The tower's hidden states up to the feature layer, with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)` of shape `(num_crops, heads, tower_length, tower_length)`, *optional*):
            The tower's attentions, with `output_attentions=True` and eager attention.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def build_vision_tower(config: Phi3EmbedConfig) -> PreTrainedModel:
    """The tower of `config.vision_config` up to the feature layer, without what follows its last layer."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers = config.num_feature_layers
    tower = AutoModel.from_config(vision_config, trust_remote_code=False)
    if tower.main_input_name != "pixel_values":
        raise ValueError(
            f"`vision_config` of type {vision_config.model_type!r} builds {type(tower).__name__}, which takes "
            f"`{tower.main_input_name}`. Give the config of a vision transformer, which takes `pixel_values`."
        )
    inputs = inspect.signature(tower.forward).parameters
    needed = [
        name for name, each in inputs.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    if needed[1:]:
        raise ValueError(
            f"`vision_config` of type {vision_config.model_type!r} builds {type(tower).__name__}, which needs "
            f"{', '.join(needed)}. Give the config of a vision transformer that takes `pixel_values` alone."
        )
    for name in CLOSING_MODULES:
        if hasattr(tower, name):
            setattr(tower, name, nn.Identity())
    return tower


def crop_grids(image_sizes: torch.LongTensor | list[tuple[int, int]], crop_size: int) -> torch.LongTensor:
    """Heights and widths in pixels -> rows and columns of crops, (num_images, 2)."""
    return torch.as_tensor(image_sizes).reshape(-1, 2) // crop_size


def hd_token_index(
    position: torch.LongTensor,
    grids: torch.LongTensor,
    num_views: torch.LongTensor,
    first_row: torch.LongTensor,
    tokens_per_side: int,
    order: str,
) -> torch.LongTensor:
    """
    Where image tokens stand in the projected table, whose rows are the tokens of view after view, an image's global
    view before its crops, and at the end the two separators, `sub_GN` and `glb_GN`.

    Args:
        position (`(*shape,)`): which token of its image, from 0.
        grids (`(*shape, 2)`): rows and columns of crops of its image.
        num_views (`(*shape,)`): views of its image in the table; 1 where the global view stands for the crop too.
        first_row (`(*shape,)`): where its image's global view begins in the table.

    Returns:
        index (`(*shape,)`): a row of the table for each token; -2 for `sub_GN`, -1 for `glb_GN`. All shapes may
            broadcast.
    """
    side, area = tokens_per_side, tokens_per_side**2
    rows, cols = grids.unbind(-1)

    sub_length, glb_length = rows * side * (cols * side + 1), side * (side + 1)
    if order == "sub_glb":
        is_sub, is_separator = position < sub_length, position == sub_length
        position = torch.where(is_sub, position, position - sub_length - 1)
    else:
        is_sub, is_separator = position > glb_length, position == glb_length
        position = torch.where(is_sub, position - glb_length - 1, position)
    width = torch.where(is_sub, cols * side, side)
    y, x = position // (width + 1), position % (width + 1)

    crop = (num_views > 1) + (y // side) * cols + x // side
    index = first_row + torch.where(is_sub, crop * area, 0) + (y % side) * side + x % side
    index = torch.where(x == width, -2, index)
    return torch.where(is_separator, -1, index)


class Phi3EmbedProjector(nn.Module):
    """Merges patches and projects them and the separators into the token space."""

    # The separators live here, and not in the parent, so that a forward of their own brings them in from offload.
    def __init__(self, config: Phi3EmbedConfig):
        super().__init__()
        self.use_hd_transform = config.use_hd_transform
        in_features = config.vision_config.hidden_size
        if self.use_hd_transform:
            in_features *= MERGE_SIZE**2
            self.glb_GN = nn.Parameter(torch.zeros(1, 1, in_features))
            self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, in_features))
        if config.projection_cls == "linear":
            self.img_projection = nn.Linear(in_features, config.hidden_size)
        else:
            self.img_projection = nn.Sequential(
                nn.Linear(in_features, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size),
            )

    def forward(self, features: torch.FloatTensor) -> torch.FloatTensor:
        """
        `(num_crops, num_patches, C)` -> `(num_crops * num_tokens + 2, hidden_size)`, the last two rows `sub_GN` and
        `glb_GN`; without the HD transform `(num_crops, num_patches, hidden_size)`.
        """
        if not self.use_hd_transform:
            return self.img_projection(features)
        num_crops, num_patches, width = features.shape
        side = int(num_patches**0.5) // MERGE_SIZE
        features = features.view(num_crops, side, MERGE_SIZE, side, MERGE_SIZE, width).transpose(2, 3)
        features = features.reshape(-1, MERGE_SIZE**2 * width)  # (num_crops * side * side, 4 * C)
        separators = (self.sub_GN.view(1, -1), self.glb_GN.view(1, -1))
        return self.img_projection(torch.cat((features, *separators)))


class Phi3ImageEmbedding(nn.Module):
    """
    Phi-3-vision's image embedding: tower, HD transform, projection, and the merge with the word embeddings.

    Args:
        config ([`Phi3EmbedConfig`], or a config with Microsoft's `img_processor`):
            The geometry.
        wte (`nn.Embedding`, *optional*):
            The word embeddings to share; without it the module has its own, of `config.vocab_size` rows.
        kwargs:
            Microsoft's `embd_layer` settings (`use_hd_transform`, `projection_cls`, ...), over those of `config`.
    """

    def __init__(self, config, wte: nn.Embedding | None = None, **kwargs):
        super().__init__()
        if hasattr(config, "img_processor"):
            config = Phi3EmbedConfig.from_dict(
                config.to_dict() | {"embd_layer": (getattr(config, "embd_layer", None) or {}) | kwargs}
            )
        elif kwargs:
            config = Phi3EmbedConfig.from_dict(config.to_dict() | {"num_img_tokens": None} | kwargs)
        if wte is not None and wte.embedding_dim != config.hidden_size:
            raise ValueError(
                f"`wte` has rows of width {wte.embedding_dim}, but must have those of `hidden_size`, "
                f"{config.hidden_size}."
            )
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size) if wte is None else wte
        self.img_processor = build_vision_tower(config)
        self.projector = Phi3EmbedProjector(config)
        self.drop = nn.Dropout(config.embd_pdrop)
        # A PreTrainedModel that holds this module takes these over for its device map.
        self._no_split_modules = {"Phi3EmbedProjector", *(self.img_processor._no_split_modules or ())}
        self.img_features = None
        self.img_sizes = None

    def set_img_features(self, img_features: torch.Tensor | None) -> None:
        """Leave features (3-D) or pixels for the next forward, which uses them once."""
        self.img_features = img_features

    def set_img_sizes(self, img_sizes: torch.Tensor | None) -> None:
        """Leave the image sizes for the next forward, which uses them once."""
        self.img_sizes = img_sizes

    def get_img_features(self, img_embeds: torch.Tensor) -> torch.Tensor:
        """Pixels `(num_crops, 3, H, W)` -> the tower's features `(num_crops, num_patches, C)` at the feature layer."""
        return self._select_features(self._encode(img_embeds).last_hidden_state)

    def _encode(self, pixel_values, **kwargs):
        return self.img_processor(pixel_values.to(self.img_processor.dtype), **kwargs)

    def _select_features(self, features):
        if features.ndim != 3:
            raise ValueError(
                f"The tower gives features of shape {tuple(features.shape)}, but must give (crops, patches, width). "
                "Set `vision_config` to that of a plain vision transformer."
            )
        # Towers put 0 (SigLIP), 1 (CLIP) or more (DINOv2 with registers) tokens before the patches, the class token
        # first.
        num_prefix = features.shape[1] - self.config.patches_per_side**2
        if num_prefix < 0 or (num_prefix == 0 and self.config.type_feature == "cls_patch"):
            raise ValueError(
                f"The tower gives {features.shape[1]} tokens a crop of {self.config.patches_per_side**2} patches; "
                f"`type_feature={self.config.type_feature!r}` needs more. Set `type_feature` or `vision_config` right."
            )
        if self.config.type_feature == "cls_patch":
            return torch.cat((features[:, :1], features[:, num_prefix:]), dim=1)
        return features[:, num_prefix:]

    def embed_images(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | list[tuple[int, int]] | None = None,
        pad_tokens: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3EmbedImageOutput:
        """
        See [`Phi3EmbedModel.get_image_features`]. With `pad_tokens` the image tokens are one tensor
        `(num_images, max_num_tokens, hidden_size)`, zeros behind shorter images, its length known from the shape of
        `pixel_values`: what a graph for any number of images needs.
        """
        _check_pixels(self.config, pixel_values)
        if not self.config.use_hd_transform:
            return self._embed_single(pixel_values, image_sizes, pad_tokens, **kwargs)
        return self._embed_hd(pixel_values, image_sizes, pad_tokens, **kwargs)

    def _embed_single(self, pixel_values, image_sizes, pad_tokens, **kwargs):
        if image_sizes is not None:
            raise ValueError(
                "`image_sizes` were given, but this model works without the HD transform. Leave them out."
            )
        if pixel_values.ndim == 3:  # precomputed features (num_images, num_tokens, C)
            features, encoded = pixel_values.to(self.img_processor.dtype), {}
        else:
            encoded = self._encode(pixel_values, **kwargs)
            features = self._select_features(encoded.last_hidden_state)
        tokens = self.projector(features)  # (num_images, num_tokens, hidden_size)
        return Phi3EmbedImageOutput(
            last_hidden_state=features if encoded else None,
            pooler_output=tokens if pad_tokens else tokens.unbind(0),
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
            image_embeds=tokens.mean(1),
        )

    def _embed_hd(self, pixel_values, image_sizes, pad_tokens, **kwargs):
        _check_image_sizes(self.config, pixel_values, image_sizes)
        grids = crop_grids(image_sizes, self.config.crop_size).to(pixel_values.device)
        num_views = grids.prod(-1) + 1
        _check_padding_crops(pixel_values, num_views)
        num_images, max_views = pixel_values.shape[:2]
        # The only crop of a 1 x 1 grid equals the global view, to the bit as the processor makes them: encode it once,
        # but where each view's own gradient is asked for.
        if max_views > 1 and not torch.compiler.is_compiling() and not pixel_values.requires_grad:
            is_twin = (num_views == 2) & (pixel_values[:, 0] == pixel_values[:, 1]).flatten(1).all(-1)
            num_views = num_views - is_twin.long()
        number = torch.arange(num_images, device=grids.device)
        is_real = torch.arange(max_views, device=grids.device) < num_views[:, None]  # (num_images, max_views)
        if torch.compiler.is_compiling():
            # A traced graph cannot know how many views will be real: it encodes the padding too, and twins.
            image, first_view = number[:, None].expand(-1, max_views).flatten(), number * max_views
            views, weight = pixel_values.flatten(0, 1), (is_real / num_views[:, None]).flatten()
        else:
            image, view = is_real.nonzero(as_tuple=True)
            first_view = num_views.cumsum(0) - num_views
            views, weight = pixel_values[image, view], 1 / num_views[image]
        if pixel_values.ndim == 4:  # precomputed features (num_images, max_views, num_patches, C)
            features, encoded = views.to(self.img_processor.dtype), {}
        else:
            encoded = self._encode(views, **kwargs)
            features = self._select_features(encoded.last_hidden_state)

        table = self.projector(features)  # (num_crops * tokens + 2, hidden_size)
        crops = table[:-2].view(features.shape[0], -1, table.shape[-1])  # (num_crops, tokens, hidden_size)
        layout = (grids, num_views, first_view, image, weight)
        grids, num_views, first_view, image, weight = (each.to(table.device) for each in layout)
        if self.config.pooling_mode == "global":
            image_embeds = crops[first_view].mean(1)
        else:
            crops = crops.mean(1) * weight[:, None]  # float32: half precision would round the sum
            image_embeds = crops.new_zeros(num_images, crops.shape[-1]).index_add(0, image, crops).to(table.dtype)
        return Phi3EmbedImageOutput(
            last_hidden_state=features if encoded else None,
            pooler_output=self._gather_tokens(table, grids, num_views, first_view, max_views, pad_tokens),
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
            image_embeds=image_embeds,
        )

    def _gather_tokens(self, table, grids, num_views, first_view, max_views, pad_tokens):
        side, order = self.config.tokens_per_side, self.config.hd_transform_order
        num_tokens, first_row = hd_num_tokens(*grids.unbind(-1), side), first_view * side**2
        if pad_tokens:
            # No grid of so many views has more tokens than one column of crops.
            position = torch.arange(hd_num_tokens(max_views - 1, 1, side), device=table.device)
            each = (grids[:, None], num_views[:, None], first_row[:, None])
            index = hd_token_index(position, *each, side, order)  # (num_images, max_num_tokens)
            is_token = position < num_tokens[:, None]
            return table[torch.where(is_token, index, -1)].where(is_token[..., None], 0)
        image = torch.arange(grids.shape[0], device=table.device).repeat_interleave(num_tokens)
        position = torch.arange(image.shape[0], device=table.device) - (num_tokens.cumsum(0) - num_tokens)[image]
        index = hd_token_index(position, grids[image], num_views[image], first_row[image], side, order)
        return table[index].split(num_tokens.tolist())

    def merge(
        self,
        image_tokens: tuple[torch.FloatTensor, ...] = (),
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """Word embeddings `(batch_size, sequence_length, hidden_size)` with the image tokens in the placeholders."""
        if input_ids is not None:
            _check_input_ids(input_ids, self.wte.num_embeddings)
            input_ids = input_ids.view(-1, input_ids.shape[-1])
            inputs_embeds = self.wte(input_ids.clamp(min=0))
        else:
            _check_inputs_embeds(inputs_embeds, self.wte.embedding_dim)
        is_placeholder = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
        if len(image_tokens):
            features = torch.cat(image_tokens).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(is_placeholder[..., None], features)
        return self.drop(inputs_embeds)

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_tokens):
        """Where the image tokens go, `(batch_size, sequence_length)`; each image's must stand together, in order."""
        if input_ids is not None:
            is_placeholder = (input_ids < 0) & (input_ids > MIN_PLACEHOLDER_ID)
            if self.config.image_token_id is not None:
                is_placeholder = is_placeholder | (input_ids == self.config.image_token_id)
            number = torch.where(is_placeholder, input_ids, MIN_PLACEHOLDER_ID)
        elif self.config.image_token_id is not None:
            image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            is_placeholder = (inputs_embeds == self.wte(image_token_id)).all(-1)
            number = is_placeholder.long()
        else:
            raise ValueError("`inputs_embeds` need an `image_token_id` in the config to tell where images go.")
        _check_placeholders(is_placeholder, number, [tokens.shape[0] for tokens in image_tokens])
        return is_placeholder.to(inputs_embeds.device)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`(batch_size, sequence_length)`, *optional*):
                Token ids; an image token is Microsoft's negative id or `config.image_token_id`. Left unchanged.
            pixel_values (*optional*):
                `(num_images, max_crops, 3, H, W)`, the global view first, or precomputed features
                `(num_images, max_crops, num_patches, C)`; without the HD transform `(num_images, 3, H, W)` or
                precomputed features `(num_images, num_tokens, C)`.
            image_sizes (`(num_images, 2)`, *optional*):
                Height and width in pixels of each image's grid of crops.

        Returns:
            hidden_states `(batch_size, sequence_length, hidden_size)`; without `input_ids`
            `(num_images, max_num_tokens, hidden_size)`, with zeros behind shorter images.
        """
        if self.img_features is not None:
            if pixel_values is not None:
                raise ValueError(
                    "`pixel_values` were given, but `set_img_features` has left some. Give one of the two."
                )
            pixel_values, self.img_features = self.img_features, None
        if self.img_sizes is not None:
            if image_sizes is not None:
                raise ValueError("`image_sizes` were given, but `set_img_sizes` has left some. Give one of the two.")
            image_sizes, self.img_sizes = self.img_sizes, None
        if input_ids is None and pixel_values is None:
            raise ValueError("Neither `input_ids` nor `pixel_values` were given. Give one of them, or both.")
        tokens = () if pixel_values is None else self.embed_images(pixel_values, image_sizes).pooler_output
        if input_ids is None:
            return self.drop(pad_sequence(tokens, batch_first=True))
        return self.merge(tokens, input_ids)


# Checks of what callers give. They read values, which a traced graph cannot, so they are left out of one.


def _check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"`{name}` are of type {type(value).__name__}, but must be a tensor: call the processor with "
            "`return_tensors='pt'`."
        )


def _check_pixels(config, pixel_values):
    _check_tensor("pixel_values", pixel_values)
    shape, channels, size = tuple(pixel_values.shape), config.vision_config.num_channels, config.crop_size
    width = config.vision_config.hidden_size
    if config.use_hd_transform:
        patches = config.patches_per_side**2
        accepted = (
            f"(num_images, crops, {channels}, {size}, {size}), or (num_images, crops, {patches}, {width}) for features"
        )
        is_accepted = shape[2:] in ((channels, size, size), (patches, width))
    else:
        accepted = f"(num_images, {channels}, {size}, {size}), or (num_images, num_tokens, {width}) for features"
        is_accepted = (pixel_values.ndim == 4 and shape[1:] == (channels, size, size)) or (
            pixel_values.ndim == 3 and shape[1] > 0 and shape[2] == width
        )
    if not (is_accepted and shape[0] > 0 and shape[1] > 0):
        raise ValueError(f"`pixel_values` are of shape {shape}, but this model takes {accepted}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` are of dtype {pixel_values.dtype}, but must be floating point, as the image processor "
            "makes them."
        )
    if not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
        raise ValueError("`pixel_values` hold NaN or infinite values.")


def _check_image_sizes(config, pixel_values, image_sizes):
    if image_sizes is None:
        raise ValueError("`image_sizes` are missing: the HD transform needs the size of each image's grid of crops.")
    try:
        sizes = torch.as_tensor(image_sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`image_sizes` are {image_sizes!r:.80}, but must be ints of shape ({len(pixel_values)}, 2), a height and "
            "a width for each image of `pixel_values`."
        ) from error
    if sizes.numel() != 2 * pixel_values.shape[0] or sizes.shape[-1] != 2 or sizes.is_floating_point():
        raise ValueError(
            f"`image_sizes` are of shape {tuple(sizes.shape)} and dtype {sizes.dtype}, but must be ints of shape "
            f"({len(pixel_values)}, 2), a height and a width for each image of `pixel_values`."
        )
    if torch.compiler.is_compiling():
        return
    for number, (height, width) in enumerate(sizes.reshape(-1, 2).tolist()):
        is_grid = height > 0 and width > 0 and height % config.crop_size == 0 and width % config.crop_size == 0
        if not (is_grid or height == width == 0):
            raise ValueError(
                f"`image_sizes` say {height} x {width} for image {number}, but must be multiples of the crop size, "
                f"{config.crop_size} (or 0 x 0 for the global view alone)."
            )
        num_views = height * width // config.crop_size**2 + 1
        if num_views > pixel_values.shape[1]:
            raise ValueError(
                f"`image_sizes` say {height} x {width} for image {number}, which is {num_views} crops with the global "
                f"view, but `pixel_values` have {pixel_values.shape[1]}."
            )


def _check_padding_crops(pixel_values, num_views):
    if torch.compiler.is_compiling():
        return
    for number, (views, used) in enumerate(zip(pixel_values, num_views.tolist())):
        if views[used:].any():
            raise ValueError(
                f"Image {number} has {used} crops by `image_sizes` (the global view counted), but `pixel_values` hold "
                "more. Crops beyond them must be zero."
            )


def _check_input_ids(input_ids, num_embeddings):
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(f"`input_ids` are of type {type(input_ids).__name__}, but must be a tensor.")
    if input_ids.dtype not in (torch.int32, torch.int64) or input_ids.ndim not in (1, 2) or not input_ids.numel():
        raise ValueError(
            f"`input_ids` are of shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}, but must be int64 or "
            "int32 of shape (batch_size, sequence_length), and not empty."
        )
    if torch.compiler.is_compiling():
        return
    if (highest := input_ids.max().item()) >= num_embeddings:
        raise ValueError(f"`input_ids` hold {highest}, but the vocabulary ends at {num_embeddings - 1}.")


def _check_inputs_embeds(inputs_embeds, width):
    _check_tensor("inputs_embeds", inputs_embeds)
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
        raise ValueError(
            f"`inputs_embeds` are of shape {tuple(inputs_embeds.shape)}, but must be (batch_size, sequence_length, "
            f"{width})."
        )


def _check_labels(config, labels, num_images):
    _check_tensor("labels", labels)
    is_single_label = config.num_labels > 1 and (
        config.problem_type == "single_label_classification"
        or (config.problem_type is None and not labels.is_floating_point())
    )
    shapes = [(num_images,)] if is_single_label else [(num_images, config.num_labels)]
    if config.num_labels == 1:
        shapes.append((num_images,))
    if tuple(labels.shape) not in shapes or labels.is_floating_point() == is_single_label:
        raise ValueError(
            f"`labels` are of shape {tuple(labels.shape)} and dtype {labels.dtype}, but with `num_labels` "
            f"{config.num_labels} and `problem_type` {config.problem_type!r} must be "
            f"{'ints' if is_single_label else 'floating point'} of shape {shapes[-1]}."
        )
    if not is_single_label or torch.compiler.is_compiling():
        return
    wrong = labels[(labels >= config.num_labels) | ((labels < 0) & (labels != IGNORED_LABEL))]
    if len(wrong):
        raise ValueError(
            f"`labels` hold {wrong[0].item()}, but must be from 0 to {config.num_labels - 1}, or {IGNORED_LABEL} for "
            "images that do not count."
        )


def _check_placeholders(is_placeholder, number, num_tokens):
    if torch.compiler.is_compiling():
        torch_compilable_check(
            is_placeholder.sum() == sum(num_tokens), "placeholders and image tokens differ in number"
        )
        return
    # A run of placeholders ends where the row does, the next id is none, or another image's number begins.
    ends = is_placeholder.clone()
    ends[:, :-1] &= number[:, 1:] != number[:, :-1]
    run_ends = is_placeholder.flatten().cumsum(0)[ends.flatten()].tolist()
    token_ends = torch.tensor(num_tokens).cumsum(0).tolist()
    if (run_ends[-1:] or [0]) != (token_ends[-1:] or [0]) or not set(run_ends) <= set(token_ends):
        runs = [end - start for start, end in zip([0, *run_ends], run_ends)]
        raise ValueError(
            f"The text has {sum(runs)} image placeholders, in runs of {runs}, but the images take {sum(num_tokens)} "
            f"tokens, {list(num_tokens)}. Each image's placeholders must stand together and be as many as its tokens."
        )
    # Images are taken in the order of their places: numbers in another would give each the other's picture.
    text, numbers = ends.nonzero(as_tuple=True)[0], number[ends]
    if ((text[1:] == text[:-1]) & (numbers[1:] < 0) & (numbers[1:] >= numbers[:-1])).any():
        raise ValueError(
            f"The image placeholders are {numbers.tolist()}, but must be -1, -2, -3, ... in the order of their places "
            "in a text. Reorder the images to match the text."
        )


Model = TypeVar("Model", bound="Phi3EmbedPreTrainedModel")


class Phi3EmbedPreTrainedModel(PreTrainedModel):
    config: Phi3EmbedConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3EmbedProjector) and module.use_hd_transform:
            init.zeros_(module.glb_GN)
            init.zeros_(module.sub_GN)

    def post_init(self):
        super().post_init()
        # A CLIP tower names the classes of the text side too. FSDP looks for each that is named.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @classmethod
    def from_pretrained(
        cls: type[Model], pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs
    ) -> Model:
        """
        As [`PreTrainedModel.from_pretrained`], but weights that the checkpoint lacks are an error, never left random.
        To train a head from the base model's checkpoint its own weights, and only they, may be lacking where its
        classes are named: they start fresh, with transformers' warning that names them. So do, as everywhere, weights
        of another shape with `ignore_mismatched_sizes=True`.

        Raises:
            ValueError: the checkpoint lacks weights; they are named. Or it is in Microsoft's layout.
        """
        if kwargs.get("config") is None and pretrained_model_name_or_path is not None:
            config, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if "img_processor" in config:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a checkpoint in Microsoft's layout. Take the image embedding "
                    f"out of it by `python convert_phi3_vision.py {shlex.quote(str(pretrained_model_name_or_path))} "
                    "OUTPUT`, and load OUTPUT."
                )
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = loading_info["missing_keys"]
        hint = "For a fresh, untrained model use `AutoModel.from_config(config, trust_remote_code=True)`."
        if model.base_model is not model and model.config.architectures == [type(model.base_model).__name__]:
            if model.config.id2label != PreTrainedConfig().id2label:
                missing = {name for name in missing if name.startswith(f"{cls.base_model_prefix}.")}
            else:  # nobody asked for a head: a pipeline would pass off its random answers
                hint = "To train them, name the classes by `id2label`, or their number (if not 2) by `num_labels`."
        if missing := sorted(missing):
            raise ValueError(
                f"The checkpoint lacks {len(missing)} of the model's weights: {', '.join(missing)}. {hint}"
            )
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        """As [`PreTrainedModel.save_pretrained`], but whichever model saved it, the config names the code of all."""
        self.config.auto_map = {
            model._auto_class: f"{model.__module__.rpartition('.')[2]}.{model.__name__}"
            for model in Phi3EmbedPreTrainedModel.__subclasses__()
            if model._auto_class is not None
        }
        # FSDP gives the model a class of its own, which is of torch: its code would be saved in place of ours.
        sharded = type(self)
        if sharded.__name__.startswith("FSDP"):
            self.__class__ = sharded.__mro__[2]
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = sharded


class Phi3EmbedModel(Phi3EmbedPreTrainedModel):
    """Phi-3-vision's image embedding as a model: images, texts, or texts with images in, embeddings out."""

    def __init__(self, config: Phi3EmbedConfig):
        super().__init__(config)
        self.vision_embed_tokens = Phi3ImageEmbedding(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.vision_embed_tokens.wte

    def set_input_embeddings(self, value):
        self.vision_embed_tokens.wte = value

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3EmbedImageOutput:
        r"""
        Image tokens, and one vector an image.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, max_crops, 3, crop_size, crop_size)`):
                As the image processor makes them: the global view first, then the crops row by row, then zeros; or in
                their place the tower's features `(num_images, max_crops, num_patches, vision_config.hidden_size)`.
                Without the HD transform `(num_images, 3, crop_size, crop_size)`, or features
                `(num_images, num_tokens, vision_config.hidden_size)`.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)` or a list of int pairs):
                Height and width in pixels of each image's grid of crops; 0 x 0 for the global view alone. To be left
                out without the HD transform.
            output_hidden_states, output_attentions (`bool`, *optional*):
                Also return the tower's.

        Returns:
            [`Phi3EmbedImageOutput`] in the dtype of the weights: `pooler_output` has a `(num_tokens, hidden_size)`
            tensor for each image, `image_embeds` is `(num_images, hidden_size)`.

        Raises:
            ValueError: shape, dtype or values are wrong, or sizes and crops disagree.
        """
        return self.vision_embed_tokens.embed_images(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_img_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3EmbedModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. An image's tokens are a run of `config.image_token_id`, or of Microsoft's negative ids.
            pixel_values, image_sizes (*optional*):
                As in [`~Phi3EmbedModel.get_image_features`]; the images of all texts, in the order of their
                placeholders.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                In place of `input_ids`; placeholders are the embedding of `config.image_token_id`.
            attention_mask, num_img_tokens (*optional*):
                Taken because tokenizer and image processor give them; without effect.

        Returns:
            [`Phi3EmbedModelOutput`]

        Raises:
            ValueError: placeholders and image tokens differ in number, an id is out of range, or as in
                [`~Phi3EmbedModel.get_image_features`].
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Both `input_ids` and `inputs_embeds` were given. Give one of the two.")
        has_text = input_ids is not None or inputs_embeds is not None
        if pixel_values is None and image_sizes is not None:
            raise ValueError("`image_sizes` were given without `pixel_values`.")
        if pixel_values is None:
            if not has_text:
                raise ValueError("Nothing was given: `input_ids` (or `inputs_embeds`), `pixel_values`, or both.")
            return Phi3EmbedModelOutput(last_hidden_state=self.vision_embed_tokens.merge((), input_ids, inputs_embeds))

        if torch.compiler.is_compiling() and not has_text:
            images = self.vision_embed_tokens.embed_images(pixel_values, image_sizes, pad_tokens=True, **kwargs)
            return Phi3EmbedModelOutput(
                last_hidden_state=self.vision_embed_tokens.drop(images.pooler_output),
                pooler_output=images.image_embeds,
                hidden_states=images.hidden_states,
                attentions=images.attentions,
            )
        images = self.get_image_features(pixel_values, image_sizes, **{**kwargs, "return_dict": True})
        tokens = images.pooler_output
        if has_text:
            last_hidden_state = self.vision_embed_tokens.merge(tokens, input_ids, inputs_embeds)
        else:
            last_hidden_state = self.vision_embed_tokens.drop(pad_sequence(tokens, batch_first=True))
        return Phi3EmbedModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=images.image_embeds,
            image_hidden_states=tokens,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
        )


class Phi3EmbedForImageClassification(Phi3EmbedPreTrainedModel):
    """
    [`Phi3EmbedModel`] and a linear layer from an image's vector (`pooler_output`) to `config.num_labels` classes.

    The word embeddings and the separators do not reach that vector. Where a training asks for a gradient of every
    weight, as distributed training without `find_unused_parameters` does, set their `requires_grad` to `False`.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The loss is the mean of the batch: a Trainer that accumulates batches has to divide it.
    accepts_loss_kwargs = False

    def __init__(self, config: Phi3EmbedConfig):
        super().__init__(config)
        self.model = Phi3EmbedModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        labels: torch.Tensor | None = None,
        num_img_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values, image_sizes:
                As in [`~Phi3EmbedModel.get_image_features`].
            labels (`torch.Tensor`, *optional*):
                By `config.problem_type`: `"single_label_classification"`, ints of shape `(num_images,)`, -100 where an
                image does not count; `"multi_label_classification"` or `"regression"`, floats of shape
                `(num_images, num_labels)`. Without a `problem_type` one label is a regression, and several are told
                apart by the dtype.
            num_img_tokens (*optional*):
                Taken because the image processor gives them; without effect.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: `logits` of shape `(num_images, num_labels)`, the
            `loss` where labels were given, and on request the tower's `hidden_states` and `attentions`.

        Raises:
            ValueError: labels are of a wrong shape, dtype or range, or as in [`~Phi3EmbedModel.get_image_features`].
        """
        images = self.model.get_image_features(pixel_values, image_sizes, **{**kwargs, "return_dict": True})
        logits = self.classifier(images.image_embeds)
        loss = None
        if labels is not None:
            _check_labels(self.config, labels, len(logits))
            loss = self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=images.hidden_states, attentions=images.attentions
        )


# transformers loads the module of each auto_map entry of a folder on its own. Named from here, the config is one class
# with the model's, and wherever the config is saved the model's code goes along.
Phi3EmbedConfig.__module__ = __name__
Phi3EmbedModel.register_for_auto_class("AutoModel")
Phi3EmbedForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["Phi3EmbedForImageClassification", "Phi3EmbedModel", "Phi3EmbedPreTrainedModel", "Phi3ImageEmbedding"]
