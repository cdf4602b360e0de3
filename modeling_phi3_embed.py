"""
Phi-3-vision: the image embedding, and the whole model.

Pixels of the views of all images, the global view of each before its crops (views, 3, H, W)
  -> the tower, up to the feature layer                                     (views, patches, C)
  -> 2 x 2 patches merged, separators appended, projected                   (views * tokens + 2, hidden_size)
  -> gathered in reading order: lines across the whole image, each closed by `sub_GN`, and one `glb_GN` between the
     crops and the global view                                              (num_tokens of each image, hidden_size)
  -> put in the place of the image placeholders among the word embeddings   (batch, length, hidden_size)
  -> of the whole model: transformers' Phi-3 language model, and its head   (batch, length, vocab_size)
"""

import copy
import inspect
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .checks_phi3_embed import (
    check_arguments,
    check_encoded_images,
    check_image_features,
    check_image_sizes,
    check_image_tokens,
    check_input_ids,
    check_inputs_embeds,
    check_labels,
    check_length,
    check_logits,
    check_padding,
    check_pixels,
    check_placeholder_order,
    check_placeholders,
    check_pooling_mode,
    check_tensor,
    check_weight_files,
    is_features,
    is_padded,
)
from .configuration_phi3_embed import MERGE_SIZE, Phi3EmbedConfig, hd_num_tokens

logger = logging.get_logger(__name__)

# Microsoft marks image n by the id -n. Ids at or below this bound are not placeholders.
MIN_PLACEHOLDER_ID = -(10**9)

# The code of each Auto class, which config.json names.
AUTO_MAP = {
    "AutoConfig": "modeling_phi3_embed.Phi3EmbedConfig",
    "AutoModel": "modeling_phi3_embed.Phi3EmbedModel",
    "AutoModelForImageClassification": "modeling_phi3_embed.Phi3EmbedForImageClassification",
}
GENERATION_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM")
WHOLE_AUTO_MAP = AUTO_MAP | {
    "AutoModel": "modeling_phi3_embed.Phi3VisionModel",
    **dict.fromkeys(GENERATION_AUTO_CLASSES, "modeling_phi3_embed.Phi3VisionForConditionalGeneration"),
}

# What towers call the modules behind their last layer. The features are taken before them.
CLOSING_MODULES = ("post_layernorm", "layernorm", "norm", "rms_norm", "head", "pooler")


@dataclass
class Phi3EmbedImageOutput(BaseModelOutputWithPooling):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_views, num_patches, vision_config.hidden_size)`):
            The tower's features of every view at `config.layer_idx`, image after image, the global view of each first.
            [`~Phi3EmbedModel.get_image_features`] takes them in place of pixels. In a graph traced with padded pixels
            also those of the padding.
        pooler_output (`tuple(torch.FloatTensor)`, one of shape `(num_tokens, hidden_size)` an image):
            The image tokens; [`~Phi3EmbedModel.split_image_tokens`] puts them in place.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            The tower's, on request, one row for each view that went through it: the only crop of a grid of 1 x 1
            equals the global view and is encoded with it.
        image_embeds (`torch.FloatTensor` of shape `(num_images, config.embed_dim)`):
            One vector an image, by `pooling_mode`.
        grids (`torch.LongTensor` of shape `(num_images, 2)`):
            Rows and columns of each image's crops; 0 x 0 for the global view alone.
    """

    image_embeds: torch.FloatTensor | None = None
    grids: torch.LongTensor | None = None

    @property
    def global_features(self) -> torch.FloatTensor:
        """The tower's features of each image's global view, `(num_images, num_patches, vision_config.hidden_size)`."""
        num_views = self.grids.prod(-1) + 1
        return self.last_hidden_state[(num_views.cumsum(0) - num_views).to(self.last_hidden_state.device)]


@dataclass
class Phi3EmbedModelOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The word embeddings with the image tokens in place of the placeholders. For images alone, of shape
            `(num_images, max_num_tokens, hidden_size)`: the image tokens, with zeros behind shorter images. In a graph
            traced with padded pixels its length follows from their shape.
        pooler_output (`torch.FloatTensor` of shape `(num_images, config.embed_dim)`, *optional*):
            One vector an image, by `pooling_mode`.
        image_outputs ([`Phi3EmbedImageOutput`], *optional*):
            What [`~Phi3EmbedModel.get_image_features`] gives: the tokens of each image, the grids, the tower's
            features. `None` in a traced graph of images alone, which is one for any number of images.
        hidden_states (`tuple(torch.FloatTensor)` of shape `(num_views, tower_length, tower_width)`, *optional*):
            The tower's hidden states up to the feature layer, with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)` of shape `(num_views, heads, tower_length, tower_length)`, *optional*):
            The tower's attentions, with `output_attentions=True` and eager attention.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    image_outputs: Phi3EmbedImageOutput | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# The cache's field is named by transformers' version: `past_key_values` before 5.24, `cache` since.
@dataclass
class Phi3VisionModelOutput(BaseModelOutputWithPast):
    r"""
    [`~transformers.modeling_outputs.BaseModelOutputWithPast`], and:

    Args:
        image_outputs ([`Phi3EmbedImageOutput`], *optional*):
            What [`~Phi3VisionModel.get_image_features`] gives.
    """

    image_outputs: Phi3EmbedImageOutput | None = None


