"""
Pixels -> image tokens at full size, in float32. The weights are random: their values do not change the time.

`limit` is the least work that gives the result: every real crop once, in one batch, through the layers that the
features need. `original scheme` is the published computation: padding too, through all layers, every hidden state
kept.
"""

import copy

import numpy as np
import torch
from measure import ROOT, figures_of_cases, interleaved_seconds, peak_bytes, timed
from PIL import Image
from torch.nn.functional import conv2d, layer_norm, linear, scaled_dot_product_attention
from transformers import AutoImageProcessor, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# Width and height of each image, and `num_crops`. The grids of the four are 2 x 2, 1 x 4, 3 x 1 and 1 x 2: with the
# global views 17 crops, which padding makes 20.
CASES = {
    "4 images, 17 real of 20 crops": (((640, 480), (1600, 400), (400, 1200), (800, 400)), 4),
    "1 image of one crop": (((336, 336),), 1),
}
CONTENDERS = ("limit", "ours", "original scheme, sdpa", "original scheme, eager")
# Float32 sums in another order, after 23 layers.
TOLERANCE = 1e-3


def load_inputs(case, pad_views=False):
    sizes, num_crops = CASES[case]
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), np.uint8)) for size in sizes]
    processor = AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True)
    inputs = processor(images, num_crops=num_crops, pad_views=pad_views, return_tensors="pt")
    return inputs.pixel_values, inputs.image_sizes


def load_model():
    torch.manual_seed(0)
    model_class = get_class_from_dynamic_module("modeling_phi3_embed.Phi3EmbedModel", str(ROOT))
    model = model_class(model_class.config_class()).eval()  # by default of Phi-3-vision's widths
    # A fresh model's separators are zero, which would hide one in a wrong place.
    for separator in (model.vision_embed_tokens.projector.sub_GN, model.vision_embed_tokens.projector.glb_GN):
        torch.nn.init.normal_(separator)
    return model


def load_original_tower(model, attention):
    """The whole tower, all layers of it, sharing the weights of ours."""
    config = copy.deepcopy(model.config.vision_config)
    tower = AutoModel.from_config(config, attn_implementation=attention).eval()
    tower.load_state_dict(model.vision_embed_tokens.img_processor.state_dict(), strict=False, assign=True)
    return tower


def contender(name, model):
    """A function of (pixel_values, image_sizes) that gives the image tokens, one tensor an image."""
    if name == "ours":
        return lambda *inputs: model.get_image_features(*inputs).pooler_output
    embedding = model.vision_embed_tokens
    if name == "limit":
        return lambda *inputs: limit(embedding.img_processor, embedding.projector, *inputs)
    tower = load_original_tower(model, name.split()[-1])
    return lambda *inputs: original_scheme(tower, embedding.projector, *inputs)


