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
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoConfig

from phi3_tools.compare.changes import CHANGES, CHANGES_VERSION, SHRINKS, shrink
from phi3_tools.compare.report import format_cost, format_value, write_report
from phi3_tools.compare.vectors import KeyedImage, embed, open_cache
from phi3_tools.images import IMAGE, LABEL, NAME, TEXT, image_hash, load_images, read_image, readable
from phi3_tools.measures import (
    FEW_RESAMPLES,
    NUM_NEIGHBOURS,
    UNLABELLED,
    Figure,
    after_change,
    ari,
    bootstrap,
    clusters,
    held_out_accuracy,
    linear_cka,
    nmi,
    overlap,
    retrieval,
    summarise,
    text_to_image,
    unit,
    why_undefined,
)
from phi3_tools.models import PHI3_EMBED, TRANSFORMERS, find_model
from phi3_tools.results import MAX_NAMED, check_writable, without_path, write_beside, write_text

PACKAGES = ("torch", "transformers", "sentence-transformers", "scikit-learn", "scipy", "numpy", "pillow")
RETRIEVAL, HELD_OUT, CLUSTERING = "Same-class retrieval", "Classification of held-out images", "Clustering"
ROBUSTNESS, DETAIL, TEXTS = "Robustness", "Fine detail", "Text to image"
CKA_PICTURES = 200
ALL_CHANGES = "mean of all changes"
LOWER_IS_BETTER = ("moved", "fall of recall@1")
console = Console()


@dataclass
class Data:
    """Pictures that differ; `labels` `(n,)` index `classes`, or are `UNLABELLED`; `captions` are texts, or None."""

    names: list[str]
    images: list[KeyedImage]
    labels: np.ndarray
    classes: list[str]
    captions: list[str] | None

    def select(self, kept):
        return Data(
            [self.names[each] for each in kept],
            [self.images[each] for each in kept],
            self.labels[kept],
            self.classes,
            self.captions and [self.captions[each] for each in kept],
        )


@dataclass
class Arguments:
    """What is compared, and how: see `phi3-embed compare --help`."""

    models: list[str]
    source: str
    output: Path
    split: str | None
    image_column: str | None
    label_column: str | None
    text_column: str | None
    limit: int | None
    probe: int
    num_crops: int | None
    resamples: int
    batch_size: int
    seed: int
    cache: Path


def run(arguments):
    # All that can be wrong is looked for before the work.
    check(arguments)
    models = [find_model(text) for text in dict.fromkeys(arguments.models)]
    data, left_out = load_data(arguments)
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    rng = np.random.default_rng(arguments.seed)
    probe = np.sort(rng.permutation(len(data.names))[: arguments.probe])
    embedded = embed(
        models,
        data.images + changed_pictures(data, probe),
        [] if data.captions is None else data.captions,
        arguments.num_crops,
        arguments.cache,
        arguments.batch_size,
    )
    data, probe, spaces = leave_out_refused(data, probe, embedded, left_out)
    labels = name_models(models)
    with console.status("Measuring"):
        figures, undefined = measure(data, probe, embedded, spaces, labels, arguments.seed)
        results = {
            "about": about(arguments, data, started, left_out),
            "models": [
                {
                    "label": label,
                    "spec": each.model.text,
                    "version": each.model.version,
                }
                | what_it_is(each.model)
                | {"undefined": undefined.get(label), "cost": each.cost}
                for label, each in zip(labels, embedded)
            ],
            "figures": summarise(figures, arguments.resamples, arguments.seed),
            "spaces": compare_spaces(spaces, labels, undefined, arguments),
        }
    vectors = {label: np.ascontiguousarray(each["all"]) for label, each in zip(labels, spaces)}
    write_beside(arguments.output / "embeddings.safetensors", lambda path: save_file(vectors, path, names_of(data)))
    results_text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    write_text(arguments.output / "results.json", results_text)
    with console.status("Writing the report"):
        good = {label: vectors for label, vectors in vectors.items() if label not in undefined}
        write_beside(
            arguments.output / "report.html", lambda path: write_report(path, results, data, good, arguments.seed)
        )
    show(results)
    console.print(f"Written: {arguments.output / 'report.html'}, results.json, embeddings.safetensors")


