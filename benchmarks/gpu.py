"""
The speed of the model on this machine's GPU, with random weights at full size, in one run of a few minutes.

    python benchmarks/gpu.py [--tiny] [--output TABLE.md]

It needs no network, nothing but requirements.txt, and torch 2.11 or newer; what is not installed (flash-attn, torchao,
bitsandbytes) is said in the table. `--tiny`, the only size for a CPU, has the small checkpoint's widths.
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, Phi3ForCausalLM  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
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
    table = markdown(measure(arguments.tiny))
    print(table)
    if arguments.output:
        arguments.output.write_text(table)


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
        add("weights in bfloat16", footprint, ours)
        for name, settings in QUANTISED.items():
            add(f"generate, rows: 1, {name}", decode_quantised, ours, settings)
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


def native(ours):
    """transformers' own Phi-3, with the weights of ours."""
    with torch.device("meta"):
        limit = Phi3ForCausalLM(copy.deepcopy(ours.config.text_config)).eval()
    for name in ("layers", "norm", "rotary_emb"):
        setattr(limit.model, name, getattr(ours.model.language_model, name))
    limit.model.embed_tokens, limit.lm_head = ours.get_input_embeddings(), ours.lm_head
    return limit


def seconds(call):
    """Median of some rounds, after two that set up and compile."""
    taken = []
    for _ in range(ROUNDS + 2):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[2:])


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


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


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**settings):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
QUANTISED = {
    "int8 by torchao": torchao,
    "int8 by bitsandbytes": lambda: bitsandbytes(load_in_8bit=True),
    "nf4 by bitsandbytes": lambda: bitsandbytes(**NF4),
}


def decode_quantised(ours, settings):
    state, config = {name: weight.cpu() for name, weight in ours.state_dict().items()}, copy.deepcopy(ours.config)
    model = type(ours).from_pretrained(
        None, config=config, state_dict=state, quantization_config=settings(), device_map=DEVICE, dtype=torch.bfloat16
    )
    return f"{decode(model.eval(), 1)}, {footprint(model)}"


def footprint(model):
    return f"{model.get_memory_footprint() / 2**20:.0f} MiB"


def markdown(rows):
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    about = f"{card}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"`benchmarks/gpu.py` on {about}. Medians of {ROUNDS} rounds, bfloat16, random weights.", ""]
    lines += ["| | |", "|---|---:|", *(f"| {name} | {figure} |" for name, figure in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
