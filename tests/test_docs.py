"""What README and docstrings say, run as printed."""

import doctest
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from phi3_embed import configuration_phi3_embed, processing_phi3_embed
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

README = (ROOT / "README.md").read_text()
# What needs a Hub runs in test_hub.py.
WITHOUT_HUB = re.sub(r"\n## From and to the Hub\n.*?(?=\n## )", "", README, flags=re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", WITHOUT_HUB, re.DOTALL)


def test_the_readmes_python_runs_as_printed():
    code = "\n".join(BLOCKS)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = re.search(r"It prints `(.*?)`", README)[1]
    assert done.stdout.splitlines()[0] == said
    assert done.stdout.splitlines()[1:] == [
        "torch.Size([2, 1, 3, 336, 336]) [157, 157]",
        "757",
        "torch.Size([3, 630, 128])",
        "2 128",
        "(2, 128) [0, 1]",
        "(1366, 768)",
        "(6144, 235200)",
        f"224 49 {done.stdout.split()[-1]}",
    ]


@pytest.mark.parametrize("module", [configuration_phi3_embed, processing_phi3_embed])
def test_examples_in_docstrings(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {"AutoConfig": AutoConfig, "AutoImageProcessor": AutoImageProcessor, "Image": Image}
    documented = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and item.__name__.startswith("Phi3Embed") and ">>>" in (item.__doc__ or "")
    ]
    runner = doctest.DocTestRunner()
    for item in documented:
        text = item.__doc__.replace("```", "")
        runner.run(doctest.DocTestParser().get_doctest(text, names, item.__name__, None, 0))
    assert documented and runner.failures == 0


def test_the_demo_runs_on_a_folder_and_names_what_it_cannot_read(tmp_path):
    for number, color in enumerate(["red", "green", "blue"]):
        folder = tmp_path / color
        folder.mkdir()
        for size in (40, 60):
            Image.new("RGB", (size, 30 + number), color).save(folder / f"{size}.png")
    (tmp_path / "red" / "broken.png").write_bytes(b"no picture")
    command = [sys.executable, "-m", "phi3_tools", "demo", tmp_path, "--output", tmp_path / "out" / "drawn.png"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout.replace("\n", "") and "recall@1" in done.stdout and "Drawn: " in done.stdout
    done = subprocess.run([*command[:4], tmp_path / "none"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "There is no" in done.stderr
