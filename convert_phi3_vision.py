"""
Microsoft's Phi-3-vision checkpoints, and fine-tunes of them, as phi3-embed; and back.

    python convert_phi3_vision.py SOURCE OUTPUT [--dtype bfloat16] [--push-to-hub NAME]
    python convert_phi3_vision.py SOURCE OUTPUT --put-back MODEL

SOURCE is a Hub id or a folder, with safetensors in one file or in shards, or a LoRA adapter over such a base. Of a
repository on the Hub only the bytes of the image embedding are fetched.

A conversion goes on in `OUTPUT.partial`: `source/` takes what is fetched, a small checkpoint of Microsoft's layout
whose `model.safetensors` is only ever appended to, so that its length says where to go on; `output/` takes the result,
and is renamed to OUTPUT when it is complete.
"""

import argparse
import errno
import inspect
import json
import logging
import math
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import httpx2
import numpy as np
import torch
import yaml
from filelock import Timeout
from huggingface_hub import (
    HfApi,
    ModelCardData,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    split_torch_state_dict_into_shards,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    validate_repo_id,
)
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent

# How our names of weights begin, and how Microsoft's do. The word embeddings are one module under two names there, and
# a file may hold either or both. The image embedding reads `wte`, so that comes first: where training has replaced the
# other alone, `wte` is still what images were embedded with.
PUBLISHED_PREFIXES = {
    "vision_embed_tokens.wte.": ("model.vision_embed_tokens.wte.", "model.embed_tokens."),
    "vision_embed_tokens.img_processor.": ("model.vision_embed_tokens.img_processor.vision_model.",),
    "vision_embed_tokens.projector.": ("model.vision_embed_tokens.",),
}
# What the image embedding's weights in a published checkpoint, and no others, begin with.
IMAGE_EMBEDDING = ("model.vision_embed_tokens.", "model.embed_tokens.")
LANGUAGE_MODEL = ("model.layers.", "model.norm.", "lm_head.")
# Parts of the tower behind the feature layer: they do not reach the output. `position_ids` are no weights.
(TOWER,) = PUBLISHED_PREFIXES["vision_embed_tokens.img_processor."]
BEHIND_FEATURES = re.compile(
    re.escape(TOWER) + r"(post_layernorm\.|embeddings\.position_ids|encoder\.layers\.(\d+)\.)"
)

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PREPROCESSOR = "preprocessor_config.json"
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
# The small files of a source: what it says of itself, its processor, its tokenizer, and an adapter's weights.
SMALL_FILES = (
    "config.json",
    PREPROCESSOR,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
    INDEX,
    ADAPTER,
    "adapter_model.safetensors",
)

# What makes embeddings of weights, beside their shapes.
SETTINGS = ("layer_idx", "type_feature", "use_hd_transform", "hd_transform_order", "projection_cls")
TOWER_SETTINGS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)

# What is taken over from a source's files, key by key: a source gives weights, numbers and texts. All else there, such
# as an `auto_map`, could name code, files or addresses that would act here or wherever the result is loaded.
TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
IMAGE_SETTINGS = ("num_crops", "image_mean", "image_std")
TOKEN_KEYS = {"content": str, "lstrip": bool, "rstrip": bool, "normalized": bool, "single_word": bool, "special": bool}
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
TOKENIZER_SETTINGS = {
    "add_bos_token": bool,
    "add_eos_token": bool,
    "clean_up_tokenization_spaces": bool,
    "legacy": bool,
    "model_max_length": int,
    "padding_side": str,
    "truncation_side": str,
    "split_special_tokens": bool,
}
# An adapter's settings that decide what it changes, and those that do not matter once it is trained.
ADAPTER_NUMBERS, ADAPTER_SWITCHES = ("r", "lora_alpha"), ("fan_in_fan_out", "use_rslora", "use_dora")
ADAPTER_PATTERNS = ("rank_pattern", "alpha_pattern")
ADAPTER_SETTINGS = (*ADAPTER_NUMBERS, *ADAPTER_SWITCHES, *ADAPTER_PATTERNS)
IGNORED_ADAPTER_SETTINGS = (
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "bias",
    "init_lora_weights",
    "eva_config",
    "megatron_config",
    "megatron_core",
    "runtime_config",
)
# Names of layers, and plain patterns of them: at most two repetitions, which cannot take for ever to match.
LAYER_PATTERN = re.compile(r"[\w.\\^$|-]{0,200}([*+][\w.\\^$|-]{0,200}){0,2}")
# These begin from another base than the one that is given: the adapter alone does not say how it was changed.
CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")

MAX_TEXT_SIZE = 2**24  # bytes of a JSON file or a text; Phi-3's tokenizer.json has 1.9 million
MAX_CARD_SIZE = 2**16  # of the metadata of a card
MAX_HEADER_SIZE = 2**24  # of a safetensors file; Phi-3-vision's have 70 thousand
MAX_RANK = 8  # dimensions of a tensor
MAX_LAYERS = 500
MAX_NUMBER = 10**7  # any other number of a config: widths, rows of tables, positions
LFS_POINTER = b"version https://git-lfs.github.com/"

MAX_SHARD_SIZE = "5GB"
CHUNK = 2**22
MAX_RETRIES = 5
TIMEOUT = 30  # seconds without a byte


class ConversionError(Exception):
    """What a user can mend: told in a few lines, without a traceback."""


@contextmanager
def library_errors(what):
    """What a library raises over a file of the user's, as an error of ours; some raise plain `Exception`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConversionError) or getattr(error, "errno", None) or is_disk_full(error):
            raise  # a full disk is no fault of the file
        raise ConversionError(f"{what}: {' '.join(str(error).split())}") from error


def is_disk_full(error) -> bool:
    """Whether an error says that no more can be written; tokenizers say it by the text of a plain `Exception`."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    said = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) in codes or bool(said and int(said[1]) in codes)


def published_names(name: str) -> list[str]:
    """Our name of a weight -> its names in a published checkpoint, the one to prefer first."""
    for ours, theirs in PUBLISHED_PREFIXES.items():
        if name.startswith(ours):
            return [prefix + name.removeprefix(ours) for prefix in theirs]
    raise KeyError(name)


# Where the weights are


