"""Images embedded and searched: nearest neighbours, recall, and what the HD transform makes of photographs."""

import itertools
import os
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_sample_images
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, TextStreamer

from phi3_tools import ROOT
from phi3_tools.digits import LARGER, NAME_IT, ask, true_answer
from phi3_tools.images import (
    DIGIT_CROPS,
    DIGIT_NAMES,
    IMAGE,
    LABEL,
    NAME,
    digits_split,
    load_images,
    read_image,
    readable,
)
from phi3_tools.measures import check_finite, nearest, pixel_vectors, recall, unit
from phi3_tools.models import (
    embed,
    embed_words,
    find_model,
    in_batches,
    load_embedder,
    load_model,
    pick_device,
    prompt_inputs,
)
from phi3_tools.results import check_png, console, draw_rows, new_figure, save_figure

NUM_QUERIES, NUM_NEIGHBOURS = 6, 5
NUM_ASKED, NUM_SHOWN, MAX_ANSWER = 64, 3, 12


def run(source=None, model=None, output=Path("demo/neighbours.png")) -> None:
    """
    Prints what the embedding finds among the images of a SOURCE, and draws it. Without one it takes handwritten
    digits, and also finds them by words and asks about them, as far as the model can.
    """
    output = check_png(output)
    # Images first: what is wrong with them is said before weights are read.
    images, labels, names = _load_source(source) if source else _load_digits()
    if not model:
        os.environ["HF_HUB_OFFLINE"] = "1"
        console.print("Model: a small test checkpoint that was trained on digits and knows nothing else.")
    found = find_model(model or str(ROOT))
    loaded, image_processor = load_model(found)
    embedder = load_embedder(found, None if source else DIGIT_CROPS, loaded=loaded)
    vectors = unit(embed(embedder.encode_images, images))
    check_finite(vectors, found.label)
    rows = nearest(vectors, vectors, NUM_NEIGHBOURS, own=np.arange(len(vectors)))
    _show_neighbours(rows, vectors, names)
    if labels is not None and len(np.unique(labels)) > 1:
        _show_recall(vectors, images, labels)
    if not source:
        if embedder.encode_texts is not None:
            _show_text_search(vectors, unit(embedder.encode_texts(list(DIGIT_NAMES))), labels)
        elif not model:
            tokenizer = AutoTokenizer.from_pretrained(**found.pinned)
            _show_text_search(vectors, embed_words(loaded, tokenizer, DIGIT_NAMES), labels)
        if loaded.config.text_config is not None:
            _ask(found, images, labels)
    photographs = images[:3] if source else _load_photographs()
    _show_photographs(loaded, image_processor, photographs)
    _draw(images, names, rows, labels, photographs[0], image_processor, output)


def _load_digits():
    _, held_out, _, labels = digits_split()
    console.print(f"{len(held_out)} handwritten digits that the checkpoint was not trained on.")
    return [Image.fromarray(digit) for digit in held_out], labels, [DIGIT_NAMES[label] for label in labels]


def _load_source(source):
    """Images, labels (or None), and names of a SOURCE; what cannot be read is named and left out."""
    split = readable(concatenate_datasets(list(load_images(source).values())), skip_broken=True)
    if len(split) < 2:
        raise ValueError(f"{source} has {len(split)} readable images, but a search needs two at least.")
    console.print(f"{len(split)} images of {source}.")
    labels = np.array(split[LABEL]) if LABEL in split.column_names else None
    return [read_image(image) for image in split[IMAGE]], labels, split[NAME]


