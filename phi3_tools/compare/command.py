"""
Embeddings of several models side by side: figures, and a report to look at.

The output folder gets `report.html`, which opens without a network, `results.json`, and `embeddings.safetensors`.
Vectors are kept: a second run does not embed again, and an interrupted one goes on.
"""

import functools
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from rich.table import Table
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoConfig

from phi3_tools import measures
from phi3_tools.compare.answers import EXACT, LOSS, answer
from phi3_tools.compare.changes import CHANGES, CHANGES_VERSION, SHRINKS
from phi3_tools.compare.report import data_uri, format_cost, format_value, write_report
from phi3_tools.compare.vectors import VECTORS, Embedded, Key, embed
from phi3_tools.images import IMAGE, LABEL, NAME, TEXT, image_bytes, image_hash, load_images, read_image
from phi3_tools.measures import UNLABELLED, Figure, Undefined, unit
from phi3_tools.models import BATCH_SIZE, PHI3_EMBED, TRANSFORMERS, Model, find_model
from phi3_tools.results import check_writable, console, say_left_out, without_path, write_beside, write_text

PACKAGES = ("torch", "transformers", "sentence-transformers", "scikit-learn", "scipy", "numpy", "pillow")
RETRIEVAL, HELD_OUT, CLUSTERING = "Same-class retrieval", "Classification of held-out images", "Clustering"
ROBUSTNESS, DETAIL, TO_IMAGE, TO_TEXT = "Robustness", "Fine detail", "Text to image", "Image to text"
ANSWERS = "Answers"
ALL, ALL_CHANGES = "all", "mean of all changes"
CKA_IMAGES = 200
LOWER_IS_BETTER = ("moved", "fall of recall@1", LOSS)


class Item(NamedTuple):
    """
    An image that can be read: `key` is its file's hash, `read(opener)` opens it, `thumbnail` is a data URI. `words`
    are its caption, or its class where the data has no captions.
    """

    name: str
    key: str
    read: Callable
    thumbnail: str
    label: int = UNLABELLED
    words: str = ""


