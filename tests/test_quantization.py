"""
Loading by the `quantization_config` of torchao and of bitsandbytes. torchao is in a folder of its own: it prints at
transformers' import.
"""

import re

import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BitsAndBytesConfig

TORCHAO = ROOT / ".venv" / "torchao"
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
    given = run_python(CODE, ROOT / "tiny", kind, tmp_path / "int8", PYTHONPATH=str(TORCHAO)).split()[-4:]
    assert cosine < float(given[0]) < 1  # not 1: it is quantised
    assert float(given[1]) == 0
    assert int(given[2]) == int(given[3]) > 10


@pytest.mark.parametrize(
    ("settings", "layer", "cosine"),
    [
        ({"load_in_8bit": True}, "Linear8bitLt", 0.9995),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "Linear4bit", 0.99),
    ],
)
@torch.inference_mode()
def test_bitsandbytes_loads_and_is_saved_so(settings, layer, cosine, tmp_path):
    where = {"pretrained_model_name_or_path": ROOT / "tiny", "trust_remote_code": True}
    image = [Image.radial_gradient("L")]
    inputs = AutoImageProcessor.from_pretrained(**where)(image, num_crops=1, return_tensors="pt")
    wanted = AutoModel.from_pretrained(**where)(**inputs).pooler_output
    model = AutoModel.from_pretrained(**where, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu")
    model.save_pretrained(tmp_path)  # before its first use, at which bitsandbytes packs 4-bit weights for CPUs
    given = model(**inputs).pooler_output
    assert cosine < torch.cosine_similarity(given.float(), wanted).item() < 1
    assert sum(type(module).__name__ == layer for module in model.modules()) > 10
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, device_map="cpu")
    torch.testing.assert_close(again(**inputs).pooler_output, given)


def test_the_readmes_snippet_runs_as_printed():
    (snippet,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = f"import os\nos.chdir({str(ROOT)!r})\n{snippet}"
    count = "print(sum(type(each).__name__ == 'Int8Tensor' for each in model.state_dict().values()))"
    assert int(run_python(code + count, PYTHONPATH=str(TORCHAO)).split()[-1]) > 10


@torch.inference_mode()
def test_torchs_own_dynamic_int8_over_the_mlps():
    where = {"pretrained_model_name_or_path": ROOT / "tiny", "trust_remote_code": True}
    inputs = AutoImageProcessor.from_pretrained(**where)(
        [Image.linear_gradient("L")], num_crops=1, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(**where).eval()
    wanted = model(**inputs).pooler_output
    for layer in model.vision_embed_tokens.img_processor.encoder.layers:
        torch.ao.quantization.quantize_dynamic(layer.mlp, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    assert 0.99 < torch.cosine_similarity(model(**inputs).pooler_output, wanted).item() < 1