@dataclass(frozen=True)
class Source:
    """A repository on the Hub at a commit, or a folder, whose `commit` is None."""

    name: str
    folder: Path  # holds the small files
    files: frozenset[str]
    commit: str | None = None

    def url(self, file):
        return hf_hub_url(self.name, file, revision=self.commit)

    def size(self, file) -> int:
        if self.commit is None:
            return (self.folder / file).stat().st_size
        size = retried(lambda: get_hf_file_metadata(self.url(file), retry_on_errors=True)).size
        if size is None:
            raise ConversionError(f"The server does not say how large {self.url(file)} is.")
        return size

    def read(self, file, start, stop):
        """Yields the bytes [start, stop) of a file as they come."""
        if self.commit is not None:
            yield from read_url(self.url(file), start, stop)
            return
        with open(self.folder / file, "rb") as opened:
            opened.seek(start)
            yield opened.read(stop - start)

    def text(self, file, errors="strict") -> str:
        """One of the small files, which lie in `folder` of a repository on the Hub too."""
        if file not in self.files:
            raise ConversionError(f"{self.name} has no {file}.")
        with open(self.folder / file, "rb") as opened:
            content = opened.read(MAX_TEXT_SIZE + 1)
        if len(content) > MAX_TEXT_SIZE:
            raise ConversionError(
                f"{self.name}: {file} is larger than {MAX_TEXT_SIZE} bytes, so is not what it should be."
            )
        self.check_pointer(file, content)
        return content.decode("utf-8-sig", errors)

    def check_pointer(self, file, begins: bytes):
        if begins.startswith(LFS_POINTER):
            raise ConversionError(
                f"{self.name}: {file} is a Git LFS pointer, not the file itself. Fetch it by `git lfs pull` there."
            )

    def json(self, file) -> dict:
        try:
            content = json.loads(self.text(file), parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{self.name}: {file} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConversionError(f"{self.name}: {file} must hold a JSON object, but holds {str(content)[:40]!r}.")
        return content

    def weight_map(self) -> dict[str, str]:
        """The index: name of a weight -> its file."""
        found = self.json(INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ConversionError(f"{self.name}: {INDEX} has no `weight_map` from names of weights to files.")
        return found


def refuse_constant(name):
    raise ValueError(f"{name} is no number in JSON")


def read_url(url, start, stop):
    """
    Yields the bytes [start, stop) of a file on the Hub as they come, exactly these: bytes too many would move all that
    come after. Answers of 429 and 5xx are tried again, and where a body is cut, reading goes on at the byte after the
    last.

    A redirect to another origin, as large files have, is followed without the token: the client leaves it out.
    """
    failures = 0
    while start < stop:
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        error = None
        try:
            # Errors of reading the body are handled below: the client's retry would enter this generator again.
            with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT, retry_on_exceptions=()) as response:
                hf_raise_for_status(response)
                check_answer(response, start, stop)
                for chunk in response.iter_raw():
                    if len(chunk) > stop - start:
                        raise ConversionError(f"The server sends more bytes of {url} than were asked for.")
                    if chunk:
                        start, failures = start + len(chunk), 0
                        yield chunk
        except httpx2.TransportError as raised:
            error = raised
        if start < stop:
            failures += 1
            wait_or_raise(failures, error or ConversionError(f"the answer ends {stop - start} bytes early"))


def check_answer(response, start, stop):
    """Raises unless an answer says that it brings the bytes [start, stop) as they are."""
    given = response.headers.get("Content-Range", "")
    length = response.headers.get("Content-Length", "0")
    if response.status_code != 206:
        raise ConversionError(f"The server of {response.url.host} does not serve parts of files (HTTP ranges).")
    if not re.fullmatch(rf"bytes {start}-{stop - 1}/(\d+|\*)", given) or int(length) > stop - start:
        raise ConversionError(
            f"The server of {response.url.host} was asked for the bytes {start} to {stop - 1}, but answers with "
            f"{given or 'no range'}, {length} bytes long. A proxy may stand between; try from another network."
        )
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ConversionError(f"The server of {response.url.host} sends files encoded, though asked not to.")


def retried(call):
    """What a call of the client gives, which by itself gives up at a 5xx of some kinds of request."""
    failures = 0
    while True:
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError) as error:
            if is_offline_mode() or (isinstance(error, HfHubHTTPError) and error.response.status_code < 500):
                raise
            failures += 1
            wait_or_raise(failures, error)


def wait_or_raise(failures, error):
    if failures > MAX_RETRIES:
        raise ConversionError(
            f"The network fails ({first_line(error)}). The same command goes on from here."
        ) from error
    seconds = min(2 ** (failures - 1), 8)
    tqdm.write(f"{first_line(error)}: trying again in {seconds} s", file=sys.stderr)
    time.sleep(seconds)


def first_line(error):
    return str(error).partition("\n")[0] or type(error).__name__


def open_source(name: str, revision: str | None, folder: Path, is_on_hub: bool = False) -> Source:
    """A folder as it is, or a repository on the Hub, whose small files are fetched to `folder`."""
    if not is_on_hub and Path(name).is_dir():
        if revision is not None:
            raise ConversionError(f"A revision is of a repository on the Hub, but {name} is a folder.")
        return Source(name, Path(name), files_of(Path(name)))
    if not is_on_hub and Path(name).exists():
        raise ConversionError(f"{name} is a file. Give the folder that it is in, or a Hub id.")
    with hub_errors(name):
        info = retried(lambda: HfApi().model_info(name, revision=revision))
        remember_commit(name, info.sha, folder)
        # Names that could lie elsewhere than in the folder are no files of a checkpoint.
        files = {sibling.rfilename for sibling in info.siblings if re.fullmatch(r"[\w-][\w.-]*", sibling.rfilename)}
        source = Source(name, folder, frozenset(files), info.sha)
        for file in sorted(files):
            if matches(file, SMALL_FILES):
                fetch_small_file(source, file)
    return source


def matches(file, patterns):
    return any(Path(file).match(pattern) for pattern in patterns)


def fetch_small_file(source: Source, file: str):
    path, size = source.folder / file, source.size(file)
    if size > MAX_TEXT_SIZE and not file.endswith(".safetensors"):
        raise ConversionError(
            f"{source.name}: {file} is larger than {MAX_TEXT_SIZE} bytes, so is not what it should be."
        )
    if path.exists() and path.stat().st_size == size:
        return
    with open(f"{path}.part", "wb") as opened:
        opened.writelines(source.read(file, 0, size))
    os.replace(f"{path}.part", path)


def files_of(folder: Path) -> frozenset[str]:
    """The names of the files in a folder. What is none, or lies elsewhere, is refused, or left out if it is a text."""
    files = set()
    for path in folder.iterdir():
        if unlike := unlike_a_file(path, folder):
            if matches(path.name, ("LICENSE*", "README.md")):
                print(f"Left out: {path.name} of {folder} is {unlike}.")
            elif matches(path.name, (*SMALL_FILES, "*.safetensors")):
                raise ConversionError(f"{folder}: {path.name} is {unlike}. Put the file itself there.")
        else:
            files.add(path.name)
    return frozenset(files)


