"""
Where a checkpoint lies, a folder or a repository on the Hub at a commit, and reading what is data of it.

Only the wanted bytes of a repository are fetched, by HTTP ranges, and an interrupted download goes on. What a source
says is not believed where its sizes contradict it.
"""

import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import numpy as np
import torch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from tqdm import tqdm

from phi3_tools.checkpoint.layout import DTYPE_NAMES, DTYPES, INDEX, PICKLE, PICKLE_INDEX, SMALL_FILES, TEXTS, WEIGHTS
from phi3_tools.results import LFS_POINTER, is_disk_full, one_line

MAX_TEXT_SIZE = 2**24  # bytes of a JSON file or a text; Phi-3's tokenizer.json has 1.9 million
MAX_HEADER_SIZE = 2**24  # of a safetensors file; Phi-3-vision's have 70 thousand
MAX_RANK = 8  # dimensions of a tensor
FOLDER = "a folder"
MAX_RETRIES = 5
TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file, whose bytes are [start, stop), or out of a pickle, which is that `tensor`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0
    tensor: torch.Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Source:
    """A repository on the Hub at a commit, or a folder, whose `commit` is None."""

    name: str
    folder: Path  # holds the small files
    files: frozenset[str]
    commit: str | None = None

    def url(self, file: str) -> str:
        return hf_hub_url(self.name, file, revision=self.commit)

    def size(self, file: str) -> int:
        if self.commit is None:
            return (self.folder / file).stat().st_size
        size = retried(lambda: get_hf_file_metadata(self.url(file), retry_on_errors=True)).size
        if size is None:
            raise ValueError(f"The server does not say how large {self.url(file)} is.")
        return size

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes [start, stop) of a file as they come."""
        if self.commit is not None:
            yield from read_url(self.url(file), start, stop)
            return
        with open(self.folder / file, "rb") as opened:
            opened.seek(start)
            yield opened.read(stop - start)

    def text(self, file: str, errors: str = "strict") -> str:
        """One of the small files. Raises ValueError where it is none, too large, or a Git LFS pointer."""
        if file not in self.files:
            raise ValueError(f"{self.name} has no {file}. Give all files of the checkpoint.")
        with open(self.folder / file, "rb") as opened:
            content = opened.read(MAX_TEXT_SIZE + 1)
        self.check_text(file, content, len(content))
        try:
            return content.decode("utf-8-sig", errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}: {file} is no text in UTF-8: {error}. Fetch it again.") from error

    def check_text(self, file: str, begins: bytes, size: int) -> None:
        if size > MAX_TEXT_SIZE:
            raise ValueError(f"{self.name}: {file} is larger than {MAX_TEXT_SIZE} bytes, too large for what it is.")
        if begins.startswith(LFS_POINTER):
            raise ValueError(
                f"{self.name}: {file} is a Git LFS pointer, not the file itself. Fetch it by `git lfs pull` there."
            )

    def json(self, file: str) -> dict:
        text = self.text(file)
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name}: {file} is no JSON: {error}. Fetch it again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.name}: {file} must hold a JSON object, but holds {str(content)[:40]!r}.")
        return content

    def weight_files(self, begins: tuple[str, ...] = ("",), allow_pickle: bool = False) -> list[str]:
        """The files that hold the weights whose names begin so: safetensors, or pickles where these are allowed."""
        pickled = bool({PICKLE, PICKLE_INDEX} & self.files)
        if WEIGHTS in self.files:  # as transformers chooses where an index is there too
            return [WEIGHTS]
        if INDEX not in self.files and not (pickled and allow_pickle):
            if pickled or any(file.endswith((".bin", ".pt", ".pth")) for file in self.files):
                raise ValueError(
                    f"{self.name} has its weights as pickles (.bin) only. If you trust where they come from, give "
                    "`--allow-pickle`: they are read as data alone (`torch.load(weights_only=True)`), all of the file."
                )
            raise ValueError(f"{self.name} has neither {WEIGHTS} nor {INDEX}. Give all files of the checkpoint.")
        index = INDEX if INDEX in self.files else PICKLE_INDEX
        if index not in self.files:
            return [PICKLE]
        weight_map = self.json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{self.name}: {index} has no `weight_map` from weights to files. Fetch it again.")
        files = sorted({file for name, file in weight_map.items() if name.startswith(begins)})
        for file in files:
            if file not in self.files:
                raise ValueError(f"{self.name} has no {file}, which its {index} names. Fetch it too.")
        return files

    def tensor(self, entry: Entry) -> torch.Tensor:
        """A tensor of a folder's."""
        if entry.tensor is not None:
            return entry.tensor
        data = np.fromfile(self.folder / entry.file, np.uint8, entry.stop - entry.start, offset=entry.start)
        return torch.from_numpy(data).view(DTYPES[entry.dtype]).reshape(entry.shape)


