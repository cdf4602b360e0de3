"""
Vectors of texts and images in one space, by sentence-transformers around the whole model, in float32: the language
model has Phi-3's widths, the tower those of CLIP ViT-L/14-336, and of the layers of both few, which makes what is not
theirs weigh more. The weights are random.

`limit` is the least work that gives the vector: for a text transformers' own Phi3Model without head or cache, for an
image the tower, the projection, and one such pass over the prompt with the image's tokens.
"""

import numpy as np
import torch
from measure import ROOT, figures_of_cases, in_turns, peak_bytes
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, Phi3Config, Phi3Model

WIDTHS = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
NUM_LAYERS = 1
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CASES = {
    "8 texts of up to 66 tokens": [" ".join(["the number seven"] * number) for number in range(6, 21, 2)],
    "1 image of 4 crops": [Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8))],
}
CONTENDERS = ("limit", "ours")
TOLERANCE = 1e-4


def load():
    """The embedder, and transformers' Phi-3 of the same weights."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    text = Phi3Config(
        **(config.text_config.to_dict() | WIDTHS | {"num_hidden_layers": NUM_LAYERS, "use_cache": False})
    )
    about = config.to_dict() | {"vision_config": CLIP_LARGE, "hidden_size": None, "text_config": text.to_dict()}
    torch.manual_seed(0)
    model = AutoModel.from_config(type(config).from_dict(about), trust_remote_code=True).eval()
    embedder = SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu")
    embedder[0].model = model
    with torch.device("meta"):
        native = Phi3Model(text).eval()
    native.load_state_dict(model.language_model.state_dict(), strict=False, assign=True)
    native.embed_tokens = model.get_input_embeddings()
    native.rotary_emb = model.language_model.rotary_emb
    return embedder, native


def calls(case):
    """Functions that give the unit vectors `(n, 3072)` of a case, by contender."""
    embedder, native = load()
    model = embedder[0].model
    features = embedder.preprocess(CASES[case], processing_kwargs={"image": {"num_crops": 4}})

    def limit():
        embeds = native.embed_tokens(features["input_ids"])
        if "pixel_values" in features:
            images = model.get_image_features(features["pixel_values"], features["image_sizes"]).pooler_output
            is_image = features["input_ids"] == model.config.image_token_id
            embeds = embeds.masked_scatter(is_image[..., None], torch.cat(images))
        hidden = native(inputs_embeds=embeds, attention_mask=features["attention_mask"]).last_hidden_state
        return normalize(hidden[:, -1], dim=-1)

    return {"limit": limit, "ours": lambda: embedder(dict(features))["sentence_embedding"]}


@torch.inference_mode()
def measure_seconds(case, rounds):
    return in_turns(calls(case), rounds, case, check_agreement)


def check_agreement(results):
    torch.testing.assert_close(results["ours"], results["limit"], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def measure_peak(case, name):
    call = calls(case)[name]
    call()
    return peak_bytes(call)


def run(quick):
    rounds = {"8 texts of up to 66 tokens": 2 if quick else 7, "1 image of 4 crops": 1 if quick else 5}
    return figures_of_cases(CASES, CONTENDERS, measure_seconds, measure_peak, rounds)
