"""
Loading by the `quantization_config` of torchao and of bitsandbytes, which are in a folder of their own: they print at
imports of transformers and peft.
"""

import json
import re

import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

QUANTIZERS = ROOT / ".venv" / "quantizers"
# Prints the cosines of each image's vector, and how many layers are quantised, as loaded and after saving again.
CODE = """
import sys, torch
from PIL import Image
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup
from transformers import AutoImageProcessor, AutoModel, TorchAoConfig
source, kind, folder = sys.argv[1:]
kinds = {
    "weight-only": Int8WeightOnlyConfig(granularity=PerGroup(64)),
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
}
where = {"trust_remote_code": True}
images = [Image.linear_gradient("L"), Image.radial_gradient("L").resize((400, 200))]
inputs = AutoImageProcessor.from_pretrained(source, num_crops=1, **where)(images, return_tensors="pt")
with torch.inference_mode():
    wanted = AutoModel.from_pretrained(source, **where)(**inputs).pooler_output
    model = AutoModel.from_pretrained(source, quantization_config=TorchAoConfig(kinds[kind]), **where)
    given = model(**inputs).pooler_output
    model.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder, **where)(**inputs).pooler_output
layers = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
quantised = sum(type(layer.weight).__name__ == "Int8Tensor" for layer in layers)
print(torch.cosine_similarity(given, wanted).min().item(), (again - given).abs().max().item(), quantised, len(layers))
"""


@pytest.mark.parametrize(("kind", "cosine"), [("weight-only", 0.9995), ("dynamic", 0.99)])
def test_int8_loads_by_quantization_config_and_is_saved_so(kind, cosine, tmp_path):
    given = run_python(CODE, ROOT, kind, tmp_path / "int8", PYTHONPATH=str(QUANTIZERS)).split()[-4:]
    assert cosine < float(given[0]) < 1  # not 1: it is quantised
    assert float(given[1]) == 0
    assert int(given[2]) == int(given[3]) > 10


BITSANDBYTES = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BitsAndBytesConfig
source, settings, layer, folder = sys.argv[1:]
where = {"trust_remote_code": True}
images = [Image.radial_gradient("L")]
inputs = AutoImageProcessor.from_pretrained(source, num_crops=1, **where)(images, return_tensors="pt")
quantised = {"quantization_config": BitsAndBytesConfig(**json.loads(settings)), "device_map": "cpu"}
with torch.inference_mode():
    wanted = AutoModel.from_pretrained(source, **where)(**inputs).pooler_output
    model = AutoModel.from_pretrained(source, **quantised, **where)
    model.save_pretrained(folder)  # before its first use, at which bitsandbytes packs 4-bit weights for CPUs
    given = model(**inputs).pooler_output
    again = AutoModel.from_pretrained(folder, device_map="cpu", **where)(**inputs).pooler_output
count = sum(type(module).__name__ == layer for module in model.modules())
print(torch.cosine_similarity(given.float(), wanted).item(), (again - given).abs().max().item(), count)
"""


@pytest.mark.parametrize(
    ("settings", "layer", "cosine"),
    [
        ({"load_in_8bit": True}, "Linear8bitLt", 0.9995),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "Linear4bit", 0.99),
    ],
)
def test_bitsandbytes_loads_and_is_saved_so(settings, layer, cosine, tmp_path):
    arguments = ROOT, json.dumps(settings), layer, tmp_path / "saved"
    given = run_python(BITSANDBYTES, *arguments, PYTHONPATH=str(QUANTIZERS)).split()[-3:]
    assert cosine < float(given[0]) < 1 and float(given[1]) < 1e-5 and int(given[2]) > 10


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
