"""Handwritten digits: the split that tiny/ was trained with, and how search among images is measured."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SEED = 0
HELD_OUT = 0.2
# A digit has 8 x 8 pixels: one crop shows all of it.
NUM_CROPS = 1


def digits_split():
    """uint8 images `(n, 8, 8)` and labels `(n,)`: training and held-out images, training and held-out labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return train_test_split(images, labels, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels)


def unit(vectors):
    """Rows of length 1; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@torch.inference_mode()
def embed_images(model, image_processor, images, num_crops, batch_size=16, description="Embedding"):
    """One unit vector an image, `(n, hidden_size)`."""
    vectors = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=len(starts) < 2):
        inputs = image_processor(images[start : start + batch_size], num_crops=num_crops, return_tensors="pt")
        inputs = inputs.to(model.device)
        output = model(pixel_values=inputs.pixel_values, image_sizes=inputs.image_sizes)
        vectors.append(output.pooler_output.float().cpu().numpy())
    return unit(np.concatenate(vectors))


@torch.inference_mode()
def embed_words(model, tokenizer, words):
    """One unit vector a word, `(n, hidden_size)`: its row of the model's word embeddings."""
    ids = tokenizer(list(words), add_special_tokens=False, return_tensors="pt").input_ids  # (n, 1)
    return unit(model(input_ids=ids.to(model.device)).last_hidden_state[:, 0].float().cpu().numpy())


def neighbours(vectors):
    """For each row the others, nearest first, `(n, n - 1)`, and the cosines of all pairs, `(n, n)`."""
    cosines = vectors @ vectors.T
    order = np.argsort(-(cosines - np.diag(np.full(len(vectors), np.inf))), axis=1, kind="stable")
    return order[:, :-1], cosines


def recall(order, labels, k):
    """Share of the queries that have an image of their own class among the `k` nearest."""
    return float((labels[order[:, :k]] == labels[:, None]).any(1).mean())


def pixel_vectors(images):
    """Raw pixels of equally large images as vectors: as they are, and with the images' mean taken off."""
    pixels = np.stack([np.asarray(image, np.float64).ravel() for image in images])
    return {"raw pixels": unit(pixels), "raw pixels, centred": unit(pixels - pixels.mean(0))}
