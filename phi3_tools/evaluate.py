"""
A benchmark of mteb: runs its tasks and prints the leaderboard's row. MIEB(Img) is of images alone, MIEB(lite) and
MIEB(eng) of texts too, ViDoRe of pages.

mteb fetches each task's images from the Hub. Finished tasks are kept in the results folder: run the same command again
to go on after an interruption.
"""

from pathlib import Path

import mteb
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.results import BenchmarkResults
from rich.table import Table
from transformers import AutoConfig

from phi3_tools.models import PHI3_EMBED, PIXELS, find_model, load_sentence_transformer
from phi3_tools.results import console


def run(model, benchmark="MIEB(Img)", num_crops=None, batch_size=16, output=Path("results"), device=None) -> None:
    """Prints the scores of a benchmark's tasks, and the leaderboard's row if none failed."""
    try:
        tasks = mteb.get_benchmark(benchmark)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"mteb has no benchmark {benchmark!r}. Those of images are MIEB(Img), MIEB(lite), MIEB(eng), "
            "ViDoRe(v2) and others, as mteb.get_benchmarks() lists them."
        ) from error
    failed = evaluate(load(model, num_crops, device), tasks, batch_size, output)
    if failed:
        raise ValueError(f"{len(failed)} tasks failed, so there is no row. Run again to go on with them.")


def load(name, num_crops=None, device=None):
    """The model as mteb takes it, with a revision under which scores of other weights are never taken for its own."""
    model = find_model(name)
    if model.kind == PIXELS:
        raise ValueError(f"{PIXELS} is no model that mteb takes, but one of `compare`. Give a folder or a Hub id.")
    by_pooling = model.kind == PHI3_EMBED and not model.has_recipe
    if by_pooling and AutoConfig.from_pretrained(**model.pinned).text_config is not None:
        raise ValueError(
            f"{name} is a whole checkpoint, which mteb takes by its recipe and no other pooling. Convert it with "
            "--recipe and name it without a pooling, or convert its image embedding alone."
        )
    encoder = SentenceTransformerEncoderWrapper(load_sentence_transformer(model, num_crops, device=device))
    about = {
        "name": f"local/{model.label}" if Path(model.name).is_dir() else model.name,
        "revision": model.version,
        "modalities": encoder.model.modalities,
        "experiment_kwargs": None if num_crops is None else {"num_crops": num_crops},
    }
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=about)
    return encoder


def evaluate(encoder, benchmark, batch_size, results):
    """Prints the scores of the tasks, and the leaderboard's row if all have one -> the tasks that failed."""
    outcome = mteb.evaluate(
        encoder,
        benchmark,
        cache=mteb.ResultCache(results),
        encode_kwargs={"batch_size": batch_size},
        raise_error=False,
    )
    tasks = Table("task", "type", "measure", "score", title=f"{benchmark.name}: {outcome.model_name}")
    for result in outcome.task_results:
        about = result.task.metadata
        tasks.add_row(about.name, about.type, about.main_score, f"{result.get_score():.2%}")
    for error in outcome.exceptions:
        tasks.add_row(error.task_name, "", "failed:", error.exception)
    console.print(tasks)
    if not outcome.exceptions:
        scores = benchmark.get_score(BenchmarkResults(model_results=[outcome], benchmark=benchmark))
        scores = {name: score for name, score in scores[outcome.model_name].items() if name != "Rank"}  # among one
        row = Table("Model", *scores, title="The leaderboard's row")
        row.add_row(outcome.model_name, *(f"{score:.2%}" for score in scores.values()))
        console.print(row)
    return outcome.exceptions
