"""What a training leaves beside a model: figures in words and numbers, drawings of curves and confusions, a card."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score

from phi3_tools.finetune.settings import METRICS, Settings
from phi3_tools.images import DIGITS, SMALL_TEXT
from phi3_tools.measures import Undefined, same_class_retrieval, unit
from phi3_tools.results import new_figure, save_figure, without_path
from phi3_tools.results import write_card as write_from_template

CURVES, CONFUSION = "curves.png", "confusion.png"
TO_TEXT = "image to text: recall@1"  # of texts and images in one space
PIPELINES = {
    "classification": "image-classification",
    "embedding": "image-feature-extraction",
    "align": "image-text-to-text",
    "instruct": "image-text-to-text",
}
MAX_CONFUSED = 40  # classes that a drawing of confusions can show
MORE = "Train longer (--num-train-epochs), at another --learning-rate, or on more images."


def figures_of_classes(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": accuracy_score(labels, predicted),
        "macro F1": f1_score(labels, predicted, average="macro", zero_division=0),
    }


def figures_of_search(vectors: np.ndarray, labels: np.ndarray, size: int | None = None) -> dict[str, float]:
    """
    Of the images with another of their label, each searched among all others, by vectors that are cut to `size`;
    nothing where there are none such.
    """
    try:
        found = same_class_retrieval(unit(vectors[:, :size]), np.asarray(labels))
    except Undefined:
        return {}
    return {name: float(found[name].mean()) for name in METRICS["embedding"]}


def with_cuts(figures_of: Callable[[int | None], dict[str, float]], sizes: list[int]) -> dict[str, float]:
    """Figures by whole vectors, and by those that are cut to each of some sizes."""
    cut = {f"{name}, {size} dimensions": value for size in sizes for name, value in figures_of(size).items()}
    return figures_of(None) | cut


def verdict(rows: dict[str, dict[str, float]], labels: list[int], task: str) -> list[str]:
    """Sentences on a result that is no result: at chance, below the linear probe, or not above the untrained model."""
    trained, before, counts, total = rows["fine-tuned"], rows["untrained"], Counter(labels), len(labels)
    if task == "embedding":
        name, chance = "recall@1", sum(n * (n - 1) for n in counts.values()) / (total * (total - 1))
        guess = "drawing another image at random"
        return against_chance(name, trained[name], before[name], chance, guess, _noise(chance, labels))
    value, probe, chance = trained["accuracy"], before["linear probe"], max(counts.values()) / total
    guess = "naming the most common class alone"
    said = against_chance("accuracy", value, None, chance, guess, _noise(chance, labels))
    if said or value >= probe:
        return said
    within = " (within noise)" if value >= probe - _noise(probe, labels) else ""
    return [
        f"**Below a linear probe**{within}: accuracy is {value:.1%}, and logistic regression on the untrained "
        f"model's vectors has {probe:.1%}. {MORE} --train head is the nearest to such a probe."
    ]


def against_chance(name, value, before, chance, guess, noise=0.0) -> list[str]:
    """A sentence on a figure that is not above chance, or above what it was `before` unless that is `None`."""
    if value <= chance + noise:
        return [f"{_no_better(value, chance)}: {name} is {value:.1%}, and {guess} gives {chance:.1%}. {MORE}"]
    if before is not None and value <= before < 1:
        return [f"**Not better than before**: {name} is {value:.1%}, and was {before:.1%}. {MORE}"]
    return []


def verdict_of_answers(figures: dict[str, dict[str, float]], truths: list[str]) -> list[str]:
    """As [`verdict`], of what is said of images: exact answers where each is true of two at least, and the loss."""
    value, loss = figures["fine-tuned"]["exact answers"], figures["fine-tuned"]["loss"]
    chance = max(Counter(truths).values()) / len(truths)
    if 2 * len(set(truths)) <= len(truths) and value <= chance + _noise(chance, truths):
        return [
            f"{_no_better(value, chance)}: {value:.1%} of the answers are exact, and saying the most common one alone "
            f"gives {chance:.1%}. {MORE}"
        ]
    if "before" in figures and loss >= figures["before"]["loss"]:
        return [f"**Not better than before**: the loss is {loss:.3f}, and was {figures['before']['loss']:.3f}. {MORE}"]
    return []


def _no_better(value, chance):
    return f"**No better than chance**{' (within the noise of so few images)' if value > chance else ''}"


def _noise(share, labels):
    """Two standard errors of a share of the images."""
    return 2 * (share * (1 - share) / len(labels)) ** 0.5


def describe(labels: list[int]) -> str:
    """How many images were held out, and how far one of them moves a figure."""
    counts = Counter(labels).values()
    a_class = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{len(labels)} images ({a_class} a class; one image is {1 / len(labels):.1%})"


def table_of(rows: dict[str, dict[str, float]]) -> str:
    columns = list(rows["fine-tuned"])
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in rows.items():
        cells = [f"{row[column]:.3f}" if column == "loss" else f"{row[column]:.1%}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(history: list[dict], path: Path) -> None:
    figure = new_figure(figsize=(10, 4))
    validated = {f"eval_{name}" for names in METRICS.values() for name in names} - {"eval_loss"}
    for axis, keys, title in zip(
        figure.subplots(1, 2), (("loss", "eval_loss"), sorted(validated)), ("loss", "validation")
    ):
        for key in keys:
            if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
                axis.plot(*zip(*points), marker=".", label=key.replace("eval_", "validation: "))
        axis.set(xlabel="step", ylabel=title)
        if axis.lines:
            axis.legend()
    save_figure(figure, path)


def draw_confusion(labels: list[int], predicted: list[int], names: list[str], path: Path) -> None:
    shown = sorted({*labels, *predicted})
    size = 3 + 0.4 * len(shown)
    figure = new_figure(figsize=(size, size))
    axis = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        labels,
        predicted,
        labels=shown,
        display_labels=[names[label] for label in shown],
        xticks_rotation="vertical",
        colorbar=False,
        cmap="Blues",
        ax=axis,
    )
    axis.set(xlabel="named", ylabel="is")
    save_figure(figure, path)


def write_card(settings: Settings, about: dict, metrics: dict, names: list[str]) -> None:
    """README.md in OUTPUT. It names folders by their own names, and not by where they lie."""
    source, _, _, options, arguments = settings
    output = Path(arguments.output_dir)
    task, rows = PIPELINES[options.task], metrics["held out"]
    title, data = arguments.hub_model_id or output.resolve().name, without_path(source)
    is_on_hub = not Path(source).exists() and source not in (DIGITS, SMALL_TEXT)
    counts = (
        "" if about["images"] is None else ": " + ", ".join(f"{n} in {name}" for name, n in about["images"].items())
    )
    more = ", ..." if len(names) > MAX_CONFUSED else ""
    write_from_template(
        output / "README.md",
        "finetune.md",
        ModelCardData(
            model_name=title,
            library_name="transformers",
            pipeline_tag=task,
            base_model=None if Path(options.model).exists() else options.model,
            datasets=[source] if is_on_hub else None,
            tags=["custom_code", "phi3_embed"] + ["sentence-transformers"] * (options.task == "embedding"),
            eval_results=[
                EvalResult(
                    task_type=task,
                    dataset_type=source if is_on_hub else data,
                    dataset_name=data,
                    metric_type=name,
                    metric_value=round(value, 4),
                )
                for name, value in rows["fine-tuned"].items()
            ],
        ),
        title=title,
        base=without_path(options.model),
        task=options.task,
        source=data,
        held_out=metrics["held-out images"],
        table=table_of(rows),
        verdict=metrics["verdict"],
        confusion=(output / CONFUSION).exists(),
        about_data=f"{data}{counts}." + (f" Labels: {', '.join(names[:MAX_CONFUSED])}{more}." if names else ""),
        arguments=json.dumps(about | {"source": data, "model": without_path(options.model)}, indent=2),
        pipeline=task,
        answers=metrics.get("answers"),
        by_words=TO_TEXT in rows["fine-tuned"],
    )