def limit(tower, projector, pixel_values, image_sizes):
    grids = [(height // 336, width // 336) for height, width in image_sizes.tolist()]
    # The only crop of a 1 x 1 grid equals the global view.
    num_views = [1 if grid == (1, 1) else 1 + grid[0] * grid[1] for grid in grids]
    of_image = pixel_values.split([1 + rows * cols for rows, cols in grids])
    crops = torch.cat([views[:used] for views, used in zip(of_image, num_views)])

    embeddings = tower.embeddings
    patches = conv2d(crops, embeddings.patch_embedding.weight, stride=14).flatten(2).transpose(1, 2)
    state = torch.cat((embeddings.class_embedding.expand(len(crops), 1, -1), patches), dim=1)
    del crops, patches
    state += embeddings.position_embedding.weight
    state = normed(tower.pre_layrnorm, state)
    for layer in tower.encoder.layers:
        state += attended(layer.self_attn, normed(layer.layer_norm1, state))
        state += perceived(layer.mlp, normed(layer.layer_norm2, state))

    merged = state[:, 1:].view(-1, 12, 2, 12, 2, 1024).transpose(2, 3).reshape(-1, 4096)
    table = projector.img_projection(torch.cat((merged, projector.sub_GN.view(1, -1), projector.glb_GN.view(1, -1))))
    sub_GN, glb_GN = table[-2], table[-1:]
    tokens = []
    for grid, views in zip(grids, table[:-2].view(-1, 12, 12, table.shape[-1]).split(num_views)):
        crops = views if len(views) == 1 else views[1:]
        tokens.append(torch.cat((lines(crops, *grid, sub_GN), glb_GN, lines(views[:1], 1, 1, sub_GN))))
    return tokens


def normed(norm, state):
    return layer_norm(state, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def attended(attention, state):
    heads = [
        linear(state, projection.weight, projection.bias).unflatten(-1, (16, 64)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    mixed = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return linear(mixed, attention.out_proj.weight, attention.out_proj.bias)


def perceived(mlp, state):
    wide = linear(state, mlp.fc1.weight, mlp.fc1.bias)
    return linear(wide * torch.sigmoid(1.702 * wide), mlp.fc2.weight, mlp.fc2.bias)


def lines(crops, rows, cols, sub_GN):
    """Crops (rows * cols, 12, 12, C) -> the tokens of the whole image, line by line, each closed by `sub_GN`."""
    width = crops.shape[-1]
    image = crops.view(rows, cols, 12, 12, width).transpose(1, 2).reshape(rows * 12, cols * 12, width)
    return torch.cat((image, sub_GN.expand(rows * 12, 1, width)), dim=1).flatten(0, 1)


def original_scheme(tower, projector, pixel_values, image_sizes):
    """The original computation on padded views, (images, most views, 3, 336, 336)."""
    hidden_states = tower(pixel_values.flatten(0, 1), output_hidden_states=True).hidden_states
    features = hidden_states[-2][:, 1:].unflatten(0, pixel_values.shape[:2])  # (images, views, 576, 1024)
    tokens = []
    for views, (height, width) in zip(features, image_sizes.tolist()):
        rows, cols = height // 336, width // 336
        glb = merged_lines(views[:1], 1, 1, projector.sub_GN)
        sub = merged_lines(views[1 : rows * cols + 1], rows, cols, projector.sub_GN)
        tokens.append(projector.img_projection(torch.cat((sub, projector.glb_GN[0], glb))))
    return tokens


def merged_lines(crops, rows, cols, sub_GN):
    """Features (rows * cols, 576, 1024) -> 2 x 2 merged tokens of the whole image, each line closed by `sub_GN`."""
    merged = crops.reshape(-1, 12, 2, 12, 2, 1024).permute(0, 1, 3, 2, 4, 5).reshape(rows, cols, 12, 12, 4096)
    image = merged.permute(0, 2, 1, 3, 4).reshape(rows * 12, cols * 12, 4096)
    return torch.cat((image, sub_GN[0].repeat(rows * 12, 1, 1)), dim=1).reshape(-1, 4096)


def prepare(name, case, model):
    """A contender's call, which one small image went through so that no round pays for what is set up once, and what
    it takes."""
    call, is_padded = contender(name, model), name.startswith("original")
    call(*load_inputs("1 image of one crop", is_padded))
    return call, load_inputs(case, is_padded)


@torch.no_grad()
def measure_seconds(case, rounds):
    model, timed_calls = load_model(), {}
    for name in CONTENDERS:
        call, inputs = prepare(name, case, model)
        timed_calls[name] = lambda call=call, inputs=inputs: timed(lambda: call(*inputs))
    return interleaved_seconds(timed_calls, rounds, case, check_agreement)


def check_agreement(results):
    expected = torch.cat(results["limit"])
    allowed = TOLERANCE * expected.abs().max().item()
    for name, tokens in results.items():
        given, message = torch.cat(tokens), lambda text, name=name: f"{name!r}: {text}"
        torch.testing.assert_close(given, expected, atol=allowed, rtol=0, msg=message)


@torch.no_grad()
def measure_peak(case, name):
    call, inputs = prepare(name, case, load_model())
    return peak_bytes(lambda: call(*inputs))


def run(quick):
    rounds = {"4 images, 17 real of 20 crops": 1 if quick else 3, "1 image of one crop": 2 if quick else 9}
    return figures_of_cases(CASES, CONTENDERS, measure_seconds, measure_peak, rounds)
