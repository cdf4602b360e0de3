"""
MIEB(Img), mteb's benchmark of images alone: runs its tasks and prints the leaderboard's row.

    python examples/mteb_eval.py FOLDER_OR_HUB_ID [--num-crops N] [--batch-size N] [--results FOLDER]

mteb fetches each task's images from the Hub. Finished tasks are kept in the results folder: run the same command again
to go on after an interruption.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import mteb
import torch
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.results import BenchmarkResults
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

console = Console()


def main():
    parser = argparse.ArgumentParser(description="Evaluate a model on MIEB(Img).")
    parser.add_argument("model", help="a folder or Hub id")
    parser.add_argument("--num-crops", type=int, help="the most crops of an image; without it the checkpoint's")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a batch (default 16)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the finished tasks' scores")
    arguments = parser.parse_args()
    try:
        encoder = load(arguments.model, arguments.num_crops)
    except (OSError, ValueError) as error:
        sys.exit(f"mteb_eval: {error}")
    failed = evaluate(encoder, mteb.get_benchmark("MIEB(Img)"), arguments.batch_size, arguments.results)
    if failed:
        sys.exit(f"mteb_eval: {len(failed)} tasks failed, so there is no row. Run again to go on with them.")


def load(name, num_crops=None):
    """The model as mteb takes it, with a revision under which scores of other weights are never taken for its own."""
    processor_kwargs = {} if num_crops is None else {"num_crops": num_crops}
    model = SentenceTransformer(name, trust_remote_code=True, processor_kwargs=processor_kwargs)
    encoder = SentenceTransformerEncoderWrapper(model)
    about = {
        "name": f"local/{Path(name).resolve().name}" if Path(name).is_dir() else name,
        "revision": model.model_card_data.base_model_revision or weights_digest(model),
        "modalities": model.modalities,
        "experiment_kwargs": processor_kwargs or None,
    }
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=about)
    return encoder


def weights_digest(model):
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


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


if __name__ == "__main__":
    main()