@dataclass
class Phi3VisionCausalLMOutput(CausalLMOutputWithPast):
    r"""
    [`~transformers.modeling_outputs.CausalLMOutputWithPast`], and:

    Args:
        image_outputs ([`Phi3EmbedImageOutput`], *optional*):
            What [`~Phi3VisionModel.get_image_features`] gives.
    """

    image_outputs: Phi3EmbedImageOutput | None = None


def build_vision_tower(config: Phi3EmbedConfig) -> PreTrainedModel:
    """The tower of `config.vision_config` up to the feature layer, without what follows its last layer."""
    vision_config = config.vision_config
    # The tower keeps the config that it is given: what is set there, as an attention implementation, holds for both.
    num_hidden_layers = vision_config.num_hidden_layers
    vision_config.num_hidden_layers = config.num_feature_layers
    try:
        tower = AutoModel.from_config(vision_config, trust_remote_code=False)
    finally:
        vision_config.num_hidden_layers = num_hidden_layers
    if tower.main_input_name != "pixel_values":
        raise ValueError(
            f"`vision_config` of type {vision_config.model_type!r} builds {type(tower).__name__}, which takes "
            f"`{tower.main_input_name}`. Give the config of a vision transformer, which takes `pixel_values`."
        )
    parameters = inspect.signature(tower.forward).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
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


