"""A small whole checkpoint that embeds texts and images into one space, and images with captions to train it on."""

import numpy as np
import torch
from conftest import make_tokenizer, whole_model
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor, Phi3EmbedProcessor
from PIL import Image

from phi3_tools.checkpoint import recipes

RECIPE = recipes.Recipe(
    name="own",
    title="A test's",
    checkpoints=[],
    source="here",
    text="{prompt}{text}",
    image="{images}{prompt}",
    text_with_image=None,
    image_tag="<|image_{number}|> ",
    without_prompt={"image": "a picture"},
    prompts={"query": "what is this "},
    pooling="lasttoken",
    num_crops=1,
    note="",
)
CAPTIONED = Features({"image": ImageFeature(), "said": Value("string")})
COMMON = "--task embedding --validation 0 --num-crops 0 --logging-steps 1 --disable-tqdm true --temperature 0.1"
SHORT = f"{COMMON} --max-steps 4 --learning-rate 1e-3 --per-device-train-batch-size 8"


def save_embedder(folder, switch):
    """A checkpoint with random weights and a recipe -> its folder; at `switch` tokens rotary factors change."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    whole_model({"original_max_position_embeddings": switch}, image_token_id=image_token_id).save_pretrained(folder)
    image_processor = Phi3EmbedImageProcessor(num_crops=1, size={"height": 56, "width": 56}, num_img_tokens=4)
    template = recipes.chat_templates("{{ messages[0].content }}", RECIPE)
    Phi3EmbedProcessor(image_processor, tokenizer, chat_template=template).save_pretrained(folder)
    recipes.write_files(RECIPE, 48, folder)
    return folder


def last_token(model, processor, **given):
    """The vector of what a processor is given, by hand: the last token's, of length 1."""
    with torch.inference_mode():
        last = model(**processor(**given, return_tensors="pt")).last_hidden_state[0, -1]
    return (last / last.norm()).numpy()


def make_image(color, number, rng):
    """An image of about this colour; `number` makes it taller."""
    return Image.fromarray(np.clip(rng.normal(color, 40, (20 + number, 30, 3)), 0, 255).astype(np.uint8))


def save_captions(path):
    """Parquet of 20 images of as many colours, each with a caption of its own in `said` -> the file."""
    rng, things = np.random.default_rng(0), ("cat", "dog", "is", "in")
    texts = [f"{first} {second}" for first in ("a", "the", "this", "that", "what") for second in things]
    images = [make_image(rng.integers(0, 255, 3), number, rng) for number in range(20)]
    Dataset.from_dict({"image": images, "said": texts}, CAPTIONED).to_parquet(path)
    return path
