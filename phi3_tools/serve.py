"""
An OpenAI-style /v1/embeddings of images by LitServe.

`input` is an image, or a list of images, each a data URI (`data:image/png;base64,...`). Paths and addresses are
errors: a client has no say in what the server reads.
"""

import base64
import binascii

import litserve
from fastapi import HTTPException
from sentence_transformers import SentenceTransformer

from phi3_tools.images import open_image
from phi3_tools.models import PHI3_EMBED, ROOT, find_model


def run(model=None, host="127.0.0.1", port=8000, num_crops=None, dtype="float32", device=None):
    """Serves until it is interrupted."""
    api = Embeddings(spec=litserve.OpenAIEmbeddingSpec())
    api.model_name = find_model(model or str(ROOT))
    server = litserve.LitServer(api)
    server.run(host=host, port=port, generate_client_file=False)


class Embeddings(litserve.LitAPI):
    def setup(self, device):
        model = self.model_name
        code = {"code_revision": model.revision} if model.revision else {}
        self.model = SentenceTransformer(
            model.name,
            revision=model.revision,
            trust_remote_code=model.kind == PHI3_EMBED,
            device=device,
            model_kwargs=code,
            config_kwargs=code,
            processor_kwargs=code,
        )

    def predict(self, images):
        images = [images] if isinstance(images, str) else images
        images = [read_data_uri(image) for image in images]
        try:
            return self.model.encode(images).tolist()
        except ValueError as error:
            raise HTTPException(400, f"An input cannot be embedded: {error}") from error


def read_data_uri(uri):
    """A data URI -> PIL image. Raises HTTP status 400 for anything else."""
    try:
        head, _, content = uri.partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise ValueError("it does not begin with `data:image/...;base64,`")
        return open_image(base64.b64decode(content, validate=True))
    except (AttributeError, ValueError, binascii.Error) as error:
        raise HTTPException(400, f"An input is no image: {error}. Give data URIs of images.") from error
