"""
Texts and images in one space, by the recipe of a whole checkpoint: what `--task embedding` trains of one.

All of it is sentence-transformers': the in-batch loss of pairs (with GradCache in parts of memory), batches in which
no text comes twice, the mining of hard negatives, and the model that is saved. The loss of the image embedding alone
does not serve, because it compares images with images, and classes that are few.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import mine_hard_negatives

from phi3_tools.finetune.data import NUMBER, ImageCollator, check_texts, load_splits, split_at_random
from phi3_tools.finetune.report import TO_TEXT
from phi3_tools.finetune.settings import DataOptions, Settings, TaskOptions
from phi3_tools.images import IMAGE, LABEL, NAME, TEXT, image_bytes, image_hash, load_images, readable
from phi3_tools.measures import retrieval
from phi3_tools.models import embed

# Both ways: images by words, and words by images; each softmax is over what one query is compared with.
BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
# A mined image that is nearly as near as the true one may well be true (NV-Retriever, arXiv 2407.15831).
MARGIN = 0.05


def check(settings: Settings) -> None:
    """
    Raises:
        ValueError: an option does not go with texts and images in one space.
    """
    options, data, arguments = settings.task, settings.data, settings.arguments
    if options.train == "head":
        raise ValueError(
            "--train head goes not with a whole checkpoint that embeds by its recipe, because its vectors come out of "
            "the language model. Give --train all or lora."
        )
    if options.words:
        raise ValueError("--words goes with the image embedding alone. A recipe takes captions or classes as texts.")
    if data.streaming or arguments.fsdp:
        raise ValueError("--streaming and --fsdp go not with texts and images in one space.")


def load_pairs(source: str, options: DataOptions, seed: int) -> dict[str, Dataset]:
    """
    The splits "train" (its rows numbered), "validation" (where one is wanted) and "test", with the columns `text`,
    `image` and `name`: of captions, or else with the names of classes as texts.

    Raises:
        ValueError: the data does not serve; what is wrong and how to mend it.
    """
    found = load_images(source, options.image_column, options.label_column, options.text_column)
    columns = next(iter(found.values())).column_names
    if TEXT not in columns and LABEL not in columns:
        raise ValueError(f"{source} has neither captions (`text`, or --text-column) nor classes (`label`) to learn.")
    if TEXT in columns:
        for name, split in found.items():
            check_texts(split[NAME], split[TEXT], source)
            found[name] = readable(split, options.skip_broken)
        splits = split_at_random(found, source, options, seed)
        splits["train"] = splits["train"].add_column(NUMBER, range(len(splits["train"])))
    else:
        splits, names = load_splits(source, options, seed, least=1, found=found)
        for name, split in splits.items():
            splits[name] = split.add_column(TEXT, [names[label] for label in split[LABEL]])
    if len(set(splits["train"][TEXT])) < 2:
        raise ValueError(f"All images of {source} have one and the same text. Give two or more.")
    return splits


def figures(
    encode_texts: Callable,
    encode_images: Callable,
    split: Dataset,
    collate: ImageCollator,
    batch_size: int,
    title: str,
) -> Callable[[int | None], dict[str, float]]:
    """Embeds a split -> a function from the length that vectors are cut to (None: whole) to figures of search."""
    texts = [*dict.fromkeys(split[TEXT])]
    numbers, places = np.arange(len(texts)), {text: number for number, text in enumerate(texts)}
    wanted = np.array([places[text] for text in split[TEXT]])
    words = embed(encode_texts, texts, batch_size, f"{title}: texts")
    images = embed(
        lambda rows: encode_images([collate.open(split[row]) for row in rows]),
        range(len(split)),
        batch_size,
        f"{title}: images",
    )

    def of(size=None):
        to_image = retrieval(words[:, :size], numbers, images[:, :size], wanted)
        to_text = retrieval(images[:, :size], wanted, words[:, :size], numbers)
        found = {name: float(to_image[name].mean()) for name in ("recall@1", "recall@5", "mAP")}
        return found | {TO_TEXT: float(to_text["recall@1"].mean())}

    return of


class PairCollator(SentenceTransformerDataCollator):
    """Rows of texts and of the numbers of images in `split` -> a batch, an image a row of all that it gives."""

    def __init__(self, embedder: SentenceTransformer, collate: ImageCollator, split: Dataset, prompts: dict[str, str]):
        # GradCache cuts batches by rows.
        preprocess = partial(embedder.preprocess, processing_kwargs={"image": {"pad_views": True}})
        super().__init__(preprocess, prompts=prompts)
        self.collate, self.split = collate, split

    def __call__(self, rows: list[dict]) -> dict:
        opened = [
            {name: value if name == TEXT else self.collate.open(self.split[value]) for name, value in row.items()}
            for row in rows
        ]
        return super().__call__(opened)


def figures_of(
    embedder: SentenceTransformer, split: Dataset, collate: ImageCollator, batch_size: int
) -> dict[str, float]:
    """[`figures`] of a model while it is trained."""
    encode_texts = partial(embedder.encode_query, show_progress_bar=False)
    encode_images = partial(embedder.encode_document, show_progress_bar=False)
    return figures(encode_texts, encode_images, split, collate, batch_size, "Validation")()


def make_loss(embedder: SentenceTransformer, options: TaskOptions) -> torch.nn.Module:
    """The in-batch loss both ways, over the batches of all processes."""
    shared = {"scale": 1 / options.temperature, "gather_across_devices": True, **BOTH_WAYS}
    if options.mini_batch_size:
        loss = CachedMultipleNegativesRankingLoss(embedder, mini_batch_size=options.mini_batch_size, **shared)
    else:
        loss = MultipleNegativesRankingLoss(embedder, **shared)
    if options.matryoshka:
        loss = MatryoshkaLoss(embedder, loss, [*options.matryoshka, embedder.get_embedding_dimension()])
    return loss


def rows_to_train(embedder: SentenceTransformer, split: Dataset, num_negatives: int, batch_size: int) -> Dataset:
    """
    A row for each image: its text, its number in `split`, and the numbers of as many images that lie near the text
    and are not its own. Texts of which there are too few such are left out.

    Raises:
        ValueError: there are too few for all texts.
    """
    first = {}  # of equal images
    numbers = [first.setdefault(image_hash(image), number) for number, image in enumerate(split[IMAGE])]
    if not num_negatives:
        return Dataset.from_dict({TEXT: split[TEXT], IMAGE: numbers})
    with TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{number}.png") for number in numbers]
        for path, number in zip(paths, numbers):
            Path(path).write_bytes(image_bytes(split[number][IMAGE]))  # what they are is told by their content
        mined = mine_hard_negatives(
            Dataset.from_dict({TEXT: split[TEXT], IMAGE: paths}),
            embedder,
            num_negatives=num_negatives,
            relative_margin=MARGIN,
            output_format="n-tuple",
            batch_size=batch_size,
            verbose=False,
        )
    if not len(mined):
        raise ValueError(f"--hard-negatives {num_negatives} finds no text with so many images that are not its own.")
    print(f"Hard negatives: {len(mined)} of {len(split)} images have {num_negatives}.")
    images = [name for name in mined.column_names if name != TEXT]
    return Dataset.from_dict(
        {TEXT: mined[TEXT][:]} | {name: [int(Path(path).stem) for path in mined[name]] for name in images}
    )