def check(arguments):
    for name, low in {"limit": 1, "probe": 1, "num_crops": 0, "resamples": 100, "batch_size": 1, "seed": 0}.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be {low} at least.")
    check_writable(arguments.output)
    open_cache(arguments.cache).close()


def load_data(arguments):
    """The pictures that can be read, each once, and what was left out."""
    datasets.disable_progress_bars()
    splits = load_images(arguments.source, arguments.image_column, arguments.label_column, arguments.text_column)
    name = arguments.split or ("test" if "test" in splits else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"The data has no split {name!r}, but {', '.join(map(repr, splits))}. Give one as --split.")
    split = splits[name]
    if TEXT in split.features and getattr(split.features[TEXT], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"The captions are {split.features[TEXT]}, but must be a text a picture. Name a column of such by "
            "--text-column."
        )
    if arguments.limit and arguments.limit < len(split):
        kept = np.sort(np.random.default_rng(arguments.seed).permutation(len(split))[: arguments.limit])
        split = split.select(kept.tolist())
    given = len(split)
    split = readable(split, skip_broken=True)
    if not len(split):
        raise ValueError(f"Not one of the {given} pictures of {arguments.source} can be read.")
    is_classes = isinstance(split.features.get(LABEL), datasets.ClassLabel)
    pictures = [KeyedImage(image_hash(image), functools.partial(read_image, image)) for image in split[IMAGE]]
    labels = [UNLABELLED if each is None else each for each in split[LABEL]] if is_classes else None
    data = Data(
        list(split[NAME]),
        pictures,
        np.full(len(split), UNLABELLED) if labels is None else np.array(labels),
        split.features[LABEL].names if is_classes else [],
        [each or "" for each in split[TEXT]] if TEXT in split.features else None,
    )
    kept = list({picture.key: number for number, picture in reversed(list(enumerate(pictures)))}.values())[::-1]
    if len(kept) < len(pictures):
        console.print(f"Left out {len(pictures) - len(kept)} pictures that are copies of others.")
    left_out = {"unreadable": given - len(split), "copies": len(pictures) - len(kept), "refused": {}}
    return data.select(sorted(kept)), left_out


def changed_pictures(data, probe):
    """The probe's pictures after every change, change by change."""

    def changed(number, name, change):
        picture = data.images[number]
        return KeyedImage(f"{picture.key} {name} {CHANGES_VERSION}", lambda: change(picture.read()))

    return [changed(number, name, change) for name, change in all_changes().items() for number in probe]


def all_changes():
    return CHANGES | {name: functools.partial(shrink, factor=factor) for name, factor in SHRINKS.items()}


def leave_out_refused(data, probe, embedded, left_out):
    """
    Pictures that a model refuses, changed or not, are left out of all models alike.

    Returns:
        The data, the probe, and for each model {"all": vectors `(n, d)`, change: vectors of the probe `(m, d)`}.
    """
    refused = {key: reason for each in embedded for key, reason in each.refused.items()}
    keys = {key.split(" ")[0] for key in refused}
    kept = np.array([number for number, picture in enumerate(data.images) if picture.key not in keys])
    left_out["refused"] = {
        name: next(reason for key, reason in refused.items() if key.startswith(picture.key))
        for name, picture in zip(data.names, data.images)
        if picture.key in keys
    }
    for name, reason in list(left_out["refused"].items())[:MAX_NAMED]:
        console.print(f"Left out of all models: {name}: {reason}", style="yellow")
    if not len(kept):
        raise ValueError("Every picture is refused by one model or another, so that there is nothing to compare.")
    total, is_kept = len(data.images), np.isin(probe, kept)
    spaces = []
    for each in embedded:
        space = {"all": each.vectors[:total][kept]}
        for number, name in enumerate(all_changes()):
            start = total + number * len(probe)
            space[name] = each.vectors[start : start + len(probe)][is_kept]
        spaces.append(space)
        if each.texts is not None:
            each.texts = each.texts[kept]
    return data.select(kept), np.searchsorted(kept, probe[is_kept]), spaces


