"""
Pictures and their neighbours under CLIP and under Phi-3, the HD crops and their tokens, and which patches match.

    make app                                              # the small checkpoint, no network
    MODEL=someone/phi3-embed python space/app.py          # a Hub id or folder, at REVISION if that is set

The CLIP of this page is the tower inside the checkpoint: the mean of its patches of the global view.
"""

import os
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import gradio as gr
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits, load_sample_images
from sklearn.decomposition import PCA
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

TINY = Path(__file__).resolve().parent.parent
DIGITS_A_CLASS, NUM_NEIGHBOURS = 4, 6
FIRST = 2  # a digit: what the small checkpoint knows
MAX_FILE_MB, MAX_MEGAPIXELS, MAX_UPLOADS = 20, 25, 30
CLIP, PHI3 = "CLIP's tower", "Phi-3"
GAP, SMALL = 8, 160
THUMBNAILS = TemporaryDirectory()
# Fonts of the machine: a page of the small checkpoint needs no network.
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


@dataclass(eq=False)
class Entry:
    """A picture of the collection; `vectors` keeps those computed of it, by the number of crops."""

    picture: Image.Image
    name: str
    vectors: dict = field(default_factory=dict)

    def __post_init__(self):
        # A file: gradio writes the same picture again and again to one place, even while that is being sent.
        self.thumbnail = Path(THUMBNAILS.name) / f"{uuid4()}.png"
        enlarged(self.picture).save(self.thumbnail)


def load(name, revision):
    """Model and image processor of a folder or Hub id."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"There is no folder {name}. Give one with a model, or a Hub id.")
    options = {"trust_remote_code": True} | ({"revision": revision, "code_revision": revision} if revision else {})
    image_processor = AutoImageProcessor.from_pretrained(name, **options)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = AutoModel.from_pretrained(name, device_map=device, **options).eval()
    if not model.config.use_hd_transform:
        raise ValueError(f"{name} works without the HD transform, which this page shows.")
    return model, image_processor


def read_picture(path):
    """
    A file -> PIL image in RGB, upright as its EXIF says.

    Raises:
        ValueError: it cannot be read, or has more than `MAX_MEGAPIXELS`.
    """
    name = Path(path).name
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_MEGAPIXELS * 1e6:
                raise ValueError(f"it has {image.width} x {image.height} pixels. Scale it down first")
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture, or of an unknown format.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error


def to_rgb(picture):
    """
    A PIL image -> the same in RGB. Greys of 16 bits are scaled, which `convert` would cut off at 255.

    Raises:
        ValueError: its numbers (mode I or F) do not span 0..255, and what they span is not known.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    elif picture.mode in ("I", "F"):
        low, high = picture.getextrema()
        if not (low >= 0 and high <= 255) or (picture.mode == "F" and 0 < high <= 1):
            raise ValueError(
                f"its values (mode {picture.mode}) go from {low} to {high}, but must be in 0..255. Scale it first"
            )
    return picture.convert("RGB")


