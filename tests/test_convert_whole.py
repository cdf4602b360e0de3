"""All of Phi-3-vision: names, bits, adapters, pickles and recipes, in and back."""

import json
import math
import os
import shutil

import golden
import numpy as np
import published
import pytest
import torch
from conftest import run_python
from fresh_process import run_fresh
from published import EMBED_TOKENS, WTE
from test_convert import SCRIPT, TARGETS, assert_same_weights, rewrite, save_adapter, weights_of
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from phi3_tools import cli
from phi3_tools.checkpoint import convert as conversion
from phi3_tools.checkpoint.convert import convert, read_config
from phi3_tools.checkpoint.layout import published_names, select_published
from phi3_tools.checkpoint.put_back import put_back
from phi3_tools.checkpoint.source import open_source, read_entries


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Float32, with several shards."""
    tensors = published.weights(dtype=torch.float32)
    return published.save(tmp_path_factory.mktemp("published") / "source", tensors, max_shard_size="9MB")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "model"
    convert(str(source), output, whole=True, recipe="vlm2vec")
    return output


# The result


def test_a_whole_checkpoint_gives_what_the_original_gave(source, converted):
    assert_same_weights(converted, published.weights(dtype=torch.float32))
    arrays, note = golden.load("lm_small")
    case = golden.case(arrays, "images")
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    images = [golden.image(**image) for image in note["cases"]["images"]["images"]]
    pixels = processor.image_processor(images, num_crops=4, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=True)
    with torch.inference_mode():
        outputs = model(input_ids=torch.from_numpy(case["input_ids"]), output_hidden_states=True, **pixels)
    rows, columns = case["at"].T
    np.testing.assert_allclose(outputs.hidden_states[-1].numpy()[rows, columns], case["hidden"], atol=4e-5, rtol=0)
    rows, columns = case["logits_at"].T
    np.testing.assert_allclose(outputs.logits.numpy()[rows, columns][:, :512], case["logits"], atol=1.5e-4, rtol=0)


LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel, AutoProcessor
from PIL import Image

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.linear_gradient("L")}, {"type": "text", "text": "what is this"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"num_crops": 0},
)
new = []
for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    new.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
vector = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)(**pixels).pooler_output
print(json.dumps([new, str(model.dtype), processor.tokenizer.padding_side, list(vector.shape)]))
"""


def test_one_command_makes_a_model_that_a_fresh_process_generates_with(tmp_path):
    folder = published.save(tmp_path / "my source")
    cli.main(["convert", str(folder), str(tmp_path / "output"), "--whole"])
    output = tmp_path / "output"
    new, dtype, side, shape = json.loads(run_python(LOAD, output, HF_HOME=str(tmp_path / "cache")).splitlines()[-1])
    assert new[0] == new[1] and len(new[0]) == 3 and (dtype, side, shape) == ("torch.bfloat16", "left", [1, 96])
    generation = GenerationConfig.from_pretrained(output)
    assert generation.eos_token_id == [2, 32000, 32007] and generation.suppress_tokens == [32044]
    assert (generation.pad_token_id, generation.bos_token_id) == (32000, 1)
    text_config = json.loads((output / "config.json").read_text())["text_config"]
    assert text_config["rope_parameters"]["rope_type"] == "longrope" and text_config["sliding_window"] is None
    assert not (output / "modules.json").exists()
    card = (output / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "python convert_phi3_vision.py 'my source' output --whole" in card
    assert "language model's layers" not in card and "## Vectors" not in card


def test_microsofts_own_index_has_a_weight_for_each_of_ours_and_no_other(tmp_path):
    folder = published.save_true_size(tmp_path / "phi3v")
    source = open_source(str(folder), None, folder)
    selected = select_published(read_entries(source), read_config(source, whole=True), "phi3v")
    assert len(selected) == 574 and sum(math.prod(entry.shape) for entry in selected.values()) == 4_134_023_168


# In and back


def test_a_fine_tune_of_the_whole_goes_back(source, converted, tmp_path, capsys):
    tuned = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=True)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    put_back(str(tmp_path / "tuned"), str(source), tmp_path / "back")
    assert "left out" not in capsys.readouterr().out
    before, after, own = (weights_of(folder) for folder in (source, tmp_path / "back", tmp_path / "tuned"))
    ours = {name: tensor for key, tensor in own.items() for name in published_names(key) if name in before}
    assert before.keys() == after.keys() and len(ours) == len(own)
    for name, tensor in after.items():
        assert torch.equal(tensor, ours.get(name, before[name])), name


