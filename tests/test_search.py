"""Searching by image, at the command line."""

import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import lancedb
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_checkpoint
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from filelock import FileLock
from fresh_process import run_fresh
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from phi3_tools import search
from phi3_tools.cli import main
from phi3_tools.images import digits_split
from phi3_tools.models import load_embedder

COMMAND = [sys.executable, "-m", "phi3_tools", "search"]
FEW_CROPS = ("--num-crops", "0")


@pytest.fixture
def folder(tmp_path):
    """Twelve held-out digits in two subfolders; a copy of one, and a broken file."""
    folder = tmp_path / "images"
    _, digits, _, _ = digits_split()
    for number, digit in enumerate(digits[:12]):
        path = folder / "ab"[number % 2] / f"it's {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).save(path)
    shutil.copy(folder / "a" / "it's 0.png", folder / "b" / "copy.png")
    (folder / "a" / "broken.png").write_bytes(b"no image")
    return folder


def run(capsys, *arguments):
    """Runs the command in this process -> what it printed; its error is the text of the `SystemExit`."""
    main(["search", *map(str, arguments)])
    return capsys.readouterr().out


def rows(index):
    return lancedb.connect(index).open_table("images").to_arrow().to_pylist()


def paths(index, folder):
    return sorted(os.path.relpath(row["path"], folder) for row in rows(index))


def test_an_index_follows_its_folder_by_content(folder, tmp_path, capsys):
    index = tmp_path / "index"
    said = run(capsys, "index", folder, index, *FEW_CROPS)
    assert "Added 12. Already there: 0. Further copies: 1." in said and "Left out 1 of 14" in said
    assert "broken.png: it cannot be read as an image" in said
    before = {row["hash"]: row["vector"] for row in rows(index)}

    (folder / "a" / "it's 2.png").unlink()
    (folder / "a" / "it's 4.png").rename(folder / "b" / "moved.png")
    Image.new("L", (8, 8), 77).save(folder / "b" / "it's 1.png")
    said = run(capsys, "index", folder, index)
    assert "Added 1. Already there: 10." in said and "Removed 2 that" in said
    assert {"b/moved.png", "b/it's 1.png"} <= set(paths(index, folder)) and len(rows(index)) == 11
    assert all(before.get(row["hash"], row["vector"]) == row["vector"] for row in rows(index))


def test_images_come_and_go_one_by_one(folder, tmp_path, capsys):
    index, new = tmp_path / "index", tmp_path / "new.png"
    run(capsys, "index", folder, index, *FEW_CROPS)
    Image.new("L", (8, 8), 77).save(new)
    said = run(capsys, "add", new, folder / "b" / "copy.png", index)
    assert "Added 1. Already there: 0." in said and "Added 0. Already there: 1." in said
    assert "Removed 7." in run(capsys, "remove", new, folder / "b", index)
    assert paths(index, folder) == sorted(f"a/it's {number}.png" for number in range(0, 12, 2))
    with pytest.raises(SystemExit, match="new.png is not in .*Nothing was removed"):
        run(capsys, "remove", new, index)


def test_neighbours_are_printed_and_drawn(folder, tmp_path, capsys, monkeypatch, recwarn):
    index, output = tmp_path / "index", tmp_path / "found.png"
    query = (folder / "a" / "it's 6.png").rename(folder / "a" / "[b] :cat: $x^$ 日.png")  # no markup, no formula
    run(capsys, "index", folder, index, *FEW_CROPS)
    shutil.rmtree(folder / "b")  # the index shows them all the same
    monkeypatch.setenv("COLUMNS", "200")
    said = run(capsys, "query", query, index, "--output", output, "--count", 3)
    lines = [line.split("│") for line in said.splitlines() if ".png" in line and "│" in line]
    assert len(lines) == 3 and all(query.name not in line[3] for line in lines)
    vectors = {row["path"]: np.array(row["vector"]) for row in rows(index)}
    asked = vectors[str(query)]
    wanted = sorted(vectors, key=lambda path: -(vectors[path] @ asked))[1:4]
    assert [line[3].strip() for line in lines] == wanted
    said = run(capsys, "query", query, index, "--output", output, "--no-exclude-self")
    assert "1.000" in said and query.name in said.split("1.000")[1]
    with Image.open(output) as image:
        assert image.width > image.height > 200
    assert not any("Glyph" in str(warning.message) for warning in recwarn)


