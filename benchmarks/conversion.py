"""
A checkpoint of the published sizes, 8.3 GB, on a Hub on loopback -> phi3-embed: one process a contender, from its
first request to the finished folder, without imports.

`limit` fetches the bytes of the weights that reach the output to a file, and nothing else. `ours` is the command.
`all shards` downloads the whole checkpoint, loads it and saves the image embedding's weights. All weights are zero and
holes on the Hub's disk, so that reading there costs nothing. A contender's name says what it fetched, as a multiple of
the bytes that reach the output.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, figures, interleaved_seconds, peak_bytes

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

NAME = "someone/phi3v"
CASE = "8.3 GB checkpoint to phi3-embed"


# Contenders, each run in a process of its own, which has the Hub's address in its environment


def limit(output, ranges):
    import httpx2
    from huggingface_hub import hf_hub_url

    with httpx2.Client(follow_redirects=True) as client, open(output, "wb") as file:
        for name, start, stop in ranges:
            headers = {"Range": f"bytes={start}-{stop - 1}"}
            with client.stream("GET", hf_hub_url(NAME, name), headers=headers) as response:
                response.raise_for_status()
                file.writelines(response.iter_raw())


def ours(output, ranges):
    from phi3_tools.checkpoint.convert import convert

    convert(NAME, output)


def all_shards(output, ranges):
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file, save_file

    from phi3_tools.checkpoint.layout import IMAGE_EMBEDDING

    weights = {}
    for path in Path(snapshot_download(NAME)).glob("*.safetensors"):
        weights |= load_file(path)
    output.mkdir()
    save_file(
        {name: weight for name, weight in weights.items() if name.startswith(IMAGE_EMBEDDING)},
        output / "model.safetensors",
    )


CONTENDERS = {"limit": limit, "ours": ours, "all shards": all_shards}


def contend(name, output, ranges):
    """Prints the seconds and the peak memory of a contender; what it imports is there before."""
    import phi3_tools.checkpoint.convert  # noqa: F401

    start = time.perf_counter()
    peak = peak_bytes(lambda: CONTENDERS[name](Path(output), json.loads(ranges)))
    print(json.dumps([time.perf_counter() - start, peak]))


# The Hub's side


def make_hub_repo(hub, folder):
    """The checkpoint, the ranges of the weights that reach the output, and how many bytes those are."""
    import conftest  # noqa: F401
    import published
    from hub_server import File

    from phi3_tools.checkpoint.convert import read_config
    from phi3_tools.checkpoint.layout import IMAGE_EMBEDDING, select_published
    from phi3_tools.checkpoint.source import joined, open_source, read_entries

    published.save_true_size(folder)
    source = open_source(str(folder), None, folder)
    ranges = joined(select_published(read_entries(source, IMAGE_EMBEDDING), read_config(source), NAME).values())
    files = {path.name: path for path in folder.iterdir()}
    # A checksum of holes would take longer than all that is measured; nobody compares it.
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    files |= {name: File(name, files[name], sha256=f"{number:064}") for number, name in enumerate(shards)}
    hub.add_repo(NAME, files)
    return ranges, sum(stop - start for _, start, stop in ranges)


def run(quick):
    from hub_server import HubServer

    peaks, fetched = {}, {}
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        ranges, wanted = make_hub_repo(hub, Path(folder) / "published")

        def call(name):
            with tempfile.TemporaryDirectory(dir=folder) as home:
                before = hub.bytes_sent()
                done = subprocess.run(
                    [sys.executable, __file__, name, f"{home}/output", json.dumps(ranges)],
                    env=os.environ | hub.environment(home),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    check=True,
                )
            fetched[name] = (hub.bytes_sent() - before) / wanted
            seconds, peaks[name] = json.loads(done.stdout.splitlines()[-1])
            return seconds, None

        calls = {name: lambda name=name: call(name) for name in CONTENDERS}
        measured = figures(interleaved_seconds(calls, 1 if quick else 3, CASE), peaks)
    return {CASE: {f"{name}: {fetched[name]:.2f} x the bytes": figure for name, figure in measured.items()}}


if __name__ == "__main__":
    contend(*sys.argv[1:])