def run(
    models: Sequence[str],
    source: str,
    output: Path = Path("report"),
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    question: str | None = None,
    limit: int | None = None,
    probe: int = 100,
    num_crops: int | None = None,
    resamples: int = 1000,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    cache: Path | None = None,
) -> dict[str, Any]:
    """
    Measures the embeddings of MODELs on the images of a SOURCE, and writes the report -> what `results.json` holds.

    Raises:
        ValueError: a model, the data or the output cannot be used; said before the work.
    """
    arguments, started = dict(locals()), time.strftime("%Y-%m-%d %H:%M:%S %z")
    cache = cache or VECTORS
    for folder in (output, cache):
        check_writable(folder)
    found = [find_model(text) for text in dict.fromkeys(models)]
    columns = {"image_column": image_column, "label_column": label_column, "text_column": text_column}
    items, classes, facts = load_items(source, split, limit, seed, **columns)
    if question and not any(item.words for item in items):
        raise ValueError("--question has no right answers here: the images have neither captions nor classes.")

    probed = np.sort(np.random.default_rng(seed).permutation(len(items))[:probe])
    texts = [item.words for item in items if item.words]
    embedded = embed(found, versions_of(items, set(probed.tolist())), texts, num_crops, cache, batch_size)
    items, probed = leave_out_refused(items, probed, embedded, facts["left_out"])
    embedded = dict(zip(name_models(found), embedded.values()))
    spaces = {label: space_of(of_model, items, probed) for label, of_model in embedded.items()}

    undefined = {label: reason for label, space in spaces.items() if (reason := measures.why_undefined(space[ALL]))}
    units = {
        label: {name: unit(vectors) for name, vectors in space.items()}
        for label, space in spaces.items()
        if label not in undefined
    }
    of_all = {label: space[ALL] for label, space in units.items()}
    figures = measure(items, probed, units, {label: embedded[label].texts for label in units}, undefined, seed)
    if question:
        figures += measure_answers(dict(zip(embedded, found)), items, question, num_crops, cache)
    with console.status("Resampling"):
        results = {
            "about": {"command": command_again(found, arguments)} | about(arguments, items, started) | facts,
            "models": [
                {"label": label, "spec": model.text, "version": model.version}
                | what_it_is(model)
                | {"undefined": undefined.get(label), "cost": embedded[label].cost}
                for label, model in zip(embedded, found)
            ],
            "figures": measures.summarise(figures, resamples, seed),
            "spaces": compare_spaces(of_all, resamples, seed),
        }
    vectors = {label: np.ascontiguousarray(space[ALL]) for label, space in spaces.items()}
    names = {"names": [item.name for item in items], "labels": [item.label for item in items]}
    names = {name: json.dumps(values, ensure_ascii=False) for name, values in names.items()}
    write_beside(output / "embeddings.safetensors", lambda path: save_file(vectors, path, names))
    write_text(output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    with console.status("Writing the report"):
        write_report(output / "report.html", results, items, classes, of_all, seed)
    show(results)
    console.print(f"Written: {output / 'report.html'}, results.json, embeddings.safetensors")
    return results


# Data


def load_items(source, split, limit, seed, **columns) -> tuple[list[Item], list[str], dict[str, Any]]:
    """The images that can be read, each once, in order; the classes' names; and what results say about the data."""
    datasets.disable_progress_bars()
    splits = load_images(source, **columns)
    name = split or ("test" if "test" in splits else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"The data has no split {name!r}, but {', '.join(map(repr, splits))}. Give one as --split.")
    rows: Any = splits[name]  # whose type says less than its documentation
    features = rows.features
    if TEXT in features and getattr(features[TEXT], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"The captions are {features[TEXT]}, but must be a text an image. Name a column of such by --text-column."
        )
    if limit and limit < len(rows):
        rows = rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit]).tolist())
    classes = features[LABEL].names if isinstance(features.get(LABEL), datasets.ClassLabel) else []

    def reader(number):
        return lambda opener: read_image(rows[number][IMAGE], opener)

    items, broken = {}, []
    for number, row in enumerate(tqdm(rows, desc="Checking", unit="image")):
        try:
            image = {"bytes": image_bytes(row[IMAGE]), "path": None}
            key = image_hash(image)
            if key not in items:
                label = row[LABEL] if classes and row[LABEL] is not None else UNLABELLED
                words = row[TEXT] if TEXT in row else classes[label] if label != UNLABELLED else ""
                items[key] = Item(row[NAME], key, reader(number), data_uri(read_image(image)), label, words or "")
        except ValueError as error:
            broken.append(f"{row[NAME]}: {error}")
    say_left_out(broken, len(rows))
    if not items:
        raise ValueError(f"Not one of the {len(rows)} images of {source} can be read.")
    copies = len(rows) - len(broken) - len(items)
    if copies:
        console.print(f"Left out {copies} images that are copies of others.")
    left_out = {"unreadable": len(broken), "copies": copies, "refused": {}}
    return list(items.values()), classes, {"captions": TEXT in features, "left_out": left_out}


def versions_of(items: list[Item], probed: set[int]) -> dict[Key, Callable]:
    """What opens each image, and each one of the probe after every change. Side by side, so that it is opened once."""
    opened = functools.lru_cache(maxsize=1)(lambda number, opener: items[number].read(opener))
    versions: dict[Key, Callable] = {}
    for number, item in enumerate(items):
        versions[Key(item.key)] = functools.partial(opened, number)
        for name, change in (CHANGES | SHRINKS).items() if number in probed else ():
            versions[changed_key(item, name)] = lambda opener, number=number, change=change: change(
                opened(number, opener)
            )
    return versions


def changed_key(item: Item, change: str) -> Key:
    return Key(item.key, f"{change} {CHANGES_VERSION}")


def leave_out_refused(items, probed, embedded: dict[Model, Embedded], left_out):
    """Leaves out of all models alike what one refuses, changed or not -> the items and the probe's numbers in them."""
    refused = {key.digest: reason for found in embedded.values() for key, reason in found.refused.items()}
    left_out["refused"] = {item.name: refused[item.key] for item in items if item.key in refused}
    say_left_out([f"{name}: {reason}" for name, reason in left_out["refused"].items()], len(items))
    kept = [number for number, item in enumerate(items) if item.key not in refused]
    if not kept:
        raise ValueError("Every image is refused by one model or another, so that there is nothing to compare.")
    return [items[number] for number in kept], np.searchsorted(kept, np.intersect1d(probed, kept))


