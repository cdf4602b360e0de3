"""Examples in docstrings, run as printed, and the demonstration."""

import doctest

import pytest
from conftest import ROOT
from fresh_process import run_fresh
from phi3_embed import configuration_phi3_embed, processing_phi3_embed
from PIL import Image
from trainings import make_images
from transformers import AutoConfig, AutoImageProcessor

from phi3_tools.cli import main


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


def test_the_demo_asks_and_says_how_many_answers_are_right(whole_checkpoint, monkeypatch, capsys):
    from phi3_tools import demo, digits, images
    from phi3_tools.models import find_model

    monkeypatch.setattr(demo, "NUM_ASKED", 4)
    _, held_out, _, labels = images.digits_split()
    demo._ask(find_model(whole_checkpoint), [Image.fromarray(digit) for digit in held_out[:4]], labels[:4])
    said = capsys.readouterr().out
    assert f"a {images.DIGIT_NAMES[labels[0]]}: {digits.NAME_IT} " in said
    assert digits.LARGER in said and said.count("Right: ") == 2 and "of 4 held-out ones" in said


def test_the_demo_runs_on_a_folder_and_names_what_it_cannot_read(tmp_path):
    make_images(tmp_path, ("blue", "green", "red"), 2)
    (tmp_path / "red" / "broken.png").write_bytes(b"no image")
    done = run_fresh("-m", "phi3_tools", "demo", tmp_path, "--output", tmp_path / "out" / "drawn.png")
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout.replace("\n", "") and "recall@1" in done.stdout and "Drawn: " in done.stdout
    with pytest.raises(SystemExit, match="phi3-embed demo: There is no"):
        main(["demo", str(tmp_path / "none")])
