"""Loading, placing and saving: by the Auto classes in fresh processes, from folder, subfolder and cache, offloaded."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map, load_checkpoint_and_dispatch
from conftest import ROOT, copy_checkpoint, run_python, save_checkpoint, small_config, small_model, small_pixels
from phi3_embed.modeling_phi3_embed import AUTO_MAP, Phi3EmbedModel
from safetensors.torch import load_file

MODULES = ("checks_phi3_embed.py", "configuration_phi3_embed.py", "modeling_phi3_embed.py", "processing_phi3_embed.py")

EMBED = """
import json, sys
import numpy as np
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

name, options = sys.argv[1], json.loads(sys.argv[2]) | {"trust_remote_code": True}
config = AutoConfig.from_pretrained(name, **options)
model = AutoModel.from_pretrained(name, device_map="auto", **options)
assert type(model.config) is model.config_class
image = np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3)
inputs = AutoImageProcessor.from_pretrained(name, **options)(image, return_tensors="pt")
print(json.dumps(model(**inputs).pooler_output.tolist()))
inputs = AutoProcessor.from_pretrained(name, **options)(images=image, text="a <|image_1|>", return_tensors="pt")
print(json.dumps(model(**inputs).last_hidden_state.sum(-1).tolist()))
assert AutoTokenizer.from_pretrained(name, **options).convert_tokens_to_ids("<|image|>") == config.image_token_id
assert not [module for module in sys.modules if module.partition(".")[0] == "torchvision"]
"""


def subfolder_layout(path, tokenizer):
    save_checkpoint(path / "small", tokenizer)
    for module in MODULES:
        (path / "small" / module).rename(path / module)
    return path, {"subfolder": "small"}


def cache_layout(path, tokenizer):
    repo, commit = path / "hub" / "models--someone--phi3-embed", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    save_checkpoint(repo / "snapshots" / commit, tokenizer)
    return "someone/phi3-embed", {"revision": commit}


@pytest.mark.parametrize("layout", [subfolder_layout, cache_layout])
def test_auto_classes_load_alike_in_fresh_processes_offline(layout, tmp_path, tokenizer, repository):
    name, options = layout(tmp_path, tokenizer)
    assert run_python(EMBED, name, json.dumps(options), HF_HOME=str(tmp_path)) == run_python(EMBED, repository, "{}")


def test_a_saved_folder_carries_its_code_also_when_loaded_code_saves_it(repository, tmp_path):
    code = """
import sys
from pathlib import Path
from transformers import AutoModel, AutoProcessor
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
"""
    run_python(code, repository, tmp_path / "second")
    for module in MODULES:
        assert (tmp_path / "second" / module).read_bytes() == (ROOT / module).read_bytes()
    auto_map = json.loads((tmp_path / "second" / "config.json").read_text())["auto_map"]
    assert auto_map == AUTO_MAP
    again, weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "second", Path(repository)))
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_whole_and_embedding_of_one_code_and_name_load_each_as_what_they_are(embedding_checkpoint, tmp_path):
    whole = copy_checkpoint(tmp_path / Path(embedding_checkpoint).name)
    code = """
import sys
from pathlib import Path
from transformers import AutoModel
for name in sys.argv[1:]:
    print(type(AutoModel.from_pretrained(name, trust_remote_code=True)).__name__)
"""
    names = whole, embedding_checkpoint, whole
    assert run_python(code, *names).split() == ["Phi3VisionModel", "Phi3EmbedModel", "Phi3VisionModel"]


def test_the_modules_import_nothing_beyond_what_loading_needs():
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                assert top in {"torch", "transformers", "numpy", "PIL"} | sys.stdlib_module_names, f"{module}: {name}"


@pytest.mark.parametrize("subfolder", ["", "small"])
def test_a_git_lfs_pointer_in_place_of_the_weights_is_told(subfolder, tmp_path):
    small_model().save_pretrained(tmp_path / subfolder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / subfolder / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="model.safetensors is a Git LFS pointer .* Run `git lfs pull`"):
        Phi3EmbedModel.from_pretrained(tmp_path, subfolder=subfolder)


# Placing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    small_model().save_pretrained(path)
    return path


IMAGES = small_pixels((1, 2), (1, 1))
TEXT = torch.tensor([[1, *[-1] * 17, 7, *[-2] * 13]])


def every_public_entry(model):
    """What each public entry gives, each called on its own."""
    embedding = model.vision_embed_tokens
    features = model.get_image_features(**IMAGES)
    return [
        model(TEXT, **IMAGES).last_hidden_state,
        model(**IMAGES).pooler_output,
        model(TEXT[:, :1]).last_hidden_state,
        features.image_embeds,
        *features.pooler_output,
        embedding.get_img_features(IMAGES["pixel_values"]),
        model.get_input_embeddings()(TEXT[:, :1]),
    ]


PLACEMENTS = {
    "auto": lambda path, folder: Phi3EmbedModel.from_pretrained(path, device_map="auto"),
    "cpu": lambda path, folder: Phi3EmbedModel.from_pretrained(path, device_map="cpu"),
    "sequential": lambda path, folder: Phi3EmbedModel.from_pretrained(path, device_map="sequential"),
    "max_memory": lambda path, folder: Phi3EmbedModel.from_pretrained(
        path, device_map="auto", max_memory={"cpu": 120_000}, offload_folder=folder
    ),
    "disk": lambda path, folder: Phi3EmbedModel.from_pretrained(path, device_map={"": "disk"}, offload_folder=folder),
    "cpu_offload": lambda path, folder: cpu_offload(Phi3EmbedModel.from_pretrained(path), torch.device("cpu")),
    "disk_offload": lambda path, folder: disk_offload(
        Phi3EmbedModel.from_pretrained(path), folder, torch.device("cpu")
    ),
    "load_checkpoint_and_dispatch": lambda path, folder: load_checkpoint_and_dispatch(
        Phi3EmbedModel(small_config()).eval(), str(path / "model.safetensors"), device_map="auto"
    ),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_public_entry_works_wherever_the_weights_are(placement, checkpoint, tmp_path):
    with torch.no_grad():
        wanted = every_public_entry(small_model())
        model = PLACEMENTS[placement](checkpoint, str(tmp_path))
        given = every_public_entry(model)
    for left, right in zip(given, wanted):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)
    if placement in ("disk", "disk_offload"):
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
    if placement == "max_memory":
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}


def test_a_model_on_disk_is_saved_whole(checkpoint, tmp_path):
    model = Phi3EmbedModel.from_pretrained(checkpoint, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    model.save_pretrained(tmp_path / "saved")
    saved, wanted = load_file(tmp_path / "saved" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_device_maps_split_the_tower_but_neither_its_layers_nor_the_projector():
    with torch.device("meta"):
        model = Phi3EmbedModel(small_config())
    for limit in range(60_000, 180_000, 20_000):
        memory = {"cpu": limit, "disk": 10**9}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        parts = [
            name for name in device_map if name.startswith(("vision_embed_tokens.projector.",)) or ".layers.0." in name
        ]
        assert not parts, device_map
    assert model._no_split_modules == {"CLIPEncoderLayer", "CLIPVisionEmbeddings", "Phi3EmbedProjector"}


def test_sharded_checkpoints_round_trip(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = Phi3EmbedModel.from_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_round_trip(dtype, tmp_path):
    model = small_model().to(dtype)
    model.save_pretrained(tmp_path)
    again = Phi3EmbedModel.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert all(torch.equal(*pair) for pair in zip(again.state_dict().values(), model.state_dict().values()))
