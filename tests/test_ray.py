"""`phi3-embed embed` on a local Ray of two nodes, with a worker and a driver killed."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHECKPOINT_FILES, ROOT, copy_checkpoint, run_python
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from ray.cluster_utils import Cluster
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel

from phi3_tools import embed as embed_ray
from phi3_tools.cli import main
from phi3_tools.images import make_shards
from phi3_tools.models import find_model

SCRIPT = ("-m", "phi3_tools", "embed")
NUM_IMAGES, SHARD_SIZE, BROKEN = 80, 2, 50
TIMEOUT = 480  # seconds; on a busy machine processes of Ray take minutes to start


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**28})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=2**28)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def files():
    """Image files of unequal sizes by name, one of them broken."""
    generator, files = np.random.default_rng(0), {}
    for number in range(NUM_IMAGES):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (20 + number, 140 - number, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "png")
        files[f"{number:03}.png"] = b"no image" if number == BROKEN else buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def vectors(files):
    """What the model gives without Ray."""
    where = {"pretrained_model_name_or_path": ROOT, "trust_remote_code": True}
    images = [Image.open(io.BytesIO(file)) for file in files.values() if file != b"no image"]
    inputs = AutoImageProcessor.from_pretrained(**where, num_crops=1)(images, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(**where)(**inputs).pooler_output.numpy()


def begin(cluster, source, folder, *more):
    command = [
        sys.executable,
        *SCRIPT,
        source,
        folder,
        "--model",
        f"{ROOT}:mean",
        "--num-crops",
        "1",
        "--shard-size",
        SHARD_SIZE,
        "--copies",
        "1",
    ]
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command), *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers(cluster, stage):
    """The cluster's processes of a stage."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"MapWorker(Map({stage}))" in " ".join(process.info["cmdline"] or ()):
            raylet = process.parent()
            if raylet and any(cluster.address in word for word in raylet.cmdline()):
                found.append(process)
    return found


def wait_for_files(folder, count):
    stop = time.monotonic() + TIMEOUT
    while len(list(folder.glob("*.parquet"))) < count:
        assert time.monotonic() < stop, "Nothing was written."
        time.sleep(0.02)


def assert_equal_rows(folder, names, vectors):
    rows = pq.read_table(folder).to_pylist()
    assert [row["name"] for row in rows] == names
    assert [row["name"] for row in rows if row["error"]] == [names[BROKEN]]
    assert rows[BROKEN]["embedding"] is None
    given = np.array([row["embedding"] for row in rows if row["embedding"] is not None])
    np.testing.assert_allclose(given, vectors, atol=1e-5, rtol=1e-5)
    assert not list(folder.glob("*.part"))


@pytest.fixture
def source(files, tmp_path):
    """A folder of a parquet and a tar file -> it, and the names of their images in order."""
    folder, names, half = tmp_path / "images", [*files], NUM_IMAGES // 2
    folder.mkdir()
    images = [{"bytes": files[name], "path": name} for name in names[:half]]
    data = Dataset.from_dict({"image": images}).cast_column("image", ImageFeature(decode=False))
    data.to_parquet(folder / "a.parquet", batch_size=25)
    with tarfile.open(folder / "b.tar", "w") as archive:
        for name in names[half:]:
            for member, content in ((name, files[name]), (name.replace("png", "txt"), b"a text")):
                about = tarfile.TarInfo(member)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
    rows = [f"{folder}/a.parquet#{row}" for row in range(half)]
    return folder, rows + [f"{folder}/b.tar#{name}" for name in names[half:]]


