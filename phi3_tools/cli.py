"""
The command line: `phi3-embed COMMAND`, or `python -m phi3_tools COMMAND`.

All options stand here, one spelling for each. The commands are plain functions in modules of their own, which are
imported when they run, so that help is quick and a command asks for no other command's packages.
"""

import errno
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

DISTRIBUTIONS = {"sklearn": "scikit-learn", "faiss": "faiss-cpu", "PIL": "pillow", "dotenv": "python-dotenv"}
# The extra of pyproject.toml that a command needs, where it has another name.
EXTRAS = {"export": "onnx"}
INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
GOES_ON = "What is done is kept: the same command goes on from there."
BEGIN_ANEW = ("assemble", "demo", "export", "serve")

app = typer.Typer(
    name="phi3-embed",
    help="Phi-3-vision's image embedding: convert, fine-tune, compare, search, embed, serve, export, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
search = typer.Typer(
    no_args_is_help=True, help="Keep an index of images on disk, and search it.", rich_markup_mode=None
)
app.add_typer(search, name="search")

FILES = "a folder of images, one image, parquet, a tar file"
SOURCE = f"{FILES}, a Hub dataset NAME[@REVISION], digits or small-text"
MODEL = "a folder or Hub id: NAME[@REVISION][:mean|global|tower]"
SMALL = "Without it the repository's small checkpoint, which knows digits alone."

SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE)]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help=f"{MODEL}. {SMALL}")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Index = Annotated[Path, typer.Argument(metavar="INDEX", help="the folder of the index")]
NumCrops = Annotated[
    int | None,
    typer.Option("--num-crops", min=0, help="the most crops of an image; without it the model's own"),
]
ImageColumn = Annotated[str | None, typer.Option("--image-column", help="without it the only column of images")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="without it `label`")]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="without it `text` or `caption`")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="images in a batch")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16")]
Device = Annotated[str | None, typer.Option("--device", help="without it the machine's accelerator, else its CPU")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(epilog="Interrupted, the same command goes on where it stopped.")
def convert(
    source: Annotated[str, typer.Argument(help="a folder or Hub id; also of a LoRA or DoRA adapter")],
    output: Annotated[Path, typer.Argument(help="the folder to write; must not exist")],
    dtype: Annotated[str | None, typer.Option(help="of the weights; without it SOURCE's own")] = None,
    revision: Annotated[str | None, typer.Option(help="a branch, tag or commit of SOURCE on the Hub")] = None,
    base: Annotated[str | None, typer.Option(help="of an adapter, in place of the base that it names")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="NAME", help="push OUTPUT to this repository")] = None,
    private: Annotated[bool, typer.Option("--private", help="make that repository private, if it is new")] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="with the language model; else the image embedding alone")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="how the whole embeds: vlm2vec, unime, dse, vdocretriever, mean, or a JSON file of your own"
        ),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read a .bin file, as data alone, where there are no safetensors")
    ] = False,
    put_back: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the reverse: OUTPUT is SOURCE with the weights of this phi3-embed model"),
    ] = None,
):
    """Bring Microsoft's Phi-3-vision checkpoints, and fine-tunes of them, into phi3-embed; and back."""
    from phi3_tools.checkpoint.command import run

    run(source, output, dtype, revision, base, push_to_hub, private, put_back, whole, recipe, allow_pickle)


@app.command(context_settings=PASS_ON, add_help_option=False)
def finetune(context: typer.Context):
    """Train a classifier, or the embedding itself, on your images (its options are transformers' arguments)."""
    from phi3_tools.finetune.command import main

    main(context.args)


