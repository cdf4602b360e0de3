"""A copy of Microsoft's layout with the weights of a phi3-embed model in it, for engines that load that."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm

from phi3_tools.checkpoint import convert, layout
from phi3_tools.checkpoint import source as sources
from phi3_tools.checkpoint.layout import DTYPES
from phi3_tools.checkpoint.source import Entry, Source


def put_back(model_name: str, source_name: str, output: Path, revision: str | None = None) -> None:
    """
    A copy of Microsoft's layout with the weights of a phi3-embed model, whole or the image embedding alone, or those
    beneath a head on one.

    All that the model does not have, and every file's layout, stay as they were. A weight takes the dtype that the
    source has it in.

    Raises:
        ValueError: with what is wrong and how to mend it.
    """
    with convert.work_folder(output) as partial:
        source, model = _open_whole(source_name, revision), _open_whole(model_name)
        if partial.resolve().is_relative_to(source.folder.resolve()):
            raise ValueError(f"{output} is inside {source_name}. Give a folder outside of what is to be copied.")
        about = model.json("config.json")
        if about.get("model_type") != "phi3_embed":
            raise ValueError(
                f"{model.name} is no phi3-embed model. `--put-back` takes one, and SOURCE is in Microsoft's layout."
            )
        whole = about.get("text_config") is not None
        config = convert.read_config(source, whole)
        _check_settings(model, about, config)
        targets = sources.read_entries(source, ("",) if whole else layout.IMAGE_EMBEDDING)
        selected = layout.select_published(targets, config, source.name)
        own = _model_entries(model, layout.model_shapes(config))
        _copy_files(source.folder, partial / "output")
        not_finite, cast = [], set()
        for name, entry in tqdm(own.items(), desc="Putting back"):
            tensor = model.tensor(entry)
            for target in _same_weights(source, targets, name):
                with open(partial / "output" / target.file, "r+b") as file:
                    file.seek(target.start)
                    if not convert.write_tensor(file, tensor, DTYPES[target.dtype]):
                        not_finite.append(entry.name)
                if target.dtype != entry.dtype:
                    cast.add(f"{entry.dtype} to {target.dtype}")
        layout.raise_problems(model.name, {"NaN or infinite": not_finite})
        convert.finish(partial, output)
    note = f" They took the dtype that they have there: {', '.join(sorted(cast))}." if cast else ""
    print(f"{output} is {source_name} with the {len(selected)} weights of {model_name} put back.{note}")


def _open_whole(name, revision=None):
    """A folder as it is, or all of a repository on the Hub, by the client's cache."""
    if Path(name).exists():
        return sources.open_source(name, revision, Path(name))
    with sources.hub_errors(name):
        folder = Path(
            sources.retried(
                lambda: snapshot_download(name, revision=revision, ignore_patterns=[*layout.PICKLES]), name
            )
        )
    return replace(sources.open_source(str(folder), None, folder), name=name)


def _check_settings(model, about, config):
    """Raises unless the weights of a phi3-embed model give with the source's config what they give with their own."""
    with sources.library_errors(f"{model.name}: config.json"):
        own = layout.computation(layout.parse_config(about, whole=config.text_config is not None))
    theirs = layout.computation(config)
    if other := [f"{name} is {own[name]!r}, not {theirs[name]!r}" for name in own if own[name] != theirs[name]]:
        raise ValueError(
            f"The config of {model.name} is not SOURCE's: {', '.join(other)}. Put back, its weights would give other "
            "results."
        )


def _model_entries(model: Source, shapes) -> dict[str, Entry]:
    """The weights of a phi3-embed model, or of a head on one, by our names."""
    entries = sources.read_entries(model)
    left_out = [name for name in entries if not layout.is_of_the_layout(name)]
    own = layout.select(entries, shapes, model.name, lambda name: [name, f"model.{name}"], left_out.__contains__)
    if left_out:
        print(f"Not part of the layout, so left out: {', '.join(sorted(left_out))}")
    return own


def _same_weights(source: Source, entries, name) -> list[Entry]:
    """Where a weight of ours goes: the word embeddings under both of their names, unless these differ."""
    first, *others = [entries[published] for published in layout.published_names(name) if published in entries]
    if not others:
        return [first]
    value = source.tensor(first)
    return [first, *(other for other in others if torch.equal(source.tensor(other), value))]


def _copy_files(folder: Path, output: Path) -> None:
    """Everything but pickles, which would still hold the old weights, and what is no file of the folder."""

    def left_out(place, names):
        reasons = {name: sources.unlike_a_file(Path(place, name), folder) for name in names}
        reasons = {name: reason for name, reason in reasons.items() if reason and reason != sources.FOLDER}
        reasons |= {name: "a pickle, with the old weights" for name in names if sources.matches(name, layout.PICKLES)}
        for name, reason in reasons.items():
            print(f"Left out: {Path(place, name).relative_to(folder)} is {reason}.")
        return {*reasons, ".cache"}

    def copy(path, target):
        shutil.copyfile(path, target)
        bar.update(Path(path).stat().st_size)

    total = sum((folder / file).stat().st_size for file in sources.files_of(folder))
    with tqdm(total=total, unit="B", unit_scale=True, desc="Copying") as bar:
        shutil.copytree(folder, output, ignore=left_out, copy_function=copy, dirs_exist_ok=True)