def space_of(embedded: Embedded, items, probed) -> dict[str, np.ndarray]:
    """The vectors of a model: of all images `(n, d)`, and by each change of the probe's `(m, d)`."""
    space = {ALL: np.stack([embedded.images[Key(item.key)] for item in items])}
    for change in CHANGES | SHRINKS:
        keys = [changed_key(items[number], change) for number in probed]
        space[change] = np.stack([embedded.images[key] for key in keys]) if keys else space[ALL][:0]
    return space


# Figures


def measure(items, probed, units, texts, undefined, seed) -> list[Figure]:
    """
    All figures.

    Args:
        probed: the numbers of the items that were changed.
        units: {model: what [`space_of`] gives, as unit vectors}, of the models that can be measured.
        texts: {model: {words: their vector}, or None without a text side}.
        undefined: {model: why it cannot be measured}.
    """
    labels = np.array([item.label for item in items])
    figures = []

    def add(group, names, samples_of, statistics=None):
        """`samples_of(model)` gives {figure: a sample for each image}; `names` stand where no model has any."""
        samples, reasons = {}, dict(undefined)
        for label in units:
            try:
                with console.status(f"{group}: {label}"):
                    samples[label] = samples_of(label)
            except Undefined as reason:
                reasons[label] = str(reason)
        for name in dict.fromkeys(name for found in samples.values() for name in found) or names:
            of_models = {label: found[name] for label, found in samples.items()}
            statistic = (statistics or {}).get(name, np.mean)
            figures.append(Figure(group, name, of_models, reasons, statistic, not name.endswith(LOWER_IS_BETTER)))
        return samples

    add(RETRIEVAL, measures.RANKED, lambda label: measures.same_class_retrieval(units[label][ALL], labels))
    probes = ("k-NN accuracy", "linear-probe accuracy")
    add(HELD_OUT, probes, lambda label: measures.held_out_accuracy(units[label][ALL], labels, seed))
    agreement = {"NMI": measures.nmi, "ARI": measures.ari}
    clustered = functools.partial(dict.fromkeys, agreement)
    add(CLUSTERING, agreement, lambda label: clustered(measures.clusters(units[label][ALL], labels, seed)), agreement)

    by_change = {}
    for change in CHANGES | SHRINKS:

        def samples_of(label, change=change):
            found = measures.after_change(units[label][ALL], units[label][change], probed, labels)
            return {f"{change}: {name}": sample for name, sample in found.items()}

        group = ROBUSTNESS if change in CHANGES else DETAIL
        by_change[change] = add(group, [f"{change}: finds itself"], samples_of)

    def mean_samples(label):
        if any(label not in by_change[change] for change in CHANGES):
            raise Undefined("see above")
        names = [name.removeprefix("blur: ") for name in by_change["blur"][label]]
        return {
            f"{ALL_CHANGES}: {name}": np.mean([by_change[c][label][f"{c}: {name}"] for c in CHANGES], axis=0)
            for name in names
        }

    add(ROBUSTNESS, [f"{ALL_CHANGES}: finds itself"], mean_samples)

    if any(vectors is not None for vectors in texts.values()):
        words = {text: number for number, text in enumerate(dict.fromkeys(item.words for item in items if item.words))}
        numbers, wanted = np.arange(len(words)), np.array([words.get(item.words, UNLABELLED) for item in items])

        def of_words(label):
            if texts[label] is None:
                raise Undefined("it has no text side")
            return unit(np.stack([texts[label][text] for text in words]))

        searched = measures.retrieval
        add(TO_IMAGE, measures.RANKED, lambda label: searched(of_words(label), numbers, units[label][ALL], wanted))
        add(TO_TEXT, measures.RANKED, lambda label: searched(units[label][ALL], wanted, of_words(label), numbers))
    return figures


