"""examples/embed_ray.py on a local Ray of two nodes, with a worker and a driver killed."""

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
from conftest import ROOT
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from ray.cluster_utils import Cluster
from transformers import AutoImageProcessor, AutoModel

SCRIPT = ROOT / "examples" / "embed_ray.py"
NUM_IMAGES, SHARD_SIZE, BROKEN = 120, 2, 50


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**28})
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=2**28)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def files():
    """Picture files of unequal sizes by name, one of them broken."""
    generator, files = np.random.default_rng(0), {}
    for number in range(NUM_IMAGES):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (20 + number, 140 - number, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "png")
        files[f"{number:03}.png"] = b"no picture" if number == BROKEN else buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def vectors(files):
    """What the model gives without Ray."""
    where = {"pretrained_model_name_or_path": ROOT / "tiny", "trust_remote_code": True}
    pictures = [Image.open(io.BytesIO(file)) for file in files.values() if file != b"no picture"]
    inputs = AutoImageProcessor.from_pretrained(**where, num_crops=1)(pictures, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(**where)(**inputs).pooler_output.numpy()


def begin(cluster, source, folder, *more):
    command = [sys.executable, SCRIPT, source, folder, "--num-crops", "1", "--shard-size", SHARD_SIZE, "--copies", "1"]
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
            if raylet and any(cluster.address in each for each in raylet.cmdline()):
                found.append(process)
    return found


def wait_for_files(folder, count):
    stop = time.monotonic() + 90
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


def test_a_killed_driver_and_a_killed_worker_lose_and_double_no_row(cluster, files, vectors, tmp_path):
    pictures, folder = tmp_path / "pictures", tmp_path / "vectors"
    pictures.mkdir()
    for name, file in files.items():
        (pictures / name).write_bytes(file)

    driver = begin(cluster, pictures, folder)
    wait_for_files(folder, 3)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 3 <= len(before) < NUM_IMAGES // SHARD_SIZE
    while workers(cluster, "Embed"):  # those of the dead driver may still finish a shard
        time.sleep(0.1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}

    driver = begin(cluster, pictures, folder)
    wait_for_files(folder, len(before) + 3)
    (model,) = workers(cluster, "Embed")
    assert workers(cluster, "Preprocess")  # in processes of their own, so that they overlap
    model.kill()
    said, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert f"120 images in 60 shards, of which {len(before)} are done." in said
    assert "a second; the model was busy" in said
    assert f"1 of 120 images are broken and have no vector (column `error`):\n{pictures}/050.png: it is no" in said
    assert_equal_rows(folder, [str(pictures / name) for name in files], vectors)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert before.items() <= after.items()  # what was done was not done again


def test_parquet_and_webdataset_give_the_same_vectors(cluster, files, vectors, tmp_path):
    parquet, tar = tmp_path / "pictures.parquet", tmp_path / "pictures.tar"
    images = [{"bytes": file, "path": name} for name, file in files.items()]
    data = Dataset.from_dict({"image": images}).cast_column("image", ImageFeature(decode=False))
    data.to_parquet(parquet, batch_size=50)
    with tarfile.open(tar, "w") as archive:
        for name, file in files.items():
            for member, content in ((name, file), (name.replace("png", "txt"), b"a text")):
                about = tarfile.TarInfo(member)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))

    names = {
        parquet: [f"{parquet}#{number}" for number in range(NUM_IMAGES)],
        tar: [f"{tar}#{name}" for name in files],
    }
    for source in names:
        driver = begin(cluster, source, tmp_path / f"{source.suffix[1:]}-vectors", "--shard-size", "25")
        said, errors = driver.communicate(timeout=120)
        assert driver.returncode == 0, errors
        assert_equal_rows(tmp_path / f"{source.suffix[1:]}-vectors", names[source], vectors)


def test_a_users_mistake_is_told_in_a_line(cluster, tmp_path):
    empty, taken = tmp_path / "empty", tmp_path / "taken"
    empty.mkdir()
    taken.mkdir()
    (taken / "mine.parquet").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    for source, folder, told in (
        (tmp_path / "none", tmp_path / "out", "There is no "),
        (empty, tmp_path / "out", "holds no images"),
        (tmp_path / "one.png", taken, "are not of this command"),
    ):
        driver = begin(cluster, source, folder)
        errors = driver.communicate(timeout=120)[1]
        assert driver.returncode == 1 and told in errors.splitlines()[-1] and "Traceback" not in errors
