"""The report of a comparison as one HTML file that needs nothing else: a verdict, charts, maps, images and tables."""

import base64
import io
from itertools import combinations
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from phi3_tools.measures import UNLABELLED, nearest
from phi3_tools.results import write_text

MAPPED = 400  # images in a map
CASES = 12  # queries with their neighbours
NEIGHBOURS = 5
QUERY = ""  # in a row of neighbours, where models have names
THUMBNAIL = 96
BINS = 40
WIDTH, HEIGHT = 320, 160  # of a chart
# The verdict's tasks: the figure, its title, and what a model does well whose value is the best.
TASKS = {
    ("Same-class retrieval", "recall@1"): (
        "Nearest image of the same class (recall@1)",
        "finding an image of the same class",
    ),
    ("Same-class retrieval", "mAP"): ("All images of the same class first (mAP)", "ranking a class first"),
    ("Classification of held-out images", "linear-probe accuracy"): (
        "Telling classes by a linear probe",
        "telling classes by a linear probe",
    ),
    ("Clustering", "NMI"): ("Clusters that match the classes (NMI)", "clusters that match the classes"),
    ("Robustness", "mean of all changes: finds itself"): (
        "Finding the original of a changed image",
        "finding the original of a changed image",
    ),
    ("Fine detail", "1/4 size: finds itself"): (
        "Finding the original of an image at a quarter of its size",
        "finding the original of a small copy",
    ),
    ("Text to image", "recall@1"): ("Finding an image by words (recall@1)", "finding an image by words"),
    ("Answers", "exact answers"): ("Answering with the right words", "answering with the right words"),
    ("Image to text", "recall@1"): ("Finding the words for an image (recall@1)", "finding the words for an image"),
}
FAMILIES = {"clip_vision_model": "CLIP", "clip": "CLIP", "siglip_vision_model": "SigLIP", "siglip": "SigLIP"}
FAMILIES |= {"dinov2": "DINOv2", "vit": "ViT"}
DECIMALS = ("NMI", "ARI", "moved", "loss a token")


def is_decimal(figure):
    return figure["name"].endswith(DECIMALS)


def format_number(number, figure):
    number = round(number, 2 if is_decimal(figure) else 3) + 0.0  # which makes 0 of -0
    return f"{number:.2f}" if is_decimal(figure) else f"{number:.1%}"


def format_value(value, figure):
    if value is None or "undefined" in value:
        return "undefined"
    if value["low"] is None:
        return format_number(value["value"], figure)
    if is_decimal(figure):
        return f"{value['value']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
    return f"{value['value']:.1%} ({100 * value['low']:.0f}–{100 * value['high']:.0f})"


def format_difference(difference, figure):
    """A difference with its sign, shares in percentage points."""
    digits = 2 if is_decimal(figure) else 1
    number = round(difference if is_decimal(figure) else 100 * difference, digits) + 0.0
    return f"{number:+.{digits}f}".replace("-", "−") if number else "0"


def format_cost(cost):
    if cost is None:
        return "–"
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"


