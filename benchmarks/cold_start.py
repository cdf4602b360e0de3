"""
Loading the image embedding of full size in float32, and the whole model in bfloat16, in a fresh process, against
reading the weights once.

`limit` reads model.safetensors, piece by piece. `ours` is `from_pretrained`: not the time of
`from transformers import AutoModel`, but that of all that is imported after it, and of the repository's code.
`ours, weights read` also goes through every weight once, because a mapped file is read only where it is used. The
file is in the page cache for all. Private memory is what the loaded model takes beside that file.
"""

import json
import shutil
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
    from phi3_tools.checkpoint.source import safetensors_header  # here, as loading is measured with all its imports

    of_root = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    config = type(of_root).from_pretrained(ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.config.json")
    config.auto_map, config.name_or_path = of_root.auto_map, of_root.name_or_path  # where its code is
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    weights = model.state_dict()
    with open(Path(folder) / "model.safetensors", "wb") as file:
        file.write(safetensors_header({name: ("BF16", list(weight.shape)) for name, weight in weights.items()}))
        file.truncate(file.tell() + 2 * sum(weight.numel() for weight in weights.values()))
    about = config.to_dict() | {"auto_map": of_root.auto_map, "dtype": "bfloat16"}
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