def _load_photographs():
    """Two photographs that scikit-learn ships, and one of them upright."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    return [china, flower, flower.crop((200, 0, 420, 427))]


def _show_neighbours(rows, vectors, names):
    table = Table(title="Nearest neighbours by cosine")
    for column in ("query", *(f"{number + 1}." for number in range(rows.shape[1]))):
        table.add_column(column)
    for query in range(min(NUM_QUERIES, len(names))):
        table.add_row(names[query], *(f"{names[row]} {vectors[query] @ vectors[row]:.2f}" for row in rows[query]))
    console.print(table)


def _show_recall(vectors, images, labels):
    if len({image.size for image in images}) > 1:  # a baseline of pixels needs images of one size
        images = [image.resize((32, 32)) for image in images]
    table = Table(title="Does an image find its own class? Each is searched among all others")
    for column in ("vectors", "recall@1", "recall@5"):
        table.add_column(column, justify="left" if column == "vectors" else "right")
    for name, contender in ({"this model": vectors} | pixel_vectors(images)).items():
        table.add_row(name, *(f"{recall(contender, labels, k):.1%}" for k in (1, 5)))
    console.print(table)


def _show_text_search(vectors, words, labels):
    table = Table(title="Images found by a word")
    for column in ("word", "labels of the 5 nearest images"):
        table.add_column(column)
    for name, rows in zip(DIGIT_NAMES, nearest(vectors, words, NUM_NEIGHBOURS)):
        table.add_row(name, " ".join(str(labels[row]) for row in rows))
    console.print(table)


def _ask(model, images, labels):
    """Questions about held-out digits, answered word by word, and how many of the answers are right."""
    loaded = AutoModelForImageTextToText.from_pretrained(**model.pinned, device_map=pick_device()).eval()
    processor = AutoProcessor.from_pretrained(**model.pinned)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def answer(question, asked, **kwargs):
        conversations = [ask(question, [images[number] for number in members]) for members in asked]
        inputs = prompt_inputs(processor, conversations, DIGIT_CROPS, add_generation_prompt=True).to(loaded.device)
        ids = loaded.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False, **kwargs)
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    single = [(number,) for number in range(min(NUM_ASKED, len(images)))]
    for question, asked in ((NAME_IT, single), (LARGER, [(a, b) for (a,), (b,) in itertools.pairwise(single)])):
        for members in asked[:NUM_SHOWN]:
            shown = " and ".join(f"a {DIGIT_NAMES[labels[number]]}" for number in members)
            console.print(f"{shown}: {question} ", end="")
            answer(question, [members], streamer=streamer)
        wanted = [true_answer(question, *(labels[number] for number in members)) for members in asked]
        answers = [text for part in in_batches(asked, 16, "Asking") for text in answer(question, part)]
        right = sum(text.strip() == truth for text, truth in zip(answers, wanted))
        console.print(f"Right: {right} of {len(asked)} held-out ones.")


@torch.inference_mode()
def _show_photographs(model, image_processor, photographs):
    table = Table(title=f"Photographs at full HD geometry (num_crops={image_processor.num_crops})")
    for column in ("width x height", "grid", "views", "pixel_values", "image tokens", "embedding"):
        table.add_column(column)
    for photograph in photographs:
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


def _draw(images, names, rows, labels, photograph, image_processor, output):
    """Queries with their neighbours, and the crops and global view of one photograph, as one PNG."""
    queries = range(min(NUM_QUERIES, len(images)))
    figure = new_figure(figsize=(13, 1.6 * len(queries) + 1))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    left.suptitle("query and nearest neighbours")
    cells = []
    for query in queries:
        shown = [query, *rows[query]]
        colours = ["black"] * len(shown)
        if labels is not None:
            colours[1:] = ["green" if labels[row] == labels[query] else "red" for row in shown[1:]]
        cells.append([(images[row], names[row][-18:], colour) for row, colour in zip(shown, colours)])
    draw_rows(left, cells)

    views = image_processor(photograph, do_normalize=False, return_tensors="np")
    num_rows, num_cols = (views["image_sizes"][0] // image_processor.size["height"]).tolist()
    grid, overview = right.subfigures(2, 1, height_ratios=(2, 1))
    grid.suptitle(f"one photograph: its {num_rows} x {num_cols} crops, and below its global view")
    pixels = views["pixel_values"].transpose(0, 2, 3, 1).clip(0, 1)
    for axis, crop in zip(grid.subplots(max(num_rows, 1), max(num_cols, 1), squeeze=False).flat, pixels[1:]):
        axis.imshow(crop)
        axis.axis("off")
    axis = overview.subplots()
    axis.imshow(pixels[0])
    axis.axis("off")
    save_figure(figure, output)
    console.print(f"Drawn: {output}")