class Phi3EmbedProjector(nn.Module):
    """Merges patches and projects them and the separators into the token space."""

    # The separators are parameters of this module, so that accelerate's hooks load them when its forward runs.
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
        `(num_views, num_patches, C)` -> `(num_views * num_tokens + 2, hidden_size)`, the last two rows `sub_GN` and
        `glb_GN`; without the HD transform `(num_views, num_patches, hidden_size)`.
        """
        if not self.use_hd_transform:
            return self.img_projection(features)
        num_views, num_patches, width = features.shape
        side = int(num_patches**0.5) // MERGE_SIZE
        features = features.view(num_views, side, MERGE_SIZE, side, MERGE_SIZE, width).transpose(2, 3)
        features = features.reshape(-1, MERGE_SIZE**2 * width)  # (num_views * side * side, 4 * C)
        separators = (self.sub_GN.view(1, -1), self.glb_GN.view(1, -1))
        return self.img_projection(torch.cat((features, *separators)))


class ViewLayout(NamedTuple):
    """
    How views belong to images.

    Attributes:
        grids (`(num_images, 2)`): rows and columns of crops.
        first_view (`(num_images,)`): the row of each image's global view, which its crops follow.
        image (`(num_views,)`): the image of each view.
        weight (`(num_views,)`): what a view counts in the mean of its image.
    """

    grids: torch.LongTensor
    first_view: torch.LongTensor
    image: torch.LongTensor
    weight: torch.FloatTensor


def hd_token_index(
    position: torch.LongTensor,
    grids: torch.LongTensor,
    first_row: torch.LongTensor,
    tokens_per_side: int,
    order: str,
) -> torch.LongTensor:
    """
    Maps token positions to rows of a table. Its rows are the tokens of view after view, the global view of an image
    before its crops; its last two rows are `sub_GN` and `glb_GN`.

    Args:
        position (`(*shape,)`): which token of its image, from 0.
        grids (`(*shape, 2)`): rows and columns of crops of its image.
        first_row (`(*shape,)`): where the global view of its image begins in the table.

    Returns:
        index (`(*shape,)`): a row of the table for each token; -2 for `sub_GN`, -1 for `glb_GN`. All shapes may
            broadcast.
    """
    side, area = tokens_per_side, tokens_per_side**2
    rows, cols = grids.unbind(-1)

    crops_length, global_length = rows * side * (cols * side + 1), side * (side + 1)
    if order == "sub_glb":
        is_crop, is_separator = position < crops_length, position == crops_length
        position = torch.where(is_crop, position, position - crops_length - 1)
    else:
        is_crop, is_separator = position > global_length, position == global_length
        position = torch.where(is_crop, position - global_length - 1, position)
    width = torch.where(is_crop, cols * side, side)
    y, x = position // (width + 1), position % (width + 1)

    view = torch.where(is_crop, 1 + (y // side) * cols + x // side, 0)
    index = first_row + view * area + (y % side) * side + x % side
    index = torch.where(x == width, -2, index)
    return torch.where(is_separator, -1, index)


class Phi3EmbedEmbeddings(nn.Module):
    """Word embeddings, tower and projector: the image tokens of images, and the merge of both."""

    def __init__(self, config: Phi3EmbedConfig, wte: nn.Embedding | None = None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size) if wte is None else wte
        self.img_processor = build_vision_tower(config)
        self.projector = Phi3EmbedProjector(config)
        self.drop = nn.Dropout(config.embd_pdrop)
        # A PreTrainedModel that holds this module takes these over for its device map.
        self._no_split_modules = {"Phi3EmbedProjector", *(self.img_processor._no_split_modules or ())}

    def get_img_features(self, img_embeds: torch.Tensor) -> torch.Tensor:
        """Pixels `(num_views, 3, H, W)` -> the tower's features `(num_views, num_patches, C)` at the feature layer."""
        return self._select_features(self._encode(img_embeds).last_hidden_state)

    def _encode(self, pixel_values, **kwargs):
        return self.img_processor(pixel_values.to(self.img_processor.dtype), **kwargs)

    def _select_features(self, features):
        if features.ndim != 3:
            raise ValueError(
                f"The tower gives features of shape {tuple(features.shape)}, but must give (views, patches, width). "
                "Set `vision_config` to that of a plain vision transformer."
            )
        # Towers put 0 (SigLIP), 1 (CLIP) or more (DINOv2 with registers) tokens before the patches, the class token
        # first.
        num_prefix = features.shape[1] - self.config.patches_per_side**2
        if num_prefix < 0 or (num_prefix == 0 and self.config.type_feature == "cls_patch"):
            raise ValueError(
                f"The tower gives {features.shape[1]} tokens a view of {self.config.patches_per_side**2} patches; "
                f"`type_feature={self.config.type_feature!r}` needs more. Set `type_feature` or `vision_config` right."
            )
        if self.config.type_feature == "cls_patch":
            return torch.cat((features[:, :1], features[:, num_prefix:]), dim=1)
        return features[:, num_prefix:]

    def embed_images(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | list[tuple[int, int]] | None = None,
        pooling_mode: str | None = None,
        pad_tokens: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3EmbedImageOutput:
        """
        See [`Phi3EmbedModel.get_image_features`]. With `pad_tokens` the image tokens are one tensor
        `(num_images, max_num_tokens, hidden_size)`, zeros behind shorter images, which a graph for any number of
        images needs.
        """
        pooling_mode = check_pooling_mode(self.config, pooling_mode)
        check_pixels(self.config, pixel_values)
        grids = check_image_sizes(self.config, pixel_values, image_sizes)
        layout, views, encoded_view = self._pack(pixel_values, grids)
        if is_features(self.config, pixel_values):
            features, encoded = views.to(self.img_processor.dtype), {}
        else:
            encoded = self._encode(views, **kwargs)
            features = self._select_features(encoded.last_hidden_state)

        projected = self.projector(features)
        layout = ViewLayout(*(part.to(projected.device) for part in layout))
        if encoded_view is None:
            encoded_view = torch.arange(features.shape[0], device=projected.device)
        else:
            encoded_view = encoded_view.to(projected.device)
            features = features[encoded_view]  # again one row a view
        if self.config.use_hd_transform:
            max_views = pixel_values.shape[1] if is_padded(self.config, pixel_values) else None
            tokens = self._gather_tokens(projected, layout, encoded_view, max_views, pad_tokens)
            projected = projected[:-2].view(-1, self.config.num_img_tokens, projected.shape[-1])
        else:
            tokens = projected if pad_tokens else projected.unbind(0)
        return Phi3EmbedImageOutput(
            last_hidden_state=features,
            pooler_output=tokens,
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
            image_embeds=self._pool(pooling_mode, features, projected, layout, encoded_view),
            grids=layout.grids,
        )

    def _pack(self, pixel_values, grids) -> tuple[ViewLayout, torch.Tensor, torch.LongTensor | None]:
        """
        -> the layout, the views `(num_encoded, ...)` that go through the tower, and which of them each view is, where
        they are fewer than all.
        """
        num_images, num_views = grids.shape[0], grids.prod(-1) + 1
        if not is_padded(self.config, pixel_values):
            views, row, num_real = pixel_values, None, pixel_values.shape[0]
        else:
            max_views, views = pixel_values.shape[1], pixel_values.flatten(0, 1)
            is_real = torch.arange(max_views, device=grids.device) < num_views[:, None]  # (num_images, max_views)
            if torch.compiler.is_compiling():
                # A graph cannot know how many views will be real: it encodes the padding too.
                number = torch.arange(num_images, device=grids.device)
                image, weight = number[:, None].expand(-1, max_views), is_real / num_views[:, None]
                return ViewLayout(grids, number * max_views, image.flatten(), weight.flatten()), views, None
            row = is_real.flatten().nonzero().squeeze(1)
            num_real = row.shape[0]
        first_view = num_views.cumsum(0) - num_views
        # How many images end before each view. ONNX takes this, and not `repeat_interleave`.
        image = (torch.arange(num_real, device=grids.device)[:, None] >= num_views.cumsum(0)).sum(-1)
        encoded_view = None
        # The only crop of a 1 x 1 grid equals the global view, to the bit as the processor makes them: encode it once,
        # but where each view's own gradient is asked for.
        if not torch.compiler.is_compiling() and not pixel_values.requires_grad:
            first = first_view[num_views == 2]
            left, right = (first, first + 1) if row is None else (row[first], row[first + 1])
            twin = 1 + first[(views[left] == views[right]).flatten(1).all(-1)]
            if len(twin):
                is_encoded = torch.ones(num_real, dtype=torch.bool, device=grids.device).index_fill(0, twin, False)
                encoded_view = is_encoded.cumsum(0) - 1
                row = is_encoded.nonzero().squeeze(1) if row is None else row[is_encoded]
        layout = ViewLayout(grids, first_view, image, 1 / num_views[image])
        return layout, views if row is None else views[row], encoded_view

    def _gather_tokens(self, table, layout, encoded_view, max_views, pad_tokens):
        side, area, order = self.config.tokens_per_side, self.config.num_img_tokens, self.config.hd_transform_order
        grids, num_tokens = layout.grids, hd_num_tokens(*layout.grids.unbind(-1), side)
        # Rows of the table by the view that was encoded, one for twins; the last two are the separators.
        encoded_row = encoded_view[:, None] * area + torch.arange(area, device=table.device)
        encoded_row = torch.cat((encoded_row.flatten(), encoded_row.new_tensor([-2, -1])))
        if pad_tokens:
            max_tokens = num_tokens.max().item()
            if max_views is not None:  # no grid of so many views has more tokens than one column of crops
                max_tokens = hd_num_tokens(max_views - 1, 1, side)
            position = torch.arange(max_tokens, device=table.device)
            first_row = layout.first_view[:, None] * area
            index = hd_token_index(position, grids[:, None], first_row, side, order)  # (num_images, max_tokens)
            is_token = position < num_tokens[:, None]
            return table[encoded_row[torch.where(is_token, index, -1)]].where(is_token[..., None], 0)
        image = torch.arange(grids.shape[0], device=table.device).repeat_interleave(num_tokens)
        position = torch.arange(image.shape[0], device=table.device) - (num_tokens.cumsum(0) - num_tokens)[image]
        index = hd_token_index(position, grids[image], layout.first_view[image] * area, side, order)
        return table[encoded_row[index]].split(num_tokens.tolist())

    def _pool(self, mode, features, projected, layout, encoded_view):
        """
        One vector an image, of features `(num_views, num_patches, C)` or of tokens `(num_encoded, num_tokens,
        hidden_size)`.
        """
        if mode == "tower":
            return features[layout.first_view, -(self.config.patches_per_side**2) :].mean(1)
        if mode == "global":
            return projected[encoded_view[layout.first_view]].mean(1)
        # The sum is in float32, because half precision would round it.
        means = projected.mean(1)[encoded_view] * layout.weight[:, None]
        zeros = means.new_zeros(layout.grids.shape[0], means.shape[-1])
        return zeros.index_add(0, layout.image, means).to(projected.dtype)

    def merge(
        self,
        image_tokens: tuple[torch.FloatTensor, ...] = (),
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """Word embeddings `(batch_size, sequence_length, hidden_size)` with the image tokens in the placeholders."""
        if input_ids is not None:
            check_input_ids(input_ids, self.wte.num_embeddings)
            input_ids = input_ids.view(-1, input_ids.shape[-1])
            inputs_embeds = self.wte(input_ids.clamp(min=0))
        else:
            check_inputs_embeds(inputs_embeds, self.wte.embedding_dim)
        is_placeholder = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
        if len(image_tokens):
            check_image_features(image_tokens, self.wte.embedding_dim)
            features = torch.cat(image_tokens).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(is_placeholder[..., None], features)
        return self.drop(inputs_embeds)

    def is_placeholder(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Which ids stand for image tokens: `config.image_token_id`, and Microsoft's negative ids."""
        is_placeholder = (input_ids < 0) & (input_ids > MIN_PLACEHOLDER_ID)
        if self.config.image_token_id is not None:
            is_placeholder = is_placeholder | (input_ids == self.config.image_token_id)
        return is_placeholder

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        image_tokens: tuple[torch.FloatTensor, ...],
    ) -> torch.BoolTensor:
        """Where the image tokens go, `(batch_size, sequence_length)`; each image's must stand together, in order."""
        if input_ids is not None:
            is_placeholder, number = self.is_placeholder(input_ids), input_ids
        elif self.config.image_token_id is not None:
            image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            is_placeholder = (inputs_embeds == self.wte(image_token_id)).all(-1)
            number = is_placeholder.long()
        else:
            raise ValueError("`inputs_embeds` need an `image_token_id` in the config to tell where images go.")
        check_placeholders(is_placeholder, number, [tokens.shape[0] for tokens in image_tokens])
        return is_placeholder.to(self.wte.weight.device if inputs_embeds is None else inputs_embeds.device)


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
    _has_language_model = False
    # The image embedding takes its own part of a whole checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?language_model\.", r"^lm_head\."]

    def __init__(self, config: Phi3EmbedConfig):
        if config.text_config is not None and not self._has_language_model:
            # What is saved is a checkpoint of the image embedding.
            config = copy.deepcopy(config)
            config.text_config = None
        super().__init__(config)
        # AutoModel keeps the class that it loads for the config's class, and would give it for every later checkpoint
        # of the same code, whole or not, where `auto_map` names another.
        kept = AutoModel._model_mapping._extra_content
        if __name__.startswith("transformers_modules.") and type(self.config) in kept:
            del kept[type(self.config)]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3EmbedProjector) and module.use_hd_transform:
            init.zeros_(module.glb_GN)
            init.zeros_(module.sub_GN)

    def post_init(self):
        super().post_init()
        # CLIP's `_no_split_modules` also lists classes of its text side. FSDP fails on a class that the model lacks.
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
            ValueError: the checkpoint lacks weights; they are named. Or it is in Microsoft's layout, or Git LFS has
                not fetched it.
        """
        if pretrained_model_name_or_path is not None:
            check_weight_files(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        if kwargs.get("config") is None and pretrained_model_name_or_path is not None:
            config, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if "img_processor" in config:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a checkpoint in Microsoft's layout. Take the image embedding "
                    f"out of it by `python convert_phi3_vision.py {shlex.quote(str(pretrained_model_name_or_path))} "
                    "OUTPUT`, or with `--whole` all of it, and load OUTPUT."
                )
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = loading_info["missing_keys"]
        hint = "For a fresh, untrained model use `AutoModel.from_config(config, trust_remote_code=True)`."
        head = {name for name in missing if name.startswith("classifier.")}
        if head and model.config.architectures != [cls.__name__]:
            if model.config.id2label != PreTrainedConfig().id2label:
                missing = missing - head
            else:  # nobody asked for a head: a pipeline would pass off its random answers
                hint = "To train them, name the classes by `id2label`, or their number (if not 2) by `num_labels`."
        if missing := sorted(missing):
            raise ValueError(
                f"The checkpoint lacks {len(missing)} of the model's weights: {', '.join(missing)}. {hint}"
            )
        if model.config.untrained and pretrained_model_name_or_path is not None:
            logger.warning(
                f"The projection of {pretrained_model_name_or_path} has never been trained: what the model gives of "
                "images is noise. Train it, as by `phi3-embed finetune --task align`, and set `config.untrained` to "
                "False."
            )
        return (model, loading_info) if output_loading_info else model

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As [`PreTrainedModel.resize_token_embeddings`]."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = embeddings.num_embeddings  # beside that of `text_config`
        return embeddings

    def save_pretrained(self, *args, **kwargs):
        """As [`PreTrainedModel.save_pretrained`], but whichever model saved it, the config names the code of all."""
        self.config.auto_map = dict(AUTO_MAP if self.config.text_config is None else WHOLE_AUTO_MAP)
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
        self.vision_embed_tokens = Phi3EmbedEmbeddings(self.config)
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
        pooling_mode: str | None = None,
        num_image_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3EmbedImageOutput:
        r"""
        Image tokens, and one vector an image.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_views, 3, crop_size, crop_size)`):
                The views of all images one after another, as the image processor makes them: the global view of an
                image, then its crops row by row. Or one row an image, `(num_images, max_views, 3, crop_size,
                crop_size)`, with zeros behind the views, as Microsoft's. In place of pixels the tower's features,
                `(num_views, num_patches, vision_config.hidden_size)` or
                `(num_images, max_views, num_patches, vision_config.hidden_size)`. Without the HD transform
                `(num_images, 3, crop_size, crop_size)`, or features
                `(num_images, num_tokens, vision_config.hidden_size)`.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)` or a list of int pairs):
                Height and width in pixels of each image's grid of crops; 0 x 0 for the global view alone. Needed for
                the HD transform only.
            pooling_mode (`str`, *optional*):
                `"mean"`, `"global"` or `"tower"`, in place of `config.pooling_mode`.
            num_image_tokens (*optional*):
                Taken because the image processor gives them; without effect.
            output_hidden_states, output_attentions (`bool`, *optional*):
                Also return the tower's.

        Returns:
            [`Phi3EmbedImageOutput`] in the dtype of the weights: `pooler_output` has a `(num_tokens, hidden_size)`
            tensor for each image, `image_embeds` is `(num_images, hidden_size)`, or with `"tower"` as wide as the
            tower.

        Raises:
            ValueError: shape, dtype or values are wrong, or sizes and views disagree.
            TypeError: an argument is unknown.
        """
        check_arguments(self.get_image_features, kwargs)
        return self.vision_embed_tokens.embed_images(pixel_values, image_sizes, pooling_mode, **kwargs)

    def split_image_tokens(
        self, tokens: torch.Tensor, grid: torch.Tensor | tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Puts the tokens of one image in their places, without the separators.

        Args:
            tokens (`torch.Tensor` of shape `(num_tokens, hidden_size)`):
                One of `pooler_output` of [`~Phi3EmbedModel.get_image_features`].
            grid (`tuple` of two ints):
                Rows and columns of its crops, the one of `grids` that belongs to it.

        Returns:
            The lines of the crops across the whole image `(rows * tokens_per_side, cols * tokens_per_side,
            hidden_size)`, and those of the global view `(tokens_per_side, tokens_per_side, hidden_size)`. Without the
            HD transform no crops, and one token a patch.

        Raises:
            ValueError: an image of this grid has another number of tokens.
        """
        rows, cols = (int(count) for count in grid)
        if not self.config.use_hd_transform:
            side = self.config.patches_per_side
            check_image_tokens(tokens, (rows, cols), self.config.num_img_tokens)
            return tokens.new_empty(0, 0, tokens.shape[-1]), tokens[-(side**2) :].view(side, side, -1)
        side = self.config.tokens_per_side
        check_image_tokens(tokens, (rows, cols), hd_num_tokens(rows, cols, side))
        lengths = [rows * side * (cols * side + 1), 1, side * (side + 1)]
        if self.config.hd_transform_order == "sub_glb":
            crops, _, global_view = tokens.split(lengths)
        else:
            global_view, _, crops = tokens.split(lengths[::-1])
        crop_lines = crops.view(rows * side, cols * side + 1, tokens.shape[-1])[:, :-1]
        return crop_lines, global_view.view(side, side + 1, tokens.shape[-1])[:, :-1]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_image_tokens: torch.Tensor | None = None,
        pooling_mode: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3EmbedModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. An image's tokens are a run of `config.image_token_id`, or of Microsoft's negative ids.
            pixel_values, image_sizes, pooling_mode (*optional*):
                As in [`~Phi3EmbedModel.get_image_features`]; the images of all texts, in the order of their
                placeholders.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                In place of `input_ids`; placeholders are the embedding of `config.image_token_id`.
            attention_mask, num_image_tokens (*optional*):
                Taken because tokenizer and image processor give them; without effect.

        Returns:
            [`Phi3EmbedModelOutput`]

        Raises:
            ValueError, TypeError: placeholders and image tokens differ in number, an id is out of range, or as in
                [`~Phi3EmbedModel.get_image_features`].
        """
        check_arguments(self.forward, kwargs)
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
            images = self.vision_embed_tokens.embed_images(
                pixel_values, image_sizes, pooling_mode, pad_tokens=True, **kwargs
            )
            return Phi3EmbedModelOutput(
                last_hidden_state=self.vision_embed_tokens.drop(images.pooler_output),
                pooler_output=images.image_embeds,
                hidden_states=images.hidden_states,
                attentions=images.attentions,
            )
        images = self.get_image_features(pixel_values, image_sizes, pooling_mode, **{**kwargs, "return_dict": True})
        tokens = images.pooler_output
        if has_text:
            last_hidden_state = self.vision_embed_tokens.merge(tokens, input_ids, inputs_embeds)
        else:
            last_hidden_state = self.vision_embed_tokens.drop(pad_sequence(tokens, batch_first=True))
        return Phi3EmbedModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=images.image_embeds,
            image_outputs=images,
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
        self.model = Phi3EmbedModel(self.config)
        self.classifier = nn.Linear(config.embed_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        labels: torch.Tensor | None = None,
        num_image_tokens: torch.Tensor | None = None,
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
            num_image_tokens (*optional*):
                Taken because the image processor gives them; without effect.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: `logits` of shape `(num_images, num_labels)`, the
            `loss` where labels were given, and on request the tower's `hidden_states` and `attentions`.

        Raises:
            ValueError, TypeError: labels are of a wrong shape, dtype or range, or as in
                [`~Phi3EmbedModel.get_image_features`].
        """
        check_arguments(self.forward, kwargs)
        images = self.model.get_image_features(pixel_values, image_sizes, **{**kwargs, "return_dict": True})
        logits = self.classifier(images.image_embeds)
        loss = None
        if labels is not None:
            check_labels(self.config, labels, len(logits))
            loss = self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=images.hidden_states, attentions=images.attentions
        )


