"""One vector, whatever the tool, of a checkpoint with words and of one of images alone."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from phi3_tools import embed as ray_embed
from phi3_tools import search, serve
from phi3_tools.compare.vectors import Key
from phi3_tools.compare.vectors import embed as compare_embed
from phi3_tools.images import load_images, make_shards, read_image
from phi3_tools.measures import unit
from phi3_tools.models import find_model, load_embedder, load_model, load_sentence_transformer

CROPS = 4
TEXT = "a red dress"
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one image and its caption, and the image."""
    folder = tmp_path_factory.mktemp("images")
    image = Image.radial_gradient("L").resize((90, 60)).convert("RGB")
    image.save(folder / "a.png")
    (folder / "metadata.csv").write_text(f"file_name,text\na.png,{TEXT}\n")
    return folder, image


@pytest.fixture(scope="module", params=["words", "images alone"])
def by_hand(request, whole_checkpoint, embedding_checkpoint, folder):
    """The folder of a model, and its vectors by transformers alone: {kind of input: unit vector}."""
    _, image = folder
    name = whole_checkpoint if request.param == "words" else embedding_checkpoint
    model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

    @torch.inference_mode()
    def last_token(text, images):
        inputs = processor(text=text, images=images, num_crops=CROPS, return_tensors="pt")
        return unit(model(**inputs).last_hidden_state[:, -1].numpy())[0]

    if request.param == "words":
        return name, {
            "image": last_token("<|image_1|> Represent the given image.", [image]),
            "text": last_token(f"Find me an everyday image that matches the given caption: {TEXT}", None),
            "document": last_token(TEXT, None),
            "both": last_token(f"<|image_1|> Represent the given image with the following question: {TEXT}", [image]),
        }
    with torch.inference_mode():
        output = model(**processor.image_processor(image, num_crops=CROPS, return_tensors="pt"))
    return name, {"image": unit(output.pooler_output.numpy())[0]}


def close(given, wanted):
    np.testing.assert_allclose(given, wanted, atol=TOLERANCE, rtol=0)


def test_by_sentence_transformers(by_hand, folder):
    name, wanted = by_hand
    model = SentenceTransformer(name, trust_remote_code=True, processor_kwargs={"num_crops": CROPS})
    close(model.encode_document(folder[1]), wanted["image"])
    if "text" in wanted:
        close(model.encode_query(TEXT), wanted["text"])
        close(model.encode_document({"text": TEXT, "image": folder[1]}), wanted["both"])


def test_by_search(by_hand, folder, tmp_path):
    name, wanted = by_hand
    search.make_index(folder[0], tmp_path, name, num_crops=CROPS)
    (row,) = search._open_table(tmp_path).to_arrow().to_pylist()
    close(row["vector"], wanted["image"])
    embedder = load_embedder(name, CROPS)
    if "text" in wanted:
        close(search._embed_query(embedder, None, TEXT), wanted["text"])


def test_by_compare(by_hand, folder, tmp_path):
    name, wanted = by_hand
    image = load_images(folder[0])["train"][0]["image"]
    model, key = find_model(name), Key("a")
    embedded = compare_embed([model], {key: lambda opener: read_image(image, opener)}, [TEXT], CROPS, tmp_path)[model]
    close(unit(embedded.images[key][None])[0], wanted["image"])
    if "text" in wanted:
        close(unit(embedded.texts[TEXT][None])[0], wanted["text"])


@pytest.mark.parametrize("column", [None, "text"])
def test_by_ray(by_hand, folder, column, tmp_path):
    name, wanted = by_hand
    if column and "text" not in wanted:
        pytest.skip("it embeds no texts")
    (shard,) = make_shards(folder[0], 8, text_column=column)
    model = find_model(name)
    preprocess = ray_embed.Preprocess(model, CROPS, "{text}" if column else None)
    ray_embed.Embed(tmp_path, model, CROPS, "float32")(preprocess(shard))
    (row,) = pq.read_table(tmp_path).to_pylist()
    close(unit([row["embedding"]])[0], wanted["both" if column else "image"])


def test_by_the_server(by_hand, folder):
    name, wanted = by_hand
    api = serve.Api(find_model(name), CROPS, "float32", serve.Limits())
    api.setup("cpu")
    buffer = io.BytesIO()
    folder[1].save(buffer, "PNG")
    uri = f"data:image/png;base64,{serve.base64.b64encode(buffer.getvalue()).decode()}"
    inputs = [uri, TEXT] if "text" in wanted else [uri]
    (answer,) = api.predict(serve.EmbeddingRequest(model="phi3-embed", input=inputs))
    for vector, kind in zip(answer["vectors"], ("image", "text")):
        close(vector, wanted[kind])


@pytest.mark.parametrize("pooling", ["global", "tower"])
def test_a_pooling_that_is_named_is_exported_and_evaluated(pooling, embedding_checkpoint, folder):
    name = f"{embedding_checkpoint}:{pooling}"
    wanted = unit(load_embedder(name, CROPS).encode_images([folder[1]]))
    exported, image_processor = load_model(name)
    with torch.inference_mode():
        output = exported(**image_processor(folder[1], num_crops=CROPS, return_tensors="pt"))
    close(unit(output.pooler_output.numpy()), wanted)
    close(load_sentence_transformer(find_model(name), CROPS).encode([folder[1]]), wanted)


@pytest.mark.parametrize("device", ["nope", "meta"])
def test_a_device_that_cannot_be_used_is_told(device, embedding_checkpoint):
    with pytest.raises(ValueError, match=f"--device is {device}, which cannot be used here: .*Give cpu"):
        load_embedder(embedding_checkpoint, device=device)
