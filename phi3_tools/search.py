"""
An index of pictures on disk, in LanceDB, and the pictures in it that are nearest to another.

    python examples/search.py index FOLDER INDEX [--model FOLDER_OR_HUB_ID] [--revision COMMIT] [--num_crops N]
    python examples/search.py add PICTURE_OR_FOLDER... INDEX
    python examples/search.py remove PICTURE_OR_FOLDER... INDEX
    python examples/search.py query PICTURE INDEX [--count N] [--output PNG]

`index` makes INDEX, and later brings it in line with the folder: what is new is embedded, what is gone is removed.
Pictures are told apart by the content of their files, so that a copy or a moved file is not embedded again. Each batch
is one transaction: killed at any time, the same command goes on where it stopped.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import lancedb
import matplotlib
import numpy as np
import pyarrow as pa
import torch
from datasets import concatenate_datasets
from lancedb.table import Table
from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig
from transformers.utils import cached_file, extract_commit_hash

from phi3_tools.digits import embed_images
from phi3_tools.pictures import IMAGE, MAX_NAMED, NAME, load_pictures, picture_hash, read_picture

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TINY = Path(__file__).resolve().parent.parent
TABLE, MADE_BY = "pictures", b"made_by"
# What a kill can lose: the pictures of one batch, which the next run embeds again.
BATCH_SIZE = 8
THUMBNAIL = 224
PER_ROW = 6
console = Console(soft_wrap=True)


def main():
    arguments = parse()
    try:
        COMMANDS[arguments.command](arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"search: {error}")
    except KeyboardInterrupt:
        sys.exit("search: interrupted. What is embedded is kept, and the same command goes on from there.")


def parse():
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="a folder or Hub id; by default the index's own, for a new index tiny/")
    model.add_argument("--revision", help="the commit to load from the Hub")
    model.add_argument("--num_crops", type=int, help="the most HD crops; by default the index's, or the model's own")
    parser = argparse.ArgumentParser(description="Index pictures, and search by picture.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, pictures, *parents, **kwargs):
        added = commands.add_parser(name, parents=parents, help=kwargs.pop("help"))
        added.add_argument("pictures", metavar=pictures, **kwargs)
        added.add_argument("index", type=Path, metavar="INDEX", help="the folder of the index")
        return added

    command("index", "FOLDER", model, help="make an index, or bring one in line with its folder")
    command("add", "PICTURE_OR_FOLDER", model, nargs="+", help="add pictures to an index")
    command("remove", "PICTURE_OR_FOLDER", nargs="+", help="remove pictures from an index; files stay")
    query = command("query", "PICTURE", model, help="print and draw the nearest pictures")
    query.add_argument("--count", type=int, default=5, help="how many (default 5)")
    query.add_argument("--output", type=Path, default="neighbours.png", help="the picture (default neighbours.png)")
    return parser.parse_args()


def index(arguments):
    rows = find_pictures(arguments.pictures)
    check_writable(arguments.index)
    model, image_processor, made_by = load_asked(arguments, read_made_by(arguments.index, required=False))
    table = make_index(arguments.index, model.config.hidden_size, made_by)
    found = add_pictures(table, rows, model, image_processor, made_by["num_crops"])
    follow_moves(table, found, Path(arguments.pictures).resolve())
    finish(table, arguments.index)


def add(arguments):
    made_by = read_made_by(arguments.index)
    rows = [row for source in arguments.pictures for row in find_pictures(source)]
    check_writable(arguments.index)
    model, image_processor, made_by = load_asked(arguments, made_by)
    table = make_index(arguments.index, model.config.hidden_size, made_by)
    add_pictures(table, rows, model, image_processor, made_by["num_crops"])
    finish(table, arguments.index)


def remove(arguments):
    read_made_by(arguments.index)
    check_writable(arguments.index)
    table = open_table(arguments.index)
    paths, digests = known_pictures(table), set()
    for picture in map(Path, arguments.pictures):
        where = picture.resolve()
        digest = picture_hash({"path": str(where), "bytes": None}) if where.is_file() else None
        of_it = {key for key, path in paths.items() if key == digest or lies_in(path, where)}
        if not of_it:
            raise ValueError(f"{picture} is not in {arguments.index}. Nothing was removed.")
        digests |= of_it
    delete(table, digests)
    console.print(f"Removed {len(digests)}.")
    finish(table, arguments.index)


def query(arguments):
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}, but must be 1 at least.")
    made_by = read_made_by(arguments.index)
    try:
        picture = read_picture({"path": arguments.pictures, "bytes": None})
    except ValueError as error:
        raise ValueError(f"{arguments.pictures}: {error}") from error
    check_output(arguments.output)
    model, image_processor, made_by = load_asked(arguments, made_by)
    vector = embed_images(model, image_processor, [picture], made_by["num_crops"])[0]
    found = nearest(open_table(arguments.index), vector, arguments.count)
    if not found:
        raise ValueError(f"{arguments.index} holds no pictures. Add some: python examples/search.py add PICTURE INDEX")
    shown = RichTable(title=f"Nearest to {arguments.pictures}")
    for column, justify in (("", "right"), ("cosine", "right"), ("picture", "left")):
        shown.add_column(column, justify=justify, overflow="fold")
    for number, row in enumerate(found, start=1):
        shown.add_row(str(number), f"{row['cosine']:.3f}", row["path"])
    Console().print(shown)
    draw(picture, found, arguments.output)
    console.print(f"Picture: {arguments.output}")


COMMANDS = {"index": index, "add": add, "remove": remove, "query": query}


def find_pictures(source):
    """Rows of `image`, undecoded, and `name`: of one picture, or of any source that `load_pictures` takes."""
    path = Path(source)
    if path.is_file() and path.suffix != ".parquet":
        return [{IMAGE: {"path": str(path.resolve()), "bytes": None}, NAME: path.name}]
    splits = load_pictures(path.resolve() if path.exists() else source)
    return concatenate_datasets([split.select_columns([IMAGE, NAME]) for split in splits.values()])


def load_asked(arguments, made_by):
    """
    The model asked for, by default that of the index: model, image processor, and by what the index is made.

    Raises:
        ValueError: the index is made by another model, with other settings or with other crops.
    """
    wanted = made_by or {"model": str(TINY), "revision": None, "num_crops": None}
    name = arguments.model or wanted["model"]
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    revision = arguments.revision or (wanted["revision"] if name == wanted["model"] else None)
    model, image_processor = load_model(name, revision)
    num_crops = wanted["num_crops"] if arguments.num_crops is None else arguments.num_crops
    given = {
        "model": name,
        "revision": None if Path(name).is_dir() else commit_of(name, revision),
        "num_crops": image_processor.num_crops if num_crops is None else num_crops,
        "checksum": checksum(model),
        "settings": settings(model, image_processor),
    }
    if made_by and any(given[key] != made_by.get(key) for key in ("num_crops", "checksum", "settings")):
        raise ValueError(
            f"{arguments.index} is made by {described(made_by)}, but this is {described(given)}. Their vectors cannot "
            "be compared. Give the same model and number of crops, or make another index."
        )
    return model, image_processor, made_by or given


def load_model(name, revision=None):
    """Model and image processor of a folder or Hub id, on the machine's accelerator."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"There is no folder {name}. Give one with a model, or a Hub id.")
    options = {"trust_remote_code": True} | ({"revision": revision, "code_revision": revision} if revision else {})
    image_processor = AutoImageProcessor.from_pretrained(name, **options)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return AutoModel.from_pretrained(name, device_map=device, **options).eval(), image_processor