def name_models(models):
    labels = [model.label for model in models]
    return [model.text if labels.count(label) > 1 else label for model, label in zip(models, labels)]


def what_it_is(model):
    """What the report's words about a model follow from: its kind, its pooling, and the family of its tower."""
    pooling = family = None
    if model.kind in (PHI3_EMBED, TRANSFORMERS):
        config = AutoConfig.from_pretrained(**model.pinned)
        pooling = (model.pooling or config.pooling_mode) if model.kind == PHI3_EMBED else None
        family = (config.vision_config if model.kind == PHI3_EMBED else config).model_type
    return {"kind": model.kind, "pooling": pooling, "architecture": family}


def measure(data, probe, embedded, spaces, labels, seed):
    """All figures, and {model: why it has none}."""
    undefined, units = {}, {}
    for label, space in zip(labels, spaces):
        reason = why_undefined(space["all"])
        if reason:
            undefined[label] = reason
        else:
            units[label] = {name: unit(vectors) for name, vectors in space.items()}
    classes, counts = np.unique(data.labels[data.labels != UNLABELLED], return_counts=True)
    without = undefined | dict.fromkeys(units, why_without_classes(classes))
    figures = []

    def add(group, found, without):
        """`found`: {model: {figure: samples}}; `without`: {model: why it has none}."""
        for name in dict.fromkeys(name for each in found.values() for name in each):
            samples = {label: each[name] for label, each in found.items()}
            figures.append(Figure(group, name, samples, without, higher_is_better=not name.endswith(LOWER_IS_BETTER)))

    def add_undefined(group, names, without=without):
        figures.extend(Figure(group, name, {}, without) for name in names)

    if len(classes) > 1 and counts.max() > 1 and units:
        all_of = {label: space["all"] for label, space in units.items()}
        add(RETRIEVAL, {label: retrieval(each, data.labels) for label, each in all_of.items()}, undefined)
        if (counts > 1).sum() > 1:
            progress = tqdm(all_of.items(), desc="Classifying", unit="model")
            add(HELD_OUT, {label: held_out_accuracy(each, data.labels, seed) for label, each in progress}, undefined)
        else:
            reason = undefined | dict.fromkeys(units, "fewer than two classes have two pictures")
            add_undefined(HELD_OUT, ("k-NN accuracy", "linear-probe accuracy"), reason)
        found = {label: clusters(each, data.labels, seed) for label, each in all_of.items()}
        for name, statistic in (("NMI", nmi), ("ARI", ari)):
            figures.append(Figure(CLUSTERING, name, found, undefined, statistic))
    else:
        add_undefined(RETRIEVAL, ("recall@1", "recall@5", "recall@10", "mAP"))
        add_undefined(HELD_OUT, ("k-NN accuracy", "linear-probe accuracy"))
        add_undefined(CLUSTERING, ("NMI", "ARI"))

    changes = {label: {} for label in units}
    for change in all_changes():
        group, reasons = DETAIL if change in SHRINKS else ROBUSTNESS, dict(undefined)
        for label, space in units.items():
            if np.isfinite(space[change]).all():
                changes[label][change] = after_change(space["all"], space[change], probe, data.labels)
            else:
                reasons[label] = "it gives NaN or infinite values after this change"
        found = {label: each[change] for label, each in changes.items() if change in each}
        add(group, {label: {f"{change}: {k}": v for k, v in each.items()} for label, each in found.items()}, reasons)
        if not found:
            add_undefined(group, [f"{change}: finds itself"], reasons)
    whole = {label: each for label, each in changes.items() if CHANGES.keys() <= each.keys()}
    names = next(iter(whole.values()))["blur"] if whole else {}
    means = {
        label: {
            f"{ALL_CHANGES}: {name}": np.mean([each[change][name] for change in CHANGES], axis=0) for name in names
        }
        for label, each in whole.items()
    }
    add(ROBUSTNESS, means, undefined | dict.fromkeys(units.keys() - whole.keys(), "see above"))

    if data.captions is not None and any(data.captions):
        texts = {label: each.texts for label, each in zip(labels, embedded) if label in units}
        found = {
            label: text_to_image(unit(each), units[label]["all"], data.captions)
            for label, each in texts.items()
            if each is not None
        }
        textless = {label: "it has no text side" for label, each in texts.items() if each is None}
        add(TEXTS, found, undefined | textless)
    return figures, undefined


