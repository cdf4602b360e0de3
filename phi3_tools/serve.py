"""
OpenAI's /v1/embeddings and /v1/chat/completions by LitServe, of one model in one process.

An image is a data URI (`data:image/png;base64,...`). Paths and addresses are none: a client has no say in what the
server reads. Texts are embedded where the model has a text side, and chats answered where it has a language model. One
request is worked on at a time, so each has limits; what a client can mend is status 400 in words, and what the server
does not honour is refused.
"""

import asyncio
import base64
import binascii
import io
import json
import os
import signal
import socket
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import litserve
import numpy as np
import torch
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from litserve.specs.base import LitSpec
from litserve.specs.openai import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionStreamingChoice,
    ChatMessage,
    ChoiceDelta,
    UsageInfo,
)
from litserve.specs.openai_embedding import Embedding, EmbeddingResponse
from litserve.utils import LitAPIStatus, ResponseBufferItem
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from phi3_tools import ROOT
from phi3_tools.measures import unit
from phi3_tools.models import PHI3_EMBED, Model, embed, find_model, load_embedder, prompt_inputs

ALIAS = "phi3-embed"  # any client may name the served model so
LOWEST_TEMPERATURE = 0.01


@dataclass
class Limits:
    """What one request may ask for: inputs, bytes of its body, pixels of all its images, and tokens of an answer."""

    inputs: int = 64
    bytes: int = 32 * 2**20
    pixels: int = 100_000_000
    tokens: int = 1024


def run(model=None, host="127.0.0.1", port=8000, num_crops=None, dtype="float32", device=None, limits=None) -> None:
    """
    Serves until it is interrupted.

    Raises:
        OSError: nothing can listen there.
    """
    _check_free(host, port)
    limits = limits or Limits()
    api = Api(find_model(model or str(ROOT)), num_crops, dtype, limits)
    accelerator = device.partition(":")[0] if device else "auto"
    server = Server(api, accelerator=accelerator, max_payload_size=limits.bytes)
    server.app.add_exception_handler(RequestValidationError, _say_invalid)
    server.app.add_exception_handler(StarletteHTTPException, _say)
    _end_as_by_ctrl_c()
    print(f"Serving {api.model.label} at http://{host}:{port}/v1")
    server.run(host=host, port=port, generate_client_file=False, log_level="warning")


def _end_as_by_ctrl_c():
    """LitServe ends its processes at Ctrl+C alone; at SIGTERM they would stay, with the model, and answer on."""
    own = os.getpid()

    def end(number, frame):
        if os.getpid() == own:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a process that was forked from this one
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)


