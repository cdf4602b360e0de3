"""
Millions of images -> parquet files of one vector an image, on one machine or a cluster, by Ray Data.

An image is one row in the output folder: `name`, `embedding` and `error`, of which the last or the one before is null.
Images that cannot be read are named at the end.

The images are cut into numbered shards, and each becomes a file of that number, written beside and renamed. A shard
whose worker died is done again, into the same file; after an interruption the same command goes on with the shards
that have no file. Some processes read and preprocess shards while others have theirs in the model. `RAY_ADDRESS` names
a cluster, whose machines all see source, output and model; without it Ray is started here.
"""

import hashlib
import json
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

from phi3_tools.images import image_bytes, make_shards, open_image, read_shard
from phi3_tools.models import PHI3_EMBED, ROOT, Model, find_model, pick_device
from phi3_tools.results import one_line, say_left_out, write_beside, write_text


def run(source, output, model=None, num_crops=None, image_column=None, shard_size=64, copies=None, dtype="float32"):
    """Embeds a folder, parquet or webdataset into the folder `output`, or goes on with it."""
    source, output = Path(source).absolute(), Path(output).absolute()
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{output} lies in {source}, so that vectors would be taken for images. Give one elsewhere.")
    model = find_model(model or str(ROOT))
    if model.kind != PHI3_EMBED:
        raise ValueError(f"{model.name} is no phi3_embed model, but of {model.kind}.")
    load_image_processor(model, num_crops)  # a wrong one is told before all else
    shards = make_shards(source, shard_size, image_column)
    settings = {"model": model.name, "version": model.version, "pooling": model.pooling, "num_crops": num_crops}
    begin(output, shards, settings | {"dtype": dtype, "image_column": image_column})
    todo = [shard for shard in shards if not (output / file_name(shard["number"])).exists()]
    print(f"{sum(map(size, shards))} images in {len(shards)} shards, of which {len(shards) - len(todo)} are done.")
    if todo:
        embed(todo, output, copies, model, num_crops, dtype)
    report_broken(output, shards)


def size(shard):
    return len(shard["names"])


def file_name(number):
    return f"{number:08}.parquet"


def begin(folder, shards, settings):
    """Makes the folder, or finds that it is of the same work: files of other images or vectors are never mixed in."""
    names = hashlib.sha256("\n".join("\t".join(shard["names"]) for shard in shards).encode())
    work = settings | {"images": sum(map(size, shards)), "shards": len(shards), "names": names.hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "_work.json"
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder} holds parquet files that are not of this command. Give another folder.")
        write_text(path, json.dumps(work, indent=1) + "\n")
    before = json.loads(path.read_text())
    changed = [key for key in work if work[key] != before.get(key)]
    if changed:
        raise ValueError(f"{folder} was begun with other {', '.join(changed)} ({path}). Give another folder.")


# The work


def load_image_processor(model: Model, num_crops):
    settings = {} if num_crops is None else {"num_crops": num_crops}
    return AutoImageProcessor.from_pretrained(**model.pinned, **settings)


class Preprocess:
    """A shard -> the pixels of its images; of an image that cannot be read, the error."""

    def __init__(self, *settings):
        self.image_processor = load_image_processor(*settings)

    def __call__(self, shard):
        images, errors = [], []
        for image in read_shard(shard):
            try:
                opened = open_image(image_bytes(image))
                self.image_processor.num_image_tokens(*opened.size)
                images.append(opened)
                errors.append("")
            except ValueError as error:
                errors.append(str(error))
        row = {"number": shard["number"], "names": shard["names"], "errors": errors}
        if not images:
            return row | {"pixel_values": np.zeros((0, 1, 3, 1, 1), np.float32), "image_sizes": np.zeros((0, 2), int)}
        inputs = self.image_processor(images, return_tensors="np")
        return row | {key: inputs[key] for key in ("pixel_values", "image_sizes")}


class Embed:
    """The pixels of a shard -> its file, and when the model began and ended."""

    def __init__(self, folder, model: Model, dtype):
        self.folder, self.device = folder, pick_device()
        self.model = AutoModel.from_pretrained(
            **model.pinned, dtype=getattr(torch, dtype), device_map=self.device
        ).eval()
        self.model.config.pooling_mode = model.pooling or self.model.config.pooling_mode

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
        write_beside(self.folder / file_name(shard["number"]), lambda beside: pq.write_table(pa.table(rows), beside))
        return {"images": len(errors), "began": began, "ended": ended}


def embed(shards, folder, copies, model, num_crops, dtype):
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
        fn_constructor_args=(model, num_crops),
        # Actors, not tasks: Ray would fuse tasks with the model's actors, and nothing would overlap.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cpus if gpus else cpus - copies),
    )
    done = pixels.map(
        Embed,
        fn_constructor_args=(folder, model, dtype),
        compute=ray.data.ActorPoolStrategy(size=copies),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    try:
        _follow_progress(done, shards, copies)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(f"{one_line(error.cause)}. What is done is kept: the same command goes on.") from error


def _follow_progress(done, shards, copies):
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
    say_left_out(broken, sum(map(size, shards)), "images, which are broken (column `error`)")
    if len(broken) == sum(map(size, shards)):
        raise ValueError("not one image could be read.")