def commit_of(name, revision=None):
    """The commit of a Hub id that was loaded just now."""
    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def checksum(model):
    """SHA-256 of the weights: what a name does not tell is whether they were trained on."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings(model, image_processor):
    """What the config and the image processor say of how a picture becomes a vector, the number of crops apart."""
    # What every config has tells of the file, the classes' names or the output, and nothing of the vectors.
    of_all = PreTrainedConfig().to_dict().keys() | {"auto_map", "bos_token_id", "eos_token_id", "pad_token_id"}
    config = json.loads(model.config.to_json_string(use_diff=False))
    kept = {key: value for key, value in config.items() if key not in of_all}
    kept["vision_config"] = {key: value for key, value in config["vision_config"].items() if key not in of_all}
    processing = json.loads(image_processor.to_json_string())
    names = ("size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return kept | {name: processing[name] for name in names}


def described(made_by):
    at = f" at {made_by['revision'][:12]}" if made_by["revision"] else ""
    digest = hashlib.sha256(json.dumps(made_by.get("settings"), sort_keys=True).encode()).hexdigest()
    return (
        f"{made_by['model']}{at} (weights {made_by['checksum'][:12]}, settings {digest[:12]}, num_crops "
        f"{made_by['num_crops']})"
    )


def read_made_by(folder, required=True):
    """What the index in `folder` is made by; `None` where there is none yet and none is `required`."""
    if (folder / f"{TABLE}.lance").is_dir():
        return json.loads(open_table(folder).schema.metadata[MADE_BY])
    if required:
        raise ValueError(f"There is no index {folder}. Make one: python examples/search.py index FOLDER {folder}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is no index, and not an empty folder. Give one that is, or that does not exist.")
    return None


def open_table(folder) -> Table:
    return lancedb.connect(folder).open_table(TABLE)


def make_index(folder, width, made_by) -> Table:
    """The index in `folder` with vectors of `width` floats, made if there is none."""
    fields = {
        "hash": pa.string(),
        "path": pa.string(),
        "thumbnail": pa.binary(),
        "vector": pa.list_(pa.float32(), width),
    }
    schema = pa.schema(list(fields.items()), {MADE_BY: json.dumps(made_by)})
    return lancedb.connect(folder).create_table(TABLE, schema=schema, exist_ok=True)


def check_writable(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"There is no permission to write in {folder}.")


def check_output(path):
    check_writable(path.resolve().parent)
    if path.is_dir() or path.suffix != ".png":
        raise ValueError(f"{path} is no name for a PNG file. Give one that ends in .png, and is no folder.")


def known_pictures(table):
    """{content hash: path} of an index."""
    columns = table.search().select(["hash", "path"]).to_arrow()
    return dict(zip(columns["hash"].to_pylist(), columns["path"].to_pylist()))


def add_pictures(table, rows, model, image_processor, num_crops):
    """Embeds what the index does not hold yet, batch by batch -> {content hash: path} of all rows that can be read."""
    known, found, added, copies, left_out, batch = known_pictures(table), {}, 0, 0, [], []

    def write():
        vectors = embed_images(model, image_processor, [picture for *_, picture in batch], num_crops)
        is_finite = np.isfinite(vectors).all(1)
        left_out.extend(
            f"{path}: its vector is not finite" for (_, path, _), good in zip(batch, is_finite) if not good
        )
        entries = [
            {"hash": digest, "path": path, "thumbnail": thumbnail(picture), "vector": vector.astype(np.float32)}
            for (digest, path, picture), vector, good in zip(batch, vectors, is_finite)
            if good
        ]
        batch.clear()
        # Rather than `add`: another process may have embedded the same pictures meanwhile.
        return table.merge_insert("hash").when_not_matched_insert_all().execute(entries).num_inserted_rows

    for row in tqdm(rows, desc="Indexing", unit="picture"):
        path = row[IMAGE]["path"] if row[IMAGE]["bytes"] is None else row[NAME]
        try:
            digest = picture_hash(row[IMAGE])
            if digest in found:
                copies += 1
            elif digest not in known:
                batch.append((digest, path, read_picture(row[IMAGE])))
            found.setdefault(digest, path)
        except (OSError, ValueError) as error:
            left_out.append(f"{path}: {error}")
        if len(batch) == BATCH_SIZE:
            added += write()
    if batch:
        added += write()
    console.print(f"Added {added}. Already there: {len(known.keys() & found.keys())}. Further copies: {copies}.")
    if left_out:
        named = "\n".join(left_out[:MAX_NAMED] + ["..."] * (len(left_out) > MAX_NAMED))
        console.print(f"Left out {len(left_out)} of {len(rows)} pictures:\n{named}", style="yellow", markup=False)
    return found


def follow_moves(table, found, folder):
    """Gives moved files their new paths, and removes pictures of the folder that it does not hold any more."""
    known = known_pictures(table)
    for digest in known.keys() & found.keys():
        if known[digest] != found[digest] and not Path(known[digest]).exists():
            table.update(where=f"hash = '{digest}'", values={"path": found[digest]})
    gone = {digest for digest, path in known.items() if digest not in found and lies_in(path, folder)}
    if gone:
        delete(table, gone)
        console.print(f"Removed {len(gone)} that {folder} does not hold any more.")


def lies_in(path, folder):
    return Path(path).is_relative_to(folder)


def delete(table, digests):
    table.delete(f"hash IN ({', '.join(repr(digest) for digest in sorted(digests))})")


def finish(table, folder):
    """Packs what many batches wrote, and says how many pictures there are."""
    table.optimize()
    console.print(f"{folder} holds {table.count_rows()} pictures.")


def nearest(table, vector, count):
    """The `count` nearest pictures, nearest first: dicts of `path`, `thumbnail` and `cosine`."""
    found = table.search(vector.astype(np.float32)).distance_type("cosine").limit(count).to_list()
    return [{"path": row["path"], "thumbnail": row["thumbnail"], "cosine": 1 - row["_distance"]} for row in found]


def thumbnail(picture):
    """A picture as a small JPEG, so that an index shows pictures whose files are gone."""
    small, written = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(written, "JPEG", quality=90)
    return written.getvalue()


def draw(picture, found, output):
    """A picture and its neighbours as one PNG."""
    shown = [(picture, "query", "black")]
    for number, row in enumerate(found, start=1):
        title = f"{number}.  {row['cosine']:.3f}\n{Path(row['path']).name[-22:]}"
        shown.append((Image.open(io.BytesIO(row["thumbnail"])), title, "black"))
    lines = [shown[start : start + PER_ROW] for start in range(0, len(shown), PER_ROW)]
    figure = plt.figure(figsize=(2 * len(lines[0]), 2.5 * len(lines)), layout="constrained")
    draw_lines(figure, lines)
    save(figure, output)


def draw_lines(figure, lines):
    """Lines of pictures, each `(picture, title, colour of the title)`; the first line is as long as any."""
    axes = figure.subplots(len(lines), len(lines[0]), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, row in zip(lines, axes):
        for axis, (picture, title, colour) in zip(row, line):
            axis.imshow(picture, cmap="gray_r" if np.ndim(picture) == 2 else None)
            axis.set_title(title, fontsize=8, color=colour)


def save(figure, output):
    output.parent.mkdir(exist_ok=True)
    beside = output.with_name(f"{output.stem}.part.png")
    figure.savefig(beside, dpi=110)
    beside.replace(output)


if __name__ == "__main__":
    main()