def _check_free(host, port):
    """The server itself would say so after it has loaded the model, in words of its own."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
    except OSError as error:
        raise OSError(
            f"Nothing can listen at {host}, port {port} ({error.strerror}). Give another --port, or another --host."
        ) from error


# Requests


class EmbeddingRequest(BaseModel, allow_inf_nan=False, extra="forbid"):
    input: Any
    model: str
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Part(BaseModel, extra="forbid"):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: dict[str, str] | str | None = None


class Message(BaseModel, extra="forbid"):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


Stop = Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel, allow_inf_nan=False, extra="forbid"):
    messages: list[Message]
    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Literal[1] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    user: str | None = None


def _refuse(text: str) -> HTTPException:
    return HTTPException(400, text)


def _say(request: Request, error: StarletteHTTPException) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    detail = "The request's body is too large. Send smaller ones." if error.status_code == 413 else error.detail
    about = {"message": str(detail), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": about}, error.status_code)


def _say_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    # The input is left out, because it may hold what JSON cannot say, such as NaN.
    reasons = [f"{'.'.join(map(str, part['loc'][1:])) or 'body'}: {part['msg']}" for part in error.errors()]
    return _say(request, _refuse(f"The request is invalid. {'; '.join(reasons)}"))


def check_inputs(given: Any, limits: Limits) -> list[str]:
    """`input` of a request -> a list of texts and data URIs. Raises HTTP status 400 for all else."""
    inputs = given if isinstance(given, list) else [given]
    if not inputs:
        raise _refuse("`input` is empty. Give a text, an image as a data URI, or a list of such.")
    if len(inputs) > limits.inputs:
        raise _refuse(f"`input` has {len(inputs)} items, but a request may have {limits.inputs}. Send several.")
    for item in inputs:
        if not isinstance(item, str) or not item.strip():
            kind = "token ids" if isinstance(item, (int, list)) else f"{item!r:.80}"
            raise _refuse(f"`input` holds {kind}, but must hold texts, or images as data URIs.")
    return inputs


def open_data_uris(uris: list[str], limits: Limits, open_image) -> list[Image.Image]:
    """Images of data URIs. Raises HTTP status 400 for what is none, and beyond the limit of pixels."""
    images, pixels = [], 0
    for number, uri in enumerate(uris, 1):
        try:
            head, _, content = uri.partition(",")
            if not (head.startswith("data:image/") and head.endswith(";base64")):
                raise ValueError("it does not begin with `data:image/...;base64,`")
            content = base64.b64decode(content, validate=True)
            pixels += _count_pixels(content)
            if pixels > limits.pixels:
                raise _refuse(
                    f"The images of a request may have {limits.pixels} pixels together. Send fewer or smaller ones."
                )
            images.append(open_image(content))
        except (ValueError, binascii.Error) as error:
            reason = str(error).rstrip(".")
            raise _refuse(f"An input is no image ({number} of {len(uris)}): {reason}. Give data URIs.") from error
    return images


def _count_pixels(content):
    """Width x height of all frames that a decoder would touch, by the header alone; 0 where it cannot be told."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return 2 * Image.MAX_IMAGE_PIXELS
    except Exception:  # of any type, as decoders raise; opening the image says why
        return 0


def _until(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """The pieces of a text up to the first of the stop strings, which may lie across pieces; the rest is drained."""
    held, back, is_over = "", max(map(len, stops), default=1) - 1, False
    for piece in pieces:
        held += "" if is_over else piece
        if ends := [held.find(stop) for stop in stops if stop in held]:
            held, back, is_over = held[: min(ends)], 0, True
        said, held = held[: len(held) - back], held[max(len(held) - back, 0) :]
        if said:
            yield said
    if held:
        yield held


# The server


class Spec(LitSpec):
    """The endpoints. Each request goes through one queue to the one process that holds the model."""

    stream = True

    def __init__(self, names: list[str], limits: Limits):
        super().__init__()
        self.api_path, self.names, self.limits = "/v1/embeddings", names, limits

    def pre_setup(self, lit_api):
        self.add_endpoint(self.api_path, self.embeddings, ["POST"])
        self.add_endpoint("/v1/chat/completions", self.chat, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])

    def decode_request(self, request, context_kwargs=None):
        return request

    def encode_response(self, output, context_kwargs=None):
        yield from output

    async def models(self):
        return {"object": "list", "data": [{"id": self.names[0], "object": "model", "owned_by": "phi3-embed"}]}

    async def embeddings(self, request: EmbeddingRequest) -> EmbeddingResponse:
        self._check_model(request.model)
        request.input = check_inputs(request.input, self.limits)
        answer = json.loads(await anext(aiter(self._ask(request))))
        vectors = answer["vectors"]
        if request.encoding_format == "base64":  # little-endian float32
            vectors = [base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() for vector in vectors]
        data = [Embedding(index=index, embedding=vector) for index, vector in enumerate(vectors)]
        return EmbeddingResponse(data=data, model=request.model, usage=answer["usage"])

    async def chat(self, request: ChatRequest):
        self._check_model(request.model)
        request.max_tokens = request.max_completion_tokens or request.max_tokens or self.limits.tokens
        if request.max_tokens > self.limits.tokens:
            raise _refuse(f"`max_tokens` is {request.max_tokens}, but an answer may have {self.limits.tokens}.")
        pieces = aiter(self._ask(request))
        begun = json.loads(await anext(pieces))  # before the stream, because a refusal has a status of its own
        if request.stream:
            return StreamingResponse(self._stream(request, pieces), media_type="text/event-stream")
        text, ended = "", begun
        async for piece in pieces:
            ended = json.loads(piece)
            text += ended["text"]
        message = ChatMessage(role="assistant", content=text)
        choice = ChatCompletionResponseChoice(index=0, message=message, finish_reason=ended["finish_reason"])
        answer = ChatCompletionResponse(model=request.model, choices=[choice], usage=UsageInfo(**ended["usage"]))
        return answer.model_dump(exclude_none=True)  # clients send the message back with the next turn

    async def _stream(self, request, pieces):
        chunk = ChatCompletionChunk(model=request.model, choices=[], usage=None)
        role = "assistant"  # in the first chunk alone, because clients join the chunks

        def say(**said):
            return f"data: {chunk.model_copy(update=said).model_dump_json()}\n\n"

        try:
            async for piece in pieces:
                piece = json.loads(piece)
                delta, role = ChoiceDelta(role=role, content=piece["text"]), None
                reason = piece["finish_reason"]
                yield say(choices=[ChatCompletionStreamingChoice(index=0, delta=delta, finish_reason=reason)])
            if (request.stream_options or {}).get("include_usage"):  # in a chunk of its own, as OpenAI's
                yield say(usage=UsageInfo(**piece["usage"]))
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield f"data: {_say(None, error).body.decode()}\n\n"

    def _check_model(self, name):
        if name not in self.names:
            raise HTTPException(404, f"There is no model {name!r} here, but {' or '.join(map(repr, self.names[:2]))}.")

    async def _ask(self, request):
        """What the model's process answers to a request, piece by piece."""
        uid, queue, event = uuid.uuid4(), deque(), asyncio.Event()
        self.response_buffer[uid] = ResponseBufferItem(response_queue=queue, event=event)
        self.request_queue.put((self.response_queue_id, uid, time.monotonic(), request))
        try:
            async for piece, status in self.data_streamer(queue, event, send_status=True):
                if status == LitAPIStatus.ERROR:
                    raise piece if isinstance(piece, HTTPException) else HTTPException(500, "The server failed.")
                yield piece
        finally:
            self.response_buffer.pop(uid, None)


