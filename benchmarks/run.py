"""
Time and peak memory of embedding, one space, preprocessing, cold start, conversion, quantised loading and the language
model, each beside the least that it could take, or beside float32.

    python benchmarks/run.py [--only PART] [--quick]

Writes results.json and results.md beside this file; a part that is not run keeps its figures. A quick run has few
rounds and writes nothing.
"""

import argparse
import json
from pathlib import Path

import cold_start
import conversion
import embedding
import language_model
import one_space
import preprocessing
import quantization
from measure import listed, machine, table

FOLDER = Path(__file__).resolve().parent
PARTS = {
    "embedding": embedding,
    "one-space": one_space,
    "preprocessing": preprocessing,
    "cold-start": cold_start,
    "conversion": conversion,
    "quantization": quantization,
    "language-model": language_model,
}
COLUMNS = ("contender", "seconds", "x limit", "peak MiB", "x limit")


def main():
    parser = argparse.ArgumentParser(description="Times and peak memory beside the least possible, in one run.")
    parser.add_argument("--only", choices=PARTS, help="run this part alone")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    arguments = parser.parse_args()

    measured = {}
    for name in [arguments.only] if arguments.only else PARTS:
        measured[name] = {"machine": machine(), "cases": PARTS[name].run(arguments.quick)}
        print(*lines_of(name, measured[name]), sep="\n")
    if not arguments.quick:
        write(measured)


def rows(contenders):
    for name, figure in contenders.items():
        memory = ("", "")
        if figure["peak_bytes"] is not None:
            memory = (f"{figure['peak_bytes'] / 2**20:.0f}", f"{figure['peak_ratio']:.2f}")
        yield name, f"{figure['seconds']:.3f}", f"{figure['seconds_ratio']:.2f}", *memory


def write(measured):
    path = FOLDER / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= measured
    path.write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "results.md").write_text(markdown(results))


def markdown(results):
    lines = [
        "Written by `benchmarks/run.py`. Medians of interleaved rounds; a ratio is the median of the rounds' ratios "
        "to `limit`. Peak memory is above that with weights and inputs loaded, each contender in a process of its own."
    ]
    for name, part in results.items():
        lines += lines_of(name, part)
    return "\n".join(lines) + "\n"


def lines_of(name, part):
    lines = ["", f"## {name}", "", f"Machine: {listed(part['machine'])}."]
    for case, contenders in part["cases"].items():
        lines += ["", f"**{case}**", "", *table(COLUMNS, rows(contenders))]
    return lines


if __name__ == "__main__":
    main()