def test_an_index_of_another_model_or_of_other_crops_is_refused(folder, tmp_path, capsys):
    index, other = tmp_path / "index", tmp_path / "other"
    copy_checkpoint(other)
    run(capsys, "index", folder, index, *FEW_CROPS, "--model", other)
    assert "Added 0" in run(capsys, "index", folder, index, "--model", ROOT)  # the same weights
    with pytest.raises(SystemExit, match="num_crops 0.*num_crops 1.*make another index"):
        run(capsys, "index", folder, index, "--num-crops", 1)
    with pytest.raises(SystemExit, match="pooling_mode|settings.*make another index"):
        run(capsys, "index", folder, index, "--model", f"{other}:tower")
    model = AutoModel.from_pretrained(other, trust_remote_code=True)
    with torch.no_grad():
        next(model.vision_embed_tokens.img_processor.parameters()).add_(1)
    model.save_pretrained(other)  # under the same name
    with pytest.raises(SystemExit, match=r"is made by .*other \(weights .*but this is .*other \(weights"):
        run(capsys, "query", folder / "a" / "it's 0.png", index)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", '"pooling_mode": "mean"', '"pooling_mode": "global"'),
        ("config.json", '"layer_norm_eps": 1e-05', '"layer_norm_eps": 1e-03'),
        ("processor_config.json", "0.48145466", "0.5"),
    ],
    ids=["config", "tower", "image_processor"],
)
def test_an_index_of_other_settings_is_refused(file, old, new, folder, embedding_checkpoint, tmp_path, capsys):
    index, other = tmp_path / "index", shutil.copytree(embedding_checkpoint, tmp_path / "other")
    image = folder / "a" / "it's 0.png"
    run(capsys, "index", image, index, *FEW_CROPS, "--model", other)
    AutoModel.from_pretrained(other, trust_remote_code=True).save_pretrained(other)  # the same model, saved anew
    assert "Already there: 1." in run(capsys, "add", image, index)
    before = (other / file).read_text()
    assert old in before
    (other / file).write_text(before.replace(old, new))
    with pytest.raises(SystemExit, match=r"is made by .*settings .*but this is .*settings .*make another index"):
        run(capsys, "add", image, index)


def test_an_index_keeps_to_the_commit_of_its_model(folder, repository, hub, tmp_path):
    commit = hub.add_repo("someone/embedder", repository)
    environment = hub.environment(tmp_path / "home")

    def search_there(*arguments):
        return run_fresh("-m", "phi3_tools", "search", *arguments, cwd=tmp_path, env=environment)

    done = search_there("index", folder, "index", "--model", "someone/embedder", *FEW_CROPS)
    assert done.returncode == 0, done.stderr
    assert search._read_made_by(tmp_path / "index")["model"] == f"someone/embedder@{commit}"
    hub.commit("someone/embedder", {"config.json": b"{}"})  # later ones may be of another model
    done = search_there("query", folder / "a" / "it's 0.png", "index")
    assert done.returncode == 0, done.stderr


