"""
Loading the full-size model in float32 in a fresh process, against reading its weights once.

`limit` reads model.safetensors into memory. `ours` is `AutoModel.from_pretrained`: not the time of
`from transformers import AutoModel`, but that of all that is imported after it, and of the repository's code.
`ours, weights read` also goes through every weight once, as a mapped file is read only where it is used. The file is
in the page cache for all.
"""

import tempfile
from pathlib import Path

from embedding import load_model
from measure import figures, fresh, interleaved_seconds, timed
from transformers import AutoModel

CASE = "Load of the full-size model in a fresh process"


def save(folder):
    load_model().save_pretrained(folder)


def read(folder):
    return timed((Path(folder) / "model.safetensors").read_bytes)[0]


def load(folder):
    return timed(lambda: from_pretrained(folder))[0]


def load_and_read(folder):
    return timed(lambda: [parameter.sum() for parameter in from_pretrained(folder).parameters()])[0]


def from_pretrained(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True)


def run(quick):
    contenders = {"limit": read, "ours": load, "ours, weights read": load_and_read}
    with tempfile.TemporaryDirectory() as folder:
        fresh(save, folder)
        # Once before the rounds, for the page cache and transformers' copy of the repository's code.
        fresh(load, folder)
        calls = {name: lambda call=call: (fresh(call, folder), None) for name, call in contenders.items()}
        return {CASE: figures(interleaved_seconds(calls, 2 if quick else 9, CASE), {})}
