"""What a command leaves: files that are there once they are whole, thumbnails, cards, one commit on the Hub, words."""

import errno
import io
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image
from rich.console import Console

MAX_NAMED = 10
THUMBNAIL = 224
TEMPLATES = Path(__file__).parent / "templates"
# C libraries, tokenizers and LanceDB raise plain exceptions with these words.
DISK_IS_FULL = re.compile("No space left|os error 28|File too large|[Qq]uota|unexpected pos|file write failed")
# A clone without Git LFS has files that begin so in place of large ones.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Names of files are no markup.
console = Console(soft_wrap=True, markup=False, emoji=False)


# Files


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """
    Writes a file under another name beside `path`, and renames it: a kill leaves the old file or the new one whole.

    `write` gets the other name, which keeps the suffix. Several processes may write at once: the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, by [`write_beside`]."""
    write_beside(path, lambda beside: beside.write_text(text, "utf-8"))


def check_no_pointer(path: Path) -> None:
    """Raises ValueError if a file is a Git LFS pointer."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer in place of the weights. Run `git lfs pull` in its folder.")


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends without an error. `folder` must not exist."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already. Give a folder that does not, or remove it.")
    check_writable(folder.parent)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        whole = beside / folder.name
        whole.mkdir()
        yield whole
        whole.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Makes `folder`. Raises ValueError unless files can be written in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error}. Give another folder.") from error


def check_png(path: Path) -> Path:
    """Makes the folder of a PNG file that is to be written. Raises ValueError unless the name is one."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".png":
        raise ValueError(f"{path} is no name for a PNG file. Give one that ends in .png, and is no folder.")
    check_writable(path.absolute().parent)
    return path


def without_path(source: str | Path) -> str:
    """A folder's or file's own name, because what is published does not tell where it lay; a Hub id as it is."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


# Images


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> bytes:
    """An image as a JPEG of at most `side` pixels."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=90)
    return file.getvalue()


def draw_rows(figure, rows: list[list[tuple]]) -> None:
    """Draws rows of `(image, title, its colour)` into a matplotlib figure; the first row is as long as any."""
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, row_axes in zip(rows, axes):
        for axis, (image, title, colour) in zip(row_axes, row):
            axis.imshow(image, cmap="gray_r" if getattr(image, "mode", "L") == "L" else None)
            axis.set_title(title, fontsize=8, color=colour)


def new_figure(**kwargs):
    """A matplotlib figure that needs no display and belongs to no session, so that nothing has to close it."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names of files and classes are no formulas
    return Figure(layout="constrained", **kwargs)


def save_figure(figure, path: Path) -> None:
    """A matplotlib figure as a file of the suffix's format, by [`write_beside`]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # one for each character that the font lacks
        write_beside(path, lambda beside: figure.savefig(beside, dpi=110))


# Words


def name_some(lines: list[str]) -> str:
    """The first ten of many lines, and "..." for the others."""
    return "\n".join(lines[:MAX_NAMED] + ["..."] * (len(lines) > MAX_NAMED))


def say_left_out(lines: list[str], total: int, what: str = "images") -> None:
    """Prints how many of `total` were left out, and the first of them; `lines` are names with reasons."""
    if lines:
        console.print(
            f"Left out {len(lines)} of {total} {what}:\n{name_some(lines)}",
            style="yellow",
            highlight=False,
        )


def one_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop, or its kind where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a disk or quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or DISK_IS_FULL.search(
            str(error)
        ):
            return True
        error = error.__cause__
    return False


# The Hub


def write_card(path: Path, template: str, data: ModelCardData, **fields) -> None:
    """A model card from the Jinja template of that name in `templates/`, by [`write_beside`]."""
    card = ModelCard.from_template(data, template_path=str(TEMPLATES / template), **fields)
    write_text(path, str(card).rstrip() + "\n")


def push_target(name: str, token: str | None = None) -> str:
    """The full name of a repository to push to. Raises ValueError without a valid token, so before the work."""
    try:
        user = HfApi(token=token).whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"To push to {name} takes a valid token: log in by `hf auth login`.") from error
    return name if "/" in name else f"{user}/{name}"


def push(
    folder: Path,
    name: str,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    ignore=(),
    again: str = "run the same command again",
) -> str:
    """
    Pushes a folder in one commit, which also deletes weights that an older push left -> the commit's address.

    Raises:
        ValueError: the push failed; `again` says how to push what is there.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=["*.part*", "__pycache__/**", *ignore],
            delete_patterns=["*.safetensors*"],
            commit_message=message,
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"Pushing to {name} failed: {one_line(error)}. {folder} is complete; {again}.") from error
    return commit.commit_url