def _refuse_constant(name):
    raise ValueError(f"{name} is no number in JSON")


# Opening


def open_source(name: str, revision: str | None, folder: Path, is_on_hub: bool = False) -> Source:
    """A folder as it is, or a repository on the Hub, whose small files are fetched to `folder`."""
    if not is_on_hub and Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"A revision is of a repository on the Hub, but {name} is a folder.")
        return Source(name, Path(name), files_of(Path(name)))
    if not is_on_hub and Path(name).exists():
        raise ValueError(f"{name} is a file. Give the folder that it is in, or a Hub id.")
    with hub_errors(name):
        info = retried(lambda: HfApi().model_info(name, revision=revision), name)
        _remember_commit(name, info.sha, folder)
        # Names that could lie elsewhere than in the folder are no files of a checkpoint.
        files = {sibling.rfilename for sibling in info.siblings if re.fullmatch(r"[\w-][\w.-]*", sibling.rfilename)}
        source = Source(name, folder, frozenset(files), info.sha)
        for file in sorted(files):
            if matches(file, SMALL_FILES):
                _fetch_small_file(source, file)
    return source


def matches(file: str | Path, patterns: Iterable[str]) -> bool:
    return any(Path(file).match(pattern) for pattern in patterns)


def _fetch_small_file(source, file):
    path, size = source.folder / file, source.size(file)
    if not file.endswith(".safetensors"):
        source.check_text(file, b"", size)
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
            if matches(path.name, TEXTS):
                print(f"Left out: {path.name} of {folder} is {unlike}.")
            elif matches(path.name, (*SMALL_FILES, "*.safetensors")):
                raise ValueError(f"{folder}: {path.name} is {unlike}. Put the file itself there.")
        else:
            files.add(path.name)
    return frozenset(files)