def first_pictures():
    """Two photographs, and some digits of each class, all of which scikit-learn ships."""
    digits, labels = load_digits(return_X_y=True)
    digits = (digits.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    numbers = [number for label in range(10) for number in np.flatnonzero(labels == label)[:DIGITS_A_CLASS]]
    photographs = zip(("temple", "flower"), load_sample_images().images)
    return [
        *(Entry(Image.fromarray(pixels), name) for name, pixels in photographs),
        *(Entry(Image.fromarray(digits[number]).convert("RGB"), str(labels[number])) for number in numbers),
    ]


@lru_cache(maxsize=8)
@torch.inference_mode()
def look(item, num_crops):
    """
    What the model makes of a picture in at most `num_crops` crops (1 at least).

    Returns:
        A dict. `grid`: rows and columns of crops. `crops` and `overview`: the picture as the model sees it, its crops
        joined `(height, width, 3)`, and its global view, uint8. `box`: where in the crops it lies, as the rest is
        padding. `vectors` and `patches`: CLIP's, of the global view, and Phi-3's, of the crops, float32 `(C,)` and
        `(rows, columns, C)`. `overview_tokens`: Phi-3's of the global view. `num_tokens`: all of them.
    """
    inputs = image_processor(item.picture, num_crops=num_crops, return_tensors="pt").to(model.device)
    outputs = model.get_image_features(inputs.pixel_values, inputs.image_sizes)
    tokens = outputs.pooler_output[0].float().cpu().numpy()
    features = outputs.last_hidden_state[0, -(model.config.patches_per_side**2) :].float().cpu().numpy()

    rows, cols = (inputs.image_sizes[0] // model.config.crop_size).tolist()
    side, length = model.config.tokens_per_side, tokens_in_crops(rows, cols)
    crops, overview = tokens[:length], tokens[length + 1 :]
    if model.config.hd_transform_order == "glb_sub":
        crops, overview = tokens[-length:], tokens[: -length - 1]
    pixels = image_processor(item.picture, num_crops=num_crops, do_normalize=False, return_tensors="np").pixel_values
    pixels = (pixels.transpose(0, 2, 3, 1) * 255).round().clip(0, 255).astype(np.uint8)
    return {
        "grid": (rows, cols),
        "crops": np.block([[[pixels[1 + y * cols + x]] for x in range(cols)] for y in range(rows)]),
        "overview": pixels[0],
        "box": picture_box(item.picture, cols * model.config.crop_size, rows * model.config.crop_size),
        "vectors": {CLIP: unit(features.mean(0)), PHI3: unit(outputs.image_embeds[0].float().cpu().numpy())},
        "patches": {
            CLIP: unit(features.reshape(model.config.patches_per_side, model.config.patches_per_side, -1)),
            PHI3: unit(without_separators(crops, cols * side)),
        },
        "overview_tokens": unit(without_separators(overview, side)),
        "num_tokens": len(tokens),
    }


def tokens_in_crops(rows, cols):
    side = model.config.tokens_per_side
    return rows * side * (cols * side + 1)


def without_separators(tokens, width):
    """Lines of `width` tokens, each closed by a separator -> `(lines, width, hidden_size)`."""
    return tokens.reshape(-1, width + 1, tokens.shape[-1])[:, :-1]


def picture_box(picture, width, height):
    """Where a picture lies in a grid of crops of these pixels: left, upper, right, lower."""
    # In the image processor's order of float operations, which can be a pixel less than without rounding.
    if picture.width >= picture.height:
        inner_width, inner_height = width, max(int(width / (picture.width / picture.height)), 1)
    else:
        inner_width, inner_height = max(int(height / (picture.height / picture.width)), 1), height
    left, upper = (width - inner_width) // 2, (height - inner_height) // 2
    return left, upper, left + inner_width, upper + inner_height


def unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def vectors_of(item, num_crops):
    if num_crops not in item.vectors:
        item.vectors[num_crops] = look(item, num_crops)["vectors"]
    return item.vectors[num_crops]


# Pictures of what was computed


def enlarged(picture):
    """A small picture with larger pixels rather than blurred ones; a large one as a thumbnail."""
    factor = SMALL // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture = picture.copy()
    picture.thumbnail((4 * SMALL, 4 * SMALL))
    return picture


def sheet(crops, overview, grid):
    """Crops as they lie in the picture, gaps between them, and the global view below: arrays of any resolution."""
    (rows, cols), size = grid, model.config.crop_size
    step = size + GAP
    page = Image.new("RGBA", (cols * step - GAP, (rows + 1) * step + GAP))
    height, width = crops.shape[0] // rows, crops.shape[1] // cols
    views = [
        (crops[y * height : (y + 1) * height, x * width : (x + 1) * width], (x * step, y * step))
        for y in range(rows)
        for x in range(cols)
    ]
    for view, place in [*views, (overview, (0, rows * step + 2 * GAP))]:
        page.paste(Image.fromarray(view).resize((size, size), Image.Resampling.NEAREST), place)
    return page


def colours(*tokens):
    """Tokens `(rows, columns, hidden_size)` -> the same as colours, uint8: three principal components of them all."""
    flat = [each.reshape(-1, each.shape[-1]) for each in tokens]
    three = PCA(3, random_state=0).fit_transform(np.concatenate(flat))
    three = (three - three.min(0)) / np.maximum(np.ptp(three, axis=0), 1e-12) * 255
    parts = np.split(three.astype(np.uint8), np.cumsum([len(each) for each in flat])[:-1])
    return [part.reshape(*each.shape[:2], 3) for part, each in zip(parts, tokens)]


def heat(seen, cosines, inside):
    """Cosines `(rows, columns)` as colours over the picture, the darkest for the least of those `inside` it."""
    low, high = cosines[inside].min(), cosines[inside].max()
    shares = ((cosines - low) / max(high - low, 1e-12)).clip(0, 1)
    height, width = seen["crops"].shape[:2]
    colored = Image.fromarray((matplotlib.colormaps["inferno"](shares)[..., :3] * 255).astype(np.uint8))
    colored = colored.resize((width, height), Image.Resampling.NEAREST)
    return Image.blend(Image.fromarray(seen["crops"]).convert("L").convert("RGB"), colored, 0.7).crop(seen["box"])


def outlined(seen, place, shape):
    """The picture with one of its patches outlined."""
    picture = Image.fromarray(seen["crops"])
    (row, column), high, wide = place, picture.height / shape[0], picture.width / shape[1]
    corners = (column * wide, row * high, (column + 1) * wide, (row + 1) * high)
    ImageDraw.Draw(picture).rectangle(corners, outline="#ff2d95", width=max(picture.width // 120, 3))
    return picture.crop(seen["box"])


def inside(seen, shape):
    """Which patches have their centre in the picture, rather than in its padding: bool of this shape."""
    left, upper, right, lower = seen["box"]
    y = (np.arange(shape[0]) + 0.5) * seen["crops"].shape[0] / shape[0]
    x = (np.arange(shape[1]) + 0.5) * seen["crops"].shape[1] / shape[1]
    mask = ((y >= upper) & (y < lower))[:, None] & ((x >= left) & (x < right))
    return mask if mask.any() else np.ones(shape, bool)  # a picture thinner than a patch


# What the page's events do


def show_collection(uploads):
    return [(item.thumbnail, item.name) for item in collection + uploads]


def upload(paths, uploads):
    """Readable files join the collection, and the last of them is chosen; the others are named in a message."""
    added, wrong = [], []
    for path in paths:
        try:
            added.append(Entry(read_picture(path), Path(path).name))
        except ValueError as error:
            wrong.append(str(error))
    if not added:
        raise gr.Error("<br>".join(wrong), print_exception=False)
    if len(uploads) + len(added) > MAX_UPLOADS:
        forget(added)
        raise gr.Error(f"This page holds {MAX_UPLOADS} uploads at most.", print_exception=False)
    if wrong:
        gr.Warning("<br>".join(wrong))
    uploads = uploads + added
    shown = show_collection(uploads)
    return uploads, shown, shown, len(shown) - 1


def forget(uploads):
    """Of uploads nothing stays: of a session that has ended (an hour ago, says gradio), or that were not taken."""
    for item in uploads:
        item.thumbnail.unlink(missing_ok=True)
    look.cache_clear()  # which holds the last pictures


def show_neighbours(chosen, uploads, num_crops, progress=gr.Progress()):  # noqa: B008
    """The chosen picture, and those nearest to it under CLIP and under Phi-3."""
    items = collection + uploads
    vectors = [vectors_of(item, num_crops) for item in progress.tqdm(items, desc="Embedding", unit="pictures")]
    galleries = []
    for side in (CLIP, PHI3):
        cosines = np.stack([each[side] for each in vectors]) @ vectors[chosen][side]
        order = [each for each in np.argsort(-cosines, kind="stable") if each != chosen][:NUM_NEIGHBOURS]
        galleries.append([(items[each].thumbnail, f"{cosines[each]:.2f} · {items[each].name}") for each in order])
    return items[chosen].thumbnail, *galleries


def show_crops(chosen, uploads, num_crops):
    """The crops and the global view, and in the same layout their tokens."""
    item = (collection + uploads)[chosen]
    seen = look(item, num_crops)
    (rows, cols), side = seen["grid"], model.config.tokens_per_side
    said = (
        f"{item.picture.width} x {item.picture.height} pixels become **{rows} x {cols} crops** (rows x columns) of "
        f"{model.config.crop_size} pixels and a global view, and these **{seen['num_tokens']:,} tokens**: "
        f"{side} x {side} a view, and separators."
    )
    tokens = colours(seen["patches"][PHI3], seen["overview_tokens"])
    return said, sheet(seen["crops"], seen["overview"], seen["grid"]), sheet(*tokens, seen["grid"])


def show_matches(chosen, other, uploads, num_crops, side, follows, across, down):
    """
    Two pictures, each patch of them as bright as its best cosine with a patch of the other; or one patch of the first
    outlined, at these percentages of its sides, and the second's patches as bright as their cosine with it.
    """
    first, second = (look((collection + uploads)[number], num_crops) for number in (chosen, other))
    patches = [each["patches"][side] for each in (first, second)]
    masks = [inside(each, patch.shape[:2]) for each, patch in zip((first, second), patches)]
    if follows:
        place = patch_at(first, patches[0].shape, across, down)
        cosines = patches[1] @ patches[0][place]
        best, worst = cosines[masks[1]].max(), cosines[masks[1]].min()
        said = f"The best match of the outlined patch has cosine {best:.3f}, the worst {worst:.3f}."
        return said, outlined(first, place, patches[0].shape), heat(second, cosines, masks[1])
    cosines = np.einsum("abd,xyd->abxy", *patches, optimize=True)
    said = "The brighter a patch, the better its best match in the other picture."
    return (
        said,
        heat(first, cosines[:, :, masks[1]].max(-1), masks[0]),
        heat(second, cosines[masks[0]].max(0), masks[1]),
    )


def patch_at(seen, shape, across, down):
    """Row and column of the patch at these percentages of the picture's width and height."""
    (left, upper, right, lower), (height, width) = seen["box"], seen["crops"].shape[:2]
    # At 100 % the last pixel: the edge behind it belongs to the next patch, of padding or of none.
    x = min(left + (right - left) * across / 100, right - 1)
    y = min(upper + (lower - upper) * down / 100, lower - 1)
    return int(y * shape[0] / height), int(x * shape[1] / width)


def clicked(chosen, uploads, num_crops, click: gr.SelectData):
    """A click on the first picture -> that a patch is followed, and at which percentages of the sides it lies."""
    left, upper, right, lower = look((collection + uploads)[chosen], num_crops)["box"]
    x, y = click.index
    return True, round(100 * (x + 0.5) / (right - left), 1), round(100 * (y + 0.5) / (lower - upper), 1)


def build(name):
    """The page."""
    about = f"of `{name}`"
    if Path(name) == TINY:
        about = "of `tiny/`, a **test checkpoint that knows handwritten digits and nothing else**"
    crops = {"choices": [1, 4, 16], "label": "Crops of a picture, at most"}
    picture = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
    gallery = {"interactive": False, "object_fit": "contain", "buttons": [], "show_label": False}
    pick = {"value": show_collection([]), "allow_preview": False, **gallery}
    with gr.Blocks(title="Phi-3 and CLIP embeddings", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        uploads, chosen, other = gr.State([], delete_callback=forget), gr.State(FIRST), gr.State(FIRST + 1)
        gr.Markdown(
            "# Phi-3's image embeddings beside CLIP's\n"
            f"The image embedding {about}. *Phi-3* is the mean of a picture's image tokens; *CLIP's tower* is the "
            "vision tower in the same checkpoint: the mean of its patches of the global view."
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=350):
                gr.Markdown("### Pick a picture, or upload your own")
                pictures = gr.Gallery(columns=3, height=420, selected_index=FIRST, elem_id="pictures", **pick)
                kinds = {"file_count": "multiple", "file_types": ["image"]}
                sent = gr.UploadButton("Upload pictures", variant="primary", elem_id="upload", **kinds)
                gr.Markdown(f"Up to {MAX_FILE_MB} MB and {MAX_MEGAPIXELS} megapixels each. They stay in this session.")
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Neighbours"):
                    with gr.Row():
                        query = gr.Image(
                            label="Your picture", alt_text="Your picture", height=200, elem_id="query", **picture
                        )
                        few = gr.Radio(value=1, **crops)
                    with gr.Row():
                        nearest = []
                        for side, each in ((CLIP, "clip"), (PHI3, "phi3")):
                            with gr.Column():
                                gr.Markdown(f"### {side}")
                                nearest.append(gr.Gallery(columns=3, height=300, elem_id=each, **gallery))
                with gr.Tab("Crops"):
                    many = gr.Radio(value=16, **crops)
                    said = gr.Markdown(elem_id="tokens-said")
                    with gr.Row():
                        sheets = []
                        for title, each in (
                            ("Crops, global view below", "crops"),
                            ("Tokens, like ones alike", "tokens"),
                        ):
                            with gr.Column():
                                gr.Markdown(f"### {title}")
                                sheets.append(gr.Image(show_label=False, alt_text=title, elem_id=each, **picture))
                with gr.Tab("Patches"):
                    with gr.Row():
                        side = gr.Radio([CLIP, PHI3], value=PHI3, label="Patches of")
                        some = gr.Radio(value=4, **crops)
                    with gr.Row(equal_height=True):
                        follows = gr.Checkbox(
                            label="Follow one patch", info="Or click it in your picture.", elem_id="follows"
                        )
                        percent = {"minimum": 0, "maximum": 100, "step": 0.5, "value": 50, "buttons": []}
                        across = gr.Slider(label="Across, %", elem_id="across", **percent)
                        down = gr.Slider(label="Down, %", elem_id="down", **percent)
                    match_said = gr.Markdown(elem_id="match-said")
                    with gr.Row():
                        maps = []
                        for title, each in (("Your picture", "first"), ("The other picture", "second")):
                            with gr.Column():
                                gr.Markdown(f"### {title}")
                                maps.append(gr.Image(show_label=False, alt_text=title, elem_id=each, **picture))
                    gr.Markdown("### Pick the other picture")
                    others = gr.Gallery(columns=6, height=240, selected_index=FIRST + 1, elem_id="others", **pick)

        def picked(event: gr.SelectData):
            return event.index

        # What is chosen while an earlier choice is worked on counts, and not only what is chosen when all is done:
        # every pick is taken, and of what follows from picks the last.
        every, latest = {"trigger_mode": "multiple"}, {"trigger_mode": "always_last"}
        shown = {"show_progress": "minimal", **latest}
        sent.upload(upload, [sent, uploads], [uploads, pictures, others, chosen])
        pictures.select(picked, None, chosen, show_progress="hidden", **every)
        others.select(picked, None, other, show_progress="hidden", **every)
        gr.on(
            [page.load, chosen.change, few.change],
            show_neighbours,
            [chosen, uploads, few],
            [query, *nearest],
            show_progress_on=nearest,
            **latest,
        )
        gr.on([page.load, chosen.change, many.change], show_crops, [chosen, uploads, many], [said, *sheets], **shown)
        of_both = [chosen, other, uploads, some, side, follows, across, down]
        changes = [page.load, *(each.change for each in of_both if each is not uploads)]
        gr.on(changes, show_matches, of_both, [match_said, *maps], **shown)
        maps[0].select(clicked, [chosen, uploads, some], [follows, across, down], show_progress="hidden", **every)
    return page


name = os.environ.get("MODEL") or str(TINY)
if __name__ == "__main__":
    try:
        if not os.environ.get("MODEL") and not TINY.is_dir():
            raise ValueError("set the variable MODEL to a Hub id or folder of a phi3-embed model.")
        model, image_processor = load(name, os.environ.get("REVISION"))
        collection = first_pictures()
        for item in tqdm(collection, desc="Embedding", unit="picture"):
            if not all(np.isfinite(vector).all() for vector in vectors_of(item, 1).values()):
                raise ValueError(f"{name} gives vectors that are not finite. Are its weights whole?")
    except (OSError, ValueError) as error:
        sys.exit(f"app: {error}")
    build(name).launch(theme=THEME, max_file_size=f"{MAX_FILE_MB}mb", footer_links=[], show_error=True)
