"""What phi3-embed finetune leaves beside a model: pictures of curves and confusions, and a card."""

import json
from pathlib import Path

import matplotlib
import torch
from huggingface_hub import ModelCardData
from sklearn.metrics import ConfusionMatrixDisplay

from phi3_tools.images import DIGITS, SMALL_TEXT
from phi3_tools.results import save_figure, without_path, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CURVES, CONFUSION = "curves.png", "confusion.png"
MAX_CONFUSED = 40  # classes that a picture of confusions can show


def draw_curves(history, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figures = [f"eval_{name}" for name in ("accuracy", "macro F1", "recall@1", "recall@5")]
    for axis, keys in zip(axes, (("loss", "eval_loss"), figures)):
        for key in keys:
            if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
                axis.plot(*zip(*points), marker=".", label=key.replace("eval_", "validation: "))
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend()
    save_figure(figure, path)


def draw_confusion(confusion, names, path):
    shown = sorted(set(torch.cat(confusion).tolist()))
    size = 3 + 0.4 * len(shown)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        *confusion,
        labels=shown,
        display_labels=[names[label] for label in shown],
        xticks_rotation="vertical",
        colorbar=False,
        cmap="Blues",
        ax=axis,
    )
    axis.set(xlabel="said", ylabel="is")
    save_figure(figure, path)


CARD = """---
{data}
---

# {title}

{base}, fine-tuned for {task} on {source} by phi3-embed's `phi3-embed finetune`.

## Figures

On {num_held_out} pictures that took no part in the training. recall@k: a picture has one of its own label among the k
others that are nearest to it by cosine. Linear probe: logistic regression on the vectors of the training pictures.

{table}

![loss and validation](curves.png)
{confusion}
## Data

{about}

## Arguments

```json
{arguments}
```

## Use

```python
{use}
```

`trust_remote_code=True` runs the code in this repository: pin `revision` to a commit that you have read.
"""
USE = {
    "classification": """from transformers import pipeline

classify = pipeline("image-classification", model="{name}", trust_remote_code=True)
print(classify("picture.png"))""",
    "embedding": """from sentence_transformers import SentenceTransformer

embedder = SentenceTransformer("{name}", trust_remote_code=True)
vectors = embedder.encode(["one.png", "other.png"])
print(embedder.similarity(vectors, vectors))""",
}


def table_of(rows):
    columns = list(rows["fine-tuned"])
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[column]:.1%}' for column in columns)} |")
    return "\n".join(lines)


def write_card(options, arguments, splits, names, rows, num_held_out, about, path):
    title = arguments.hub_model_id or path.parent.resolve().name
    is_classifier = options.task == "classification"
    is_local = Path(options.model).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        base_model=None if is_local else options.model,
        datasets=None if Path(options.data).exists() or options.data in (DIGITS, SMALL_TEXT) else [options.data],
        tags=["custom_code", "phi3_embed"] + ([] if is_classifier else ["sentence-transformers"]),
    )
    has_confusion = (path.parent / CONFUSION).exists()
    counts = "" if options.streaming else ": " + ", ".join(f"{len(split)} in {name}" for name, split in splits.items())
    text = CARD.format(
        data=data.to_yaml(),
        title=title,
        base=Path(options.model).resolve().name if is_local else options.model,
        task=options.task,
        source=without_path(options.data),
        num_held_out=num_held_out,
        table=table_of(rows),
        confusion="\n![which class is taken for which](confusion.png)\n" if has_confusion else "",
        about=f"{without_path(options.data)}{counts}. Labels: {', '.join(names[:MAX_CONFUSED])}"
        f"{', ...' if len(names) > MAX_CONFUSED else ''}.",
        arguments=json.dumps(about | {name: without_path(about[name]) for name in ("model", "data")}, indent=2),
        use=USE[options.task].format(name=title),
    )
    write_text(path, text)
