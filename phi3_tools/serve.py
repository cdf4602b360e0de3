"""
An OpenAI-style /v1/embeddings of images by LitServe.

    python examples/serve.py [--model MODEL] [--revision COMMIT] [--port PORT]

`input` is an image, or a list of images, each a data URI (`data:image/png;base64,...`). Paths and addresses are
errors: a client has no say in what the server reads.
"""

import argparse
import base64
import binascii
import io
from pathlib import Path

import litserve
from fastapi import HTTPException
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer

TINY = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description="Serve /v1/embeddings of images.")
    parser.add_argument("--model", default=str(TINY), help="a folder or Hub id (default tiny/)")
    parser.add_argument("--revision", help="the commit to load from the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    arguments = parser.parse_args()
    api = Embeddings(spec=litserve.OpenAIEmbeddingSpec())
    api.model_name, api.revision = arguments.model, arguments.revision
    server = litserve.LitServer(api)
    server.run(host=arguments.host, port=arguments.port, generate_client_file=False)


class Embeddings(litserve.LitAPI):
    def setup(self, device):
        self.model = SentenceTransformer(
            self.model_name, revision=self.revision, trust_remote_code=True, device=device
        )

    def predict(self, images):
        images = [images] if isinstance(images, str) else images
        images = [read_image(image) for image in images]
        try:
            return self.model.encode(images).tolist()
        except ValueError as error:
            raise HTTPException(400, f"An input cannot be embedded: {error}") from error


def read_image(uri):
    """
    A data URI -> PIL image. Raises HTTP status 400 for anything else.

    In the file's own mode: the image processor scales 16-bit greys, which `convert` would cut off at 255.
    """
    try:
        head, _, content = uri.partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise ValueError("it does not begin with `data:image/...;base64,`")
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        return ImageOps.exif_transpose(image)
    except (AttributeError, OSError, SyntaxError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"An input is no image: {error}. Give data URIs of images.") from error


if __name__ == "__main__":
    main()
