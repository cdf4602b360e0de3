"""The command line as a whole: help, options, and errors in a line. Commands have tests of their own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copy_checkpoint, run_python
from fresh_process import run_alone
from PIL import Image
from safetensors.torch import load_file, save_file

from phi3_tools.cli import error_line, main

COMMANDS = ("convert", "finetune", "compare", "search", "embed", "serve", "export", "evaluate", "demo")


def test_the_arrows_of_the_house_hold():
    # In a process of its own, because it turns off the loggers of all libraries.
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_lists_the_commands_and_imports_none():
    code = """
import sys
from phi3_tools.cli import main
main(["--help"])
main(["search", "index", "--help"])
main(["embed", "--help"])
print(sorted({"torch", "transformers", "datasets", "lancedb", "ray"} & set(sys.modules)))
"""
    said = run_python(code, run=run_alone)
    assert all(re.search(rf"^  {command} ", said, re.MULTILINE) for command in COMMANDS)
    assert "NAME[@REVISION]" in said and said.endswith("[]\n")
    assert "Hub dataset" not in " ".join(said.rpartition("Usage:")[2].split())  # of embed, which takes files alone


def test_options_are_spelt_in_one_way(capsys):
    for command in (["compare"], ["search", "index"], ["embed"], ["serve"], ["export"], ["evaluate"], ["demo"]):
        main([*command, "--help"])
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert "--num-crops" in options and not any("_" in option for option in options)


@pytest.mark.parametrize(
    "command, what",
    [
        (["convert", "", "out"], "An argument"),
        (["convert", "--whole", "", "out"], "The argument after --whole"),
        (["search", "query", " ", "index"], "An argument"),
        (["compare", "digits", "--model", "pixels", "--question", " "], "The argument after --question"),
        (["finetune", "digits", "--task", "align", "--question="], "--question"),
    ],
)
def test_an_empty_argument_is_refused_by_its_name(command, what):
    with pytest.raises(SystemExit, match=f": {what} is empty. Give what it is for"):
        main(command)


MISSING = [
    ("search query a b", "lancedb", "search"),
    ("compare digits --model pixels", "scipy", "compare"),
    ("compare digits --model pixels", "jinja2", "compare"),
    ("embed a b", "ray", "embed"),
    ("serve", "litserve", "serve"),
    ("finetune", "peft", "finetune"),
    ("finetune", "trl", "finetune"),
    ("finetune", "sentence_transformers", "finetune"),
    ("export a b", "onnxruntime", "onnx"),
    ("evaluate a", "mteb", "evaluate"),
    ("demo", "sklearn", "demo"),
    ("demo", "datasets", "demo"),
]
NAMES = {"sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers"}


@pytest.mark.parametrize(("command", "package", "extra"), MISSING)
def test_a_missing_package_is_told_in_a_line(command, package, extra, monkeypatch):
    import transformers.trainer  # noqa: F401  # which asks for peft too, but only if it is there

    for name in [name for name in sys.modules if name.startswith("phi3_tools.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as error:
        main(command.split())
    assert error.value.code == (
        f"phi3-embed {command.split()[0]}: the package {NAMES.get(package, package)} is missing. Install what this "
        f'command needs: pip install "phi3-embed[{extra}]"'
    )


def test_a_missing_package_is_named_as_it_is_installed():
    for module, package in (("faiss", "faiss-cpu"), ("sklearn.svm", "scikit-learn"), ("PIL.Image", "pillow")):
        line = error_line(ModuleNotFoundError(f"No module named '{module}'", name=module), "search")
        assert line.startswith(f"the package {package} is missing.")


@pytest.mark.parametrize(
    "command",
    [
        *("serve --model", "evaluate", "export OUT", "embed digits OUT --model", "demo --output OUT/x.png --model"),
        "finetune digits --output OUT --model",
    ],
)
@pytest.mark.parametrize("model", ["no/such/folder", "nobody/nothing", "./tests"])
def test_a_wrong_model_is_told_in_a_line(command, model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word.replace("OUT", str(tmp_path / "out")) for word in command.split()]
    words = [words[0], model, *words[1:]] if words[0] == "export" else [*words, model]
    with pytest.raises(SystemExit) as error:
        main(words)
    said = error.value.code
    assert said.startswith(f"phi3-embed {words[0]}: ") and "\n" not in said
    assert "There is no folder" in said or "holds no model" in said


def test_a_git_lfs_pointer_in_place_of_weights_is_told_in_a_line(tmp_path):
    model = copy_checkpoint(tmp_path / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    index = str(tmp_path / "index")
    for command in (["search", "index", "digits", index, "--model"], ["export"], ["evaluate"], ["serve", "--model"]):
        words = [*command, str(model), *([str(tmp_path / "out")] if command == ["export"] else [])]
        with pytest.raises(SystemExit, match="is a Git LFS pointer in place of the weights. Run `git lfs pull`"):
            main(words)


@pytest.mark.parametrize("command", ["demo OUT --output OUT/x.png --model", "finetune OUT --output OUT/x --model"])
def test_weights_that_are_not_finite_are_told_in_a_line(command, embedding_checkpoint, tmp_path):
    shutil.copytree(embedding_checkpoint, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    broken = {name: weight * torch.nan for name, weight in weights.items()}
    save_file(broken, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for name in ("out/a/1.png", "out/a/2.png", "out/b/1.png", "out/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    words = command.replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(SystemExit, match="model gives vectors that are not finite. Are its weights whole?"):
        main([*words, str(tmp_path / "model")])


def test_an_interrupted_command_says_whether_it_goes_on(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3_tools.search.make_index", interrupt)
    monkeypatch.setattr("phi3_tools.serve.run", interrupt)
    for arguments, said in (
        (["search", "index", "a", "b"], "search: interrupted. What is done is kept"),
        (["serve"], "serve: interrupted.\n"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"phi3-embed {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        OSError(122, "Quota"),
    ],
)
def test_a_full_disk_is_told_in_a_line(error):
    assert error_line(error, "search").startswith("The disk is full: ")


def test_a_folder_without_permission_is_told_with_the_way_to_another_cache():
    for number in (13, 30):
        said = error_line(OSError(number, "no", "/home/someone/.cache"), "search")
        assert "/home/someone/.cache" in said and "name another by HF_HOME and XDG_CACHE_HOME" in said


def test_a_fault_of_ours_is_not_hidden():
    assert error_line(ZeroDivisionError("x"), "search") is None
    assert error_line(ModuleNotFoundError("No module named 'phi3_tools.x'", name="phi3_tools.x"), "search") is None
    assert error_line(ImportError("cannot import name 'x'", name="phi3_tools.search"), "search") is None


def test_it_is_a_module_too(tmp_path):
    command = [sys.executable, "-m", "phi3_tools", "assemble", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("phi3-embed assemble: Give --tower and --language-model")