def unlike_a_file(path: Path, folder: Path) -> str | None:
    """What a path is other than a file that lies in the folder; the Hub client's cache links to its own blobs."""
    folder = folder.resolve()
    own = (folder, folder.parent.parent / "blobs") if folder.parent.name == "snapshots" else (folder,)
    is_own = any(path.resolve().is_relative_to(place) for place in own)
    if path.is_symlink() and (path.is_dir() or not is_own):
        return "a symbolic link to a folder, or to what lies elsewhere"
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a symbolic link to nothing"
    if stat.S_ISREG(mode):
        return None
    return FOLDER if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def _remember_commit(name, commit, folder):
    """Records of which repository and commit a download is; raises if one of another has been begun."""
    if not re.fullmatch(r"[0-9a-f]{40}", str(commit)):
        raise ValueError(f"The Hub gives {commit!r} as the commit of {name}.")
    path, asked = folder / "source.json", {"name": name, "commit": commit}
    try:
        begun = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # none, or killed while it was written, which was before any download
        begun = None
    if begun == asked:
        return
    if begun and any((folder / file).exists() for file in (WEIGHTS, PICKLE)):
        raise ValueError(
            f"{folder} has part of {begun['name']} at {begun['commit']}, but {name} is now at {commit}. To finish the "
            f"first, give it and `--revision {begun['commit']}`; to begin anew, delete {folder.parent}."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path.write_text(json.dumps(asked))


# The weights' files


def read_entries(source: Source, begins: tuple[str, ...] = ("",), allow_pickle: bool = False) -> dict[str, Entry]:
    """The tensors whose names begin so. Pickles, which are read at once, must lie in a folder."""
    entries = {}
    for file in source.weight_files(begins, allow_pickle):
        read = read_header if file.endswith(".safetensors") else read_pickle
        entries |= {name: entry for name, entry in read(source, file).items() if name.startswith(begins)}
    return entries


def read_pickle(source: Source, file: str) -> dict[str, Entry]:
    """The tensors of a pickled state dict, mapped from the file. Nothing but tensors is unpickled."""
    entries = {}
    with library_errors(f"{source.name}: {file} is no state dict that can be read as data alone"):
        source.check_text(file, next(source.read(file, 0, len(LFS_POINTER))), 0)
        loaded = torch.load(source.folder / file, map_location="cpu", weights_only=True, mmap=True)
        for name, tensor in loaded.items():
            dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
            entries[name] = Entry(name, file, dtype, tuple(tensor.shape), tensor=tensor)
    return entries


def read_header(source: Source, file: str) -> dict[str, Entry]:
    """The tensors of a safetensors file by its header, held to what the library holds a whole file to."""
    size, entries, end = source.size(file), {}, 0
    begins = b"".join(source.read(file, 0, min(8, size)))
    if begins == LFS_POINTER[:8]:
        source.check_text(file, b"".join(source.read(file, 0, min(len(LFS_POINTER), size))), 0)
    length = int.from_bytes(begins, "little")
    with library_errors(f"{source.name}: {file} is no safetensors file"):
        if not 2 <= length <= min(size - 8, MAX_HEADER_SIZE):
            raise ValueError("it would begin with the length of its header. Fetch it again.")
        header = json.loads(b"".join(source.read(file, 8, 8 + length)))
        header.pop("__metadata__", None)
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), dtype, shape = about["data_offsets"], str(about["dtype"]), tuple(about["shape"])
            is_right = all(type(number) is int and number >= 0 for number in (start, stop, *shape))
            is_right = is_right and start == end <= stop and len(shape) <= MAX_RANK
            if is_right and dtype in DTYPES:
                is_right = math.prod(shape) * DTYPES[dtype].itemsize == stop - start
            if not is_right:
                said = f"{name} has the dtype {dtype}, the shape {shape} and the offsets {start}, {stop}"
                raise ValueError(said[:500])
            entries[name], end = Entry(name, file, dtype, shape, 8 + length + start, 8 + length + stop), stop
    if 8 + length + end > size:
        raise ValueError(f"{source.name}: {file} is cut short: {size} of {8 + length + end} bytes. Fetch it again.")
    return entries


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """What a safetensors file of these tensors, name -> (dtype, shape), begins with; their bytes follow in order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        start, offset = offset, offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, offset)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fetch(source: Source, selected: dict[str, Entry], whole_size: int) -> Source:
    """The selected weights of a repository on the Hub -> `source.folder`, as a checkpoint of Microsoft's layout."""
    header = safetensors_header({entry.name: (entry.dtype, entry.shape) for entry in selected.values()})
    total = sum(entry.stop - entry.start for entry in selected.values())
    print(f"Fetching {total / 1e9:.3f} GB of {whole_size / 1e9:.3f} GB from {source.name} at {source.commit}")
    _fetch_ranges(source, WEIGHTS, header, joined(selected.values()))
    return replace(source, commit=None, files=files_of(source.folder))


def fetch_files(source: Source, files: list[str]) -> Source:
    """Whole files of a repository on the Hub -> `source.folder`."""
    for file in files:
        size = source.size(file)
        print(f"Fetching {file}, {size / 1e9:.3f} GB, from {source.name} at {source.commit}")
        _fetch_ranges(source, file, b"", [(file, 0, size)])
    return replace(source, commit=None)


def _fetch_ranges(source, target, header, ranges):
    """Appends ranges of files behind a header to a file in the source's folder, whose length says where to go on."""
    path = source.folder / target
    path.touch()
    with open(path, "r+b") as file:
        if file.read(len(header)) != header:
            file.seek(0)
            file.truncate()
            file.write(header)
        have, total = file.seek(0, os.SEEK_END) - len(header), sum(stop - start for _, start, stop in ranges)
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="Fetching") as bar:
            for name, start, stop in ranges:
                skipped = min(have, stop - start)
                have -= skipped
                for chunk in source.read(name, start + skipped, stop):
                    file.write(chunk)
                    bar.update(len(chunk))


def joined(entries: Iterable[Entry]) -> list[tuple[str, int, int]]:
    """Entries in the order of their bytes -> file, start and stop of each unbroken run."""
    runs = []
    for entry in entries:
        if runs and runs[-1][0] == entry.file and runs[-1][2] == entry.start:
            runs[-1] = (entry.file, runs[-1][1], entry.stop)
        else:
            runs.append((entry.file, entry.start, entry.stop))
    return runs


