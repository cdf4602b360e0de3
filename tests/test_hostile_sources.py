"""Sources that would act, reach outside their folder, or take for ever: one line of ours each, quickly."""

import json
import os
import re
import shutil
import struct
import sys
import time

import published
import pytest
import torch
from conftest import run_python
from fresh_process import run_fresh
from safetensors.torch import load_file, save_file
from test_convert import SCRIPT, rewrite, write

from phi3_tools.checkpoint.convert import convert
from phi3_tools.checkpoint.put_back import put_back

CODE = "someone/other--code.Class"
OURS = re.compile(r"(configuration|modeling|processing)_phi3_embed\.\w+")


@pytest.fixture(scope="module")
def published_source(tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("published") / "source")


@pytest.fixture
def source(published_source, tmp_path):
    return shutil.copytree(published_source, tmp_path / "source")


def auto_maps(value):
    """All that stands under an `auto_map` in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from [inner] if key == "auto_map" else auto_maps(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from auto_maps(inner)


def test_code_that_a_source_names_is_neither_run_nor_passed_on(source, tmp_path, hub):
    """In a process that could fetch the code, and would leave a trace of having run it."""
    trace = tmp_path / "trace"
    hub.add_repo("someone/other", {"code.py": f"open({str(trace)!r}, 'w')\nclass Class: pass\n".encode()})
    autos = dict.fromkeys(("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoConfig", "AutoModel"), CODE)
    autos["AutoTokenizer"] = ["", CODE]
    inner = {"auto_map": autos, "_attn_implementation": "someone/kernel", "custom_pipelines": CODE}
    parts = {name: published.SMALL_CONFIG[name] | inner for name in ("img_processor", "embd_layer", "vision_config")}
    rewrite("config.json", auto_map=autos, custom_pipelines={"x": {"impl": CODE}}, **parts)(source)
    token = {"content": "<|endoftext|>", "special": True, "auto_map": autos}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        rewrite(name, auto_map=autos, tokenizer_class=CODE, processor_class=CODE, pad_token=token)(source)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        rewrite(name, auto_map=autos, image_processor_type=CODE, processor_class=CODE)(source)
    environment = hub.environment(tmp_path / "home")
    done = run_fresh(SCRIPT, source, tmp_path / "output", env=environment)
    assert done.returncode == 0, done.stderr
    load = "import sys; from transformers import AutoModel, AutoProcessor\n"
    load += "for auto in (AutoModel, AutoProcessor): auto.from_pretrained(sys.argv[1], trust_remote_code=True)"
    run_python(load, tmp_path / "output", **hub.environment(tmp_path / "home"))
    assert not trace.exists() and not hub.log
    for path in (tmp_path / "output").glob("*.json"):
        if path.name == "tokenizer.json":
            continue
        assert "--" not in path.read_text() and "someone" not in path.read_text(), path.name
        for found in auto_maps(json.loads(path.read_text())):
            assert all(OURS.fullmatch(reference) for reference in found.values())


def test_a_model_that_is_put_back_names_no_code_either(source, tmp_path, monkeypatch):
    convert(str(source), tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())["vision_config"]
    rewrite("config.json", vision_config=about | {"auto_map": {"AutoModel": CODE}})(tmp_path / "model")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    put_back(str(tmp_path / "model"), str(source), tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def link(name):
    def change(folder):
        secret = folder.parent / "secret"
        secret.write_text("a secret of this machine")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)

    return change


def pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def folder_instead(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        (folder / name / "MIT").write_text("inside")

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (link("LICENSE"), "LICENSE of .* is a symbolic link to a folder, or to what lies elsewhere"),
        (link("README.md"), "README.md of .* is a symbolic link to a folder, or to what lies elsewhere"),
        (lambda folder: (folder / "LICENSE.old").symlink_to("/nowhere"), "LICENSE.old of .* is a symbolic link to"),
        (pipe("LICENSE"), "LICENSE of .* is a pipe, a socket or a device"),
        (folder_instead("LICENSES"), "LICENSES of .* is a folder"),
    ],
)
def test_texts_that_are_no_files_are_left_out_and_said(change, said, source, tmp_path, capsys):
    change(source)
    convert(str(source), tmp_path / "output")
    assert re.search(said, capsys.readouterr().out)
    for path in (tmp_path / "output").rglob("*"):
        assert path.is_file() and b"a secret" not in path.read_bytes()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("change", [link, pipe, folder_instead])
def test_a_file_that_is_none_is_refused(change, name, source, tmp_path):
    change(name)(source)
    with pytest.raises(ValueError, match=rf"{name} is a (symbolic link|pipe|folder).*Put the file itself there"):
        convert(str(source), tmp_path / "output")


def test_a_copy_put_back_holds_no_file_of_the_machine(source, tmp_path, capsys):
    convert(str(source), tmp_path / "model")
    link("notes.txt")(source)
    (source / "more").symlink_to("/etc")
    os.mkfifo(source / "pipe")
    put_back(str(tmp_path / "model"), str(source), tmp_path / "back")
    said = capsys.readouterr().out
    assert all(f"Left out: {name} is a" in said for name in ("notes.txt", "pipe"))
    names, left = ({path.name for path in folder.iterdir()} for folder in (source, tmp_path / "back"))
    assert names - left == {"notes.txt", "pipe", "more"}


def test_the_links_of_the_hub_clients_cache_are_read(published_source, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(published_source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    convert(str(snapshot), tmp_path / "output")
    assert (tmp_path / "output" / "LICENSE").exists()


def header(change):
    """Rewrites the header of the weights."""

    def rewrite(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        about = json.loads(data[8 : 8 + length])
        text = change(about)
        text = json.dumps(about).encode() if text is None else text
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


def offsets(change):
    def rewrite(about):
        name, other = [name for name, value in about.items() if name != "__metadata__"][:2]
        about[name]["data_offsets"] = change(*about[name]["data_offsets"], about[other]["data_offsets"])

    return header(rewrite)


def shape(*new):
    def rewrite(about):
        next(value for name, value in about.items() if name != "__metadata__")["shape"] = list(new)

    return header(rewrite)


def bomb(folder):
    levels = "\n".join(f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]" for n in range(12))
    (folder / "README.md").write_text(f"---\nlicense: mit\nl0: &l0 x\n{levels}\n---\n")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4945242264\n"
TOWER = published.SMALL_CONFIG["vision_config"]


@pytest.mark.parametrize(
    "change, said",
    [
        (offsets(lambda start, stop, other: other), "model.safetensors is no safetensors file"),
        (offsets(lambda start, stop, other: [-16, stop - start - 16]), "has the dtype .* and the offsets"),
        (offsets(lambda start, stop, other: [float(start), float(stop)]), "has the dtype .* and the offsets"),
        (offsets(lambda start, stop, other: [stop, start]), "overlap|is no safetensors file"),
        (offsets(lambda start, stop, other: [10**15, 10**15 + stop - start]), "no safetensors file"),
        (offsets(lambda start, stop, other: [True, 2]), "no safetensors file"),
        (offsets(lambda start, stop, other: [0, 1, 2]), "no safetensors file"),
        (shape(10**9, 10**9), "the shape"),
        (shape(*[1] * 1000), "the shape"),
        (shape(-1, -1), "no safetensors file"),
        (header(lambda about: b"[" * 100_000), "no safetensors file"),
        (header(lambda about: b"[1]"), "no safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**9) + b"{}"), "begin with"),
        (write("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
        (write("tokenizer.json", POINTER), "a Git LFS pointer.*`git lfs pull`"),
        (write("config.json", '{"a":' * 100_000), "config.json is no JSON"),
        (write("config.json", " " * 2**25), "config.json is larger than 16777216 bytes"),
        (rewrite("config.json", hidden_size=float("inf")), "Infinity is no number in JSON"),
        (rewrite("config.json", vocab_size=10**12), "`vocab_size` is 10+, but must be"),
        (
            rewrite("config.json", vision_config=TOWER | {"num_hidden_layers": 10**7}),
            "`num_hidden_layers` is 10000000, but must be 500 at most",
        ),
        (rewrite("config.json", vision_config=TOWER | {"image_size": [10**9, 10**9]}), "`image_size` is 1000000000"),
        (
            rewrite("config.json", vision_config=TOWER | {"model_type": "timm_wrapper"}),
            "a part of it is of type 'timm_wrapper', but must be",
        ),
        (rewrite("config.json", vision_config=TOWER | {"model_type": [1]}), "is of type"),
        (
            rewrite("tokenizer_config.json", chat_template=[{"name": "../../x", "template": ""}]),
            "`chat_template` must be one text",
        ),
        (rewrite("tokenizer_config.json", pad_token=7), "`pad_token` is '7', but must be a text"),
    ],
)
def test_what_would_overlap_overflow_or_never_end_is_told_in_a_line(change, said, source, tmp_path):
    change(source)
    start = time.monotonic()
    with pytest.raises(ValueError, match=said) as raised:
        convert(str(source), tmp_path / "output")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 2000
    assert time.monotonic() - start < 10
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("trap", ["bomb", "[" * 60_000, "y: " + "y" * 2**20, "license_name: " + '"' * 10**6])
def test_a_card_that_is_a_trap_costs_nothing(trap, source, tmp_path):
    bomb(source) if trap == "bomb" else (source / "README.md").write_text(f"---\nlicense: mit\n{trap}\n---\n")
    start = time.monotonic()
    convert(str(source), tmp_path / "output")
    assert time.monotonic() - start < 10
    assert "license: mit\n" in (tmp_path / "output" / "README.md").read_text()


# Adapters


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.vision_embed_tokens.img_projection.0.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 256), name.format("B"): torch.ones(96, 2)},
        folder / "adapter_model.safetensors",
    )
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"], "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def test_an_adapters_settings_act_on_nothing(adapter, source, tmp_path):
    (tmp_path / "trap.py").write_text("raise AssertionError('imported')")
    traps = {"megatron_config": {"x": 1}, "megatron_core": "trap", "target_modules": "(a+)+$"}
    rewrite("adapter_config.json", auto_mapping={"parent_library": "trap", "base_model_class": "x"}, **traps)(adapter)
    convert(str(adapter), tmp_path / "output", base=str(source))
    convert(str(source), tmp_path / "plain")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("output", "plain"))
    name = "vision_embed_tokens.projector.img_projection.0.weight"
    assert torch.equal(merged[name], (plain[name].float() + 2).bfloat16())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rank_pattern": {"(a+)+$": 2}}, "`rank_pattern` is .* but must be positive numbers by names of layers"),
        ({"alpha_pattern": {"x": -1}}, "must be positive numbers by names"),
        ({"r": 10**12}, "`r` is '1000000000000'"),
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA with `init_lora_weights` 'pissa_niter_4'"),
        ({"layer_replication": [[0, 9], [0, 9]]}, "LoRA with `layer_replication`"),
        ({"target_parameters": ["x"]}, "LoRA with `target_parameters`"),
        ({"use_dora": "yes"}, "`use_dora` is 'yes', but must be true or false"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(settings, said, adapter, source, tmp_path):
    rewrite("adapter_config.json", **settings)(adapter)
    with pytest.raises(ValueError, match=said) as raised:
        convert(str(adapter), tmp_path / "output", base=str(source))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("named", ["{source}", "../source", ["x"], "a" * 10_000 + "/../b", "someone/model"])
def test_the_base_that_an_adapter_names_is_no_path(named, adapter, source, tmp_path, monkeypatch):
    """Else a stranger's adapter could carry a model of this machine into what is pushed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, tmp_path / "someone" / "model")
    named = named.format(source=source) if isinstance(named, str) else named
    rewrite("adapter_config.json", base_model_name_or_path=named)(adapter)
    with pytest.raises(ValueError, match="which is no Hub id. Give the base by|no Hub id|cannot be reached"):
        convert(str(adapter), tmp_path / "output")