def write_report(path, results, items, classes, units, seed):
    """`items`: the images; `units`: {model: unit vectors `(n, d)`} of the models that have figures."""
    rng = np.random.default_rng(seed)
    labels = np.array([item.label for item in items])
    mapped = np.sort(rng.permutation(len(items))[:MAPPED])
    cases = disagreements(units, labels)
    # Images are numbered anew in the page, which holds those alone that it shows.
    shown = np.unique(np.concatenate([mapped, *(rows for case in cases for rows in case.values())])).tolist()
    place = {number: position for position, number in enumerate(shown)}
    names, labels_shown = [items[number].name for number in shown], labels[shown].tolist()
    titles = [
        name if label == UNLABELLED else f"{name} ({classes[label]})" for name, label in zip(names, labels_shown)
    ]
    tasks = measured_tasks(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # without sorting: models keep their order
    page = environment.get_template("report.html.j2").render(
        results=results,
        labels=[model["label"] for model in results["models"]],
        verdict=verdict(results, tasks),
        described={model["label"]: describe(model) for model in results["models"]},
        tasks=tasks,
        groups=tables(results),
        curves=detail_curves(results),
        histograms={label: histogram(vectors, labels, rng) for label, vectors in units.items()},
        cases=[{model: [place[number] for number in rows.tolist()] for model, rows in case.items()} for case in cases],
        maps=list(units),
        payload={
            "thumbnails": [items[number].thumbnail for number in shown],
            "names": names,
            "titles": titles,
            "classes": classes,
            "labels": labels_shown,
            "mapped": [place[number] for number in mapped.tolist()],
            "maps": {label: layout(vectors[mapped], seed) for label, vectors in units.items()},
            "neighbours": {label: neighbours(vectors[mapped]) for label, vectors in units.items()},
        },
        format_number=format_number,
        format_difference=format_difference,
        format_cost=format_cost,
        width=WIDTH,
        height=HEIGHT,
    )
    write_text(path, page)


# Words


def describe(model):
    """What a model is, for those who did not choose it."""
    kind, pooling, tower = model["kind"], model["pooling"], model["architecture"]
    if kind == "pixels":
        return "No model: the image itself at 32 × 32 pixels, which every model should beat."
    if kind == "phi3_embed":
        of_tower = FAMILIES.get(tower, tower)
        return {
            "mean": "Phi-3-vision’s way to embed an image: the mean of the tokens that the language model reads, of "
            "the crops in full detail and of the global view.",
            "global": "The same of the global view alone: the whole image at one crop’s size, without the crops.",
            "tower": f"The vision tower inside, before Phi-3’s own projection: the mean of its patches on the global "
            f"view. The tower is a {of_tower}, so this is {of_tower}’s side of the comparison.",
        }[pooling]
    if kind == "sentence-transformers":
        return "A sentence-transformers model, by its own encode."
    return f"{FAMILIES.get(tower, tower)}, a model of transformers, by its own image processor."


def standing(figure):
    """{model: None for the one with the best value, else how it differs from that one}, of all models with a test."""
    values = {label: value["value"] for label, value in figure["values"].items() if "value" in value}
    if not values:
        return {}
    best = (max if figure["higher_is_better"] else min)(values, key=lambda label: values[label])
    found = {best: None}
    for difference in figure["differences"]:
        left, right = difference["models"]
        if best == left:
            bounds = {"difference": -difference["difference"], "low": -difference["high"], "high": -difference["low"]}
            found[right] = difference | bounds
        elif best == right:
            found[left] = difference
    return found


def is_behind(difference):
    return difference is not None and difference["beyond_noise"]


def measured_tasks(results):
    """The tasks of the verdict: how each model did, best first, and which stand together."""
    figures = {(figure["group"], figure["name"]): figure for figure in results["figures"]}
    tasks = []
    for key, (words, doing) in TASKS.items():
        if key not in figures:
            continue
        figure = figures[key]
        against_best = standing(figure)
        values = {label: value for label, value in figure["values"].items() if "value" in value}
        ranked = sorted(values, key=lambda label: -values[label]["value"])
        rows = [
            {"label": label, "is_best": label == ranked[0], "value": values[label], "against": against_best.get(label)}
            for label in ranked
        ]
        tasks.append(
            {
                "title": words,
                "doing": doing,
                "figure": figure,
                "rows": rows,
                "level": [label for label in ranked if label in against_best and not is_behind(against_best[label])],
                "is_tested": len(against_best) > 1,
                "scale": scale_of(rows),
                "line": line_of(rows, figure),
                "note": paired_note(rows),
                "undefined": {label: v["undefined"] for label, v in figure["values"].items() if "undefined" in v},
            }
        )
    return tasks


def scale_of(rows):
    """The end of a chart's axis: the next round number above what is drawn, 1 at most."""
    highest = max((row["value"]["high"] or row["value"]["value"] for row in rows), default=1)
    return next((end for end in (0.1, 0.2, 0.5) if highest <= end), 1)


def line_of(rows, figure):
    """Who is the best, who is level with it and who behind, in a line."""

    def listed(rows):
        return ", ".join(f"{row['label']} {format_number(row['value']['value'], figure)}" for row in rows)

    parts = {
        "": rows[:1],
        "within noise: ": [row for row in rows if row["against"] and not is_behind(row["against"])],
        "behind: ": [row for row in rows if is_behind(row["against"])],
        "not tested: ": [row for row in rows[1:] if row["against"] is None],
    }
    return "; ".join(words + listed(members) for words, members in parts.items() if members)


def paired_note(rows):
    """Why the tests need not agree with a look at the intervals, where they do not; otherwise None."""
    tested = [row for row in rows if row["against"]]
    behind = [row for row in tested if is_behind(row["against"])]
    overlapping = [row["label"] for row in behind if row["value"]["high"] > rows[0]["value"]["low"]]
    level = [row for row in tested if not is_behind(row["against"])]
    odd = [(a["label"], b["label"]) for a in level for b in behind if a["value"]["value"] <= b["value"]["value"]]
    if odd:
        return (
            f"{odd[0][0]} is within noise and {odd[0][1]}, whose value is no lower, is not. Models are compared image "
            "by image: the more often two of them err on the same images, the smaller a difference shows."
        )
    if overlapping:
        return (
            f"The interval of {overlapping[0]} overlaps that of {rows[0]['label']}, and yet it is behind: models are "
            "compared image by image, and what is hard for both tells nothing about which is better."
        )
    return None


def verdict(results, tasks):
    """Which model is the best at what, and whether beyond noise, in one paragraph of HTML."""
    about = results["about"]
    classes = f" of {about['classes']} classes" if about["classes"] else ""
    where = Markup("On {} images{}").format(about["images"], classes)
    measured = [task for task in tasks if task["rows"]]
    tested = [task for task in measured if task["is_tested"]]
    models = [model["label"] for model in results["models"] if not model["undefined"]]
    if not measured:
        text = Markup("{} nothing could be measured.").format(where)
    elif len(models) == 1:
        value = format_number(measured[0]["rows"][0]["value"]["value"], measured[0]["figure"])
        text = Markup("{} <strong>{}</strong> alone was measured, with nothing to compare it to: {}, {}.").format(
            where, models[0], measured[0]["title"], value
        )
    elif not tested or all(len(task["level"]) == len(task["rows"]) for task in tested):
        text = Markup(
            "{} <strong>no model is better than another beyond noise</strong>{}. More images may tell them apart."
        ).format(where, f": not at {_listed_doings(tested)}" if tested else "")
    else:
        text = Markup("{}, {}").format(where, _verdict_of_winner(tested, models))
    for model in results["models"]:
        if model["undefined"]:
            text += Markup(" <strong>{}</strong> has no figures: {}.").format(model["label"], model["undefined"])
    return text


def _verdict_of_winner(tasks, models):
    alone = {label: [task for task in tasks if task["level"] == [label]] for label in models}
    shared = {label: [task for task in tasks if label in task["level"] and len(task["level"]) > 1] for label in models}
    winner = max(models, key=lambda label: (len(alone[label]) + len(shared[label]), len(alone[label])))
    name, total = Markup("<strong>{}</strong>").format(winner), len(tasks)
    if alone[winner]:
        text = Markup("{} is the best of {} models: ahead of {} beyond noise at {} of {} tasks, {}").format(
            name,
            len(models),
            "the other" if len(models) == 2 else "every other",
            len(alone[winner]),
            total,
            _listed([_with_values(task) for task in alone[winner]]),
        )
        if shared[winner]:
            text += Markup(". It shares the first place, within noise, at {}").format(_listed_doings(shared[winner]))
    else:
        many, all_of_them = len(shared[winner]), _listed_doings(shared[winner])
        where = f"all {many} tasks" if many == total else f"{many} of {total} tasks ({all_of_them})"
        text = Markup("{} shares the first place, within noise, at {}, and is ahead of all others at none").format(
            name, where
        )
    text += "."
    for label in models:
        lost = [task for task in alone[label] if label != winner]
        if lost:
            text += Markup(" <strong>{}</strong> is ahead of every other at {}.").format(
                label, _listed([_with_values(task) for task in lost])
            )
    told = [*alone[winner], *shared[winner], *(task for label in models for task in alone[label])]
    for task in tasks:
        if task not in told:
            text += Markup(" At {} {} are level.").format(task["doing"], _listed(task["level"]))
    return text


def _with_values(task):
    best, second = (format_number(row["value"]["value"], task["figure"]) for row in task["rows"][:2])
    return f"{task['doing']} ({best} against {second})"


def _listed_doings(tasks):
    return _listed([task["doing"] for task in tasks])


def _listed(words):
    return " and ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])


# Tables and charts


def tables(results):
    """{group: its figures, each with the models that are level with the best, and whether it is a minor one}."""
    groups = {}
    for figure in results["figures"]:
        is_minor = ":" in figure["name"] and not figure["name"].endswith(("finds itself", ": recall@1"))
        level = {label for label, difference in standing(figure).items() if not is_behind(difference)}
        groups.setdefault(figure["group"], []).append(figure | {"level": level, "minor": is_minor})
    return groups


def detail_curves(results):
    """{model: points of "finds itself" by resolution, as an SVG polyline}, and the resolutions' names."""
    figures = [
        figure
        for figure in results["figures"]
        if figure["group"] == "Fine detail" and figure["name"].endswith("finds itself")
    ]
    curves = {}
    for model in results["models"]:
        values = [figure["values"].get(model["label"], {}).get("value") for figure in figures]
        if values and None not in values:
            points = [1.0, *values]
            step = WIDTH / (len(points) - 1)
            curves[model["label"]] = " ".join(
                f"{number * step:.1f},{HEIGHT * (1 - value):.1f}" for number, value in enumerate(points)
            )
    return {"lines": curves, "sizes": ["full size", *(figure["name"].split(":")[0] for figure in figures)]}


def histogram(vectors, labels, rng):
    """Cosines of pairs within and across classes: {kind: SVG points and mean}, their range, and the highest share."""
    kept = np.sort(rng.permutation(len(vectors))[:1000])
    cosines = vectors[kept] @ vectors[kept].T
    above = np.triu(np.ones_like(cosines, bool), 1)
    is_labelled = labels[kept] != UNLABELLED
    same = (labels[kept][:, None] == labels[kept]) & is_labelled & is_labelled[:, None]
    if is_labelled.any():
        pairs = {"within a class": cosines[above & same], "across classes": cosines[above & ~same]}
    else:
        pairs = {"all pairs": cosines[above]}
    low, high = float(cosines[above].min()), float(cosines[above].max())
    edges = np.linspace(low, max(high, low + 1e-3), BINS + 1)
    shares = {kind: np.histogram(values, edges)[0] / len(values) for kind, values in pairs.items() if len(values)}
    top = max(share.max() for share in shares.values())
    step = WIDTH / BINS
    curves = {}
    for kind, heights in shares.items():
        points = [(x * step, HEIGHT * (1 - y / top)) for i, y in enumerate(heights) for x in (i, i + 1)]
        corners = [(0, HEIGHT), *points, (WIDTH, HEIGHT)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        curves[kind] = {"points": line, "mean": float(pairs[kind].mean())}
    return {"curves": curves, "low": low, "high": high, "top": float(top)}


# Images


def disagreements(units, labels):
    """
    The queries whose neighbours differ most between the models, first those with the fewest in common.

    Returns:
        For each {`QUERY`: its number `(1,)`, model: the numbers of its neighbours `(k,)`}.
    """
    if not units or len(labels) < 3:
        return []
    own = np.arange(len(labels))
    found = {label: nearest(vectors, vectors, NEIGHBOURS, own) for label, vectors in units.items()}
    common = np.zeros(len(own))
    for left, right in combinations(found.values(), 2):
        common += (left[:, :, None] == right[:, None]).sum((1, 2))
    # Where neighbours differ as much, queries come first of which one model finds the class and another does not.
    hits = np.array([(labels[rows] == labels[:, None]).mean(1) for rows in found.values()])
    order = np.lexsort((-np.ptp(hits, axis=0), common))[:CASES]
    return [{QUERY: own[[query]]} | {label: rows[query] for label, rows in found.items()} for query in order]


def neighbours(vectors):
    if len(vectors) < 2:
        return [[] for _ in vectors]
    return nearest(vectors, vectors, NEIGHBOURS, np.arange(len(vectors))).tolist()


def layout(vectors, seed):
    """Places of vectors in the plane, `(n, 2)` in [0, 1]: t-SNE, or of a few PCA."""
    if len(vectors) < 2:
        return [[0.5, 0.5] for _ in vectors]
    dimensions = min(50, *vectors.shape)
    plane = PCA(dimensions, random_state=seed).fit_transform(vectors)
    if len(vectors) >= 10:
        perplexity = min(30, (len(vectors) - 1) / 3)
        plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(plane)
    plane = np.pad(plane, ((0, 0), (0, max(0, 2 - plane.shape[1]))))[:, :2]
    low, high = plane.min(0), plane.max(0)
    return ((plane - low) / np.maximum(high - low, 1e-9)).round(4).tolist()


def data_uri(image):
    """An image as a data URI, at most `THUMBNAIL` pixels long."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, lossless=max(image.size) <= 16)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
