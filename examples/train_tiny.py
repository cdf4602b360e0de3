"""
Trains the checkpoint in tiny/: Phi-3-vision's image embedding with narrow layers, on scikit-learn's handwritten digits.

Image embeddings are drawn to the word embedding of their digit's name, so that images find images and words do too.
"""

import os
import tempfile
import time
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
    unit,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerFast, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>")
WORDS = (*NAMES, *"what which digit number is this that in the a picture image of and it shows ? . , :".split())

TRAINING_SEED = 0
EPOCHS = int(os.environ.get("EPOCHS", 12))
BATCH_SIZE = 32
LEARNING_RATE = float(os.environ.get("LR", 2e-3))
WEIGHT_DECAY = 0.05
TEMPERATURE = float(os.environ.get("TEMP", 0.1))


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
            "num_attention_heads": 4,
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


def shifted(image, right, down):
    """A digit moved by at most one of its pixels, with black where nothing was."""
    return np.pad(image, 1)[1 - down : 9 - down, 1 - right : 9 - right]


def train(model, image_processor, tokenizer, images, labels):
    """Softmax over the cosines of an image's embedding with the names' word embeddings."""
    rng = np.random.default_rng(TRAINING_SEED)
    name_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(NAMES)))
    labels = torch.from_numpy(labels)
    decayed = [weight for weight in model.parameters() if weight.ndim == 2]
    table = model.get_input_embeddings().weight
    decayed = [weight for weight in decayed if weight is not table]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or weight is table]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    )
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
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
            if os.environ.get("DEV"):
                print(f" {np.mean(losses):.3f} {np.mean(hits):.1%}", flush=True)
    model.eval()
