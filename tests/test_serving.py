"""`phi3-embed serve`, over HTTP and by OpenAI's client."""

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
import openai
import psutil
import pytest
from conftest import ROOT
from PIL import Image
from sentence_transformers import SentenceTransformer

LIMITS = ("--max-inputs", "5", "--max-bytes", "300000", "--max-pixels", "1000000")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serving") / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "phi3_tools", "serve", "--port", str(port), *LIMITS]
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
    if isinstance(image, bytes):
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return data_uri(buffer.getvalue(), kind)


def ask(address, given, **more):
    return httpx2.post(f"{address}/v1/embeddings", json={"input": given, "model": "phi3-embed"} | more, timeout=60)


def test_images_become_the_vectors_that_sentence_transformers_gives(address):
    deep = Image.fromarray(np.linspace(0, 65535, 64**2).reshape(64, 64).astype(np.uint16))
    images = [Image.linear_gradient("L"), Image.radial_gradient("L").resize((400, 200)), deep]
    wanted = SentenceTransformer(str(ROOT), trust_remote_code=True).encode(images)
    for given, vectors in (data_uri(images[0]), wanted[:1]), ([data_uri(image) for image in images], wanted):
        answer = ask(address, given)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert [embedding["index"] for embedding in data] == list(range(len(vectors)))
        np.testing.assert_allclose([embedding["embedding"] for embedding in data], vectors, atol=1e-6)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")  # which asks for base64
    (embedding,) = client.embeddings.create(input=data_uri(images[1]), model=client.models.list().data[0].id).data
    np.testing.assert_allclose(embedding.embedding, wanted[1], atol=1e-6)


IMAGE = data_uri(Image.new("L", (8, 8)))
WRONG = {
    "a path": ("/etc/hostname", "has no text side. Give data URIs of images"),
    "an address": ("http://127.0.0.1/a.png", "has no text side. Give data URIs of images"),
    "no image": ("data:image/png;base64,bm8=", "An input is no image"),
    "no base64": ("data:image/png;base64,%%%", "An input is no image"),
    "another kind": ("data:text/html;base64,bm8=", "it does not begin with `data:image/...;base64,`"),
    "nothing": ([], "`input` is empty"),
    "token ids": ([1, 2, 3], "`input` holds token ids"),
    "lists of token ids": ([[1, 2], [3]], "`input` holds token ids"),
    "an empty text": ("  ", "`input` holds '  '"),
    "a number": (1.5, "`input` holds 1.5"),
    "null": (None, "`input` holds None"),
    "many": ([IMAGE] * 6, "`input` has 6 items, but a request may have 5"),
    "many pixels": ([data_uri(Image.new("L", (800, 800)))] * 2, "may have 1000000 pixels together"),
    "a bomb": (data_uri(Image.new("1", (20000, 20000))), "may have 1000000 pixels together"),
    "numbers of an unknown range": (data_uri(Image.new("F", (8, 8), 300.0), "tiff"), "must be in 0..255"),
    "a decoder's KeyError": (
        data_uri(b"II*\0\x08\0\0\0\1\0\x05\xa0\4\0\1\0\0\0\x08\0\0\0\0\0\0\0", "tiff"),
        "An input",
    ),
    "a decoder's NotImplementedError": (data_uri(b"DDS " + bytes([124, 0, 0, 0]) + bytes(120), "dds"), "An input"),
    "a decoder's IndexError": (data_uri(b"qoif" + bytes([0, 0, 0, 9, 0, 0, 0, 9, 3, 0]), "qoi"), "An input"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_input_is_the_clients_error(address, case):
    given, said = WRONG[case]
    answer = ask(address, given)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"dimensions": 64}, 400, "`dimensions` is 64, but this model's vectors are trained for 128 alone"),
        ({"model": "gpt-4"}, 404, "There is no model 'gpt-4' here, but "),
        ({"encoding_format": "int8"}, 400, "The request is invalid. encoding_format: "),
    ],
)
def test_settings_are_honoured_or_refused(address, more, status, said):
    answer = ask(address, IMAGE, **more)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert ask(address, IMAGE, dimensions=128).status_code == 200


@pytest.mark.parametrize("body", ['{"input": NaN, "model": "x"}', '{"model": NaN, "input": "a"}', "{", "[]", "null"])
def test_json_of_every_kind_is_answered_in_words(address, body):
    answer = httpx2.post(f"{address}/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"], answer.text


def test_a_body_that_is_too_large_is_refused(address):
    answer = ask(address, [IMAGE, "x" * 400_000])
    assert answer.status_code == 413 and "body is too large" in answer.json()["error"]["message"]