def test_other_rotary_factors_are_not_put_back(source, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    text_config = json.loads((converted / "config.json").read_text())["text_config"]
    text_config["rms_norm_eps"] = 1e-3
    rewrite("config.json", text_config=text_config)(tmp_path / "model")
    with pytest.raises(ValueError, match="text_config.rms_norm_eps is 0.001, not 1e-05"):
        put_back(str(tmp_path / "model"), str(source), tmp_path / "back")


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_language_model_and_tower_is_merged_as_peft_merges_it(use_dora, tmp_path, capsys):
    folder = published.save(tmp_path / "source")
    merged = save_adapter(tmp_path / "adapter", r=8, target_modules=TARGETS, use_dora=use_dora)
    convert(str(tmp_path / "adapter"), tmp_path / "output", base=str(folder), whole=True)
    assert_same_weights(tmp_path / "output", merged)
    assert "changes 28 of the model's weights. Left out are 0 of its tensors on the lang" in capsys.readouterr().out


def test_a_conversion_killed_while_it_writes_goes_on_with_the_next_file(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD_SIZE", "9MB")
    write_shard, written = conversion._write_shard, []

    def interrupted(path, *arguments):
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, *arguments)

    monkeypatch.setattr(conversion, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "output", whole=True)
    first = list(written)
    written.append("so that none is interrupted any more")
    convert(str(source), tmp_path / "output", whole=True)
    assert not set(first) & set(written[3:]) and len(written) > 3
    assert_same_weights(tmp_path / "output", published.weights(dtype=torch.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_shards_of_something_else_are_not_gone_on_with(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_compute_once", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "output", whole=True)
    monkeypatch.undo()
    convert(str(source), tmp_path / "output", torch.bfloat16, whole=True)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "output").values()} == {torch.bfloat16}


@pytest.mark.hub
def test_a_table_of_words_under_two_names_is_one_if_it_is_the_same(hub, tmp_path):
    """A difference is seen before the weights are fetched; a folder's is among what is wrong with a source."""
    tensors = published.weights()
    same = published.save(tmp_path / "same", tensors | {WTE: tensors[EMBED_TOKENS].clone()})
    convert(str(same), tmp_path / "output", whole=True)
    assert_same_weights(tmp_path / "output", tensors)
    hub.add_repo("someone/two", published.save(tmp_path / "two", tensors | {WTE: tensors[EMBED_TOKENS] + 1}))
    done = run_fresh(SCRIPT, "someone/two", tmp_path / "other", "--whole", env=hub.environment(tmp_path / "home"))
    assert "has two different tables of word embeddings" in done.stderr and "Fetching" not in done.stdout


@pytest.mark.hub
def test_all_that_counts_is_fetched_from_the_hub(hub, source, tmp_path, monkeypatch):
    hub.add_repo("someone/phi3v", source)
    done = run_fresh(SCRIPT, "someone/phi3v", tmp_path / "output", "--whole", env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "output", published.weights(dtype=torch.float32))
    sent = hub.bytes_sent(r"GET /repos/.*model.*\.safetensors")
    own = sum(tensor.nbytes for tensor in weights_of(tmp_path / "output").values())
    assert own < sent < own + 200_000  # the headers


# What is wrong with a source


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"num_hidden_layers": 10**7}, "`num_hidden_layers` is 10000000, but must be 500 at most"),
        ({"num_hidden_layers": None}, "describes no language model"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "config.json: `text_config`"),
        ({"rope_scaling": {"type": "su", "auto_map": {"AutoModel": "someone/other--code.Class"}}}, "config.json"),
    ],
)
def test_a_language_model_that_is_described_wrongly_is_told_in_a_line(settings, said, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    rewrite("config.json", **settings)(tmp_path / "source")
    with pytest.raises(ValueError, match=said) as raised:
        convert(str(tmp_path / "source"), tmp_path / "output", whole=True)
    assert "\n" not in str(raised.value)


def pickled(folder, shards):
    """A repository published as pickles alone."""
    folder.mkdir()
    tensors = published.weights()
    published.save_small_files(folder, published.SMALL_CONFIG, 16)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + (number > 20)}-of-00002.bin" for number, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("whole", [True, False])
def test_pickles_are_read_as_data_on_request_alone(shards, whole, tmp_path):
    folder = pickled(tmp_path / "source", shards)
    with pytest.raises(ValueError, match=r"as pickles \(.bin\) only. If you trust .*, give `--allow-pickle`"):
        convert(str(folder), tmp_path / "output", whole=whole)
    convert(str(folder), tmp_path / "output", whole=whole, allow_pickle=True)
    assert_same_weights(tmp_path / "output", published.weights())


class Act:
    def __reduce__(self):
        return os.system, ("touch trace",)


def test_a_pickle_that_would_act_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pickled(tmp_path / "source", 1)
    for content in ({"x": Act()}, {"x": torch.zeros(1), "y": "text"}, [1]):
        torch.save(content, folder / "pytorch_model.bin")
        said = "pytorch_model.bin is no state dict that can be read as data alone"
        with pytest.raises(ValueError, match=said) as raised:
            convert(str(folder), tmp_path / "output", allow_pickle=True)
        assert "\n" not in str(raised.value) and not (tmp_path / "trace").exists()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="pytorch_model.bin is a Git LFS pointer"):
        convert(str(folder), tmp_path / "output", allow_pickle=True)


@pytest.mark.hub
def test_pickles_on_the_hub_are_fetched_whole_and_go_on(hub, tmp_path):
    hub.add_repo("someone/dse", pickled(tmp_path / "source", 1))
    size = (tmp_path / "source" / "pytorch_model.bin").stat().st_size
    binary = r"GET .*pytorch_model\.bin"
    hub.fail(binary, kind="cut", at=3_000_000, times=2)
    arguments = ["someone/dse", tmp_path / "output", "--whole", "--allow-pickle", "--recipe", "dse"]
    done = run_fresh(SCRIPT, *arguments, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "output", published.weights())
    assert hub.bytes_sent(binary) == size