@app.command()
def assemble(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="the folder to write; must not exist")],
    tower: Annotated[
        str | None, typer.Option(metavar="TOWER", help="a folder or Hub id of a plain vision transformer")
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            metavar="LM", help="a folder or Hub id of a Phi-3 text model or one of Llama's form, or a GGUF file"
        ),
    ] = None,
    aligned: Annotated[
        Path | None,
        typer.Option(help="a folder with a trained projection between the two, as finetune --task align leaves it"),
    ] = None,
    crop_size: Annotated[
        int | None, typer.Option(min=1, help="pixels a side; without it the tower's own, or the nearest that fits")
    ] = None,
    layer_idx: Annotated[
        int | None, typer.Option(help="the hidden state of the tower that is projected [default: -2]")
    ] = None,
    num_crops: Annotated[int | None, typer.Option(min=0, help="the most crops of an image [default: 16]")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="how it embeds texts and images: a name or a JSON file, as for convert")
    ] = None,
):
    """Put a plain vision transformer before a language model of Phi-3's or Llama's form, with a projection between."""
    if aligned is None and None in (tower, language_model):
        raise ValueError(
            "Give --tower and --language-model, or a trained projection between known packages: --aligned."
        )
    from phi3_tools.checkpoint.assemble import run

    parts = {"tower": tower, "language_model": language_model, "crop_size": crop_size, "layer_idx": layer_idx}
    run(output, aligned, recipe, **parts, num_crops=num_crops)


@app.command()
def compare(
    source: SourceArgument,
    model: Annotated[list[str], typer.Option("--model", metavar="MODEL", help=f"{MODEL}, or pixels; several times")],
    output: Annotated[Path, typer.Option(help="the folder to write")] = Path("report"),
    split: Annotated[
        str | None, typer.Option(help="of the data; without it test if there is one, else the first")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    text_column: TextColumn = None,
    question: Annotated[
        str | None, typer.Option(help="asked about the images; their captions or classes are the answers")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="a random sample of so many images")] = None,
    probe: Annotated[int, typer.Option(min=1, help="images that are changed, for robustness and detail")] = 100,
    num_crops: NumCrops = None,
    resamples: Annotated[int, typer.Option(min=100, help="of the bootstrap")] = 1000,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    cache: Annotated[
        Path | None, typer.Option(help="the folder that keeps the vectors; without it in the user's cache")
    ] = None,
):
    """Measure the embeddings of several models on your images, and write a report."""
    from phi3_tools.compare.command import run

    columns = {"image_column": image_column, "label_column": label_column, "text_column": text_column}
    settings = {"question": question, "limit": limit, "probe": probe, "num_crops": num_crops, "resamples": resamples}
    run(model, source, output, split, **columns, **settings, batch_size=batch_size, seed=seed, cache=cache)


@search.command()
def index(
    source: SourceArgument,
    index: Index,
    model: ModelOption = None,
    num_crops: NumCrops = None,
    image_column: ImageColumn = None,
    dtype: Dtype = "float32",
    device: Device = None,
):
    """Make an index, or bring one in line with its source: what is new is embedded, what is gone is removed."""
    from phi3_tools.search import make_index

    make_index(source, index, model, num_crops, image_column, dtype, device)


@search.command()
def add(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=SOURCE)],
    index: Index,
    image_column: ImageColumn = None,
    device: Device = None,
):
    """Add images to an index."""
    from phi3_tools.search import add_images

    add_images(sources, index, image_column, device)


@search.command()
def remove(
    paths: Annotated[list[str], typer.Argument(metavar="IMAGE_OR_FOLDER...")],
    index: Index,
):
    """Remove images from an index; their files stay."""
    from phi3_tools.search import remove_images

    remove_images(paths, index)


@search.command()
def query(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="the file of an image, or words")],
    index: Index,
    text: Annotated[str | None, typer.Option(help="words beside an image")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="how many to find")] = 5,
    exclude_self: Annotated[bool, typer.Option(help="leave out the query itself where the index holds it")] = True,
    output: Annotated[Path, typer.Option(help="the PNG file to draw")] = Path("neighbours.png"),
    device: Device = None,
):
    """Print and draw the images of an index that are nearest to another, to words, or to both."""
    from phi3_tools.search import query_index

    query_index(query, index, text, count, exclude_self, output, device)


