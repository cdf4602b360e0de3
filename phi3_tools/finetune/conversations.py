"""
Conversations about images, for training a language model on: rows of `messages` and `images`.

A source is what [`phi3_tools.images`] reads, with captions (`text`) or classes (`label`), of which each becomes a
question and an answer; or data of conversations: in the Hub's convention (`messages` and `images`; parquet, JSON lines
or a dataset on the Hub), or LLaVA's JSON (`conversations` and `image`, files beside it).
"""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from datasets import Dataset
from jinja2 import TemplateError

from phi3_tools.finetune.data import check_texts, load_splits, split_at_random
from phi3_tools.finetune.settings import QUESTIONS, DataOptions
from phi3_tools.images import HUB_ID, IMAGE, LABEL, NAME, SPLITS, TEXT, UNDECODED, load_images, own_image, read_image
from phi3_tools.models import encode_conversation
from phi3_tools.results import one_line

MESSAGES, IMAGES = "messages", "images"
FEATURES = datasets.Features(
    {
        NAME: datasets.Value("string"),
        IMAGES: datasets.List(UNDECODED),
        MESSAGES: datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
            }
        ),
    }
)
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


def load_conversations(
    source: str, options: DataOptions, seed: int, question: str | None = None
) -> tuple[dict[str, Dataset], list[str]]:
    """
    The splits "train", "validation" (where one is wanted) and "test", and the names of the classes where answers are
    such. Splits that the data lacks are made of its "train".

    Raises:
        ValueError: the data does not serve; what is wrong and how to mend it.
    """
    if (found := _load_messages(source)) is not None:
        splits = {name: _conversations(rows, name, source) for name, rows in found.items()}
        return split_at_random(splits, source, options, seed), []
    found = load_images(source, options.image_column, options.label_column, options.text_column)
    columns = next(iter(found.values())).column_names
    if TEXT in columns:
        asked = question or QUESTIONS[TEXT]
        splits = {name: _questions(rows, asked, rows[TEXT][:], source) for name, rows in found.items()}
        return split_at_random(splits, source, options, seed), []
    if LABEL not in columns:
        raise ValueError(
            f"{source} has nothing to be said of its images: neither `messages` nor captions (`text`) nor classes "
            "(`label`). Give data with one of these."
        )
    splits, names = load_splits(source, options, seed, least=1, found=found)
    for name, rows in splits.items():
        answers = [names[label] for label in rows[LABEL]]
        splits[name] = _questions(rows, question or QUESTIONS[LABEL], answers, source)
    return splits, names


def _questions(rows, question, answers, source):
    """A question and an answer of each image."""
    check_texts(rows[NAME], answers, source)
    asked = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question}]}

    def of(row, number):
        answer = {"role": "assistant", "content": [{"type": "text", "text": answers[number]}]}
        return {NAME: row[NAME], IMAGES: [row[IMAGE]], MESSAGES: [asked, answer]}

    return rows.map(of, with_indices=True, remove_columns=rows.column_names, features=FEATURES, desc="Asking")


# Data of conversations


