"""
Trains the checkpoint in tiny/: Phi-3-vision's image embedding with narrow layers, on scikit-learn's digits.

Image embeddings are drawn to the word embedding of their digit's name, so that images find images and words do too.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from digits import (
    HELD_OUT,
    NAMES,
    NUM_CROPS,
    SPLIT_SEED,
    digits_split,
    embed_images,
    embed_words,
    neighbours,
    pixel_vectors,
    recall,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedTokenizerFast, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>")
WORDS = (*NAMES, "what", "which", "digit", "number", "is", "this", "the", "a", "picture", "of", "and", "?", ".")

TRAINING_SEED = 0
EPOCHS = 11
BATCH_SIZE = 32
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
TEMPERATURE = 0.1


def make_tokenizer():
    """Whole lower-case words; like Phi-3's it begins a text with `<s>`."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["</s>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>"],
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer):
    """A fresh model with Phi-3-vision's geometry of crops, patches and tokens, and narrow layers."""
    config = AutoConfig.from_pretrained(
        ROOT,
        trust_remote_code=True,
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 336,
            "patch_size": 14,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "projection_dim": 64,
        },
        hidden_size=128,
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModel.from_config(config, trust_remote_code=True)


@torch.no_grad()
def prepare(model, image_processor, images):
    """Starts that let a training of minutes succeed: unit-gain matrices, known positions, and centred embeddings."""
    table = model.get_input_embeddings().weight
    positions = model.vision_embed_tokens.img_processor.embeddings.position_embedding.weight
    for weight in model.parameters():
        if weight.ndim == 2 and weight is not table:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    positions[1:] = wave_positions(model.config.patches_per_side, positions.shape[1])
    inputs = image_processor(list(images[:160]), num_crops=0, return_tensors="pt")
    last = model.vision_embed_tokens.projector.img_projection[-1]
    last.bias -= model(**inputs).pooler_output.mean(0)


def wave_positions(side, width):
    """Sines and cosines of each patch's row and column, `(side ** 2, width)`."""
    angles = torch.arange(side)[:, None] * 100.0 ** -torch.linspace(0, 1, width // 4)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, width / 2)
    return torch.cat((waves.repeat_interleave(side, 0), waves.repeat(side, 1)), dim=1)


def shifted(image, right, down):
    """A digit moved by at most one of its pixels, with black where nothing was."""
    return np.pad(image, 1)[1 - down : 9 - down, 1 - right : 9 - right]


def train(model, image_processor, tokenizer, images, labels):
    """Softmax over the cosines of an image's embedding with the names' word embeddings."""
    rng = np.random.default_rng(TRAINING_SEED)
    name_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(NAMES)))
    labels = torch.from_numpy(labels)
    table = model.get_input_embeddings().weight
    decayed = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not table]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or weight is table]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc="Training", unit="step") as bar:
        for _ in range(EPOCHS):
            hits, losses = [], []
            for batch in np.array_split(rng.permutation(len(images)), steps // EPOCHS):
                moved = [shifted(images[number], *rng.integers(-1, 2, 2)) for number in batch]
                # The global view alone: the same vector as with one crop, which is its twin.
                inputs = image_processor(moved, num_crops=0, return_tensors="pt")
                output = model(pixel_values=inputs.pixel_values, image_sizes=inputs.image_sizes).pooler_output
                names = F.normalize(model.get_input_embeddings()(name_ids), dim=-1)
                logits = F.normalize(output, dim=-1) @ names.T / TEMPERATURE
                loss = F.cross_entropy(logits, labels[batch])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                hits.append((logits.argmax(-1) == labels[batch]).float().mean().item())
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{np.mean(losses):.3f}", right=f"{np.mean(hits):.1%}")
    model.eval()


def evaluate(model, image_processor, tokenizer, images, labels):
    """Recall and naming on images that the training did not see: a row of figures for each kind of vector."""
    vectors = pixel_vectors(images)
    vectors["this checkpoint"] = embed_images(model, image_processor, list(images), NUM_CROPS)
    rows = {}
    for name, each in vectors.items():
        order, _ = neighbours(each)
        rows[name] = [recall(order, labels, 1), recall(order, labels, 5)]
    words = embed_words(model, tokenizer, NAMES)
    named = float(((vectors["this checkpoint"] @ words.T).argmax(1) == labels).mean())
    return rows, named


def card(rows, named, num_training, num_held_out):
    lines = [f"| {name} | {one:.1%} | {five:.1%} |" for name, (one, five) in rows.items()]
    return CARD.format(
        table="\n".join(lines),
        named=f"{named:.1%}",
        num_training=num_training,
        num_held_out=num_held_out,
        split_seed=SPLIT_SEED,
        held_out=f"{HELD_OUT:.0%}",
    )


CARD = """---
library_name: transformers
license: mit
pipeline_tag: image-feature-extraction
tags:
- custom_code
- phi3_embed
---

# phi3-embed tiny: a test checkpoint that knows digits

Phi-3-vision's image embedding with its geometry (crops of 336 pixels, 576 patches and 144 tokens each, HD
transform) and narrow layers, trained for a few minutes on scikit-learn's handwritten digits. It exists to try,
test and demonstrate the code. It is **not** Microsoft's Phi-3-vision and holds none of its weights; of anything
but digits it knows nothing.

## Training

`make tiny` re-creates it (`examples/train_tiny.py`): {num_training} images, {held_out} held out by a stratified
split with seed {split_seed}. The image embedding (`pooler_output`) is drawn to the word embedding of its digit's
name, so the trained weights are the tower, the projection and the ten rows of the word embeddings from "zero" to
"nine". **Not trained**, and as a fresh model has them: the two separators (zero: pooling leaves them out) and all
other rows of the word embeddings.

## Figures

On the {num_held_out} held-out images, each searched among the others by cosine; with one crop, so the global view:

| vectors | recall@1 | recall@5 |
|---|---:|---:|
{table}

Named by the nearest of the ten digit names, by text: {named}.
"""


def save(model, image_processor, tokenizer, text):
    """Into a folder beside tiny/, which takes its place once it is whole. The code stays at the root."""
    processor_class = get_class_from_dynamic_module("processing_phi3_embed.Phi3EmbedProcessor", ROOT)
    processor_class.register_for_auto_class("AutoProcessor")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".tiny-") as folder:
        model.save_pretrained(folder)
        processor_class(image_processor, tokenizer).save_pretrained(folder)
        for module in Path(folder).glob("*.py"):
            module.unlink()
        shutil.rmtree(Path(folder) / "__pycache__", ignore_errors=True)
        (Path(folder) / "README.md").write_text(text)
        shutil.rmtree(TINY, ignore_errors=True)
        shutil.copytree(folder, TINY)


def main():
    set_seed(TRAINING_SEED)
    image_processor = AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    training, held_out, training_labels, held_out_labels = digits_split()
    prepare(model, image_processor, training)
    train(model, image_processor, tokenizer, training, training_labels)
    rows, named = evaluate(model, image_processor, tokenizer, held_out, held_out_labels)
    text = card(rows, named, len(training), len(held_out))
    save(model, image_processor, tokenizer, text)
    print(text)


if __name__ == "__main__":
    main()
