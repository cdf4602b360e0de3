"""
One image of one crop at full size, with the golden data's rule-made weights, in lower precision.

`limit` is float32. The name of a contender says the mean cosine of its tokens to those of the golden image, and the
resident memory that it takes with its weights loaded and used once. Contenders live in processes of their own,
and take turns.
"""

import ctypes
import gc
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import ROOT, figures, interleaved_seconds, status, timed
from tqdm import tqdm

sys.path[:0] = [str(ROOT / "tests")]

CASE = "1 image of one crop, quantised"
CONTENDERS = (
    "limit",
    "bfloat16",
    "torchao int8 weight-only",
    "torch.ao int8 dynamic",
    "torch.ao int8 dynamic, MLP alone",
    "torchao int8 dynamic",
    "bitsandbytes int8",
    "bitsandbytes nf4",
)
# They belong to a contender's process.
model = inputs = None


def save_model(folder):
    import conftest  # noqa: F401
    from phi3_embed.configuration_phi3_embed import Phi3EmbedConfig
    from test_golden import build

    build(Phi3EmbedConfig()).save_pretrained(folder)


def load(name, folder):
    """Loads a contender -> its mean cosine to golden tokens, and the resident bytes of its weights."""
    global model, inputs
    import conftest  # noqa: F401
    import golden
    from test_golden import preprocess

    arrays, note = golden.load("embedding_wide_nc1")
    inputs = preprocess(note)
    before = status("VmRSS")
    model = load_model(name, folder)
    tokens = embed().pooler_output[0][arrays["token_index"]].float()
    cosine = torch.cosine_similarity(tokens, torch.from_numpy(arrays["tokens"]), dim=-1).mean().item()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return cosine, status("VmRSS") - before


def settings_of(name, **more):
    """The arguments of `from_pretrained` that quantise by the library and in the way of this name."""
    if name.startswith("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        weight_only, dynamic = Int8WeightOnlyConfig(granularity=PerGroup(64)), Int8DynamicActivationInt8WeightConfig()
        return {"quantization_config": TorchAoConfig(dynamic if "dynamic" in name else weight_only)}
    if name.startswith("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | more
        config = BitsAndBytesConfig(**(four if "nf4" in name else {"load_in_8bit": True}))
        return {"quantization_config": config, "device_map": "cpu"}
    return {}


def load_model(name, folder):
    from transformers import AutoModel

    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **settings_of(name)).eval()
    if name.startswith("torch.ao"):
        for layer in loaded.vision_embed_tokens.img_processor.encoder.layers:
            part = layer.mlp if "MLP" in name else layer
            torch.ao.quantization.quantize_dynamic(part, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return loaded


@torch.inference_mode()
def embed():
    return model.get_image_features(inputs["pixel_values"].to(model.dtype), inputs["image_sizes"])


def measure():
    return timed(embed)[0]


def run(quick):
    quantizers = ROOT / ".venv" / "quantizers"
    if not quantizers.exists():
        sys.exit(f"quantization: there is no {quantizers}. Run `make .venv/quantizers` first.")
    sys.path.append(str(quantizers))  # which processes take over
    pools = {name: ProcessPoolExecutor(1, mp_context=get_context("spawn")) for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        pools["limit"].submit(save_model, Path(folder)).result()
        loaded = {}
        for name in tqdm(CONTENDERS, desc="Loading"):
            loaded[name] = pools[name].submit(load, name, folder).result()
            tqdm.write(f"{name}: {loaded[name]}")
    calls = {name: lambda pool=pool: (pool.submit(measure).result(), None) for name, pool in pools.items()}
    seconds = interleaved_seconds(calls, 1 if quick else 2, CASE)
    for pool in pools.values():
        pool.shutdown()
    measured = figures(seconds, {})
    return {
        CASE: {
            f"{name}: cosine {loaded[name][0]:.5f}, {loaded[name][1] / 2**20:.0f} MiB": figure
            for name, figure in measured.items()
        }
    }
