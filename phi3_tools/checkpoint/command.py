"""`phi3-embed convert`, and `python convert_phi3_vision.py`."""

import logging
import shlex
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging as transformers_logging

from phi3_tools import results
from phi3_tools.checkpoint import convert, put_back
from phi3_tools.checkpoint.source import hub_errors

DTYPES = ("bfloat16", "float16", "float32")


def run(
    source: str,
    output: Path,
    dtype: str | None = None,
    revision: str | None = None,
    base: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    model: str | None = None,
    whole: bool = False,
    recipe: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """
    Converts, and pushes where that is asked for; with `model` puts that back instead.

    Raises:
        ValueError: with what is wrong and how to mend it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # tells that weights are on disk
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`--dtype` is {dtype}, but must be one of {', '.join(DTYPES)}.")
    if private and not push_to_hub:
        raise ValueError("`--private` goes with `--push-to-hub`.")
    if model:
        if dtype or base or push_to_hub or whole or recipe or allow_pickle:
            raise ValueError("`--put-back` goes with `--revision` alone: what goes back, and how, follows from MODEL.")
        put_back.put_back(model, source, output, revision)
        return
    target = _push_target(push_to_hub, private) if push_to_hub else None
    command = ["python", "convert_phi3_vision.py", results.without_path(source), output.name]
    for option, value in (("--dtype", dtype), ("--revision", revision), ("--base", base), ("--recipe", recipe)):
        command += [option, results.without_path(value)] if value else []
    command += ["--whole"] * whole + ["--allow-pickle"] * allow_pickle
    said, weights_dtype = shlex.join(command), getattr(torch, dtype) if dtype else None
    convert.convert(source, output, weights_dtype, revision, base, target, said, whole, recipe, allow_pickle)
    if target:
        again = shlex.join(["hf", "upload", target, str(output), ".", "--delete", "*.safetensors*"])
        message = "Convert Phi-3-vision to phi3-embed"
        print(f"Pushed to {results.push(output, target, message, private, again=f'push it by `{again}`')}")


def _push_target(name, private):
    """The full name of the repository to push to, or why that cannot be, before the work."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"`--push-to-hub {name}` names no repository, such as owner/model: {error}") from error
    name = results.push_target(name)
    with hub_errors(name):
        if private and HfApi().repo_exists(name) and not HfApi().model_info(name).private:
            raise ValueError(f"{name} exists and is public. Make it private in its settings, or give another.")
    return name
