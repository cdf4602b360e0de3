"""`phi3-embed convert`, and `python convert_phi3_vision.py`: Microsoft's checkpoints as phi3-embed, and back."""

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import httpx2
import torch
import typer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging as transformers_logging

from phi3_tools.checkpoint.convert import convert, without_path
from phi3_tools.checkpoint.layout import PICKLES
from phi3_tools.checkpoint.put_back import put_back
from phi3_tools.checkpoint.source import hub_errors, is_disk_full, one_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Dtype = Literal["bfloat16", "float16", "float32"]


@app.command("convert", epilog="Interrupted, the same command goes on where it stopped.")
def command(
    source: Annotated[str, typer.Argument(help="A Hub id, or a folder; may be a LoRA or DoRA adapter.")],
    output: Annotated[Path, typer.Argument(help="A folder to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights. [default: as in SOURCE]")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of SOURCE on the Hub.")] = None,
    base: Annotated[str | None, typer.Option(help="The base of an adapter, in place of the one it names.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="NAME", help="Push the result there.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, if it is new.")] = False,
    put_back_model: Annotated[
        str | None,
        typer.Option(
            "--put-back",
            metavar="MODEL",
            help="The reverse: make of OUTPUT a copy of SOURCE with the weights of this phi3-embed folder or Hub id.",
        ),
    ] = None,
) -> None:
    """Microsoft's Phi-3-vision checkpoints, and fine-tunes of them, as phi3-embed; and back."""
    if put_back_model and (dtype or base or push_to_hub):
        raise typer.BadParameter("--put-back goes with neither --dtype nor --base nor --push-to-hub")
    if private and not push_to_hub:
        raise typer.BadParameter("--private goes with --push-to-hub")
    with _told_in_a_line():
        if put_back_model:
            put_back(put_back_model, source, output, revision)
            return
        target = _push_target(push_to_hub, private) if push_to_hub else None
        said = ["python", "convert_phi3_vision.py", without_path(source), output.name]
        for option, value in (("--dtype", dtype), ("--revision", revision), ("--base", base)):
            said += [option, without_path(value)] if value else []
        weights_dtype = getattr(torch, dtype) if dtype else None
        convert(source, output, weights_dtype, revision, base, target, shlex.join(said))
        if target:
            _push(output, target, private)


def main() -> None:
    app(prog_name=Path(sys.argv[0]).name)


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Ends the command with one line for what a user can mend."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # tells that weights are on disk
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
    except Exception as error:
        if is_disk_full(error):
            sys.exit(f"error: {one_line(error)}. Free some space: the same command goes on from here.")
        if isinstance(error, (ValueError, OSError, httpx2.TransportError)):
            sys.exit(f"error: {error}")
        raise


def _push_target(name, private):
    """The full name of the repository to push to, or why that cannot be, before the work."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"`--push-to-hub {name}` names no repository, such as owner/model: {error}") from error
    try:
        user = HfApi().whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"Pushing to {name} needs a valid token: log in by `hf auth login`.") from error
    name = name if "/" in name else f"{user}/{name}"
    with hub_errors(name):
        if private and HfApi().repo_exists(name) and not HfApi().model_info(name).private:
            raise ValueError(f"{name} exists and is public. Make it private in its settings, or give another.")
    return name


def _push(output, name, private):
    """One commit with all of the folder, and without weights that an older one left."""
    try:
        with hub_errors(name):
            HfApi().create_repo(name, private=private, exist_ok=True)
            commit = HfApi().upload_folder(
                repo_id=name,
                folder_path=output,
                delete_patterns=["*.safetensors*", *PICKLES],
                commit_message="Convert Phi-3-vision's image embedding to phi3-embed",
            )
    except ValueError as error:
        again = shlex.join(["hf", "upload", name, str(output), ".", "--delete", "*.safetensors*"])
        raise ValueError(f"{error} {output} is complete; push it by `{again}`.") from error
    print(f"Pushed to {commit.commit_url}")