class Phi3VisionModel(Phi3EmbedModel):
    """
    The whole of Phi-3-vision but its head: the embeddings of [`Phi3EmbedModel`], and Phi-3's language model on them.

    The word embeddings are `vision_embed_tokens.wte`; the language model has none of its own. With images alone the
    model gives what [`Phi3EmbedModel`] gives.
    """

    _has_language_model = True
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
    _skip_keys_device_placement = ["cache", "past_key_values"]

    def __init__(self, config: Phi3EmbedConfig):
        if config.text_config is None:
            raise ValueError(
                "The config has no `text_config`: this is the image embedding alone, without a language model. "
                "Convert the whole of Phi-3-vision by `python convert_phi3_vision.py SOURCE OUTPUT --whole`."
            )
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.language_model.embed_tokens = None
        (self.language_model._tp_plan or {}).pop("embed_tokens", None)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        num_image_tokens: torch.Tensor | None = None,
        pooling_mode: str | None = None,
        mm_encoder_outputs: dict[str, Phi3EmbedImageOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3VisionModelOutput | Phi3EmbedModelOutput:
        r"""
        Args:
            input_ids, pixel_values, image_sizes, inputs_embeds, num_image_tokens, pooling_mode (*optional*):
                As in [`~Phi3EmbedModel.forward`].
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Without them 0, 1, ..., padding counted. Where the highest of the batch reaches
                `original_max_position_embeddings`, all of its rows get the long rotary factors.
            cache, past_key_values (`Cache`, *optional*):
                Keys and values of the text before, under the name that transformers' version has for them.
            use_cache (`bool`, *optional*):
                Whether to return them.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": ...}`: what [`~Phi3EmbedModel.get_image_features`] gave, in place of `pixel_values`.

        Returns:
            [`Phi3VisionModelOutput`], `last_hidden_state` after the closing norm; of images alone
            [`Phi3EmbedModelOutput`].

        Raises:
            ValueError, TypeError: the text is longer than `max_position_embeddings`, or as in
                [`~Phi3EmbedModel.forward`].
        """
        check_arguments(self.forward, kwargs, self.language_model.forward)
        images = check_encoded_images(mm_encoder_outputs)
        if pixel_values is not None and images is not None:
            raise ValueError("Both `pixel_values` and `mm_encoder_outputs` were given. Give one of the two.")
        if input_ids is None and inputs_embeds is None and images is None:
            return super().forward(None, pixel_values, image_sizes, pooling_mode=pooling_mode, **kwargs)
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Both `input_ids` and `inputs_embeds` were given. Give one of the two.")
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, image_sizes, pooling_mode, return_dict=True)
        elif image_sizes is not None:
            raise ValueError("`image_sizes` were given without `pixel_values`.")

        caches = {"past_key_values": past_key_values, "cache": cache}
        caches = {name: value for name, value in caches.items() if value is not None}
        if images is None and self._is_continued(input_ids, inputs_embeds, *caches.values()):
            # A step of generation reads no values, and an id of the image token in it is a word.
            inputs_embeds = self.vision_embed_tokens.wte(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            tokens = () if images is None else images.pooler_output
            inputs_embeds = self.vision_embed_tokens.merge(tokens, input_ids, inputs_embeds)
            check_length(inputs_embeds.shape[1], self.config.text_config.max_position_embeddings)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **caches,
            **{**kwargs, "return_dict": True},
        )
        return Phi3VisionModelOutput(**outputs, image_outputs=images)

    @staticmethod
    def _is_continued(input_ids, inputs_embeds, cache=None):
        if torch.compiler.is_compiling():
            return True
        text = inputs_embeds if input_ids is None else input_ids
        return cache is not None and (text.shape[1] == 1 or int(cache.get_seq_length()) > 0)


