"""
Loading by the `quantization_config` of torchao and of bitsandbytes, which are in a folder of their own: they print at
imports of transformers and peft.
"""

import json
import re

import torch
from conftest import ROOT, run_python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

QUANTIZERS = ROOT / ".venv" / "quantizers"
# Prints by kind the least cosine of the images' vectors, how far those of the saved model lie from them, and how many
# layers are quantised, and of how many.
CODE = """
import json, sys, torch
from PIL import Image
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup
from transformers import AutoImageProcessor, AutoModel, TorchAoConfig
source, folder = sys.argv[1:]
kinds = {
    "weight-only": Int8WeightOnlyConfig(granularity=PerGroup(64)),
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
}
where = {"trust_remote_code": True}
images = [Image.linear_gradient("L"), Image.radial_gradient("L").resize((400, 200))]
inputs = AutoImageProcessor.from_pretrained(source, num_crops=1, **where)(images, return_tensors="pt")
with torch.inference_mode():
    wanted = AutoModel.from_pretrained(source, **where)(**inputs).pooler_output
    for kind, config in kinds.items():
        model = AutoModel.from_pretrained(source, quantization_config=TorchAoConfig(config), **where)
        given = model(**inputs).pooler_output
        model.save_pretrained(f"{folder}/{kind}")
        again = AutoModel.from_pretrained(f"{folder}/{kind}", **where)(**inputs).pooler_output
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        quantised = sum(type(layer.weight).__name__ == "Int8Tensor" for layer in layers)
        cosine = torch.cosine_similarity(given, wanted).min().item()
        print(json.dumps([kind, cosine, (again - given).abs().max().item(), quantised, len(layers)]))
"""


def test_int8_loads_by_quantization_config_and_is_saved_so(tmp_path):
    printed = run_python(CODE, ROOT, tmp_path, PYTHONPATH=str(QUANTIZERS)).splitlines()[-2:]
    least = {"weight-only": 0.9995, "dynamic": 0.99}
    for kind, cosine, moved, quantised, layers in map(json.loads, printed):
        assert least.pop(kind) < cosine < 1  # not 1: it is quantised
        assert moved == 0 and quantised == layers > 10
    assert not least


BITSANDBYTES = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BitsAndBytesConfig
source, folder = sys.argv[1:]
kinds = {
    "Linear8bitLt": {"load_in_8bit": True},
    "Linear4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
where = {"trust_remote_code": True}
images = [Image.radial_gradient("L")]
inputs = AutoImageProcessor.from_pretrained(source, num_crops=1, **where)(images, return_tensors="pt")
with torch.inference_mode():
    wanted = AutoModel.from_pretrained(source, **where)(**inputs).pooler_output
    for layer, settings in kinds.items():
        quantised = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": "cpu"}
        model = AutoModel.from_pretrained(source, **quantised, **where)
        # Before its first use, at which bitsandbytes packs 4-bit weights for CPUs.
        model.save_pretrained(f"{folder}/{layer}")
        given = model(**inputs).pooler_output
        again = AutoModel.from_pretrained(f"{folder}/{layer}", device_map="cpu", **where)(**inputs).pooler_output
        count = sum(type(module).__name__ == layer for module in model.modules())
        cosine = torch.cosine_similarity(given.float(), wanted).item()
        print(json.dumps([layer, cosine, (again - given).abs().max().item(), count]))
"""


def test_bitsandbytes_loads_and_is_saved_so(tmp_path):
    printed = run_python(BITSANDBYTES, ROOT, tmp_path, PYTHONPATH=str(QUANTIZERS)).splitlines()[-2:]
    least = {"Linear8bitLt": 0.9995, "Linear4bit": 0.99}
    for layer, cosine, moved, count in map(json.loads, printed):
        assert least.pop(layer) < cosine < 1 and moved < 1e-5 and count > 10
    assert not least


# Prints by kind the least cosine of a prompt's logits to those in float32, and whether the answer is the same.
WHOLE = """
import json, sys, torch
from PIL import Image
from torchao.quantization import Int8WeightOnlyConfig, PerGroup
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig
where = {"pretrained_model_name_or_path": sys.argv[1], "trust_remote_code": True}
kinds = {
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(64))),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
content = [{"type": "image", "image": Image.linear_gradient("L")}, {"type": "text", "text": "what digit is this ?"}]
inputs = AutoProcessor.from_pretrained(**where).apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt", processor_kwargs={"num_crops": 0},
)
model = AutoModelForImageTextToText.from_pretrained(**where)
found = {}
with torch.inference_mode():
    wanted, answer = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4).tolist()
    for kind, config in kinds.items():
        model = AutoModelForImageTextToText.from_pretrained(quantization_config=config, device_map="cpu", **where)
        cosine = torch.cosine_similarity(model(**inputs).logits.float(), wanted, dim=-1).min().item()
        found[kind] = cosine, model.generate(**inputs, max_new_tokens=4).tolist() == answer
print(json.dumps(found))
"""


def test_the_whole_model_answers_the_same_in_int8_and_nf4():
    found = json.loads(run_python(WHOLE, ROOT, PYTHONPATH=str(QUANTIZERS)).splitlines()[-1])
    for kind, least in (("torchao int8", 0.9998), ("bitsandbytes int8", 0.9998), ("bitsandbytes nf4", 0.98)):
        cosine, same = found[kind]
        assert least < cosine < 1 and same, found


def test_the_pages_snippet_runs_as_printed():
    (snippet,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "quantise.md").read_text(), re.DOTALL)
    count = "print(sum(type(weight).__name__ == 'Int8Tensor' for weight in model.state_dict().values()))"
    assert int(run_python(snippet + count, PYTHONPATH=str(QUANTIZERS)).split()[-1]) > 10


@torch.inference_mode()
def test_torchs_own_dynamic_int8_over_the_mlps():
    where = {"pretrained_model_name_or_path": ROOT, "trust_remote_code": True}
    inputs = AutoImageProcessor.from_pretrained(**where)(
        [Image.linear_gradient("L")], num_crops=1, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(**where).eval()
    wanted = model(**inputs).pooler_output
    for layer in model.vision_embed_tokens.img_processor.encoder.layers:
        torch.ao.quantization.quantize_dynamic(layer.mlp, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    assert 0.99 < torch.cosine_similarity(model(**inputs).pooler_output, wanted).item() < 1
