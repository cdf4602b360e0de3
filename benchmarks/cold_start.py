"""
Loading the image embedding of full size in float32, and the whole model in bfloat16, in a fresh process, against
reading the weights once.

`limit` reads model.safetensors, piece by piece. `ours` is `from_pretrained`: not the time of
`from transformers import AutoModel`, but that of all that is imported after it, and of the repository's code.
`ours, weights read` also goes through every weight once, as a mapped file is read only where it is used. The file is
in the page cache for all. Private memory is what the loaded model takes beside that file.
"""

import json
import shutil
import struct
import tempfile
from pathlib import Path

import torch
from embedding import load_model
from measure import ROOT, figures, fresh, interleaved_seconds, status, timed
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

PIECE = 16 * 2**20


def save_embedding(folder):
    load_model().save_pretrained(folder)


def save_whole(folder):
    """Phi-3-vision's sizes; all weights are zero, and holes on disk."""
    of_root = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    config = type(of_root).from_pretrained(ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.config.json")
    config.auto_map, config.name_or_path = of_root.auto_map, of_root.name_or_path  # where its code is
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    header, end = {}, 0
    for name, weight in model.state_dict().items():
        start, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with open(Path(folder) / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    about = json.loads((ROOT / "config.json").read_text())
    about = config.to_dict() | {"auto_map": about["auto_map"], "dtype": "bfloat16"}
    (Path(folder) / "config.json").write_text(json.dumps(about))
    for module in ROOT.glob("*_phi3_embed.py"):
        shutil.copy(module, folder)


CASES = {
    "the image embedding of full size, float32": (save_embedding, AutoModel),
    "the whole model of full size, bfloat16": (save_whole, AutoModelForImageTextToText),
}


def read(case, folder):
    def through():
        with open(Path(folder) / "model.safetensors", "rb", buffering=0) as file:
            while file.read(PIECE):
                pass

    return timed(through)[0]


def load(case, folder):
    return timed(lambda: from_pretrained(case, folder))[0]


def load_and_read(case, folder):
    return timed(lambda: [parameter.sum() for parameter in from_pretrained(case, folder).parameters()])[0]


def from_pretrained(case, folder):
    return CASES[case][1].from_pretrained(folder, trust_remote_code=True, dtype="auto")


def private_bytes(case, folder):
    """Those that the weights of a loaded model add to what the imports take."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):  # for the imports
        CASES[case][1].from_config(config, trust_remote_code=True)
    before = status("RssAnon")
    model = from_pretrained(case, folder)
    return status("RssAnon") - before, sum(weight.nbytes for weight in model.parameters())


def run(quick):
    contenders, cases = {"limit": read, "ours": load, "ours, weights read": load_and_read}, {}
    for case, (save, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            fresh(save, folder)
            # Once before the rounds, for the page cache and transformers' copy of the repository's code.
            private, size = fresh(private_bytes, case, folder)
            calls = {
                name: lambda call=call, case=case, folder=folder: (fresh(call, case, folder), None)
                for name, call in contenders.items()
            }
            title = (
                f"Load of {case}, {size / 1e9:.1f} GB of which {max(private, 0) / 1e6:.0f} MB become private memory"
            )
            cases[title] = figures(interleaved_seconds(calls, 2 if quick else 5, case), {})
    return cases