# The network


def read_url(url: str, start: int, stop: int) -> Iterator[bytes]:
    """
    Yields the bytes [start, stop) of a file on the Hub as they come, exactly these: bytes too many would move all that
    come after. (The Hub client's own file system does not compare an answer with what was asked.) Answers of 429 and
    5xx are tried again, and where a body is cut, reading goes on at the byte after the last.

    A redirect to another origin, as large files have, is followed without the token: the client leaves it out.
    """
    failures = 0
    while start < stop:
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        error: Exception = ValueError("the answer ended early")
        try:
            # Errors of reading the body are handled below: the client's retry would enter this generator again.
            with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT, retry_on_exceptions=()) as response:
                hf_raise_for_status(response)
                _check_answer(response, start, stop)
                for chunk in response.iter_raw():
                    if len(chunk) > stop - start:
                        raise ValueError(f"The server sends more bytes of {url} than were asked for.")
                    if chunk:
                        start, failures = start + len(chunk), 0
                        yield chunk
        except httpx2.TransportError as raised:
            error = raised
        if start < stop:
            failures += 1
            _wait_or_raise(failures, error)


def _check_answer(response, start, stop):
    """Raises unless an answer says that it brings the bytes [start, stop) as they are."""
    content_range, length = (response.headers.get(name) for name in ("Content-Range", "Content-Length"))
    if response.status_code != 206:
        raise ValueError(f"The server of {response.url.host} does not serve parts of files (HTTP ranges).")
    is_asked = re.fullmatch(rf"bytes {start}-{stop - 1}/(\d+|\*)", content_range or "")
    if not is_asked or int(length or 0) > stop - start:
        raise ValueError(
            f"The server of {response.url.host} was asked for the bytes {start} to {stop - 1}, but answers with "
            f"{content_range}, {length} bytes long. A proxy may stand between; try from another network."
        )
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(f"The server of {response.url.host} sends files encoded, though asked not to.")


def retried(call: Callable, sought: str | None = None):
    """
    What a call of the client gives, which by itself gives up at a 5xx of some kinds of request. `sought`: what may be
    no Hub id but a folder's name with a slip in it.
    """
    failures = 0
    while True:
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError) as error:
            if is_offline_mode() or (isinstance(error, HfHubHTTPError) and error.response.status_code < 500):
                raise
            failures += 1
            _wait_or_raise(failures, error, f"There is no folder {sought}, and the" if sought else "The")


def _wait_or_raise(failures, error, begins="The"):
    if failures > MAX_RETRIES:
        raise ValueError(f"{begins} network fails ({one_line(error)}). The same command goes on from here.") from error
    seconds = min(2 ** (failures - 1), 8)
    tqdm.write(f"{one_line(error)}: trying again in {seconds} s", file=sys.stderr)
    time.sleep(seconds)


@contextmanager
def hub_errors(name: str):
    """Turns the Hub's refusals into a ValueError that says what to do about them."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"There is no folder {name}, and it is no Hub id, such as owner/model.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, GatedRepoError):
            said = f"{name} is gated: accept its terms on its page of the Hub, and log in by `hf auth login`."
        elif isinstance(error, RevisionNotFoundError):
            said = f"{name} has no such revision. Its page on the Hub lists them."
        elif isinstance(error, RepositoryNotFoundError) or status == 401:
            said = f"There is no folder {name}, and the Hub shows no such model. A private one needs `hf auth login`."
        else:
            hint = "Your token does not allow this." if status == 403 else "The same command goes on from here."
            said = f"{name}: the Hub answers {status} ({error.server_message}). {hint}"
        raise ValueError(said) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx2.TransportError) as error:
        no_folder = f"There is no folder {name}. " if isinstance(error, LocalEntryNotFoundError) else ""
        raise ValueError(f"{no_folder}The Hub cannot be reached for {name}: {one_line(error)}") from error


# Errors


@contextmanager
def library_errors(what: str):
    """Turns what a library raises over a file of the user's into a ValueError; some raise plain `Exception`."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) or is_disk_full(error):  # no fault of the file
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