def test_weights_with_an_adapter_beside_them_are_a_question(adapter, source, tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        both = shutil.copytree(adapter, tmp_path / name)
        (both / name).write_text("{}")
        with pytest.raises(ValueError, match="has weights, and an adapter beside them"):
            convert(str(both), tmp_path / "output", allow_pickle=True)
    for path in adapter.iterdir():
        shutil.copy(path, source)
    with pytest.raises(ValueError, match=f"has weights, and an adapter beside them.*--base {source}"):
        convert(str(source), tmp_path / "output")
    convert(str(source), tmp_path / "output", base=str(source))
    convert(str(adapter), tmp_path / "other", base=str(source))
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("output", "other")]
    assert both[0] == both[1]


def test_a_missing_peft_is_named(adapter, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="Merging an adapter takes peft: `pip install peft`"):
        convert(str(adapter), tmp_path / "output", base=str(source))


FULL = """
import resource, sys
from phi3_tools.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main(["convert", *sys.argv[1:]])
"""


def test_a_full_disk_is_told_in_a_line_where_the_tokenizers_library_meets_it(source, tmp_path):
    """It raises a plain `Exception`."""
    done = run_fresh("-c", FULL, "300000", source, tmp_path / "output")
    assert done.returncode == 1
    assert re.fullmatch(
        r"phi3-embed convert: The disk is full: .*Free some space\. .*goes on from there\.",
        done.stderr.splitlines()[-1],
    )
    assert "Traceback" not in done.stderr
