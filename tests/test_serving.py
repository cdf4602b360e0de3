"""examples/serve.py, over HTTP."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time

import httpx2
import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image
from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serving") / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "phi3_tools", "serve", "--port", str(port)]
        server = subprocess.Popen(command, env=os.environ, stdout=file, stderr=file)
    address, stop = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        assert server.poll() is None and time.monotonic() < stop, log.read_text()
        try:
            if httpx2.get(f"{address}/health").status_code == 200:
                break
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    yield address
    workers = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGINT)
    server.wait(30)
    for worker in psutil.wait_procs(workers, timeout=10)[1]:
        worker.kill()


def data_uri(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_images_become_the_vectors_that_sentence_transformers_gives(address):
    deep = Image.fromarray(np.linspace(0, 65535, 64**2).reshape(64, 64).astype(np.uint16))
    images = [Image.linear_gradient("L"), Image.radial_gradient("L").resize((400, 200)), deep]
    wanted = SentenceTransformer(str(ROOT), trust_remote_code=True).encode(images)
    for given, vectors in (data_uri(images[0]), wanted[:1]), ([data_uri(image) for image in images], wanted):
        body = {"input": given, "model": "phi3-embed"}
        answer = httpx2.post(f"{address}/v1/embeddings", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert [each["index"] for each in data] == list(range(len(vectors)))
        np.testing.assert_allclose([each["embedding"] for each in data], vectors, atol=1e-5)


@pytest.mark.parametrize("given", ["/etc/hostname", "http://127.0.0.1/a.png", "data:image/png;base64,bm8="])
def test_what_is_no_image_is_the_clients_error(address, given):
    answer = httpx2.post(f"{address}/v1/embeddings", json={"input": given, "model": "phi3-embed"}, timeout=60)
    assert answer.status_code == 400 and "An input is no image" in answer.text


def test_numbers_of_an_unknown_range_are_the_clients_error(address):
    given = data_uri(Image.new("F", (8, 8), 300.0), "tiff")
    answer = httpx2.post(f"{address}/v1/embeddings", json={"input": given, "model": "phi3-embed"}, timeout=60)
    assert answer.status_code == 400 and "values from 300.0 to 300.0, but must be in 0..255" in answer.text
