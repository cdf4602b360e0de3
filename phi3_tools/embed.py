"""
Millions of images -> parquet files of one vector an image, on one machine or a cluster, by Ray Data.

    python examples/embed_ray.py SOURCE FOLDER [--model MODEL] [--revision COMMIT] [--num-crops N] [--copies N]

SOURCE is a folder of pictures, a parquet file or a folder of them, or a webdataset: a tar file or a folder of them. An
image is one row in FOLDER: `name`, `embedding` and `error`, of which the last or the one before is null. Images that
cannot be read are named at the end.

The images are cut into numbered shards, and each becomes a file of that number, written beside and renamed. A shard
whose worker died is done again, into the same file; after an interruption the same command goes on with the shards
that have no file. Some processes read and preprocess shards while others have theirs in the model. `RAY_ADDRESS` names
a cluster, whose machines all see SOURCE, FOLDER and MODEL; without it Ray is started here.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import cached_file, extract_commit_hash

MAX_NAMED = 10
TINY = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description="Embed millions of images with Ray Data.")
    parser.add_argument("source", type=Path, help="pictures: a folder, parquet or webdataset")
    parser.add_argument("folder", type=Path, help="where to write; goes on with what is there")
    parser.add_argument("--model", default=str(TINY), help="a folder or Hub id (default tiny/)")
    parser.add_argument("--revision", help="the commit to load from the Hub")
    parser.add_argument("--image-column", default="image", help="of parquet (default image)")
    parser.add_argument("--num-crops", type=int, help="the most crops of an image; without it the checkpoint's")
    parser.add_argument("--shard-size", type=int, default=64, help="images in a shard, one batch (default 64)")
    parser.add_argument("--copies", type=int, help="copies of the model (default one a GPU, or a quarter of CPUs)")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"embed_ray: {error}")
    except ray.exceptions.RayTaskError as error:
        sys.exit(f"embed_ray: {error.cause}. What is done is kept: the same command goes on.")
    except KeyboardInterrupt:
        sys.exit("embed_ray: interrupted. The same command goes on.")


def run(arguments):
    if arguments.shard_size < 1:
        raise ValueError(f"--shard-size is {arguments.shard_size}. Give 1 or more.")
    source, folder = arguments.source.resolve(), arguments.folder.resolve()
    if folder.is_relative_to(source):
        raise ValueError(f"{folder} lies in {source}, so that vectors would be taken for images. Give one elsewhere.")
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).is_dir() else arguments.model
    load_image_processor(model, arguments.revision, arguments.num_crops)  # a wrong one is told before all else
    shards = list(make_shards(source, arguments.image_column, arguments.shard_size))
    if not shards:
        raise ValueError(f"{source} holds no images. Give a folder of pictures, parquet or tar files.")
    revision, weights = version(model, arguments.revision)
    settings = {"model": model, "weights": weights, "num_crops": arguments.num_crops}
    begin(folder, shards, settings | {"image_column": arguments.image_column})
    todo = [shard for shard in shards if not (folder / file_name(shard["number"])).exists()]
    print(f"{sum(map(size, shards))} images in {len(shards)} shards, of which {len(shards) - len(todo)} are done.")
    if todo:
        embed(todo, folder, arguments.copies, model, revision, arguments.num_crops)
    report_broken(folder, shards)


# The input, in shards: a dict of the file, the names, and where in the file each image lies


def make_shards(source, column, shard_size):
    """Numbered shards of at most `shard_size` images, the same whenever the input is."""
    if not source.exists():
        raise ValueError(f"There is no {source}. Give a folder of pictures, a parquet file or a tar file.")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    known = Image.registered_extensions()
    pictures = [path for path in files if path.suffix.lower() in known]
    groups = [{"kind": "folder", "path": str(source), "names": [str(path) for path in pictures]}]
    for path in tqdm(files, desc="Listing", unit="file"):
        if path.suffix == ".parquet":
            groups += parquet_groups(path, column)
        elif path.suffix == ".tar":
            groups.append(tar_group(path, known))
    number = 0
    for group in groups:
        for start in range(0, len(group["names"]), shard_size):
            part = slice(start, start + shard_size)
            yield group | {
                "number": number,
                "names": group["names"][part],
                "row_group": group.get("row_group", 0),
                "at": group.get("at", [[0, 0]] * len(group["names"]))[part],
                "column": column,
            }
            number += 1


def parquet_groups(path, column):
    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {column!r}, but {file.schema_arrow.names}. Name it: --image-column.")
    kind = file.schema_arrow.field(column).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise ValueError(f"The column {column!r} of {path} is {kind}, but must hold images. Name it: --image-column.")
    first = 0
    for row_group in range(file.num_row_groups):
        rows = range(file.metadata.row_group(row_group).num_rows)
        yield {
            "kind": "parquet",
            "path": str(path),
            "names": [f"{path}#{first + row}" for row in rows],
            "row_group": row_group,
            "at": [[row, 1] for row in rows],
        }
        first += len(rows)


def tar_group(path, known):
    try:
        with tarfile.open(path, "r:") as tar:
            members = [each for each in tar if each.isfile() and Path(each.name).suffix.lower() in known]
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar file: {error}. Mend or remove it.") from error
    return {
        "kind": "tar",
        "path": str(path),
        "names": [f"{path}#{member.name}" for member in members],
        "at": [[member.offset_data, member.size] for member in members],
    }


def read_files(shard):
    """The file of each image, as bytes, or the error of its reading."""
    if shard["kind"] == "folder":
        for name in shard["names"]:
            try:
                yield Path(name).read_bytes()
            except OSError as error:
                yield error
    elif shard["kind"] == "tar":
        with open(shard["path"], "rb") as file:
            for offset, length in shard["at"]:
                file.seek(offset)
                yield file.read(length)
    else:
        cells = pq.ParquetFile(shard["path"]).read_row_group(shard["row_group"], [shard["column"]]).column(0)
        for row, _ in shard["at"]:
            cell = cells[int(row)].as_py()
            yield (cell["bytes"] if isinstance(cell, dict) else cell) or ValueError("the row holds no image")


def size(shard):
    return len(shard["names"])


def file_name(number):
    return f"{number:08}.parquet"


def version(model, revision):
    """
    What a name does not tell -> the revision that all workers load, and what tells two versions of a model apart: of a
    Hub id its commit, of a folder the SHA-256 of the files that a model is loaded from.
    """
    if not Path(model).is_dir():
        commit = extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
        return commit, commit
    digest = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.suffix in (".json", ".py", ".safetensors", ".bin"):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return revision, digest.hexdigest()


def begin(folder, shards, settings):
    """Makes the folder, or finds that it is of the same work: files of other images or vectors are never mixed in."""
    names = hashlib.sha256("\n".join("\t".join(shard["names"]) for shard in shards).encode())
    work = settings | {"images": sum(map(size, shards)), "shards": len(shards), "names": names.hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "_work.json"
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder} holds parquet files that are not of this command. Give another folder.")
        write_beside(path, lambda part: part.write_text(json.dumps(work, indent=1) + "\n"))
    before = json.loads(path.read_text())
    changed = [key for key in work if work[key] != before.get(key)]
    if changed:
        raise ValueError(f"{folder} was begun with other {', '.join(changed)} ({path}). Give another folder.")


def write_beside(path, write):
    # A worker that is thought dead may still write: each process has its own file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


# The work


def load_image_processor(model, revision, num_crops):
    settings = {} if num_crops is None else {"num_crops": num_crops}
    return AutoImageProcessor.from_pretrained(model, revision=revision, trust_remote_code=True, **settings)


class Preprocess:
    """A shard -> the pixels of its images; of an image that cannot be read, the error."""

    def __init__(self, *settings):
        self.image_processor = load_image_processor(*settings)

    def __call__(self, shard):
        pictures, errors = [], []
        for file in read_files(shard):
            try:
                if isinstance(file, Exception):
                    raise file
                picture = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
                if picture.mode not in ("RGB", "L"):  # which the image processor may refuse: this one, not its shard
                    self.image_processor(picture, num_crops=0)
                pictures.append(picture)
                errors.append("")
            except UnidentifiedImageError:  # whose message names a buffer
                errors.append("it is no picture of a known format")
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                errors.append(str(error) or type(error).__name__)
        row = {"number": shard["number"], "names": shard["names"], "errors": errors}
        if not pictures:
            return row | {"pixel_values": np.zeros((0, 1, 3, 1, 1), np.float32), "image_sizes": np.zeros((0, 2), int)}
        inputs = self.image_processor(pictures, return_tensors="np")
        return row | {key: inputs[key] for key in ("pixel_values", "image_sizes")}


class Embed:
    """The pixels of a shard -> its file, and when the model began and ended."""

    def __init__(self, folder, model, revision):
        self.folder = folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(
            model, revision=revision, trust_remote_code=True, device_map=self.device
        ).eval()

    @torch.inference_mode()
    def __call__(self, shard):
        began = time.time()
        vectors = iter(())
        if len(shard["pixel_values"]):
            inputs = (torch.tensor(shard[key], device=self.device) for key in ("pixel_values", "image_sizes"))
            pixel_values, image_sizes = inputs
            outputs = self.model(pixel_values=pixel_values.to(self.model.dtype), image_sizes=image_sizes)
            vectors = iter(outputs.pooler_output.float().cpu().numpy())
        ended = time.time()
        errors = [error or None for error in shard["errors"]]
        width = self.model.config.hidden_size
        rows = {
            "name": pa.array(shard["names"], pa.string()),
            "embedding": pa.array(
                [None if error else next(vectors) for error in errors], pa.list_(pa.float32(), width)
            ),
            "error": pa.array(errors, pa.string()),
        }
        write_beside(self.folder / file_name(shard["number"]), lambda part: pq.write_table(pa.table(rows), part))
        return {"images": len(errors), "began": began, "ended": ended}


def embed(shards, folder, copies, model, revision, num_crops):
    ray.init(logging_level="warning", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images, theirs blocks
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    copies = (gpus or max(1, cpus // 4)) if copies is None else copies
    if copies >= cpus or copies < 1:
        raise ValueError(
            f"--copies is {copies}, and there are {cpus} CPUs. Give 1 or more, and leave a CPU to read images."
        )
    pixels = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        Preprocess,
        fn_constructor_args=(model, revision, num_crops),
        # Actors, not tasks: Ray would fuse tasks with the model's actors, and nothing would overlap.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cpus if gpus else cpus - copies),
    )
    done = pixels.map(
        Embed,
        fn_constructor_args=(folder, model, revision),
        compute=ray.data.ActorPoolStrategy(size=copies),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    start, images, spans = time.time(), 0, []
    with tqdm(total=sum(map(size, shards)), desc="Embedding", unit="image") as progress:
        for row in done.iter_rows():
            images += row["images"]
            spans.append((row["began"], row["ended"]))
            progress.update(row["images"])
    busy = sum(end - begin for begin, end in spans)
    between = max(end for _, end in spans) - min(begin for begin, _ in spans)
    print(
        f"{images} images, {images / (time.time() - start):.1f} a second; "
        f"the model was busy {busy / (copies * between):.0%} of the time since its first batch."
    )


def report_broken(folder, shards):
    broken = []
    for shard in shards:
        rows = pq.read_table(folder / file_name(shard["number"]), columns=["name", "error"]).to_pylist()
        broken += [f"{row['name']}: {row['error']}" for row in rows if row["error"] is not None]
    if broken:
        print(f"{len(broken)} of {sum(map(size, shards))} images are broken and have no vector (column `error`):")
        print("\n".join(broken[:MAX_NAMED] + ["..."] * (len(broken) > MAX_NAMED)))


if __name__ == "__main__":
    main()