class Phi3VisionForConditionalGeneration(Phi3EmbedPreTrainedModel, GenerationMixin):
    """[`Phi3VisionModel`] and the head that gives the logits of the next token."""

    _has_language_model = True
    _keys_to_ignore_on_load_unexpected = None
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "model.vision_embed_tokens.wte.weight"}

    def __init__(self, config: Phi3EmbedConfig):
        super().__init__(config)
        self.model = Phi3VisionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> Phi3EmbedImageOutput:
        """See [`~Phi3EmbedModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def split_image_tokens(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`~Phi3EmbedModel.split_image_tokens`]."""
        return self.model.split_image_tokens(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_image_tokens: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Phi3EmbedImageOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Phi3VisionCausalLMOutput:
        r"""
        Args:
            input_ids, pixel_values, image_sizes, attention_mask, position_ids, inputs_embeds, past_key_values, cache,
            use_cache, num_image_tokens, mm_encoder_outputs (*optional*):
                As in [`~Phi3VisionModel.forward`].
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The ids to predict, each at its own place; -100 where none is to be learnt: at image placeholders,
                padding and the question.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Of how many last places the logits are computed, or of which; 0 for all.

        Returns:
            [`Phi3VisionCausalLMOutput`]

        Raises:
            ValueError, TypeError: there is no text, or as in [`~Phi3VisionModel.forward`].
        """
        check_arguments(self.forward, kwargs, self.model.language_model.forward)
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                "There is no text: give `input_ids` or `inputs_embeds`. `model.model` takes images alone."
            )
        kept = cache if past_key_values is None else past_key_values
        is_continued = self.model._is_continued(input_ids, inputs_embeds, kept)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **{**kwargs, "return_dict": True},
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, places])
        if not (is_continued or self.training or labels is not None):
            check_logits(logits[:, -1:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Phi3VisionCausalLMOutput(loss=loss, logits=logits, **others)

    # `generate` reads the signature of remote code at every step, and making it anew takes a tenth of a small model's.
    forward.__signature__ = inspect.signature(forward)

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        r"""
        As [`~transformers.GenerationMixin.generate`]. Images are encoded once; the image token is never generated;
        Microsoft's negative ids come back as `config.image_token_id`.

        Raises:
            ValueError: there is no text, the batch is padded on the right, or as in [`~Phi3VisionModel.forward`].
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("There is no text: give `input_ids` or `inputs_embeds` too.")
        if input_ids is not None:
            check_tensor("input_ids", input_ids)
            input_ids = input_ids.view(-1, input_ids.shape[-1])
        check_encoded_images(kwargs.get("mm_encoder_outputs"))
        check_padding(kwargs.get("attention_mask"))
        image_token_id = self.config.image_token_id
        if image_token_id is not None and input_ids is not None:
            is_placeholder = self.model.vision_embed_tokens.is_placeholder(input_ids)
            check_placeholder_order(is_placeholder, input_ids)
            input_ids = input_ids.masked_fill(is_placeholder, image_token_id)
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            if cache is not None and kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
                # A step on a cache reads no values: what it would take for a word is an image that is missing.
                past_length = int(cache.get_seq_length())
                new = is_placeholder[:, self._num_cached(input_ids, past_length, kwargs.get("attention_mask")) :]
                check_placeholders(new, new.long(), [])
        # What an assistant guesses is checked by the model that it assists.
        if image_token_id is not None and not getattr(generation_config, "is_assistant", False):
            suppressed = kwargs.pop("suppress_tokens", None)
            for defaults in (generation_config, self.generation_config):
                suppressed = suppressed or getattr(defaults, "suppress_tokens", None)
            suppressed = sorted({*(suppressed or ()), image_token_id})
            if generation_config is None:
                kwargs["suppress_tokens"] = suppressed
            else:
                generation_config = copy.deepcopy(generation_config)
                generation_config.suppress_tokens = suppressed
        if (encoded := kwargs.get("mm_encoder_outputs")) is not None:
            # Beams repeat the tokens in place.
            kwargs["mm_encoder_outputs"] = {name: copy.copy(outputs) for name, outputs in encoded.items()}
        return super().generate(input_ids, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        tokenizer=None,  # of stop strings, which generate hands on to the model
        **kwargs,
    ) -> dict:
        # Both names of the cache, of which transformers' version gives one, and takes the same.
        caches = {"past_key_values": past_key_values, "cache": cache}
        caches = {name: value for name, value in caches.items() if value is not None}
        past_length = int(next(iter(caches.values())).get_seq_length()) if caches else 0
        length = self._length(input_ids, past_length, attention_mask, inputs_embeds)
        if caches and past_length == 0:
            is_first_iteration = True  # also of an assistant, which needs the images too
        if past_length and self._crosses_rope_switch(past_length, length, attention_mask, kwargs.get("position_ids")):
            # The keys in the cache have the short rotary factors: compute the whole text again, with the long ones.
            if not is_first_iteration:
                # Guesses of assisted decoding may copy placeholders out of the text, which no image belongs to.
                input_ids = input_ids.clone()
                new = input_ids[:, self._num_cached(input_ids, past_length, attention_mask, inputs_embeds) :]
                new.masked_fill_(self.model.vision_embed_tokens.is_placeholder(new), 0)
            if inputs_embeds is not None and (num_generated := length - inputs_embeds.shape[1]):
                generated = self.get_input_embeddings()(input_ids[:, -num_generated:])
                inputs_embeds = torch.cat((inputs_embeds, generated.to(inputs_embeds.dtype)), dim=1)
            # Only a first iteration is handed the features of the images.
            caches, is_first_iteration, kwargs["next_sequence_length"] = {}, True, None
        return super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **caches,
            **kwargs,
        )

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        # As in transformers 5.24. Releases before repeat each image alone, where a text has several.
        if (images := mm_encoder_output.get("image")) is not None:
            embeddings = self.model.vision_embed_tokens
            is_text = input_ids is not None and input_ids.numel()
            is_placeholder = embeddings.get_placeholder_mask(
                input_ids if is_text else None, inputs_embeds, images.pooler_output
            )
            ends = is_placeholder.sum(-1).cumsum(0)  # of each text, in image tokens
            tokens, begin = [], 0
            image_ends = torch.tensor([len(image) for image in images.pooler_output]).cumsum(0)
            for end in (image_ends[:, None] <= ends.cpu()).sum(0).tolist():
                tokens += images.pooler_output[begin:end] * expand_size
                begin = end
            images.pooler_output = tuple(tokens)
        return mm_encoder_output

    @staticmethod
    def _length(input_ids, past_length, attention_mask=None, inputs_embeds=None) -> int:
        """How long the whole text is, what the cache has of it included."""
        if attention_mask is not None and attention_mask.ndim == 2:
            return attention_mask.shape[1]
        if inputs_embeds is not None and input_ids.shape[1] <= past_length:  # `input_ids` are what was generated
            return input_ids.shape[1] + inputs_embeds.shape[1]
        return input_ids.shape[1]

    def _num_cached(self, input_ids, past_length, *args) -> int:
        """How many of `input_ids` the cache has."""
        return max(input_ids.shape[1] - (self._length(input_ids, past_length, *args) - past_length), 0)

    def _crosses_rope_switch(self, past_length, length, attention_mask, position_ids) -> bool:
        """Whether the text gets the long rotary factors from here on, decided by positions: padding does not count."""
        limit = self.config.text_config.rope_parameters.get("original_max_position_embeddings")
        if limit is None or length <= limit:
            return False
        if position_ids is None or position_ids.shape[-1] != length:
            position_ids = torch.arange(length, device=self.device)[None]
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = attention_mask.long().cumsum(-1) - 1
        return bool(position_ids[:, :past_length].max() < limit <= position_ids.max())


class Phi3ImageEmbedding(Phi3EmbedEmbeddings):
    """
    Phi-3-vision's image embedding with the interface of Microsoft's module, which also takes features and sizes ahead
    of the forward. [`Phi3EmbedModel`] computes the same without such a state.

    Args:
        config ([`Phi3EmbedConfig`], or a config with Microsoft's `img_processor`):
            The geometry.
        wte (`nn.Embedding`, *optional*):
            The word embeddings to share; without it the module has its own, of `config.vocab_size` rows.
        kwargs:
            Microsoft's `embd_layer` settings (`use_hd_transform`, `projection_cls`, ...), over those of `config`.
    """

    def __init__(self, config: Phi3EmbedConfig | PreTrainedConfig, wte: nn.Embedding | None = None, **kwargs):
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
        super().__init__(config, wte)
        self.img_features = None
        self.img_sizes = None

    def set_img_features(self, img_features: torch.Tensor | None) -> None:
        """Leave features or pixels for the next forward, which uses them once."""
        self.img_features = img_features

    def set_img_sizes(self, img_sizes: torch.Tensor | None) -> None:
        """Leave the image sizes for the next forward, which uses them once."""
        self.img_sizes = img_sizes

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


# Loading by auto_map imports each file separately. Setting `__module__` here makes the config one class with the
# model's, and copies the modeling file wherever the config is saved.
Phi3EmbedConfig.__module__ = __name__
Phi3EmbedModel.register_for_auto_class("AutoModel")
Phi3EmbedForImageClassification.register_for_auto_class("AutoModelForImageClassification")
Phi3VisionModel.register_for_auto_class("AutoModel")
Phi3VisionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "Phi3EmbedForImageClassification",
    "Phi3EmbedModel",
    "Phi3EmbedPreTrainedModel",
    "Phi3ImageEmbedding",
    "Phi3VisionForConditionalGeneration",
    "Phi3VisionModel",
]
