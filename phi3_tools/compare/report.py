"""The report of examples/compare.py as one HTML file that needs nothing else: words, tables, charts and pictures."""

import base64
import io
from itertools import combinations
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from phi3_tools.measures import UNLABELLED, nearest, unit

MAPPED = 400  # pictures in a map
SHOWN = 12  # queries with their neighbours
NEIGHBOURS = 5
THUMBNAIL = 64
BINS = 40
WIDTH, HEIGHT = 320, 160  # of a chart
# What the summary is about, in words.
HEADLINES = {
    ("Same-class retrieval", "recall@1"): "Nearest picture of the same class (recall@1)",
    ("Same-class retrieval", "mAP"): "All pictures of the same class first (mAP)",
    ("Classification of held-out pictures", "linear-probe accuracy"): "Telling classes by a linear probe",
    ("Clustering", "NMI"): "Clusters that match the classes (NMI)",
    ("Robustness", "mean of all changes: finds itself"): "Finding the original of a changed picture",
    ("Fine detail", "1/4 size: finds itself"): "Finding the original of a picture at a quarter of its size",
    ("Text to image", "recall@1"): "Finding a picture by its caption (recall@1)",
}
DECIMALS = ("NMI", "ARI", "moved")


def format_number(number, figure):
    is_decimal = figure["name"].endswith(DECIMALS)
    number = round(number, 2 if is_decimal else 3) + 0.0  # which makes 0 of -0
    return f"{number:.2f}" if is_decimal else f"{number:.1%}"


def format_value(value, figure):
    if value is None or "undefined" in value:
        return "undefined"
    if figure["name"].endswith(DECIMALS):
        return f"{value['value']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
    return f"{value['value']:.1%} ({100 * value['low']:.0f}–{100 * value['high']:.0f})"


def format_cost(cost):
    if cost is None:
        return "–"
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"


