"""
Millions of images -> parquet files of one vector an image, on one machine or a cluster, by Ray Data.

An image is one row in the output folder: `name`, `embedding` and `error`, of which the last or the one before is null.
Images that cannot be read are named at the end.

The images are cut into numbered shards, and each becomes a file of that number, written beside and renamed. A shard
whose worker died is done again, into the same file; after an interruption the same command goes on with the shards
that have no file. Some processes read and preprocess shards while others have theirs in the model. `RAY_ADDRESS` names
a cluster, whose machines all see source, output and model; without it Ray is started here.
"""

import errno
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
from transformers import AutoImageProcessor

from phi3_tools import ROOT
from phi3_tools.images import make_shards, read_image, read_shard
from phi3_tools.models import (
    PHI3_EMBED,
    Model,
    encode_or_refuse,
    find_model,
    load_embedder,
    load_model,
    pick_device,
)
from phi3_tools.results import is_disk_full, one_line, say_left_out, write_beside, write_text


def run(
    source,
    output,
    model=None,
    num_crops=None,
    image_column=None,
    text_column=None,
    template="{text}",
    shard_size=64,
    copies=None,
    dtype="float32",
) -> None:
    """Embeds a folder, parquet or webdataset into the folder `output`, or goes on with it."""
    source, output = Path(source).absolute(), Path(output).absolute()
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{output} lies in {source}, so that vectors would be taken for images. Give one elsewhere.")
    model = find_model(model or str(ROOT))
    if model.kind != PHI3_EMBED:
        raise ValueError(f"{model.name} is no phi3_embed model, but of {model.kind}.")
    if text_column and not model.has_recipe:
        raise ValueError(f"{model.label} embeds images alone. Leave out --text-column, or give a model with words.")
    if "{text}" not in template:
        raise ValueError(f"--template is {template!r}, but must say where the text goes: {{text}}.")
    load_image_processor(model, num_crops)  # a wrong one is told before all else
    shards = make_shards(source, shard_size, image_column=image_column, text_column=text_column)
    settings = {"model": model.name, "version": model.version, "pooling": model.pooling, "num_crops": num_crops}
    columns = {"image_column": image_column, "text_column": text_column, "template": template}
    begin(output, shards, settings | {"dtype": dtype} | columns)
    todo = [shard for shard in shards if not (output / file_name(shard["number"])).exists()]
    num_images = sum(shard["size"] for shard in shards)
    print(f"{num_images} images in {len(shards)} shards, of which {len(shards) - len(todo)} are done.")
    if todo:
        embed(todo, output, copies, model, num_crops, template if text_column else None, dtype)
    report_broken(output, shards)


def file_name(number):
    return f"{number:08}.parquet"


def begin(folder, shards, settings):
    """Makes the folder, or finds that it is of the same work: files of other images or vectors are never mixed in."""
    images = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    work = settings | {"images": images, "num_images": sum(shard["size"] for shard in shards), "shards": len(shards)}
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
    """
    A shard -> what the model takes of it: the pixels of its images or, for a model with a recipe, images and texts; of
    an image that cannot be read, the error.
    """

    def __init__(self, model: Model, num_crops, template):
        self.image_processor, self.model, self.template = load_image_processor(model, num_crops), model, template

    def __call__(self, shard):
        names, items, errors = [], [], []
        for row in read_shard(shard):
            names.append(row["name"])
            try:
                items.append(self._open(row))
                errors.append("")
            except ValueError as error:
                errors.append(str(error))
        done = {"number": shard["number"], "names": names, "errors": errors}
        if self.model.has_recipe:
            return done | {"items": items}
        if not items:
            return done | {"pixel_values": np.zeros((0, 3, 1, 1), np.float32), "image_sizes": np.zeros((0, 2), int)}
        inputs = self.image_processor([image for image, _ in items], return_tensors="np")
        return done | {key: inputs[key] for key in ("pixel_values", "image_sizes")}

    def _open(self, row):
        """A row -> its image and its text in the template, of which one may be None."""
        text = self.template and row.get("text")
        if self.template and not (isinstance(text, str) and text.strip()):
            raise ValueError(f"the row holds no text, but {text!r:.80}" if text else "the row holds no text")
        has_image = not text or row["image"] is not None
        image = read_image(row["image"], self.image_processor.open_image) if has_image else None
        return image, text and self.template.replace("{text}", text)