def measure_answers(models: dict[str, Model], items, question, num_crops, cache) -> list[Figure]:
    """What [`answer`] gives of all models."""
    samples, undefined = {}, {}
    for label, model in models.items():
        try:
            samples[label] = answer(model, items, question, num_crops, cache)
        except Undefined as reason:
            undefined[label] = str(reason)
    return [
        Figure(
            ANSWERS,
            name,
            {label: values[name] for label, values in samples.items()},
            undefined,
            higher_is_better=name != LOSS,
        )
        for name in (EXACT, LOSS)
    ]


def compare_spaces(units: dict[str, np.ndarray], resamples: int, seed: int) -> list[dict]:
    """How alike each two spaces are: linear CKA on a sample of the images, and shared neighbours among all."""
    if len(units) < 2:
        return []
    total, rng = len(next(iter(units.values()))), np.random.default_rng(seed)
    sample = rng.permutation(total)[:CKA_IMAGES]
    everything, draws = np.arange(len(sample)), rng.choice(len(sample), (measures.FEW_RESAMPLES, len(sample)))
    grams = {label: measures.gram(vectors[sample]) for label, vectors in units.items()}
    spaces = []
    for left, right in combinations(units, 2):
        observed, resampled = measures.bootstrap(
            [measures.overlap(units[left], units[right])], np.mean, resamples, seed
        )
        cka, *others = (
            measures.linear_cka(grams[left][np.ix_(rows, rows)], grams[right][np.ix_(rows, rows)])
            for rows in (everything, *draws)
        )
        spaces.append({"models": [left, right], "overlap": with_bounds(observed[0], resampled[0])})
        # The basic bootstrap, because images drawn twice make spaces alike.
        spaces[-1]["cka"] = with_bounds(cka, 2 * cka - np.array(others))
    return spaces


def with_bounds(value, resampled):
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": float(value), "low": float(low), "high": float(high)}


# What was compared


def name_models(models: list[Model]) -> list[str]:
    labels = [model.label for model in models]
    return [model.text if labels.count(label) > 1 else label for model, label in zip(models, labels)]


def what_it_is(model: Model) -> dict[str, str | None]:
    """What the report's words about a model follow from: its kind, its pooling, and the family of its tower."""
    pooling = family = None
    if model.kind in (PHI3_EMBED, TRANSFORMERS):
        config = AutoConfig.from_pretrained(**model.pinned)
        pooling = (model.pooling or config.pooling_mode) if model.kind == PHI3_EMBED else None
        family = (config.vision_config if model.kind == PHI3_EMBED else config).model_type
    return {"kind": model.kind, "pooling": pooling, "architecture": family}


def about(arguments, items, started) -> dict[str, Any]:
    return {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "started": started,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "images": len(items),
        "classes": len({item.label for item in items} - {UNLABELLED}),
        "neighbours": measures.NUM_NEIGHBOURS,
    }


def command_again(models: list[Model], arguments) -> str:
    """The command line, with what lies on this machine by its name alone: a report may be passed on."""
    words = ["phi3-embed", "compare", without_path(arguments["source"])]
    for model in models:
        words += ["--model", model.pinned_text.replace(model.name, without_path(model.name))]
    columns = ("image_column", "label_column", "text_column")
    for name in ("split", *columns, "question", "limit", "probe", "num_crops", "seed"):
        if arguments[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(arguments[name])]
    return shlex.join(words)


def show(results) -> None:
    """Prints the figures but for those of single changes."""
    labels = [model["label"] for model in results["models"]]
    table = Table("", title="Figures, with their 95% intervals. All of them are in report.html")
    for label in labels:
        table.add_column(label, justify="right")
    for figure in results["figures"]:
        if ":" not in figure["name"] or figure["name"].startswith(ALL_CHANGES):
            group = f"{figure['group']}: " if figure["group"] in (TO_IMAGE, TO_TEXT) else ""
            table.add_row(
                group + figure["name"], *(format_value(figure["values"].get(label), figure) for label in labels)
            )
    for name in ("parameters", "dimensions", "tokens", "milliseconds", "bytes"):
        table.add_row(name, *(format_cost(model["cost"][name]) for model in results["models"]))
    console.print(table)
    for model in results["models"]:
        if model["undefined"]:
            console.print(f"{model['label']}: figures are undefined: {model['undefined']}.", style="yellow")