def write_report(path, results, data, vectors, seed):
    """`vectors`: {model: `(n, d)`} of the models that have figures."""
    units = {label: unit(each) for label, each in vectors.items()}
    rng = np.random.default_rng(seed)
    mapped = np.sort(rng.permutation(len(data.names))[:MAPPED])
    cases = disagreements(units, data)
    shown = sorted({*mapped.tolist(), *(each for case in cases for each in case["pictures"])})
    place = {number: position for position, number in enumerate(shown)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # models keep their order
    page = environment.get_template("report.html.j2").render(
        results=results,
        labels=[model["label"] for model in results["models"]],
        summary=summarise_in_words(results),
        groups=tables(results),
        curves=detail_curves(results),
        histograms={label: histogram(each, data.labels, rng) for label, each in units.items()},
        cases=[case | {"query": place[case["query"]], "rows": rows_of(case, place, data)} for case in cases],
        names=[title(data, number) for number in shown],
        mapped=[place[number] for number in mapped.tolist()],
        maps=list(units),
        payload={
            "thumbnails": [thumbnail(data.pictures[number].read()) for number in shown],
            "names": [title(data, number) for number in shown],
            "classes": [int(data.labels[number]) for number in shown],
            "mapped": [place[number] for number in mapped.tolist()],
            "maps": {label: layout(each[mapped], seed) for label, each in units.items()},
            "neighbours": {label: neighbours_of(each[mapped]) for label, each in units.items()},
        },
        format_number=format_number,
        format_cost=format_cost,
        width=WIDTH,
        height=HEIGHT,
    )
    path.write_text(page, "utf-8")


def title(data, number):
    label = data.labels[number]
    return data.names[number] + (f" ({data.classes[label]})" if label != UNLABELLED else "")


def summarise_in_words(results):
    """Sentences: who does best at what, and where the difference is within noise."""
    sentences = []
    figures = {(figure["group"], figure["name"]): figure for figure in results["figures"]}
    for key, words in HEADLINES.items():
        if key not in figures:
            continue
        figure = figures[key]
        values = {label: each for label, each in figure["values"].items() if "value" in each}
        if not values:
            reasons = sorted({each["undefined"] for each in figure["values"].values()})
            sentences.append({"words": words, "text": f"undefined: {'; '.join(reasons)}."})
            continue
        ranked = sorted(values, key=lambda label: -values[label]["value"])
        best, level = ranked[0], level_with_best(figure)
        number = format_number(values[best]["value"], figure)
        tied = [label for label in ranked[1:] if label in level]
        behind = [label for label in ranked[1:] if label not in level]
        listed = {label: f"{label} ({format_number(values[label]['value'], figure)})" for label in ranked}
        if len(values) == 1:
            text = f"only {best} has a value, {number}."
        elif not behind:
            text = f"the differences are within noise: {', '.join(listed[label] for label in ranked)}."
        elif not tied:
            text = f"{best} does best, {number}, ahead of {', '.join(listed[label] for label in behind)}."
        else:
            text = (
                f"{best} has the highest value, {number}; within noise of it: "
                f"{', '.join(listed[label] for label in tied)}; behind: {', '.join(listed[each] for each in behind)}."
            )
        sentences.append({"words": words, "text": text})
    return sentences


def level_with_best(figure):
    """The model with the best value, and those whose difference to it is within noise."""
    values = {label: each["value"] for label, each in figure["values"].items() if "value" in each}
    if not values:
        return set()
    best = (max if figure["higher_is_better"] else min)(values, key=values.get)
    near = {
        label
        for difference in figure["differences"]
        if best in difference["models"] and not difference["beyond_noise"]
        for label in difference["models"]
    }
    return near | {best}


def tables(results):
    """{group: its figures, each with the models that are level with the best, and whether it is a minor one}."""
    groups = {}
    for figure in results["figures"]:
        is_minor = ":" in figure["name"] and not figure["name"].endswith(("finds itself", ": recall@1"))
        groups.setdefault(figure["group"], []).append(figure | {"level": level_with_best(figure), "minor": is_minor})
    return groups


def detail_curves(results):
    """{model: points of "finds itself" by resolution, as an SVG polyline}, and the resolutions' names."""
    figures = [
        each for each in results["figures"] if each["group"] == "Fine detail" and each["name"].endswith("finds itself")
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
    """Cosines of pairs within and across classes: {kind: (SVG points, mean)}, and the range of the cosines."""
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
    found = {kind: np.histogram(each, edges, density=True)[0] for kind, each in pairs.items() if len(each)}
    top = max(each.max() for each in found.values())
    step = WIDTH / BINS
    curves = {}
    for kind, heights in found.items():
        points = [(x * step, HEIGHT * (1 - y / top)) for i, y in enumerate(heights) for x in (i, i + 1)]
        corners = [(0, HEIGHT), *points, (WIDTH, HEIGHT)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        curves[kind] = {"points": line, "mean": float(pairs[kind].mean())}
    return {"curves": curves, "low": low, "high": high}


def disagreements(units, data):
    """The queries whose neighbours differ most between the models: first those with the fewest in common."""
    if not units or len(data.names) < 3:
        return []
    own = np.arange(len(data.names))
    found = {label: nearest(each, each, NEIGHBOURS, own) for label, each in units.items()}
    common = np.zeros(len(own))
    for left, right in combinations(found.values(), 2):
        common += [len(set(a) & set(b)) for a, b in zip(left.tolist(), right.tolist())]
    # Among equals those where one model finds the class and another does not.
    hits = np.array([(data.labels[each] == data.labels[:, None]).mean(1) for each in found.values()])
    order = np.lexsort((-np.ptp(hits, axis=0), common))[:SHOWN].tolist()
    return [
        {
            "query": query,
            "title": title(data, query),
            "found": {label: each[query].tolist() for label, each in found.items()},
            "pictures": [query, *(each for rows in found.values() for each in rows[query].tolist())],
        }
        for query in order
    ]


def rows_of(case, place, data):
    """{model: its neighbours as their place among the thumbnails, title, and whether of the query's class}."""
    label = data.labels[case["query"]]
    return {
        model: [
            {
                "place": place[each],
                "title": title(data, each),
                "same": None if UNLABELLED in (label, data.labels[each]) else bool(data.labels[each] == label),
            }
            for each in found
        ]
        for model, found in case["found"].items()
    }


def neighbours_of(vectors):
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


def thumbnail(image):
    """A picture as a data URI, at most `THUMBNAIL` pixels long."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, lossless=max(image.size) <= 16)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