def _load_messages(source: str) -> dict[str, list[dict]] | None:
    """The rows of a source of conversations by splits, as they lie there; `None` for a source of images."""
    path = Path(source)
    if path.suffix in (".json", ".jsonl") and path.is_file():
        try:
            text = path.read_text("utf-8")
            rows = json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
        except ValueError as error:
            raise ValueError(f"{source} cannot be read as JSON: {one_line(error)}.") from error
        if not isinstance(rows, list):
            raise ValueError(f"{source} holds {rows!r:.80}, but must hold a list of conversations.")
        return {"train": rows}
    if path.exists():
        tables = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
        if not tables or MESSAGES not in pq.read_schema(tables[0]).names:
            return None
        files = {}
        for table in tables:
            files.setdefault(next((name for name in SPLITS if name in table.name), "train"), []).append(table)
        return {
            split: [row for table in tables for row in pq.read_table(table).to_pylist()]
            for split, tables in files.items()
        }
    if not (named := HUB_ID.fullmatch(source)):
        return None
    try:
        found = datasets.load_dataset(named["name"], revision=named["revision"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return None  # `load_images` says what is wrong
    if MESSAGES not in next(iter(found.values())).column_names:
        return None
    return {split: rows.with_format("arrow").data.to_pylist() for split, rows in found.items()}


def _conversations(rows: list[dict], split: str, source: str) -> Dataset:
    """Rows in the Hub's convention or LLaVA's -> rows of `FEATURES`."""
    root = None  # of a dataset on the Hub, whose images are bytes
    if Path(source).exists():
        root = Path(source) if Path(source).is_dir() else Path(source).parent
    done = {name: [] for name in FEATURES}
    for number, row in enumerate(rows):
        name = f"row {number} of {split!r} in {source}"
        try:
            images, messages = _llava(row) if "conversations" in row else _hub(row)
            images = [
                own_image({"path": image, "bytes": None} if isinstance(image, str) else image, root)
                for image in images
            ]
            _check(images, messages)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:  # JSON of any other shape
            raise ValueError(
                f"{name}: it is {row!r:.80}, but must have `messages` of `role` and `content`, and `images`; or, as "
                "LLaVA's, `conversations` of `from` and `value`, and `image`"
            ) from error
        for column, value in zip(done, (name, images, messages)):
            done[column].append(value)
    return Dataset.from_dict(done, FEATURES)


def _llava(row):
    """LLaVA's `conversations`, each image in its place as `<image>`."""
    images = row.get("image") or []
    messages = [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": _parts(turn["value"])}
        for turn in row["conversations"]
    ]
    return [images] if isinstance(images, str) else images, messages


def _parts(text):
    """A text with each image in its place as `<image>` -> its parts."""
    pieces = text.split("<image>")
    content = [{"type": "text", "text": pieces[0].rstrip("\n")}]
    for piece in pieces[1:]:
        content += [{"type": "image", "text": None}, {"type": "text", "text": piece.removeprefix("\n")}]
    return [part for part in content if part["text"] != ""]


def _hub(row):
    """The Hub's `messages`; images without a place stand before the first question."""
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    messages = []
    for message in row["messages"]:
        content = message["content"]
        content = _parts(content) if isinstance(content, str) else content
        content = [{"type": part["type"], "text": part.get("text")} for part in content]
        messages.append({"role": message["role"], "content": content})
    if not any(part["type"] == "image" for message in messages for part in message["content"]):
        asked = next((message for message in messages if message["role"] == "user"), {"content": []})
        asked["content"] = [{"type": "image", "text": None}] * len(images) + asked["content"]
    return images, messages


def _check(images, messages):
    if None in images:
        raise ValueError("an image is not given, or lies outside of the data's own folder")
    paths = [image["path"] for image in images if image["bytes"] is None]
    if missing := [path for path in paths if not Path(path).exists()]:
        raise ValueError(f"there is no image {missing[0]}. Add it, or take the row out")
    roles = [message["role"] for message in messages]
    if unknown := {*roles} - {*ROLES.values()}:
        raise ValueError(
            f"it has the role {min(unknown)!r}, but must have 'system', 'user' and 'assistant' (LLaVA: 'human', 'gpt')"
        )
    if "assistant" not in roles:
        raise ValueError("nothing in it is said by the assistant, which is what is learnt")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != len(images):
        raise ValueError(f"it has {len(images)} images, and {places} places for them")


# Rows -> what a model takes


def conversation(row: dict, processor) -> list[dict]:
    """
    The messages of a row as a chat template takes them, its images opened.

    Raises:
        ValueError: an image cannot be read; the row is named.
    """
    try:
        images = iter([read_image(image, processor.image_processor.open_image) for image in row[IMAGES]])
    except ValueError as error:
        raise ValueError(f"{row[NAME]}: {one_line(error)}") from error

    def opened(part):
        return {"type": "image", "image": next(images)} if part["type"] == "image" else part

    return [message | {"content": [opened(part) for part in message["content"]]} for message in row[MESSAGES]]


def encode(row: dict, processor, num_crops: int | None, longest: int) -> dict:
    """
    A row -> `input_ids` and `labels` `(length,)`, -100 where the assistant says nothing, and its images' pixels.

    Raises:
        ValueError: it is longer than `longest` tokens, an image cannot be read, or the template marks no answers.
    """
    messages = conversation(row, processor)
    try:
        inputs = encode_conversation(messages, processor, num_crops if row[IMAGES] else None)
    except (ValueError, TemplateError) as error:
        raise ValueError(f"{row[NAME]}: {one_line(error)}") from error
    length = len(inputs["input_ids"])
    if length > longest:
        raise ValueError(
            f"{row[NAME]} takes {length} tokens, and the language model reads {longest}. Shorten the text, or "
            "give fewer --num-crops."
        )
    return inputs
