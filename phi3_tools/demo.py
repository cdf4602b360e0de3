"""
Images embedded and searched: nearest neighbours, recall, and what the HD transform makes of photographs.

    python examples/demo.py [--model FOLDER_OR_HUB_ID] [--images FOLDER]

Without arguments: the small checkpoint in tiny/ on handwritten digits that it was not trained on.
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import concatenate_datasets
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from transformers import AutoTokenizer

from phi3_tools.digits import (
    NAMES,
    NUM_CROPS,
    digits_split,
    embed_images,
    embed_words,
    neighbours,
    pixel_vectors,
    recall,
    unit,
)
from phi3_tools.pictures import IMAGE, LABEL, NAME, load_pictures, read_picture, readable
from phi3_tools.search import TINY, draw_lines, load_model, save

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "demo" / "neighbours.png"
NUM_QUERIES, NUM_NEIGHBOURS = 6, 5
console = Console()


def main():
    parser = argparse.ArgumentParser(description="Embed images and search among them.")
    parser.add_argument("--model", help="a folder or Hub id; without it the small checkpoint in tiny/")
    parser.add_argument("--images", type=Path, help="a folder of pictures; subfolders are classes")
    arguments = parser.parse_args()
    try:
        run(arguments.model, arguments.images)
    except (OSError, ValueError) as error:
        sys.exit(f"demo: {error}")


def run(name, folder):
    # Pictures first: what is wrong with them is said before weights are read.
    pictures, labels, names = load_folder(folder) if folder else load_digits()
    if not name:
        os.environ["HF_HUB_OFFLINE"] = "1"
        console.print("Model: tiny/, a test checkpoint that was trained on digits and knows nothing else.")
    model, image_processor = load_model(name or str(TINY))
    vectors = embed_images(model, image_processor, pictures, None if folder else NUM_CROPS)
    order, cosines = neighbours(vectors)
    show_neighbours(order, cosines, names)
    if labels is not None:
        show_recall(vectors, pictures, labels)
    if not name and not folder:
        tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
        show_text_search(vectors, embed_words(model, tokenizer, NAMES), labels)
    photographs = pictures[:3] if folder else load_photographs()
    show_photographs(model, image_processor, photographs)
    draw(pictures, names, order, labels, photographs[0], image_processor)


def load_digits():
    _, held_out, _, labels = digits_split()
    console.print(f"{len(held_out)} handwritten digits that the checkpoint was not trained on.")
    return list(held_out), labels, [NAMES[label] for label in labels]


def load_folder(folder):
    """Pictures, labels by subfolder (or None), and names of a folder; unreadable files are named and left out."""
    split = readable(concatenate_datasets(list(load_pictures(folder).values())), skip_broken=True)
    if len(split) < 2:
        raise ValueError(f"{folder} has {len(split)} readable pictures, but a search needs two at least.")
    console.print(f"{len(split)} pictures of {folder}.")
    labels = np.array(split[LABEL]) if LABEL in split.column_names else None
    return [read_picture(image) for image in split[IMAGE]], labels, split[NAME]


def load_photographs():
    """Two photographs that scikit-learn ships, and one of them upright."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    return [china, flower, flower.crop((200, 0, 420, 427))]


def show_neighbours(order, cosines, names):
    table = Table(title="Nearest neighbours by cosine")
    for column in ("query", *(f"{number + 1}." for number in range(min(NUM_NEIGHBOURS, len(names) - 1)))):
        table.add_column(column)
    for query in range(min(NUM_QUERIES, len(names))):
        found = order[query, :NUM_NEIGHBOURS]
        table.add_row(names[query], *(f"{names[each]} {cosines[query, each]:.2f}" for each in found))
    console.print(table)


def show_recall(vectors, pictures, labels):
    if len({np.shape(picture) for picture in pictures}) > 1:  # a baseline of pixels needs pictures of one size
        pictures = [picture.resize((32, 32)) for picture in pictures]
    contenders = {"this model": vectors} | pixel_vectors(pictures)
    table = Table(title="Does a picture find its own class? Each is searched among all others")
    for column in ("vectors", "recall@1", "recall@5"):
        table.add_column(column, justify="left" if column == "vectors" else "right")
    for name, each in contenders.items():
        order, _ = neighbours(unit(each))
        table.add_row(name, f"{recall(order, labels, 1):.1%}", f"{recall(order, labels, 5):.1%}")
    console.print(table)


def show_text_search(vectors, words, labels):
    table = Table(title="Images found by a word")
    for column in ("word", "labels of the 5 nearest images"):
        table.add_column(column)
    for name, word in zip(NAMES, words):
        table.add_row(name, " ".join(str(labels[each]) for each in np.argsort(-(vectors @ word))[:NUM_NEIGHBOURS]))
    console.print(table)


@torch.inference_mode()
def show_photographs(model, image_processor, photographs):
    table = Table(title=f"Photographs at full HD geometry (num_crops={image_processor.num_crops})")
    for column in ("width x height", "grid", "views", "pixel_values", "image tokens", "embedding"):
        table.add_column(column)
    for photograph in photographs:
        photograph = Image.fromarray(np.asarray(photograph))
        inputs = image_processor(photograph, return_tensors="pt").to(model.device)
        outputs = model(**inputs)
        rows, cols = (inputs["image_sizes"][0] // image_processor.size["height"]).tolist()
        table.add_row(
            f"{photograph.width} x {photograph.height}",
            f"{rows} x {cols}",
            f"{rows * cols} + 1 global",
            str(tuple(inputs["pixel_values"].shape)),
            str(tuple(outputs.image_outputs.pooler_output[0].shape)),
            str(tuple(outputs.pooler_output.shape)),
        )
    console.print(table)


def draw(pictures, names, order, labels, photograph, image_processor):
    """Queries with their neighbours, and the crops and global view of one photograph, as one PNG."""
    queries = range(min(NUM_QUERIES, len(pictures)))
    figure = plt.figure(figsize=(13, 1.6 * len(queries) + 1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    left.suptitle("query and nearest neighbours")
    lines = []
    for query in queries:
        shown = [query, *order[query, :NUM_NEIGHBOURS]]
        colours = ["black"] * len(shown)
        if labels is not None:
            colours[1:] = ["green" if labels[each] == labels[query] else "red" for each in shown[1:]]
        lines.append([(pictures[each], names[each][-18:], colour) for each, colour in zip(shown, colours)])
    draw_lines(left, lines)

    views = image_processor(Image.fromarray(np.asarray(photograph)), do_normalize=False, return_tensors="np")
    rows, cols = (views["image_sizes"][0] // image_processor.size["height"]).tolist()
    grid, overview = right.subfigures(2, 1, height_ratios=(2, 1))
    grid.suptitle(f"one photograph: its {rows} x {cols} crops, and below its global view")
    pixels = views["pixel_values"].transpose(0, 2, 3, 1).clip(0, 1)
    for axis, crop in zip(grid.subplots(max(rows, 1), max(cols, 1), squeeze=False).flat, pixels[1:]):
        axis.imshow(crop)
        axis.axis("off")
    axis = overview.subplots()
    axis.imshow(pixels[0])
    axis.axis("off")

    save(figure, PICTURE)
    console.print(f"Picture: {PICTURE}")


if __name__ == "__main__":
    main()