def why_without_classes(classes):
    return "there are no two classes" if len(classes) < 2 else "no class has two pictures"


def compare_spaces(spaces, labels, undefined, arguments):
    """How alike each two spaces are: linear CKA on a sample of the pictures, and shared neighbours among all."""
    units = {label: unit(space["all"]) for label, space in zip(labels, spaces) if label not in undefined}
    rng = np.random.default_rng(arguments.seed)
    sample = rng.permutation(len(spaces[0]["all"]))[:CKA_PICTURES]
    numbers = rng.choice(sample, (FEW_RESAMPLES, len(sample)))
    found = []
    for left, right in combinations(units, 2):
        a, b = units[left], units[right]
        shared = overlap(a, b)
        observed, resampled = bootstrap([shared], np.mean, arguments.resamples, arguments.seed)
        low, high = np.quantile(resampled[0], (0.025, 0.975))
        entry = {"models": [left, right], "overlap": {"value": float(observed[0]), "low": float(low)}}
        entry["overlap"]["high"] = float(high)
        cka = linear_cka(a[sample], b[sample])
        # The basic bootstrap, as pictures drawn twice make spaces alike.
        values = [2 * cka - linear_cka(a[each], b[each]) for each in numbers]
        low, high = np.quantile(values, (0.025, 0.975))
        entry["cka"] = {"value": cka, "low": float(low), "high": float(high)}
        found.append(entry)
    return found


def about(arguments, data, started, left_out):
    return {
        "command": command_again(arguments),
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()},
        "started": started,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "images": len(data.names),
        "classes": len(np.unique(data.labels[data.labels != UNLABELLED])),
        "captions": data.captions is not None,
        "left_out": left_out,
        "neighbours": NUM_NEIGHBOURS,
    }


def command_again(arguments):
    """The command line, with what lies on this machine by its name alone: a report may be passed on."""

    words = ["phi3-embed", "compare", without_path(arguments.source)]
    for text in arguments.models:
        model = find_model(text)
        words += ["--model", model.pinned_text.replace(model.name, without_path(model.name))]
    for name in ("split", "image_column", "label_column", "text_column", "limit", "probe", "num_crops", "seed"):
        if getattr(arguments, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return shlex.join(words)


def names_of(data):
    return {"names": json.dumps(data.names, ensure_ascii=False), "labels": json.dumps(data.labels.tolist())}


def show(results):
    labels = [model["label"] for model in results["models"]]
    table = Table(title="Figures, with their 95% intervals. All of them are in report.html")
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    for figure in results["figures"]:
        if ":" in figure["name"] and not figure["name"].startswith(ALL_CHANGES):
            continue
        table.add_row(figure["name"], *(format_value(figure["values"].get(label), figure) for label in labels))
    for name in ("parameters", "dimensions", "tokens", "milliseconds", "bytes"):
        table.add_row(name, *(format_cost(model["cost"][name]) for model in results["models"]))
    console.print(table)
    for model in results["models"]:
        if model["undefined"]:
            console.print(f"{model['label']}: figures are undefined: {model['undefined']}.", style="yellow")