@app.command()
def embed(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=FILES)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="the folder to write, or to go on with")],
    model: ModelOption = None,
    num_crops: NumCrops = None,
    image_column: ImageColumn = None,
    text_column: Annotated[str | None, typer.Option(help="embed texts, or texts with their images")] = None,
    template: Annotated[str, typer.Option(help="what is said around a text")] = "{text}",
    shard_size: Annotated[int, typer.Option(min=1, help="images in a shard, which is one batch")] = 64,
    copies: Annotated[
        int | None, typer.Option(help="of the model; without it one a GPU, or for a quarter of the CPUs")
    ] = None,
    dtype: Dtype = "float32",
):
    """Embed millions of images, or texts, into parquet files, by Ray Data."""
    from phi3_tools.embed import run

    run(source, output, model, num_crops, image_column, text_column, template, shard_size, copies, dtype)


@app.command()
def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    num_crops: NumCrops = None,
    dtype: Dtype = "float32",
    device: Device = None,
    max_inputs: Annotated[int, typer.Option(min=1, help="most texts and images of a request")] = 64,
    max_bytes: Annotated[int, typer.Option(min=1, help="most bytes of a request's body")] = 32 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="most pixels of a request's images together")] = 100_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer in a chat")] = 1024,
):
    """Serve embeddings and chats over HTTP, in OpenAI's format."""
    from phi3_tools.serve import Limits, run

    run(model, host, port, num_crops, dtype, device, Limits(max_inputs, max_bytes, max_pixels, max_tokens))


@app.command()
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="the folder to write; must not exist")],
):
    """Write a checkpoint as ONNX, with its preprocessing beside it."""
    from phi3_tools.export import run

    run(model, output)


@app.command()
def evaluate(
    model: ModelArgument,
    benchmark: Annotated[
        str, typer.Option(help="of mteb: MIEB(Img), MIEB(lite), MIEB(eng), ViDoRe(v2), ...")
    ] = "MIEB(Img)",
    num_crops: NumCrops = None,
    batch_size: BatchSize = 16,
    output: Annotated[Path, typer.Option(help="the folder of the finished tasks' scores")] = Path("results"),
    device: Device = None,
):
    """Run a benchmark of mteb, and print the leaderboard's row."""
    from phi3_tools.evaluate import run

    run(model, benchmark, num_crops, batch_size, output, device)


@app.command()
def demo(
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help=SOURCE)] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option(help="the PNG file to draw")] = Path("demo/neighbours.png"),
):
    """Embed and search images, and draw a picture of it; without a SOURCE, handwritten digits."""
    from phi3_tools.demo import run

    run(source, model, output)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What a user can mend is a line on stderr, and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in arguments if not word.startswith("-")), "")
    name = f"phi3-embed {command}".strip()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _check_not_empty(arguments)
        app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(f"\n{name}: interrupted.", *(() if command in BEGIN_ANEW else (GOES_ON,)), file=sys.stderr)
        if end.code:
            raise
    except Exception as error:
        if (line := error_line(error, command)) is None:
            raise
        sys.exit(f"{name}: {line}")


def _check_not_empty(arguments):
    """A shell variable that is not set would name the folder that the command runs in."""
    for before, word in zip(["", *arguments], arguments):
        if not word.strip() or re.fullmatch(r"--[\w-]+=\s*", word):
            name = f"The argument after {before}" if before.startswith("--") else "An argument"
            name = word.partition("=")[0] if word.strip() else name
            raise ValueError(f"{name} is empty. Give what it is for, or leave it out.")


def error_line(error: BaseException, command: str) -> str | None:
    """What went wrong and how to mend it, for an error that a user can mend; otherwise `None`."""
    package = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if package.startswith("phi3_"):
        return None
    if isinstance(error, ModuleNotFoundError) and package:
        package = DISTRIBUTIONS.get(package) or package.replace("_", "-")
        extra = EXTRAS.get(command, command)
        return f'the package {package} is missing. Install what this command needs: pip install "phi3-embed[{extra}]"'
    from phi3_tools.results import is_disk_full, one_line

    if is_disk_full(error):
        return f"The disk is full: {one_line(error)}. Free some space. {GOES_ON}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "CPUAllocator" in str(error):
        return "A batch does not fit in memory. Give a smaller --batch-size, fewer --num-crops, or --dtype bfloat16."
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error}. Change its permissions, or, of a cache, name another by HF_HOME and XDG_CACHE_HOME."
    is_mended_by_user = (
        isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ == "SafetensorError"
    )
    return str(error) if is_mended_by_user else None