class Server(litserve.LitServer):
    def launch_inference_worker(self, lit_api):
        """Ctrl+C reaches all processes, but is for the first, which ends the others: they would show tracebacks."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the worker inherits
        try:
            return super().launch_inference_worker(lit_api)
        finally:
            signal.signal(signal.SIGINT, before)


class Api(litserve.LitAPI):
    def __init__(self, model: Model, num_crops: int | None, dtype: str, limits: Limits):
        names = [model.label, ALIAS, model.text, model.name, model.pinned_text]
        super().__init__(spec=Spec(list(dict.fromkeys(names)), limits), stream=True)
        self.model, self.num_crops, self.dtype, self.limits = model, num_crops, dtype, limits

    def setup(self, device):
        self.chat_model = self.processor = None
        if self.model.kind == PHI3_EMBED and AutoConfig.from_pretrained(**self.model.pinned).text_config is not None:
            where = {**self.model.pinned, "dtype": getattr(torch, self.dtype), "device_map": device}
            self.chat_model = AutoModelForImageTextToText.from_pretrained(**where).eval()
            self.processor = AutoProcessor.from_pretrained(**self.model.pinned)
        whole = self.chat_model and self.chat_model.model  # whose weights the embedder shares
        self.embedder = load_embedder(self.model, self.num_crops, self.dtype, device, whole)

    def predict(self, request):
        yield from self._answer(request) if isinstance(request, ChatRequest) else self._vectors(request)

    def _answer(self, request):
        """The length of the prompt, then the answer's text piece by piece; the last says why it ended."""
        if self.chat_model is None:
            raise _refuse(f"{self.model.label} has no language model, so it answers no chats. Ask for embeddings.")
        inputs = self._prompt(request.messages).to(self.chat_model.device)
        length, most = inputs["input_ids"].shape[1], self.chat_model.config.text_config.max_position_embeddings
        if length + request.max_tokens > most:
            raise _refuse(
                f"The prompt has {length} tokens, those of its images counted, and the answer may have "
                f"{request.max_tokens}, but together the model takes {most}. Send less, or lower `max_tokens`."
            )
        usage = {"prompt_tokens": length, "completion_tokens": 0}
        yield {"usage": usage, "finish_reason": None}
        # A lower temperature draws the likeliest token anyway, and logits divided by it can overflow.
        settings = {
            "max_new_tokens": request.max_tokens,
            "do_sample": (request.temperature or 0) >= LOWEST_TEMPERATURE,
        }
        if settings["do_sample"]:
            settings |= {"temperature": request.temperature, "top_p": request.top_p or 1.0}
        tokenizer = self.processor.tokenizer
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []

        def has_stopped(ids, scores, **kwargs):
            said = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
            return torch.tensor([any(stop in said for stop in stops)], device=ids.device)

        if stops:  # not by `stop_strings`, which fail where a tokenizer has no token for some letter
            settings["stopping_criteria"] = [has_stopped]
        if request.seed is not None:
            torch.manual_seed(request.seed)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        outcome = {}

        def generate():
            try:
                outcome["ids"] = self.chat_model.generate(**inputs, **settings, streamer=streamer)[0]
            except Exception as error:  # told where the stream is read
                outcome["error"] = error
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        for text in _until(streamer, stops):
            yield {"text": text, "finish_reason": None, "usage": None}
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        usage["completion_tokens"] = len(outcome["ids"]) - usage["prompt_tokens"]
        usage["total_tokens"] = len(outcome["ids"])
        ends = np.atleast_1d(self.chat_model.generation_config.eos_token_id)
        has_ended = outcome["ids"][-1].item() in ends or has_stopped(outcome["ids"][None], None).item()
        yield {"text": "", "finish_reason": "stop" if has_ended else "length", "usage": usage}

    def _prompt(self, messages):
        """What the language model takes of a conversation. Raises HTTP status 400 if it cannot be made."""
        if not messages:
            raise _refuse("`messages` is empty. Give one of the role user.")
        uris, conversation = [], []
        for message in messages:
            parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            content = []
            for part in parts:
                if part.type == "text":
                    content.append({"type": "text", "text": part.text or ""})
                else:
                    uris.append(
                        part.image_url.get("url", "") if isinstance(part.image_url, dict) else part.image_url or ""
                    )
                    content.append({"type": "image"})
            conversation.append({"role": message.role, "content": content})
        if len(uris) > self.limits.inputs:
            raise _refuse(f"`messages` have {len(uris)} images, but a request may have {self.limits.inputs}.")
        images = iter(open_data_uris(uris, self.limits, self.embedder.open_image))
        for part in (part for message in conversation for part in message["content"] if part["type"] == "image"):
            part["image"] = next(images)
        try:
            return prompt_inputs(self.processor, [conversation], self.num_crops, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:
            raise _refuse(f"The messages cannot be read: {error}") from error

    def _vectors(self, request):
        vectors = unit(self._embed(request.input))
        if request.dimensions not in (None, vectors.shape[1]):
            if request.dimensions not in self.embedder.dimensions:
                raise _refuse(
                    f"`dimensions` is {request.dimensions}, but this model's vectors are trained for "
                    f"{', '.join(map(str, [vectors.shape[1], *self.embedder.dimensions]))} alone. Leave it out."
                )
            vectors = unit(vectors[:, : request.dimensions])
        yield {"vectors": vectors.tolist(), "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    def _embed(self, inputs):
        """Vectors of texts and images in the order of the inputs."""
        is_image = np.array([item.startswith("data:") for item in inputs])
        images = open_data_uris(
            [item for item in inputs if item.startswith("data:")], self.limits, self.embedder.open_image
        )
        texts = [item for item in inputs if not item.startswith("data:")]
        if texts and self.embedder.encode_texts is None:
            raise _refuse(f"An input is no image, and {self.model.label} has no text side. Give data URIs of images.")
        parts = []
        for encode, items, places in (
            (self.embedder.encode_images, images, is_image),
            (self.embedder.encode_texts, texts, ~is_image),
        ):
            if items:
                try:
                    parts.append((places, embed(encode, items)))
                except ValueError as error:
                    raise _refuse(f"An input cannot be embedded: {error}") from error
        vectors = np.empty((len(inputs), parts[0][1].shape[1]), np.float32)
        for places, part in parts:
            vectors[places] = part
        if not np.isfinite(vectors).all():
            raise HTTPException(500, "The model gives vectors that are not finite.")
        return vectors
