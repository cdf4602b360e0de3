"""The scripts of examples/, as a user runs them."""

import pytest
from conftest import ROOT
from fresh_process import run_fresh
from sentence_transformers import SentenceTransformer
from trainings import make_images

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), ("blue", "green"), 8)


def run(script, *arguments, cwd):
    done = run_fresh(ROOT / "examples" / script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_is_short_and_names_nothing_private():
    for script in SCRIPTS:
        text = script.read_text()
        assert len(text.splitlines()) < 60 and "phi3_tools" not in text and "._" not in text


def test_search_finds_an_image_itself_first(images, tmp_path):
    query = images / "blue" / "1.png"
    assert run("search_images.py", images, query, cwd=tmp_path).splitlines()[0] == f"1.000  {query}"


@pytest.mark.train
def test_a_classifier_is_trained_and_saved_with_its_code(images, tmp_path):
    printed = run("train_classifier.py", images, tmp_path / "classifier", cwd=tmp_path)
    assert "eval_accuracy" in printed and (tmp_path / "classifier" / "modeling_phi3_embed.py").exists()


@pytest.mark.train
def test_an_embedding_is_trained_and_loads(images, tmp_path):
    run("train_embedding.py", images, tmp_path / "embedding", cwd=tmp_path)
    embedder = SentenceTransformer(str(tmp_path / "embedding"), trust_remote_code=True)
    assert embedder.encode([str(images / "blue" / "1.png")]).shape == (1, 128)