def unlike_a_file(path: Path, folder: Path) -> str | None:
    """What a path is other than a file that lies in the folder; the Hub client's cache links to its own blobs."""
    folder = folder.resolve()
    own = (folder, folder.parent.parent / "blobs") if folder.parent.name == "snapshots" else (folder,)
    if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in own):
        return "a symbolic link to what lies elsewhere"
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a symbolic link to nothing"
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def remember_commit(name, commit, folder):
    """Records of which repository and commit a download is; raises if one of another has been begun."""
    if not re.fullmatch(r"[0-9a-f]{40}", str(commit)):
        raise ConversionError(f"The Hub gives {commit!r} as the commit of {name}.")
    path, asked = folder / "source.json", {"name": name, "commit": commit}
    try:
        begun = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # none, or killed while it was written, which was before any download
        begun = None
    if begun == asked:
        return
    if begun and (folder / WEIGHTS).exists():
        raise ConversionError(
            f"{folder} has part of {begun['name']} at {begun['commit']}, but {name} is now at {commit}. To finish the "
            f"first, give it and `--revision {begun['commit']}`; to begin anew, delete {folder.parent}."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path.write_text(json.dumps(asked))


@contextmanager
def hub_errors(name):
    """The Hub's refusals, as what to do about them."""
    try:
        yield
    except GatedRepoError as error:
        raise ConversionError(
            f"{name} is gated: accept its terms on its page of the Hub, and log in by `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{name} has no such revision. Its page on the Hub lists them.") from error
    except HFValidationError as error:
        raise ConversionError(f"There is no folder {name}, and it is no Hub id, such as owner/model.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) or status == 401:
            raise ConversionError(
                f"There is no folder {name}, and the Hub shows no such model. A private one needs `hf auth login`."
            ) from error
        hint = "Your token does not allow this." if status in (401, 403) else "The same command goes on from here."
        raise ConversionError(f"{name}: the Hub answers {status} ({error.server_message}). {hint}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx2.TransportError) as error:
        no_folder = f"There is no folder {name}. " if isinstance(error, LocalEntryNotFoundError) else ""
        raise ConversionError(f"{no_folder}The Hub cannot be reached for {name}: {first_line(error)}") from error


# Which weights they are


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file; `start` and `stop` are bytes of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_entries(source: Source, begins: tuple[str, ...] = ("",)) -> dict[str, Entry]:
    """The tensors whose names begin so, by the headers of the files that hold them."""
    if WEIGHTS in source.files:  # as transformers chooses where an index is there too
        files = [WEIGHTS]
    elif INDEX in source.files:
        files = sorted({file for name, file in source.weight_map().items() if name.startswith(begins)})
    elif any(file.endswith((".bin", ".pt", ".pth")) for file in source.files):
        raise ConversionError(
            f"{source.name} has its weights as pickles (.bin) only, which can run code when they are read. Convert "
            "them to safetensors first: https://huggingface.co/spaces/safetensors/convert does, by a pull request."
        )
    else:
        raise ConversionError(f"{source.name} has neither {WEIGHTS} nor {INDEX}.")
    entries = {}
    for file in files:
        if file not in source.files:
            raise ConversionError(f"{source.name} has no {file}, which its {INDEX} names.")
        entries |= {name: entry for name, entry in read_header(source, file).items() if name.startswith(begins)}
    return entries


def read_header(source, file) -> dict[str, Entry]:
    """The tensors of a safetensors file, whose header is believed in nothing that it contradicts."""
    size = source.size(file)
    begins = b"".join(source.read(file, 0, min(8, size)))
    if begins == LFS_POINTER[:8]:
        source.check_pointer(file, b"".join(source.read(file, 0, min(len(LFS_POINTER), size))))
    length = int.from_bytes(begins, "little")
    try:
        if not 2 <= length <= min(size - 8, MAX_HEADER_SIZE):
            raise ValueError("a safetensors file would begin with the length of its header")
        header = json.loads(b"".join(source.read(file, 8, 8 + length)))
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), dtype, shape = about["data_offsets"], about["dtype"], about["shape"]
            numbers = (start, stop, *shape)
            if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(
                    f"{name[:200]} has the dtype {dtype!r}, the shape {shape} and the offsets {[start, stop]}"[:600]
                )
            if len(shape) > MAX_RANK or not end <= start <= stop:
                raise ValueError(
                    f"the bytes {start} to {stop} of {name[:200]} overlap others, or its shape is too long"
                )
            if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
                raise ValueError(f"{name[:200]} of shape {shape} has {stop - start} bytes")
            entries[name], end = Entry(name, file, dtype, tuple(shape), 8 + length + start, 8 + length + stop), stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{source.name}: {file} is no safetensors file ({error}).") from error
    if 8 + length + end > size:
        raise ConversionError(f"{source.name}: {file} is cut short: {size} of {8 + length + end} bytes.")
    return entries


def read_config(source: Source):
    """The source's own config -> ours."""
    config = source.json("config.json")
    if config.get("model_type") == "phi3_embed":
        raise ConversionError(f"{source.name} is a phi3-embed model already; AutoModel loads it as it is.")
    if "img_processor" not in config:
        raise ConversionError(
            f"{source.name} is not in Phi-3-vision's layout: its config.json is of type {config.get('model_type')!r} "
            "and has no `img_processor`."
        )
    config = parse_config(source)
    if not config.use_hd_transform:
        raise ConversionError(f"{source.name} works without the HD transform, for which there is no image processor.")
    return config


def parse_config(source: Source):
    """Our config of the source's, Microsoft's or ours, as far as numbers and texts describe the image embedding."""
    config_class = load_class("modeling_phi3_embed.Phi3EmbedConfig")
    with library_errors(f"{source.name}: config.json"):
        about = source.json("config.json")
        known = {*inspect.signature(config_class).parameters, "img_processor", "embd_layer"}
        taken = {key: value for key, value in about.items() if key in known}
        if isinstance(taken.get("vision_config"), dict):
            taken["vision_config"] = tower_settings(taken["vision_config"])
        for part in (taken, *(part for part in taken.values() if isinstance(part, dict))):
            check_numbers(part)
        config = config_class.from_dict(taken)
        model_shapes(config)  # the tower's own checks
    return config


def tower_settings(about: dict) -> dict:
    """A tower's own settings, without what a config of any model may say besides."""
    model_type = about.get("model_type", TOWERS[0])
    if model_type not in TOWERS:
        raise ValueError(f"`vision_config` is of type {model_type!r}, but must be of one of {', '.join(TOWERS)}.")
    known = CONFIG_MAPPING[model_type]().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    return {key: about[key] for key in known & about.keys()} | {"model_type": model_type}


def check_numbers(about: dict):
    """Raises for numbers that no checkpoint has, before anything is built by them."""
    for key, value in about.items():
        limit = MAX_LAYERS if "layers" in key else MAX_NUMBER
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and abs(number) > limit:
                raise ValueError(f"`{key}` is {number}, but must be {limit} at most.")


def load_class(reference):
    return get_class_from_dynamic_module(reference, ROOT)


def model_shapes(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = load_class("modeling_phi3_embed.Phi3EmbedModel")(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def select(entries: dict[str, Entry], config, source_name: str) -> dict[str, Entry]:
    """The entry of each of our weights, in the order of their bytes. Raises with the names of all that is wrong."""
    selected, problems = {}, defaultdict(list)
    for name, shape in model_shapes(config).items():
        names = published_names(name)
        entry = next((entries[each] for each in names if each in entries), None)
        if entry is None:
            problems["missing"].append(" or ".join(names))
        else:
            check_entry(entry, shape, problems)
            selected[name] = entry
    known = {each for name in selected for each in published_names(name)}
    problems["extra"] = [name for name in entries if name not in known and not is_behind_features(name, config)]
    raise_problems(source_name, problems)
    return dict(sorted(selected.items(), key=lambda item: (item[1].file, item[1].start)))


def is_behind_features(name, config):
    match = BEHIND_FEATURES.match(name)
    layer = match and match[2]
    return bool(match) and (
        layer is None or config.num_feature_layers <= int(layer) < config.vision_config.num_hidden_layers
    )


def check_entry(entry, shape, problems):
    if entry.shape != shape:
        problems["wrong shape"].append(f"{entry.name} is {entry.shape}, not {shape}")
    if entry.dtype not in DTYPES:
        problems["wrong dtype"].append(f"{entry.name} is {entry.dtype}, not one of {', '.join(DTYPES)}")


def raise_problems(source_name, problems):
    lines = [f"  {kind} ({len(each)}): {', '.join(each)}" for kind, each in problems.items() if each]
    if lines:
        raise ConversionError("\n".join([f"The image embedding of {source_name} is not as it should be.", *lines]))


# Fetching


def fetch(source: Source, selected: dict[str, Entry], whole_size: int) -> Source:
    """The selected weights of a repository on the Hub -> `source.folder`, as a checkpoint of Microsoft's layout."""
    header = safetensors_header({entry.name: (entry.dtype, entry.shape) for entry in selected.values()})
    path, total = source.folder / WEIGHTS, sum(entry.stop - entry.start for entry in selected.values())
    print(f"Fetching {total / 1e9:.3f} GB of {whole_size / 1e9:.3f} GB from {source.name} at {source.commit}")
    path.touch()
    with open(path, "r+b") as file:
        if file.read(len(header)) != header:
            file.seek(0)
            file.truncate()
            file.write(header)
        have = file.seek(0, os.SEEK_END) - len(header)
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="Fetching") as bar:
            for name, start, stop in joined(selected.values()):
                skipped = min(have, stop - start)
                have -= skipped
                for chunk in source.read(name, start + skipped, stop):
                    file.write(chunk)
                    bar.update(len(chunk))
    return replace(source, commit=None, files=frozenset(each.name for each in source.folder.iterdir()))


def joined(entries):
    """Entries in the order of their bytes -> file, start and stop of each unbroken run."""
    runs = []
    for entry in entries:
        if runs and runs[-1][0] == entry.file and runs[-1][2] == entry.start:
            runs[-1][2] = entry.stop
        else:
            runs.append([entry.file, entry.start, entry.stop])
    return runs


def safetensors_header(tensors) -> bytes:
    """What a safetensors file of these tensors, name -> (dtype, shape), begins with; their bytes follow in order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, offset = offset, offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, offset)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# Adapters


class Adapter:
    """A LoRA or DoRA adapter: its tensors that concern the image embedding, by the published name of the weight."""

    def __init__(self, source: Source):
        about = source.json(ADAPTER)
        self.source, self.base, self.base_revision = (
            source,
            about.get("base_model_name_or_path"),
            about.get("revision"),
        )
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ConversionError("Merging an adapter takes peft: `pip install peft`.") from error
        default = LoraConfig()
        begins = str(about.get("init_lora_weights")).lower()
        unknown = [
            f"`{key}`"
            for key, value in about.items()
            if value
            and key not in (*ADAPTER_SETTINGS, *IGNORED_ADAPTER_SETTINGS)
            and value != getattr(default, key, None)
        ]
        unknown += [f"`init_lora_weights` {begins}"] if begins.startswith(CHANGED_BASES) else []
        if about.get("peft_type") != "LORA" or unknown:
            kind = f"LoRA with {', '.join(unknown)}" if about.get("peft_type") == "LORA" else about.get("peft_type")
            raise ConversionError(
                f"{source.name} is an adapter of type {kind}; LoRA and DoRA are merged here. Merge it by peft's "
                "`merge_and_unload` and `save_pretrained`, and give that folder."
            )
        with library_errors(f"{source.name}: {ADAPTER}"):
            self.settings = {key: about[key] for key in ADAPTER_SETTINGS if about.get(key) is not None}
            check_adapter_settings(self.settings)
        if "adapter_model.safetensors" not in source.files:
            raise ConversionError(f"{source.name} has no adapter_model.safetensors (pickles are not read).")
        if others := [file for file in source.files if file.startswith("non_lora")]:
            raise ConversionError(
                f"{source.name} has {', '.join(others)}, weights that were trained beside the adapter. Merge them by "
                "the training's own script, and give the merged folder."
            )
        self.parts = defaultdict(dict)
        entries = read_header(source, "adapter_model.safetensors").values()
        tensors = {entry.name: load_tensor(source.folder, entry) for entry in entries if entry.dtype in DTYPES}
        if others := sorted({entry.dtype for entry in entries} - DTYPES.keys()):
            raise ConversionError(
                f"{source.name} has adapter weights as {', '.join(others)}, not as {', '.join(DTYPES)}."
            )
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.")
            module, lora, _ = name.partition(".lora_")
            target = f"{module}.weight" if lora else name.replace(".base_layer.", ".")
            self.parts[target][key] = tensor

    def select(self, selected, config):
        """Leaves in `parts` what concerns the selected weights, and says how much else there is."""
        left_out = {name for name in self.parts if name.startswith(LANGUAGE_MODEL) or is_behind_features(name, config)}
        language = sum(len(self.parts[name]) for name in left_out if name.startswith(LANGUAGE_MODEL))
        behind = sum(len(self.parts[name]) for name in left_out) - language
        known = {each for name in selected for each in published_names(name)}
        raise_problems(self.source.name, {"extra": [name for name in self.parts if name not in known | left_out]})
        self.parts = {
            entry.name: self.parts[published]
            for name, entry in selected.items()
            if (published := next((each for each in published_names(name) if each in self.parts), None))
        }
        print(
            f"The adapter changes {len(self.parts)} weights of the image embedding. Left out are {language} of its "
            f"tensors on the language model, and {behind} on parts of the tower that do not reach the output."
        )

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight with the adapter's change, as peft merges it."""
        from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

        tensors = dict(self.parts.get(name, {}))
        for key in [key for key in tensors if ".lora_" not in key]:
            replacement = tensors.pop(key)  # a weight that was trained whole
            if replacement.shape != weight.shape:
                wrong = f"{key} is {tuple(replacement.shape)}, not {tuple(weight.shape)}"
                raise_problems(self.source.name, {"wrong shape": [wrong]})
            weight = replacement
        if not tensors:
            return weight
        path = next(iter(tensors)).removeprefix("base_model.model.").partition(".lora_")[0]
        try:
            with warnings.catch_warnings():  # that patterns for other layers match none here
                warnings.simplefilter("ignore")
                model = PeftModel(shell(path, weight), LoraConfig(target_modules={path}, **self.settings))
            if get_peft_model_state_dict(model).keys() != tensors.keys():
                expected = ", ".join(get_peft_model_state_dict(model))
                raise ValueError(f"it has {', '.join(tensors)} where peft expects {expected}")
            set_peft_model_state_dict(model, tensors)
        except (RuntimeError, ValueError) as error:
            raise ConversionError(f"{self.source.name} does not fit {name}: {error}") from error
        return model.merge_and_unload().get_submodule(path).weight.detach()


def check_adapter_settings(settings: dict):
    """Raises for settings that are of another kind, or patterns that could take for ever to match."""
    for key, value in settings.items():
        if key in ADAPTER_SWITCHES:
            if not isinstance(value, bool):
                raise ValueError(f"`{key}` is {value!r}, but must be true or false.")
        elif key in ADAPTER_NUMBERS:
            if not is_number(value):
                raise ValueError(f"`{key}` is {value!r}, but must be a positive number.")
        elif not isinstance(value, dict) or not all(map(is_number, value.values())):
            raise ValueError(f"`{key}` is {value!r}, but must be a dict of positive numbers.")
        elif unclear := [name for name in value if not LAYER_PATTERN.fullmatch(name)]:
            raise ValueError(f"`{key}` has {unclear[0][:200]!r}, but must have names of layers.")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER


def shell(path, weight):
    """A model that has one layer alone, of this name and weight."""
    if weight.ndim == 4:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")
    elif path.endswith(("wte", "embed_tokens", "position_embedding")):
        layer = nn.Embedding(*weight.shape, device="meta")
    else:
        layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    for name in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(name, layer)
        layer = outer
    return layer


# Writing


def load_tensor(folder: Path, entry: Entry) -> torch.Tensor:
    data = np.fromfile(folder / entry.file, np.uint8, entry.stop - entry.start, offset=entry.start)
    return torch.from_numpy(data).view(DTYPES[entry.dtype]).reshape(entry.shape)


def write_tensor(file, tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Writes a tensor's bytes in this dtype, and says whether all its values are finite there."""
    is_finite = True
    for part in tensor.flatten().split(CHUNK):
        part = part.to(dtype)
        is_finite &= bool(torch.stack(part.aminmax()).isfinite().all())  # NaN comes through; ten times as fast as all
        file.write(part.view(torch.uint8).numpy())
    return is_finite


def write_weights(source: Source, selected: dict[str, Entry], dtype: torch.dtype | None, adapter, output: Path):
    """The selected weights under our names -> safetensors, one tensor in memory at a time."""
    dtypes = {name: dtype or DTYPES[entry.dtype] for name, entry in selected.items()}
    # As safetensors orders them, so that each is aligned.
    order = sorted(selected, key=lambda name: (-dtypes[name].itemsize, name))
    layout = {name: torch.empty(selected[name].shape, dtype=dtypes[name], device="meta") for name in order}
    split = split_torch_state_dict_into_shards(layout, max_shard_size=MAX_SHARD_SIZE)
    not_finite = []
    total = sum(tensor.nbytes for tensor in layout.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing") as bar:
        for filename, names in split.filename_to_tensors.items():
            with open(output / filename, "wb") as file:
                header = {name: (DTYPE_NAMES[dtypes[name]], selected[name].shape) for name in names}
                file.write(safetensors_header(header))
                for name in names:
                    tensor = load_tensor(source.folder, selected[name])
                    if adapter:
                        tensor = adapter.merge(selected[name].name, tensor)
                    if not write_tensor(file, tensor, dtypes[name]):
                        not_finite.append(selected[name].name)
                    bar.update(layout[name].nbytes)
    as_what = f" as {str(dtype).removeprefix('torch.')}" if dtype else ""
    raise_problems(source.name, {f"NaN or infinite{as_what}": not_finite})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return reduce(torch.promote_types, dtypes.values())


def write_config(config, dtype, output):
    """The config, the model's code, and how sentence-transformers takes it."""
    about = json.loads((ROOT / "config.json").read_text())
    config.architectures, config.auto_map, config.dtype = about["architectures"], about["auto_map"], dtype
    config.save_pretrained(output)


def write_processor(source: Source, config, output: Path):
    """
    Image processor and tokenizer, the latter as the source's tokenizer.json says, and their code -> the most crops of
    an image, as the card says it.
    """
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if file not in source.files:
            raise ConversionError(f"{source.name} has no {file}. Put the base model's tokenizer files beside it.")
    with library_errors(f"{source.name}: its tokenizer cannot be read"):
        tokenizer = read_tokenizer(source)
    if tokenizer.convert_tokens_to_ids("<|image|>") != config.image_token_id:
        raise ConversionError(f"The tokenizer of {source.name} has no <|image|> with the id {config.image_token_id}.")
    about = source.json(PREPROCESSOR) if PREPROCESSOR in source.files else {}
    settings = {key: about[key] for key in IMAGE_SETTINGS if key in about}
    size = {"height": config.crop_size, "width": config.crop_size}
    processor_class = load_class("processing_phi3_embed.Phi3EmbedProcessor")
    image_processor_class = load_class("processing_phi3_embed.Phi3EmbedImageProcessor")
    with library_errors(f"{source.name}: {PREPROCESSOR}"):
        image_processor = image_processor_class(size=size, num_img_tokens=config.num_img_tokens, **settings)
    processor_class.register_for_auto_class("AutoProcessor")
    processor_class(image_processor, tokenizer).save_pretrained(output)
    crops = f"at most {image_processor.num_crops}"
    if "num_crops" in settings:
        return crops
    print(
        f"{source.name} does not say `num_crops` in a {PREPROCESSOR}: {crops} are assumed, as Phi-3-vision has them. "
        "Phi-3.5-vision has 4."
    )
    return f"{crops}; assumed, as the source does not say"


def read_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The tokenizer of tokenizer.json and of the settings that are known, from a copy that has nothing else."""
    about = source.json("tokenizer_config.json")
    tokens = source.json("special_tokens_map.json") if "special_tokens_map.json" in source.files else {}
    named = {key: value for key, value in (tokens | about).items() if key in NAMED_TOKENS and value}
    settings = {key: read_token(value)["content"] for key, value in named.items()}
    settings |= {key: about[key] for key, kind in TOKENIZER_SETTINGS.items() if isinstance(about.get(key), kind)}
    for key in TOKEN_LISTS:
        if isinstance(about.get(key), list):
            settings[key] = [read_token(token)["content"] for token in about[key]]
    if isinstance(about.get("added_tokens_decoder"), dict):
        added = {str(int(number)): read_token(token) for number, token in about["added_tokens_decoder"].items()}
        settings["added_tokens_decoder"] = added
    template = (
        source.text("chat_template.jinja") if "chat_template.jinja" in source.files else about.get("chat_template")
    )
    if template is not None:
        settings["chat_template"] = read_template(template)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(source.json("tokenizer.json")))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    for key in ("is_local", "local_files_only"):  # how it was loaded just now
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def read_token(token) -> dict:
    """A token of a tokenizer_config.json, which is its text or says how it is matched."""
    token = {"content": token} if isinstance(token, str) else token
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ValueError(f"a token is {str(token)[:100]!r}, but must be a text")
    return {key: token[key] for key, kind in TOKEN_KEYS.items() if isinstance(token.get(key), kind)}


def read_template(template):
    """A chat template, or several by name; a name becomes that of a file."""
    if isinstance(template, str):
        return template
    if not isinstance(template, list) or not all(isinstance(named, dict) for named in template):
        raise ValueError(f"`chat_template` is {str(template)[:100]!r}, but must be a text or a list of named texts")
    for named in template:
        if not re.fullmatch(r"\w[\w-]*", str(named.get("name"))) or not isinstance(named.get("template"), str):
            raise ValueError(f"a chat template is called {str(named.get('name'))[:100]!r}, which is no name")
    return [{key: named[key] for key in ("name", "template")} for named in template]


CARD = """---
{metadata}
---

# {title}

The image embedding of {source}, as a model of its own: images in, image tokens and one vector an image out.

```python
from transformers import AutoImageProcessor, AutoModel

image_processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
vectors = model(**image_processor(images, return_tensors="pt")).pooler_output
```

`trust_remote_code=True` runs the Python files of this repository. From the Hub, pin `revision` to a commit.

## How it was made

```bash
{command}
```

of phi3-embed renames weights, and leaves out what does not reach the image embedding: the language model's layers, and
the vision tower's behind the feature layer. Nothing was trained.

| | |
|---|---|
| source | {source} |
| revision | {revision} |
| merged adapter | {adapter} |
| licence of the weights | {license} |
| weights | {count}, {dtype}; the word embeddings are the source's `{table}` |
| crops | {crops} |
"""


def write_card(source: Source, adapter, selected, config, crops, command, name, output: Path):
    said = read_card(source)
    license = {key: said.get(key) for key in ("license", "license_name", "license_link")}
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=[each.name for each in (source, adapter and adapter.source) if each and each.commit] or None,
        tags=["custom_code", "phi3_embed", "image-feature-extraction", "image-embedding"],
        **license,
    )
    table = next(entry.name for ours, entry in selected.items() if ours.startswith("vision_embed_tokens.wte."))
    text = CARD.format(
        metadata=metadata.to_yaml(),
        title=name.rpartition("/")[2],
        name=name,
        source=f"`{without_path(source.name)}`",
        revision=source.commit or "a folder",
        adapter=f"`{without_path(adapter.source.name)}` at {adapter.source.commit or 'a folder'}"
        if adapter
        else "none",
        license=license["license_name"] or license["license"] or "not stated by the source",
        command=command,
        count=len(selected),
        dtype=str(config.dtype).removeprefix("torch."),
        table=table,
        crops=crops,
    )
    (output / "README.md").write_text(text, encoding="utf-8")
    for file in source.files:
        if matches(file, ("LICENSE*",)):
            (output / file).write_text(source.text(file, errors="replace"), encoding="utf-8")


def read_card(source: Source) -> dict[str, str]:
    """Short texts of a card's metadata. A card that cannot be read is told, but stops no conversion."""
    try:
        with library_errors("README.md cannot be read, so the licence is not taken over"):
            text = source.text("README.md", errors="replace") if "README.md" in source.files else ""
            found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
            if found is None:
                return {}
            if len(found[1]) > MAX_CARD_SIZE:
                raise ValueError(f"its metadata are longer than {MAX_CARD_SIZE} characters")
            said = yaml.load(found[1], Loader=CardLoader)
            said = said if isinstance(said, dict) else {}
            return {key: " ".join(text.split())[:200] for key, text in said.items() if isinstance(text, str)}
    except ConversionError as error:
        print(error)
        return {}


class CardLoader(yaml.SafeLoader):
    """YAML without aliases, by which a few lines can stand for billions."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("its metadata have an alias")
        return super().compose_node(parent, index)


def without_path(name):
    """A Hub id as it is, but of a folder its own name: where it lies concerns no reader of a card."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def embed_fixed_picture(folder: Path, offload: Path) -> list[float]:
    """
    Loads a model as users do and embeds a picture: the first numbers of its vector. The weights stay on disk, and are
    widened to float32 as each module reads its own: many processors multiply in half precision several times slower.
    """
    model = AutoModel.from_pretrained(
        folder, trust_remote_code=True, device_map={"": "disk"}, offload_folder=str(offload)
    )
    model.vision_embed_tokens.img_processor.float()
    model.vision_embed_tokens.projector.float()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = Image.linear_gradient("L")
    inputs = processor(text="<|image_1|>", images=picture, num_crops=0, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    if not (outputs.pooler_output.isfinite().all() and outputs.last_hidden_state.isfinite().all()):
        raise ConversionError("The converted model gives values that are not finite.")
    return outputs.pooler_output[0, :6].tolist()


# Commands

# What the command makes in `OUTPUT.partial`.
WORK = {"lock", "source", "base", "output", "offload"}


@contextmanager
def work_folder(output: Path):
    """`OUTPUT.partial`, for one process at a time; what becomes OUTPUT begins empty in it."""
    if os.path.lexists(output):
        raise ConversionError(f"{output} exists already. Give another folder, or move it away.")
    if output.name == "..":
        raise ConversionError(f"{output} does not end in a name. Give a folder to make.")
    partial = output.with_name(f"{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = {path.name for path in partial.iterdir()}
    if held and not {"lock"} <= held <= WORK:  # what is deleted here is the command's own
        raise ConversionError(
            f"{partial}, where the work would go on, holds {', '.join(sorted(held - WORK) or sorted(held))}, not made "
            "by this command. Move it away."
        )
    try:
        with WeakFileLock(partial / "lock", timeout=1):
            shutil.rmtree(partial / "output", ignore_errors=True)
            (partial / "output").mkdir()
            try:
                yield partial
            except BaseException:
                begun = any((partial / name / WEIGHTS).exists() for name in ("source", "base"))
                shutil.rmtree(partial / "output" if begun else partial)
                raise
    except Timeout as error:
        raise ConversionError(f"Another process is at work in {partial}.") from error


def finish(partial: Path, output: Path):
    (partial / "output").rename(output)
    shutil.rmtree(partial)


def convert(
    source_name: str,
    output: Path,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    base: str | None = None,
    name: str | None = None,
    command: str = "convert_phi3_vision.convert",
) -> None:
    """
    Microsoft's layout -> a complete phi3-embed folder.

    Args:
        source_name: a Hub id or a folder; also of a LoRA adapter.
        output: a folder that does not exist yet.
        dtype: of the weights; the source's own by default.
        revision: of a Hub id.
        base: in place of the base that an adapter names.
        name, command: what the model card calls the model and says how it was made.

    Raises:
        ConversionError: with what is wrong and how to mend it.
    """
    with work_folder(output) as partial:
        source, adapter = open_source(source_name, revision, partial / "source"), None
        has_weights = bool({WEIGHTS, INDEX} & source.files)
        if ADAPTER in source.files and has_weights and base is None:
            raise ConversionError(
                f"{source_name} has weights, and an adapter beside them. Move {ADAPTER} away to convert the weights "
                f"as they are, or give `--base {source_name}` to merge the adapter into them."
            )
        if ADAPTER in source.files:
            adapter = Adapter(source)
            source = open_base(adapter, base, partial / "base")
        elif base is not None:
            raise ConversionError(f"`--base` is the base of an adapter, but {source_name} has no {ADAPTER}.")
        config = read_config(source)
        with hub_errors(source.name):
            entries = read_entries(source, IMAGE_EMBEDDING)
            selected = select(entries, config, source.name)
            if adapter:
                adapter.select(selected, config)
            origin, crops = source, write_processor(source, config, partial / "output")
            if source.commit is not None:
                files = {WEIGHTS} if WEIGHTS in source.files else set(source.weight_map().values())
                source = fetch(source, selected, sum(map(source.size, files)))
                selected = select(read_entries(source), config, source.name)
        written = write_weights(source, selected, dtype, adapter, partial / "output")
        write_config(config, written, partial / "output")
        write_card(origin, adapter, selected, config, crops, command, name or output.name, partial / "output")
        numbers = embed_fixed_picture(partial / "output", partial / "offload")
        finish(partial, output)
    print(f"{output} is complete. Its embedding of a fixed picture begins {', '.join(f'{x:.4f}' for x in numbers)}.")


def open_base(adapter, base, folder):
    """The base that was given, a folder or a Hub id, or else the one on the Hub that an adapter names."""
    if base is None:
        if adapter.base is None:
            raise ConversionError(f"{adapter.source.name} does not name its base. Give it by `--base`.")
        named = f"{adapter.base}@{adapter.base_revision or 'main'}"
        if not re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}@\w[\w./-]{0,200}", named):
            raise ConversionError(
                f"{adapter.source.name} names {str(adapter.base)[:200]!r} as its base, which is no Hub id. Give the "
                "base by `--base`, if you trust it."
            )
        print(f"The base is {adapter.base}, as {adapter.source.name} names it.")
    try:
        if base:
            return open_source(base, None, folder)
        return open_source(adapter.base, adapter.base_revision, folder, is_on_hub=True)
    except ConversionError as error:
        raise ConversionError(f"{error} (It is the base of {adapter.source.name}; `--base` gives another.)") from error


def put_back(model_name: str, source_name: str, output: Path, revision: str | None = None) -> None:
    """
    A copy of Microsoft's layout with the image embedding of a phi3-embed model, or of a head on one, in it.

    All that the image embedding does not have, and every file's layout, stay as they were. A weight takes the dtype
    that the source has it in.
    """
    with work_folder(output) as partial:
        source, model = open_whole(source_name, revision), open_whole(model_name)
        if partial.resolve().is_relative_to(source.folder.resolve()):
            raise ConversionError(f"{output} is inside {source_name}. Give a folder outside of what is to be copied.")
        config = read_config(source)
        targets = read_entries(source, IMAGE_EMBEDDING)
        selected = select(targets, config, source.name)
        check_settings(model, config)
        mine = model_entries(model, model_shapes(config))
        copy_files(source.folder, partial / "output")
        not_finite, cast = [], set()
        for name, entry in tqdm(mine.items(), desc="Putting back"):
            tensor = load_tensor(model.folder, entry)
            for target in same_weights(source, targets, name):
                with open(partial / "output" / target.file, "r+b") as file:
                    file.seek(target.start)
                    if not write_tensor(file, tensor, DTYPES[target.dtype]):
                        not_finite.append(entry.name)
                if target.dtype != entry.dtype:
                    cast.add(f"{entry.dtype} to {target.dtype}")
        raise_problems(model.name, {"NaN or infinite": not_finite})
        finish(partial, output)
    note = f" They took the dtype that they have there: {', '.join(sorted(cast))}." if cast else ""
    print(f"{output} is {source_name} with the {len(selected)} weights of {model_name} put back.{note}")


def open_whole(name: str, revision: str | None = None) -> Source:
    """A folder as it is, or all of a repository on the Hub, by the client's cache."""
    if Path(name).exists():
        return open_source(name, revision, Path(name))
    with hub_errors(name):
        folder = Path(retried(lambda: snapshot_download(name, revision=revision, ignore_patterns=PICKLES)))
    return replace(open_source(str(folder), None, folder), name=name)


def check_settings(model: Source, config):
    """Raises unless the weights of a phi3-embed model give with the source's config what they give with their own."""
    if model.json("config.json").get("model_type") != "phi3_embed":
        raise ConversionError(f"{model.name} is no phi3-embed model.")
    own, theirs = computation(parse_config(model)), computation(config)
    if other := [f"{name} is {own[name]!r}, not {theirs[name]!r}" for name in own if own[name] != theirs[name]]:
        raise ConversionError(
            f"The config of {model.name} is not SOURCE's: {', '.join(other)}. Put back, its weights would give other "
            "embeddings."
        )


def computation(config) -> dict:
    """The settings that make embeddings of weights, those of the tower under `vision_config.`"""
    tower = {f"vision_config.{name}": getattr(config.vision_config, name, None) for name in TOWER_SETTINGS}
    # The same layer, however it is counted.
    layer_idx = config.num_feature_layers - config.vision_config.num_hidden_layers - 1
    return tower | {name: getattr(config, name) for name in SETTINGS} | {"layer_idx": layer_idx}


def model_entries(model: Source, shapes) -> dict[str, Entry]:
    """The weights of a phi3-embed model, or of a head on one, by our names."""
    entries, problems = read_entries(model), defaultdict(list)
    if any(name.startswith("model.vision_embed_tokens.") for name in entries):  # a head's
        entries = {name.removeprefix("model."): entry for name, entry in entries.items()}
    left_out = [name for name in entries if not name.startswith("vision_embed_tokens.")]
    problems["missing"] = [name for name in shapes if name not in entries]
    problems["extra"] = [name for name in entries if name not in shapes and name not in left_out]
    for name in shapes.keys() & entries.keys():
        check_entry(entries[name], shapes[name], problems)
    raise_problems(model.name, problems)
    if left_out:
        print(f"Not part of the layout, so left out: {', '.join(sorted(left_out))}")
    return {name: entries[name] for name in shapes}


def same_weights(source: Source, entries, name) -> list[Entry]:
    """Where a weight of ours goes: the word embeddings under both of their names, unless these differ."""
    first, *others = [entries[each] for each in published_names(name) if each in entries]
    if not others:
        return [first]
    value = load_tensor(source.folder, first)
    return [first, *(other for other in others if torch.equal(load_tensor(source.folder, other), value))]


def copy_files(folder: Path, output: Path):
    """Everything but pickles: those would still hold the old weights."""
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in sorted(names)]
    paths = [path for path in paths if ".cache" not in path.relative_to(folder).parts]
    unlike = {path: reason for path in paths if (reason := unlike_a_file(path, folder))}
    pickles = [path for path in paths if matches(path, PICKLES)]
    paths = [path for path in paths if path not in pickles and path not in unlike]
    for path, reason in unlike.items():
        print(f"Left out: {path.relative_to(folder)} is {reason}.")
    if pickles:
        print(f"Left out, as they hold the old weights: {', '.join(path.name for path in pickles)}")
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Copying") as bar:
        for path in paths:
            target = output / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as read, open(target, "wb") as write:
                while chunk := read.read(CHUNK):
                    write.write(chunk)
                    bar.update(len(chunk))


def check_target(name: str, private: bool) -> str:
    """The full name of the repository to push to, or why that cannot be, before the work."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"`--push-to-hub {name}` names no repository, such as owner/model: {error}") from error
    try:
        user = HfApi().whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ConversionError(f"Pushing to {name} needs a valid token: log in by `hf auth login`.") from error
    name = name if "/" in name else f"{user}/{name}"
    with hub_errors(name):
        if private and HfApi().repo_exists(name) and not HfApi().model_info(name).private:
            raise ConversionError(f"{name} exists and is public. Make it private in its settings, or give another.")
    return name


def push(output: Path, name: str, private: bool) -> None:
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
    except ConversionError as error:
        command = shlex.join(["hf", "upload", name, str(output), ".", "--delete", "*.safetensors*"])
        raise ConversionError(f"{error} {output} is complete; push it by `{command}`.") from error
    print(f"Pushed to {commit.commit_url}")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description="Microsoft's Phi-3-vision checkpoints, and fine-tunes of them, as phi3-embed; and back.",
        epilog="Interrupted, the same command goes on where it stopped.",
    )
    parser.add_argument("source", help="a Hub id, or a folder; may be a LoRA adapter")
    parser.add_argument("output", type=Path, help="a folder to make")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as in SOURCE")
    parser.add_argument("--revision", help="a branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--base", help="the base of an adapter, in place of the one that it names")
    parser.add_argument("--push-to-hub", metavar="NAME", help="push the result to this repository")
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is new")
    parser.add_argument(
        "--put-back",
        metavar="MODEL",
        help="the reverse: make of OUTPUT a copy of SOURCE with the weights of this phi3-embed folder or Hub id in it",
    )
    parsed = parser.parse_args(arguments)
    if parsed.put_back and (parsed.dtype or parsed.base or parsed.push_to_hub):
        parser.error("--put-back goes with neither --dtype nor --base nor --push-to-hub")
    if parsed.private and not parsed.push_to_hub:
        parser.error("--private goes with --push-to-hub")
    return parsed


def run(arguments):
    parsed = parse_arguments(arguments)
    if parsed.put_back:
        put_back(parsed.put_back, parsed.source, parsed.output, parsed.revision)
        return
    target = check_target(parsed.push_to_hub, parsed.private) if parsed.push_to_hub else None
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    command = ["python", Path(__file__).name, without_path(parsed.source), parsed.output.name]
    for option, value in (("--dtype", parsed.dtype), ("--revision", parsed.revision), ("--base", parsed.base)):
        command += [option, without_path(value)] if value else []
    convert(parsed.source, parsed.output, dtype, parsed.revision, parsed.base, target, shlex.join(command))
    if target:
        push(parsed.output, target, parsed.private)


def main():
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # tells that weights are on disk
    try:
        run(sys.argv[1:])
    except ConversionError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if is_disk_full(error):
            sys.exit(f"error: {first_line(error)}. Free some space: the same command goes on from here.")
        if isinstance(error, (OSError, httpx2.TransportError)):
            sys.exit(f"error: {error}")
        raise
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")


if __name__ == "__main__":
    main()
