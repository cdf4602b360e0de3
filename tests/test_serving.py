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
from fastapi import HTTPException
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

from phi3_tools import serve
from phi3_tools.cli import main
from phi3_tools.models import find_model

LIMITS = {"--max-inputs": 5, "--max-bytes": 300_000, "--max-pixels": 1_000_000, "--max-tokens": 8}


@pytest.fixture(scope="module")
def address(tmp_path_factory, whole_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serving") / "log"
    settings = {"--model": whole_checkpoint, "--port": port} | LIMITS
    command = [sys.executable, "-m", "phi3_tools", "serve"] + [str(part) for pair in settings.items() for part in pair]
    with log.open("w") as file:
        server = subprocess.Popen(command, env=os.environ, stdout=file, stderr=file)
    address, stop = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while not is_ready(address):
            assert server.poll() is None and time.monotonic() < stop, log.read_text()
            time.sleep(0.2)
        yield address
        print(log.read_text())
    finally:
        workers = psutil.Process(server.pid).children(recursive=True)
        for worker in workers:  # as Ctrl+C does; SIGTERM is for the first process alone
            worker.send_signal(signal.SIGINT)
        server.terminate()
        server.wait(30)
        left = psutil.wait_procs(workers, timeout=60)[1]
        for worker in left:
            worker.kill()
    assert not left, "the server is gone, and its processes are not"
    assert "Traceback" not in log.read_text(), log.read_text()


def is_ready(address):
    try:
        return httpx2.get(f"{address}/health").status_code == 200
    except httpx2.TransportError:
        return False


def data_uri(image, kind="png", **settings):
    if isinstance(image, bytes):
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return data_uri(buffer.getvalue(), kind)


def ask(address, given, **more):
    return httpx2.post(f"{address}/v1/embeddings", json={"input": given, "model": "phi3-embed"} | more, timeout=60)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_images_and_texts_become_the_vectors_that_sentence_transformers_gives(address, client, whole_checkpoint):
    deep = Image.fromarray(np.linspace(0, 65535, 64**2).reshape(64, 64).astype(np.uint16))
    images = [Image.linear_gradient("L"), Image.radial_gradient("L").resize((400, 200)), deep]
    model = SentenceTransformer(str(whole_checkpoint), trust_remote_code=True)
    wanted = [*model.encode_document(images), model.encode_query("a cat")]
    inputs = [*map(data_uri, images), "a cat"]
    answer = ask(address, inputs).json()["data"]
    assert [embedding["index"] for embedding in answer] == [0, 1, 2, 3]
    np.testing.assert_allclose([embedding["embedding"] for embedding in answer], wanted, atol=1e-6)
    name = client.models.list().data[0].id  # whose library asks for base64
    for given, vector in zip(inputs, wanted):
        (embedding,) = client.embeddings.create(input=given, model=name).data
        np.testing.assert_allclose(embedding.embedding, vector, atol=1e-6)


def test_a_text_that_is_the_path_or_address_of_an_image_is_words(address, tmp_path):
    Image.linear_gradient("L").save(path := tmp_path / "a.png")
    texts = [str(path), f"http://{path}", "a cat"]
    found = [entry["embedding"] for entry in ask(address, [*texts, data_uri(Image.open(path))]).json()["data"]]
    assert not np.allclose(found[0], found[3], atol=1e-3)
    path.unlink()  # a file that is not there is words to every library
    np.testing.assert_allclose(ask(address, str(path)).json()["data"][0]["embedding"], found[0], atol=1e-6)


def chat(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def answered(whole_checkpoint):
    """What the model itself answers to a text with images, in eight tokens."""
    where = {"pretrained_model_name_or_path": whole_checkpoint, "trust_remote_code": True}
    model, processor = AutoModelForImageTextToText.from_pretrained(**where), AutoProcessor.from_pretrained(**where)

    def answer(text, *images):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    return answer


def test_a_chat_with_images_is_answered_as_the_model_does_whole_and_streamed(client, answered):
    images = [Image.linear_gradient("L"), Image.radial_gradient("L").resize((400, 200))]
    for given in ((), images[:1], images):
        wanted, messages = answered("what is this?", *given), chat("what is this?", *given)
        completion = client.chat.completions.create(model="phi3-embed", messages=messages)
        (choice,) = completion.choices
        assert choice.message.content == wanted and choice.finish_reason == "length"
        assert completion.usage.completion_tokens == 8
        turns = [*messages, choice.message, *chat("and now?")]  # as OpenAI's guide goes on with a conversation
        assert client.chat.completions.create(model="phi3-embed", messages=turns).choices
        streamed = {"model": "phi3-embed", "messages": messages, "stream": True}
        *chunks, last = client.chat.completions.create(**streamed, stream_options={"include_usage": True})
        assert last.choices == [] and last.usage == completion.usage and not any(chunk.usage for chunk in chunks)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
        assert len(chunks) > 2 and chunks[-1].choices[0].finish_reason == "length"
        assert len(list(client.chat.completions.create(**streamed))) == len(chunks)
        assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", *[None] * (len(chunks) - 1)]


def test_sampling_stop_and_length_are_honoured(client, answered):
    messages, whole = chat("what is this?"), answered("what is this?")
    settings = {"model": "phi3-embed", "messages": messages, "temperature": 2.0}
    first, again = (client.chat.completions.create(**settings, seed=5).choices[0].message.content for _ in range(2))
    assert first == again != whole
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stream", "seed", "stop"))  # as some clients send it
    for same in (nothing, {"temperature": 1e-40}):
        answer = client.chat.completions.create(model="phi3-embed", messages=messages, extra_body=same)
        assert answer.choices[0].message.content == whole
    short = client.chat.completions.create(model="phi3-embed", messages=messages, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3 and whole.startswith(short.choices[0].message.content)
    stopped = client.chat.completions.create(model="phi3-embed", messages=messages, stop=[whole[3:6]])
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].message.content == whole[:3]


def test_a_stop_string_may_lie_across_pieces():
    for pieces in (["abcd", "ef"], list("abcdef"), ["ab", "", "cdef"]):
        assert "".join(serve._until(iter(pieces), ["cd", "zz"])) == "ab"
        assert "".join(serve._until(iter(pieces), ["fgh"])) == "".join(serve._until(iter(pieces), [])) == "abcdef"


@pytest.mark.parametrize(
    ("messages", "more", "said"),
    [
        ([], {}, "`messages` is empty"),
        ([{"role": "tool", "content": "a"}], {}, "The request is invalid. messages.0.role"),
        ([{"role": "user", "content": "<|image_1|> what?"}], {}, "The messages cannot be read: "),
        (chat("a", Image.new("L", (2000, 2000))), {}, "may have 1000000 pixels together"),
        (chat("a", *[Image.new("L", (8, 8))] * 6), {}, "`messages` have 6 images, but a request may have 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]}],
            {},
            "no image",
        ),
        (
            [{"role": "assistant", "content": chat("a", Image.new("L", (8, 8)))[0]["content"]}],
            {},
            "An image is in a turn",
        ),
        (chat("a"), {"max_tokens": 9}, "`max_tokens` is 9, but an answer may have 8"),
        (chat("word " * 9000), {}, "but together the model takes 8192"),
        (chat("a"), {"n": 2}, "The request is invalid. n"),
        (chat("a"), {"stream_options": {"obfuscate": True}}, "The request is invalid. stream_options"),
        (chat("a"), {"stop": [""]}, "The request is invalid. stop"),
        (chat("a"), {"seed": 2**70}, "The request is invalid. seed"),
        (chat("a"), {"tools": []}, "The request is invalid. tools"),
        (chat("a"), {"temperature": -1}, "The request is invalid. temperature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_chat_is_the_clients_error(client, messages, more, said, stream):
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(model="phi3-embed", messages=messages, stream=stream, extra_body=more)


IMAGE = data_uri(Image.new("L", (8, 8)))
WRONG = {
    "no image": (
        [IMAGE, "data:image/png;base64,bm8="],
        "An input is no image (2 of 2): An image of 2 bytes cannot be read as an image: its format is not known. Give",
    ),
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
    "numbers of an unknown range": (
        data_uri(Image.new("F", (8, 8), 300.0), "tiff"),
        "0..255: scale it first. Give data",
    ),
    "a decoder's KeyError": (data_uri(Image.new("L", (8, 8)), "tiff", tiffinfo={0xA005: 8}), "An input"),
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
        ({"dimensions": 64}, 400, "`dimensions` is 64, but this model's vectors are trained for 96 alone"),
        ({"model": "gpt-4"}, 404, "There is no model 'gpt-4' here, but 'model' or 'phi3-embed'."),
        ({"prompt_name": "query"}, 400, "The request is invalid. prompt_name: "),
        ({"encoding_format": "int8"}, 400, "The request is invalid. encoding_format: "),
    ],
)
def test_settings_are_honoured_or_refused(address, more, status, said):
    answer = ask(address, IMAGE, **more)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert ask(address, IMAGE, dimensions=96).status_code == 200


@pytest.mark.parametrize("body", ['{"input": NaN, "model": "x"}', '{"model": NaN, "input": "a"}', "{", "[]", "null"])
def test_json_of_every_kind_is_answered_in_words(address, body):
    answer = httpx2.post(f"{address}/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"], answer.text


def test_a_port_that_is_taken_is_told_before_the_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"at 127.0.0.1, port {port} .*Give another --port"):
            main(["serve", "--model", "nowhere", "--port", port])


def test_a_model_of_images_alone_refuses_texts_and_chats_in_words(embedding_checkpoint):
    api = serve.Api(find_model(embedding_checkpoint), 0, "float32", serve.Limits())
    api.setup("cpu")
    ask = serve.ChatRequest(model="phi3-embed", messages=[{"role": "user", "content": "a"}], max_tokens=1)
    for request in (serve.EmbeddingRequest(model="phi3-embed", input=["/etc/hostname"]), ask):
        with pytest.raises(HTTPException, match="has no text side|has no language model"):
            list(api.predict(request))


def test_a_stop_string_ends_an_answer_of_a_tokenizer_that_cannot_spell():
    api = serve.Api(find_model(str(ROOT)), 0, "float32", serve.Limits())
    api.setup("cpu")
    asked = {"messages": [{"role": "user", "content": "the number seven"}], "max_tokens": 4, "stop": "even"}
    _, *pieces = api.predict(serve.ChatRequest(model="phi3-embed", **asked))
    assert "".join(piece["text"] for piece in pieces) == "s" and pieces[-1]["finish_reason"] == "stop"
    assert pieces[-1]["usage"]["completion_tokens"] == 1
    for most, reason in ((1, "length"), (2, "stop")):  # the word, and the end of the text
        *_, last = api.predict(serve.ChatRequest(model="phi3-embed", **asked | {"stop": None, "max_tokens": most}))
        assert (last["usage"]["completion_tokens"], last["finish_reason"]) == (most, reason)


def test_vectors_are_cut_to_the_dimensions_that_the_model_is_trained_for(embedding_checkpoint):
    api = serve.Api(find_model(embedding_checkpoint), 0, "float32", serve.Limits())
    api.setup("cpu")
    api.embedder.dimensions = (16,)

    def ask(dimensions):
        request = serve.EmbeddingRequest(model="phi3-embed", input=[IMAGE], dimensions=dimensions)
        return np.array(next(api.predict(request))["vectors"][0])

    whole = ask(None)[:16]
    np.testing.assert_allclose(ask(16), whole / np.linalg.norm(whole), atol=1e-6)
    with pytest.raises(HTTPException, match="trained for 128, 16 alone"):
        ask(8)


def test_a_body_that_is_too_large_is_refused(address):
    answer = ask(address, [IMAGE, "x" * 400_000])
    assert answer.status_code == 413 and "body is too large" in answer.json()["error"]["message"]
