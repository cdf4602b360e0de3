"""
OpenAI's /v1/embeddings by LitServe.

An input is an image as a data URI (`data:image/png;base64,...`) or, where the model has a text side, a text. Paths and
addresses are no images: a client has no say in what the server reads. One request is worked on at a time, so each has
limits; what a client can mend is status 400 in words.
"""

import asyncio
import base64
import binascii
import io
import json
import struct
import time
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import litserve
import numpy as np
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from litserve.specs.base import LitSpec
from litserve.specs.openai_embedding import Embedding, EmbeddingResponse, UsageInfo
from litserve.utils import LitAPIStatus, ResponseBufferItem
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from phi3_tools import ROOT
from phi3_tools.measures import unit
from phi3_tools.models import Model, embed, find_model, load_embedder

ALIAS = "phi3-embed"  # any client may name the served model so


@dataclass
class Limits:
    """What one request may ask for: inputs, bytes of its body, and pixels of all its images."""

    inputs: int = 64
    bytes: int = 32 * 2**20
    pixels: int = 100_000_000


def run(model=None, host="127.0.0.1", port=8000, num_crops=None, dtype="float32", device=None, limits=None) -> None:
    """Serves until it is interrupted."""
    limits = limits or Limits()
    api = Api(find_model(model or str(ROOT)), num_crops, dtype, limits)
    accelerator = device.partition(":")[0] if device else "auto"
    server = litserve.LitServer(api, accelerator=accelerator, max_payload_size=limits.bytes)
    server.app.add_exception_handler(RequestValidationError, _say_invalid)
    server.app.add_exception_handler(StarletteHTTPException, _say)
    print(f"Serving {api.model.label} at http://{host}:{port}/v1")
    server.run(host=host, port=port, generate_client_file=False, log_level="warning")


# Requests


class EmbeddingRequest(BaseModel, allow_inf_nan=False):
    input: Any
    model: str
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
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
    # Without the input, which may hold what JSON cannot say, such as NaN.
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
    for uri in uris:
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
            raise _refuse(f"An input is no image: {error}. Give data URIs of images.") from error
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


# The server


class Spec(LitSpec):
    """The endpoints. Each request goes through one queue to the one process that holds the model."""

    stream = True

    def __init__(self, names: list[str], limits: Limits):
        super().__init__()
        self.api_path, self.names, self.limits = "/v1/embeddings", names, limits

    def pre_setup(self, lit_api):
        self.add_endpoint(self.api_path, self.embeddings, ["POST"])
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
        return EmbeddingResponse(data=data, model=request.model, usage=UsageInfo(**answer["usage"]))

    def _check_model(self, name):
        if name not in self.names:
            raise HTTPException(404, f"There is no model {name!r} here, but {self.names[0]!r}.")

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


class Api(litserve.LitAPI):
    def __init__(self, model: Model, num_crops: int | None, dtype: str, limits: Limits):
        names = [model.label, ALIAS, model.text, model.name, model.pinned_text]
        super().__init__(spec=Spec(list(dict.fromkeys(names)), limits), stream=True)
        self.model, self.num_crops, self.dtype, self.limits = model, num_crops, dtype, limits

    def setup(self, device):
        self.embedder = load_embedder(self.model, self.num_crops, self.dtype, device)

    def predict(self, request):
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