def test_a_killed_driver_and_a_killed_worker_lose_and_double_no_row(cluster, source, vectors, tmp_path):
    (source, names), folder = source, tmp_path / "vectors"
    num_shards = 13 + 8 + 20  # of a table's row groups of 25 and 15 rows, and of a tar file

    driver = begin(cluster, source, folder)
    wait_for_files(folder, 3)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    while workers(cluster, "Embed"):  # those of the dead driver may still finish a shard
        time.sleep(0.1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 3 <= len(before) < num_shards

    driver = begin(cluster, source, folder)
    wait_for_files(folder, len(before) + 3)
    (model,) = workers(cluster, "Embed")
    assert workers(cluster, "Preprocess")  # in processes of their own, so that they overlap
    model.kill()
    said, errors = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, errors
    assert f"{NUM_IMAGES} images in {num_shards} shards, of which {len(before)} are done." in said
    assert "a second; the model was busy" in said
    assert f"Left out 1 of {NUM_IMAGES} images, which are broken" in said and f"{names[BROKEN]}: it cannot" in said
    assert_equal_rows(folder, names, vectors)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert before.items() <= after.items()  # what was done was not done again


def test_texts_and_texts_with_images_are_embedded_by_a_template(whole_checkpoint, tmp_path):
    model = SentenceTransformer(whole_checkpoint, trust_remote_code=True, processor_kwargs={"num_crops": 1})
    model[0].processing_kwargs["image"]["num_crops"] = 1
    image = Image.new("RGB", (60, 40), "red")
    rows = {"image": [image, None, image], "words": ["a dress", "a dress", ""]}
    Dataset.from_dict(rows, Features({"image": ImageFeature(), "words": Value("string")})).to_parquet(
        tmp_path / "both.parquet"
    )
    (shard,) = make_shards(tmp_path / "both.parquet", 3, text_column="words")
    whole = find_model(whole_checkpoint)
    row = embed_ray.Preprocess(whole, 1, "It is {text}.")(shard)
    assert embed_ray.Embed(tmp_path, whole, 1, "float32")(row)["images"] == 3
    both, text, none = pq.read_table(tmp_path / embed_ray.file_name(0)).to_pylist()
    said = "It is a dress."
    for row, wanted in ((both, {"text": said, "image": image}), (text, said)):
        np.testing.assert_allclose(row["embedding"], model.encode_document(wanted), atol=1e-6)
    assert none["embedding"] is None and none["error"] == "the row holds no text"


def test_a_table_of_texts_alone_is_read_by_a_template(whole_checkpoint, tmp_path):
    Dataset.from_dict({"words": ["a dress", ""]}).to_parquet(tmp_path / "texts.parquet")
    (shard,) = make_shards(tmp_path / "texts.parquet", 2, text_column="words")
    row = embed_ray.Preprocess(find_model(whole_checkpoint), 1, "It is {text}.")(shard)
    assert row["items"] == [(None, "It is a dress.")] and row["errors"] == ["", "the row holds no text"]
    Dataset.from_dict({"words": [7]}).to_parquet(tmp_path / "numbers.parquet")
    (shard,) = make_shards(tmp_path / "numbers.parquet", 2, text_column="words")
    assert embed_ray.Preprocess(find_model(whole_checkpoint), 1, "{text}")(shard)["errors"] == [
        "the row holds no text, but 7"
    ]


@pytest.mark.parametrize(
    ("source", "folder", "told"),
    [
        ("none", "out", "There is no "),
        ("empty", "out", "holds no images"),
        ("one.png", "taken", "are not of this command"),
        ("other.parquet", "out", "has no column of images, but 'picture'"),
        ("numbers.parquet", "out", "has no column of images, but 'image'"),
        ("broken.tar", "out", "broken.tar cannot be read as an uncompressed tar file"),
        ("one.png", f"out --text-column words --model {ROOT}:mean", "embeds images alone. Leave out --text-column"),
        ("one.png", "out --template x", "--template is 'x', but must say where the text goes"),
        ("empty", "empty/out", "lies in .*empty, so that vectors would be taken for images"),
    ],
)
def test_a_users_mistake_is_told_in_a_line(source, folder, told, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.parquet").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    Dataset.from_dict({"picture": ["a"]}).to_parquet(tmp_path / "other.parquet")
    Dataset.from_dict({"image": [1]}).to_parquet(tmp_path / "numbers.parquet")
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(SystemExit, match=f"phi3-embed embed: .*{told}"):
        folder, *more = folder.split()
        main(["embed", str(tmp_path / source), str(tmp_path / folder), *more])


def test_a_ray_that_does_not_start_in_time_is_told_in_a_line(tmp_path, monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(embed_ray.ray, "init", init)
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as end:
        main(["embed", str(tmp_path / "a.png"), str(tmp_path / "vectors")])
    assert "Ray did not start: The current node timed out" in end.value.code and "same command again" in end.value.code


def test_other_images_are_not_mixed_into_a_folder(tmp_path):
    shards = [{"path": "a.png", "size": 1}]
    embed_ray.begin(tmp_path, shards, {"num_crops": 1})
    embed_ray.begin(tmp_path, shards, {"num_crops": 1})
    with pytest.raises(ValueError, match="was begun with other num_crops, images"):
        embed_ray.begin(tmp_path, [{"path": "b.png", "size": 1}], {"num_crops": 2})


@pytest.fixture
def began(monkeypatch):
    """Runs the command in this process, without its work."""
    monkeypatch.setattr(embed_ray, "embed", lambda *arguments: None)
    monkeypatch.setattr(embed_ray, "report_broken", lambda *_: None)

    def begin(source, folder, *more):
        main(["embed", *map(str, (source, folder, *more))])

    return begin


def test_images_of_another_column_are_not_mixed_into_a_folder(began, tmp_path):
    source = tmp_path / "pairs.parquet"
    Dataset.from_dict({"image": [b"a"], "other": [b"b"]}).to_parquet(source)
    began(source, tmp_path / "out", "--image-column", "image")
    with pytest.raises(SystemExit, match="was begun with other image_column"):
        began(source, tmp_path / "out", "--image-column", "other")


@pytest.mark.parametrize("file", ["model.safetensors", "processor_config.json"])
def test_vectors_of_a_folder_that_has_changed_are_not_mixed_in(file, began, tmp_path):
    model = copy_checkpoint(tmp_path / "model")
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    arguments = (tmp_path / "one.png", tmp_path / "out", "--model", model)
    began(*arguments)
    (model / "README.md").write_text("What is not loaded does not count.")
    began(*arguments)
    content = (model / file).read_bytes()
    (model / file).write_bytes(content.replace(b"0.48145466", b"0.50000000") if ".json" in file else content[::-1])
    with pytest.raises(SystemExit, match="was begun with other version "):
        began(*arguments)


def test_vectors_of_a_branch_that_has_moved_are_not_mixed_in(hub, tmp_path):
    first = hub.add_repo("someone/tiny", {name: (ROOT / name).read_bytes() for name in CHECKPOINT_FILES})
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    code = """
import sys
from phi3_tools import embed as embed_ray
from phi3_tools.cli import main
embed_ray.embed, embed_ray.report_broken = lambda *arguments: print(arguments[3].revision), lambda *_: None
main(["embed", *sys.argv[1:]])
"""
    arguments = [tmp_path / "one.png", tmp_path / "out", "--model", "someone/tiny"]
    environment = hub.environment(tmp_path / "home")
    assert run_python(code, *arguments, **environment).split()[-1] == first  # which the workers are given
    hub.commit("someone/tiny", {"README.md": b"moved"})
    with pytest.raises(AssertionError, match="was begun with other version "):
        run_python(code, *arguments, **environment)


def test_16_bit_images_keep_their_greys_and_what_is_refused_is_an_error_of_that_image(tmp_path):
    greys = np.linspace(0, 255, 64**2).round().reshape(64, 64).astype(np.uint8)
    Image.fromarray(greys).save(tmp_path / "a.png")
    Image.fromarray(greys.astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.new("F", (9, 9), 300.0).save(tmp_path / "c.tiff")
    (shard,) = make_shards(tmp_path, 3)
    row = embed_ray.Preprocess(find_model(f"{ROOT}:mean"), 1, None)(shard)
    assert row["errors"][:2] == ["", ""] and "must be in 0..255" in row["errors"][2]
    views = row["pixel_values"]
    assert len(views) == 4 and (views[:2] == views[2:]).all()
