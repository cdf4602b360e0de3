"""
The whole model, with random weights, beside `limit`: transformers' own Phi-3 on the same weights, fed with ready
embeddings. Images are encoded beforehand, but where their encoding is what is measured.
"""

import copy

import torch
from measure import ROOT, figures, fresh, in_turns, peak_bytes
from transformers import AutoConfig, AutoModelForImageTextToText, Phi3ForCausalLM

NEW_TOKENS, TEXT = 16, 64
DECODE = f"generate {NEW_TOKENS} tokens"
WORK = [("prefill", 1), ("embedding of a text", 1), *((DECODE, rows) for rows in (1, 4, 16))]
WIDE_WORK = WORK[:3]  # on a CPU more rows take minutes a round
FULL_WIDTH = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "num_hidden_layers": 4,
}
GEOMETRIES = {"the small checkpoint": {}, "4 layers of full width": FULL_WIDTH}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(geometry, dtype):
    """Ours with the small checkpoint's narrow tower, and transformers' Phi-3, which has the same weights."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    if GEOMETRIES[geometry]:
        text_config = config.text_config.to_dict() | GEOMETRIES[geometry]
        settings = config.to_dict() | {"text_config": text_config, "hidden_size": None, "vocab_size": None}
        config = type(config).from_dict(settings)
    ours = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, dtype=DTYPES[dtype]).eval()
    return ours, native(ours)


def native(ours):
    """transformers' Phi-3 around the layers of ours."""
    with torch.device("meta"):
        limit = Phi3ForCausalLM(copy.deepcopy(ours.config.text_config)).eval()
    for name in ("layers", "norm", "rotary_emb"):
        setattr(limit.model, name, getattr(ours.model.language_model, name))
    limit.model.embed_tokens, limit.lm_head = ours.get_input_embeddings(), ours.lm_head
    return limit


def prompt(model, rows):
    """So many texts of 64 tokens behind an image of its global view alone, and what stands in place of the pixels."""
    pixels = torch.randn(rows, 3, 336, 336, dtype=model.dtype, device=model.device)
    encoded = model.get_image_features(pixels, torch.zeros(rows, 2).long())
    text = torch.arange(TEXT, device=model.device) % 30 + 9
    image = text.new_full((len(encoded.pooler_output[0]),), model.config.image_token_id)
    return torch.cat((image, text)).expand(rows, -1), {"image": encoded}


def calls(work, ours, limit, rows=1):
    """{contender: a function without arguments that does the work and gives what must agree}."""
    ids, encoded = prompt(ours, rows)
    embeds = ours.model.vision_embed_tokens.merge(encoded["image"].pooler_output, ids)
    mask = torch.ones_like(ids)
    if work == "prefill":
        settings = {"attention_mask": mask, "use_cache": True, "logits_to_keep": 1}
        return {
            "limit": lambda: limit(inputs_embeds=embeds, **settings).logits,
            "ours": lambda: ours(ids, mm_encoder_outputs=encoded, **settings).logits,
        }
    if work == "embedding of a text":
        text = ids[:, -TEXT:]
        return {
            "limit": lambda: limit.model(text, use_cache=False).last_hidden_state[:, -1],
            "ours": lambda: ours.model(text, use_cache=False).last_hidden_state[:, -1],
        }
    greedy = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    greedy |= {"suppress_tokens": [ours.config.image_token_id], "eos_token_id": None, "pad_token_id": 0}
    return {
        "limit": lambda: limit.generate(inputs_embeds=embeds, **greedy),
        "ours": lambda: ours.generate(ids, mm_encoder_outputs=encoded, **greedy)[:, ids.shape[1] :],
    }


@torch.inference_mode()
def measure_seconds(geometry, dtype, rounds):
    """{(work, rows): the seconds of each contender}, all in one process."""
    both, seconds = load(geometry, dtype), {}
    for work, rows in WIDE_WORK if GEOMETRIES[geometry] else WORK:
        title = f"{geometry}, {dtype}: {work}, rows: {rows}"
        seconds[work, rows] = in_turns(calls(work, *both, rows), rounds, title, check_agreement)
    return seconds


def check_agreement(results):
    torch.testing.assert_close(results["ours"], results["limit"], atol=1e-3, rtol=2e-2)


@torch.inference_mode()
def measure_peak(geometry, dtype, name):
    call = calls("prefill", *load(geometry, dtype))[name]
    call()
    return peak_bytes(call)


@torch.inference_mode()
def measure_encoding(rounds):
    """Seconds of encoding two images once, and of generating about them, and the views that went through the tower."""
    ours, _ = load("the small checkpoint", "float32")
    sizes = torch.tensor([[336, 336], [336, 672]])
    pixels = torch.randn(2 + 3, 3, 336, 336)
    tokens = ours.get_image_features(pixels, sizes).pooler_output
    rows = [torch.tensor([*[ours.config.image_token_id] * len(image), 9, 10, 11]) for image in tokens]
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=3) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 3).long(), "pixel_values": pixels, "image_sizes": sizes}
    views = []
    ours.model.vision_embed_tokens.img_processor.register_forward_pre_hook(lambda _, args: views.append(len(args[0])))
    answer = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3, "do_sample": False}
    contenders = {
        "limit": lambda: ours.get_image_features(pixels, sizes),
        "generate, 1 beam": lambda: ours.generate(**inputs, **answer),
        "generate, 4 beams": lambda: ours.generate(**inputs, **answer, num_beams=4),
    }
    counted = {}
    for name, call in contenders.items():
        views.clear()
        call()
        counted[name] = list(views)
    return in_turns(contenders, rounds, "encoding"), counted


def run(quick):
    rounds, cases = 1 if quick else 4, {}
    for geometry in ("the small checkpoint",) if quick else GEOMETRIES:
        for dtype in DTYPES:
            peaks = {name: fresh(measure_peak, geometry, dtype, name) for name in ("limit", "ours")}
            for (work, rows), seconds in fresh(measure_seconds, geometry, dtype, rounds).items():
                measured = figures(seconds, peaks if work == "prefill" else {})
                if work == DECODE:
                    speed = {name: rows * NEW_TOKENS / figure["seconds"] for name, figure in measured.items()}
                    measured = {f"{name}: {speed[name]:.0f} tokens a second": measured[name] for name in measured}
                cases[f"{work}, {geometry}, {dtype}, rows: {rows}"] = measured
    seconds, counted = fresh(measure_encoding, rounds)
    cases["2 images of 5 views, one a twin, encoded for a generate call"] = {
        f"{name}: runs of the tower over {counted[name]} views": figure
        for name, figure in figures(seconds, {}).items()
    }
    return cases