class Embed:
    """What a shard holds -> its file, and when the model began and ended."""

    def __init__(self, folder, model: Model, num_crops, dtype):
        self.folder, self.device, self.model = folder, pick_device(), model
        if model.has_recipe:
            self.embedder = load_embedder(model, num_crops, dtype)
            self.width = len(self.embedder.encode_texts(["a"])[0])
        else:
            self.loaded, _ = load_model(model, dtype)
            self.width = self.loaded.config.embed_dim

    def __call__(self, shard):
        began = time.time()
        vectors = iter(self._embed_items(shard["items"]) if self.model.has_recipe else self._embed_pixels(shard))
        ended = time.time()
        results = [ValueError(error) if error else next(vectors) for error in shard["errors"]]
        is_error = [isinstance(result, ValueError) for result in results]
        embeddings = [None if bad else result for bad, result in zip(is_error, results)]
        rows = {
            "name": pa.array(shard["names"], pa.string()),
            "embedding": pa.array(embeddings, pa.list_(pa.float32(), self.width)),
            "error": pa.array([str(result) if bad else None for bad, result in zip(is_error, results)], pa.string()),
        }
        write_beside(self.folder / file_name(shard["number"]), lambda beside: pq.write_table(pa.table(rows), beside))
        return {"images": len(results), "began": began, "ended": ended}

    @torch.inference_mode()
    def _embed_pixels(self, shard):
        if not len(shard["pixel_values"]):
            return []
        pixel_values, image_sizes = (
            torch.tensor(shard[key], device=self.device) for key in ("pixel_values", "image_sizes")
        )
        output = self.loaded.get_image_features(pixel_values.to(self.loaded.dtype), image_sizes)
        return list(output.image_embeds.float().numpy(force=True))

    def _embed_items(self, items):
        """Vectors of images, texts and pairs of both, or why one is refused, in their order."""
        encoders = {
            (True, False): lambda part: self.embedder.encode_images([image for image, _ in part]),
            (False, True): lambda part: self.embedder.encode_texts([text for _, text in part], is_query=False),
            (True, True): lambda part: self.embedder.encode_pairs(
                [text for _, text in part], [image for image, _ in part], is_query=False
            ),
        }
        kinds = [(image is not None, text is not None) for image, text in items]
        vectors = [None] * len(items)
        for kind, encode in encoders.items():
            numbers = [number for number, other in enumerate(kinds) if other == kind]
            for number, vector in zip(numbers, encode_or_refuse(encode, [items[number] for number in numbers])):
                vectors[number] = vector
        return vectors


def _start_ray():
    try:
        ray.init(logging_level="warning", log_to_driver=False)
    except Exception as error:
        if "timed out" not in str(error):  # of which Ray makes a plain Exception
            raise
        raise TimeoutError(
            f"Ray did not start: {one_line(error)}. Run the same command again when the machine has less to do, or "
            "name a cluster by RAY_ADDRESS."
        ) from error


def embed(shards, folder, copies, model, num_crops, template, dtype):
    _start_ray()
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
        fn_constructor_args=(model, num_crops, template),
        # Actors, not tasks: Ray would fuse tasks with the model's actors, and nothing would overlap.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cpus if gpus else cpus - copies),
    )
    done = pixels.map(
        Embed,
        fn_constructor_args=(folder, model, num_crops, dtype),
        compute=ray.data.ActorPoolStrategy(size=copies),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    try:
        _follow_progress(done, shards, copies)
    except ray.exceptions.RayTaskError as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, "a worker has no space left to write to") from error
        raise ValueError(f"{one_line(error.cause)}. What is done is kept: the same command goes on.") from error


def _follow_progress(done, shards, copies):
    start, images, spans = time.time(), 0, []
    with tqdm(total=sum(shard["size"] for shard in shards), desc="Embedding", unit="image") as progress:
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
    say_left_out(broken, sum(shard["size"] for shard in shards), "images, which are broken (column `error`)")
    if len(broken) == sum(shard["size"] for shard in shards):
        raise ValueError("not one image could be read.")
