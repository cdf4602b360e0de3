"""
The speed of the model on this machine's GPU, with random weights at full size, in one run of a few minutes.

    python benchmarks/gpu.py [--tiny] [--output TABLE.md]

It needs no network, nothing but requirements.txt, and torch 2.11 or newer; what is not installed (flash-attn, torchao,
bitsandbytes) is said in the table. `--tiny`, the only size for a CPU, has the small checkpoint's widths.
"""

import argparse
import copy
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from language_model import native
from measure import ROOT, table, timed
from quantization import settings_of
from transformers import AutoConfig, AutoModelForImageTextToText

FULL = ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.config.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, NEW_TOKENS, TEXT, VIEWS = 5, 32, 256, 16
ROWS = (1, 4, 16)


def main():
    parser = argparse.ArgumentParser(description="Speed of the model on this machine's GPU.")
    parser.add_argument("--tiny", action="store_true", help="the small checkpoint's widths")
    parser.add_argument("--output", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        sys.exit("gpu.py: torch finds no GPU. Take --tiny to try the script on a CPU.")
    page = markdown(measure(arguments.tiny))
    print(page)
    if arguments.output:
        arguments.output.write_text(page)


def measure(tiny):
    """Rows of what was measured: its name, and its figure or why there is none."""
    rows = []

    def add(name, function, *given, **settings):
        started = time.perf_counter()
        try:
            rows.append((name, function(*given, **settings)))
        except Exception as error:  # the table says of each line why it is missing, and the others go on
            rows.append((name, f"not run: {type(error).__name__}: {str(error).strip().splitlines()[0]:.120}"))
        print(f"{rows[-1]}, {time.perf_counter() - started:.0f} s", file=sys.stderr)

    with torch.inference_mode():
        ours = load(tiny)
        limit, views = native(ours), 2 if tiny else VIEWS
        for attention in ("sdpa", "flash_attention_2"):
            add(f"images by their global view, {attention}", encode, ours, views, attention)
        add("limit: the tower's layers alone", encode_limit, ours, views)
        ours.set_attn_implementation("sdpa")
        add(f"prefill of {TEXT} tokens", prefill, ours)
        add("limit: transformers' Phi-3", prefill, limit)
        for count in ROWS:
            add(f"generate, rows: {count}", decode, ours, count)
            add(f"limit: transformers' Phi-3, rows: {count}", decode, limit, count)
        # With a static cache `generate` compiles the decoding step on a GPU.
        add("generate, rows: 1, static cache, compiled", decode, ours, 1, cache_implementation="static")
        add("generate, rows: 1, offloaded cache", decode_offloaded, ours)
        add("weights in bfloat16", footprint, ours)
        for name in ("torchao int8 weight-only", "bitsandbytes int8", "bitsandbytes nf4"):
            add(f"generate, rows: 1, {name}", decode_quantised, ours, name)
    return rows


def load(tiny):
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    if not tiny:
        config = type(config).from_dict(json.loads(FULL.read_text()))
        config.image_token_id = 32044
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    return model.eval()


def seconds(call):
    """Median of some rounds, after two that set up and compile."""

    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return median([timed(finished)[0] for _ in range(ROUNDS + 2)][2:])


def pixels(views):
    return torch.randn(views, 3, 336, 336, dtype=torch.bfloat16, device=DEVICE)


def encode(model, views, attention):
    model.set_attn_implementation(attention)
    given, sizes = pixels(views), torch.zeros(views, 2, dtype=torch.long, device=DEVICE)
    return f"{views / seconds(lambda: model.get_image_features(given, sizes)):.1f} images a second"


def encode_limit(model, views):
    tower, given = model.model.vision_embed_tokens.img_processor, pixels(views)
    return f"{views / seconds(lambda: tower(given)):.1f} images a second"


def ids(rows):
    return torch.arange(TEXT, device=DEVICE).remainder(30).add(9).expand(rows, -1)


def prefill(model):
    given = ids(1)
    return f"{TEXT / seconds(lambda: model(given, use_cache=True, logits_to_keep=1)):.0f} tokens a second"


def decode(model, rows, **settings):
    """Tokens a second, the prefill of 256 tokens counted."""
    given = ids(rows)
    settings |= {"attention_mask": torch.ones_like(given), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"max_new_tokens": NEW_TOKENS}
    return f"{rows * NEW_TOKENS / seconds(lambda: model.generate(given, **settings)):.1f} tokens a second"


def decode_offloaded(model):
    """With the keys and values of all layers but one in the CPU's memory."""
    inputs = {"inputs": ids(1), "attention_mask": torch.ones_like(ids(1)), "do_sample": False, "max_new_tokens": 8}
    kept, offloaded = (model.generate(**inputs, cache_implementation=kind) for kind in ("dynamic", "offloaded"))
    said = "the same tokens" if torch.equal(kept, offloaded) else "OTHER TOKENS"
    return f"{decode(model, 1, cache_implementation='offloaded')}, {said}"


def decode_quantised(ours, name):
    state, config = {name: weight.cpu() for name, weight in ours.state_dict().items()}, copy.deepcopy(ours.config)
    settings = settings_of(name, bnb_4bit_compute_dtype=torch.bfloat16) | {"device_map": DEVICE}
    model = type(ours).from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16, **settings)
    return f"{decode(model.eval(), 1)}, {footprint(model)}"


def footprint(model):
    return f"{model.get_memory_footprint() / 2**20:.0f} MiB"


def markdown(rows):
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    about = f"{card}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"`benchmarks/gpu.py` on {about}. Medians of {ROUNDS} rounds, bfloat16, random weights.", ""]
    return "\n".join([*lines, *table(["", ""], rows), ""])


if __name__ == "__main__":
    main()