def test_vectors_that_are_not_finite_are_left_out(folder, tmp_path, capsys):
    index, model = tmp_path / "index", tmp_path / "model"
    copy_checkpoint(model)
    broken = AutoModel.from_pretrained(model, trust_remote_code=True)
    for parameter in broken.vision_embed_tokens.projector.img_projection.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    broken.save_pretrained(model)
    with pytest.raises(SystemExit, match="Not one of the 14 images of .* can be embedded"):
        run(capsys, "index", folder, index, *FEW_CROPS, "--model", model)
    said = capsys.readouterr().out
    assert "its vector is not finite" in said
    assert "Added 0. Already there: 0. Further copies: 1." in said and "Left out 13 of 14" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("index", "{folder}", "/proc/index"), "/proc/index"),
        (("index", "{folder}", "{folder}"), "is no index, and not an empty folder"),
        (("index", "{none}", "{index}"), "There is no .*none"),
        (("index", "{folder}", "{none}", "--model", "{none}/model"), "There is no folder .*none.*a Hub id"),
        (("add", "{folder}", "{none}"), "There is no index .*none.*index SOURCE"),
        (("query", "{folder}/a/broken.png", "{index}"), "broken.png: it cannot be read as an image"),
        (("query", "{none}.png", "{index}"), "none.png: it cannot be read as an image"),
        (("query", "{folder}/b/copy.png", "{index}", "--output", "{folder}"), "no name for a PNG"),
        (("query", "{folder}/b/copy.png", "{index}"), "holds no images"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(arguments, message, folder, tmp_path, capsys):
    index = tmp_path / "index"
    found, made_by = search._agree(index, None, num_crops=0)
    embedder = load_embedder(found, 0)
    with search._written(index, made_by, embedder):
        pass
    capsys.readouterr()
    given = [part.format(folder=folder, index=index, none=tmp_path / "none") for part in arguments]
    with pytest.raises(SystemExit, match=message) as error:
        run(capsys, *given)
    assert str(error.value).startswith("phi3-embed search: ") and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def words_index(whole_checkpoint, tmp_path_factory):
    """An index of three digits by a model that embeds words -> its folder, the images', and the model's."""
    folder, index = (tmp_path_factory.mktemp(name) for name in ("digits", "words"))
    for number, digit in enumerate(digits_split()[1][:3]):
        Image.fromarray(digit).save(folder / f"{number}.png")
    main(["search", "index", str(folder), str(index), "--model", whole_checkpoint, *FEW_CROPS])
    return index, folder, whole_checkpoint


@pytest.mark.parametrize("kind", ["words", "both"])
def test_images_are_found_by_words_and_by_both(kind, words_index, tmp_path, capsys, monkeypatch):
    index, folder, name = words_index
    monkeypatch.setenv("COLUMNS", "200")
    query = ["a red dress"] if kind == "words" else [folder / "1.png", "--text", "a red dress"]
    said = run(capsys, "query", query[0], index, *query[1:], "--output", tmp_path / "out.png", "--no-exclude-self")
    model = SentenceTransformer(name, trust_remote_code=True)
    model[0].processing_kwargs["image"]["num_crops"] = 0
    asked = "a red dress" if kind == "words" else {"text": "a red dress", "image": str(folder / "1.png")}
    vector = model.encode_query(asked)
    wanted = sorted(rows(index), key=lambda row: -(np.array(row["vector"]) @ vector))
    found = [line for line in said.splitlines() if line.startswith("│")]
    for line, row in zip(found, wanted, strict=True):
        assert row["path"] in line and f"{np.array(row['vector']) @ vector:.3f}" in line
    assert (tmp_path / "out.png").exists()


def test_words_may_be_longer_than_the_name_of_a_file():
    words = "a red dress, " * 30
    assert search._part(words, None) == (None, words)


def test_words_are_refused_where_there_are_none(folder, embedding_checkpoint, tmp_path, capsys):
    index = tmp_path / "index"
    run(capsys, "index", folder / "b" / "copy.png", index, *FEW_CROPS, "--model", embedding_checkpoint)
    with pytest.raises(SystemExit, match="has no text side: it holds no words. Query it by the file of an image"):
        run(capsys, "query", "a red dress", index)
    with pytest.raises(SystemExit, match="holiday.jpg: it cannot be read as an image: No such file"):
        run(capsys, "query", "holiday.jpg", index)


def test_an_index_of_another_recipe_is_refused(words_index, tmp_path, capsys):
    index, folder, name = words_index
    other = shutil.copytree(name, tmp_path / "other")
    template = other / "additional_chat_templates" / "embedding.jinja"
    template.write_text(template.read_text().replace("Represent the given image.", "Show it."))
    assert "Added 0" in run(capsys, "index", folder, index, "--model", name, *FEW_CROPS)
    with pytest.raises(SystemExit, match="settings .*but this is .*settings .*make another index"):
        run(capsys, "index", folder, index, "--model", other, *FEW_CROPS)


def test_two_commands_at_once_store_each_image_once(folder, tmp_path):
    index = tmp_path / "index"
    command = [*COMMAND, "index", str(folder), str(index), *FEW_CROPS]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("Added 12." in out for out, _ in said) == [False, True]
    assert len(rows(index)) == len({row["hash"] for row in rows(index)}) == 12


@pytest.mark.parametrize("command", ["add", "remove"])
def test_other_commands_wait_for_the_one_that_writes(command, folder, tmp_path, capsys):
    index, done = tmp_path / "index", threading.Event()
    run(capsys, "index", folder / "a", index, *FEW_CROPS)
    with FileLock(index / search.LOCK):
        other = threading.Thread(target=lambda: (main(["search", command, str(folder), str(index)]), done.set()))
        other.start()
        stop, said = time.monotonic() + 60, ""
        while "Waiting for it." not in said:
            assert time.monotonic() < stop
            said += capsys.readouterr().out
            time.sleep(0.01)
        assert not done.wait(0.2) and len(rows(index)) == 6
    other.join(60)
    assert done.is_set() and len(rows(index)) == (12 if command == "add" else 0)


def test_an_index_that_was_made_meanwhile_by_other_settings_takes_no_images(folder, tmp_path):
    index = tmp_path / "index"
    found, made_by = search._agree(index, None, num_crops=0)
    embedder = load_embedder(found, 0)
    with search._written(index, made_by, embedder):
        pass
    other = search._agree(index, None, num_crops=1)[1]
    with pytest.raises(ValueError, match="was made meanwhile by .*num_crops 0"), search._written(index, other):
        pytest.fail("it was opened")


def test_duplicates_of_an_earlier_version_are_removed(folder, tmp_path, capsys):
    index = tmp_path / "index"
    run(capsys, "index", folder, index, *FEW_CROPS)
    lancedb.connect(index).open_table("images").add(rows(index)[:3])
    assert len(rows(index)) == 15
    assert "holds 12 images" in run(capsys, "index", folder, index)


def test_rows_that_leave_a_parquet_file_leave_the_index(tmp_path, capsys):
    index, data = tmp_path / "index", tmp_path / "data.parquet"
    images = [Image.new("L", (8, 8), 40 * number) for number in range(4)]
    for kept in (images, images[1:3]):
        Dataset.from_dict({"image": kept}, Features({"image": ImageFeature()})).to_parquet(data)
        said = run(capsys, "index", data, index, *FEW_CROPS)
    assert "Added 0. Already there: 2." in said and "Removed 2 that" in said
    assert sorted(row["path"] for row in rows(index)) == [f"{data}#row 0", f"{data}#row 1"]


def test_a_full_disk_is_told_in_a_line_where_lancedb_meets_it(tmp_path, capsys):
    """It raises a plain `RuntimeError`."""
    index, images = tmp_path / "index", tmp_path / "images"
    images.mkdir()
    for number in range(4):  # noise, so that thumbnails are large
        pixels = np.random.default_rng(number).integers(0, 256, (300, 300, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(SystemExit, match="phi3-embed search: The disk is full: .*File too large") as error:
            run(capsys, "index", images, index, *FEW_CROPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(error.value)
    assert "Added 4." in run(capsys, "index", images, index, *FEW_CROPS)


def test_a_kill_in_the_middle_loses_nothing_and_doubles_nothing(tmp_path, capsys):
    folder, index = tmp_path / "images", tmp_path / "index"
    folder.mkdir()
    training, *_ = digits_split()
    for number, digit in enumerate(training[:48]):
        Image.fromarray(digit).resize((300, 600)).save(folder / f"{number}.png")
    arguments = ["index", str(folder), str(index), "--num-crops", "2"]
    killed = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not ((index / "images.lance").exists() and len(rows(index)) >= 16):
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -9
    before = {row["hash"]: row["vector"] for row in rows(index)}
    assert 16 <= len(before) < 48
    said = run(capsys, *arguments)
    after = rows(index)
    assert len(after) == len({row["hash"] for row in after}) == 48
    assert f"Added {48 - len(before)}. Already there: {len(before)}." in said
    assert before.items() <= {row["hash"]: row["vector"] for row in after}.items()
