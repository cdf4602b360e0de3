"""
What Phi-3-vision sees in images: similar ones, crops and tokens, matching parts and, with its language model, words.

    make app                                              # the small checkpoint, no network
    MODEL=someone/phi3-embed python space/app.py          # a Hub id or folder, at REVISION if that is set
"""

import base64
import html
import io
import math
import os
import sys
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import gradio as gr
import numpy as np
from PIL import Image
from sight import CLIP, PHI3, Sight, unit
from sklearn.decomposition import PCA
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NUM_SIMILAR, NUM_FOUND = 6, 12
MAX_FILE_MB, MAX_MEGAPIXELS, MAX_CHARACTERS = 32, 64, 500
# So much is kept of an upload, a little more than 16 crops hold: in memory 160 MB a session, and 1.6 GB in all.
KEPT_MEGAPIXELS, MAX_UPLOADS, MAX_UPLOADS_OF_ALL = 2, 20, 200
THUMBNAIL, SHOWN = 192, 768
GLOW = np.array((255, 214, 64))  # red, green, blue
# Fonts of the machine: a page of the small checkpoint needs no network.
FONTS = {"font": ["ui-sans-serif", "system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
INTRODUCTION = """
# What Phi-3-vision sees
Phi-3-vision looks at an image through **CLIP**, crop by crop, and turns what CLIP sees into the tokens that its
language model reads, here called **Phi-3**."""
ABOUT_SMALL = """
This page runs a **small test model that knows handwritten digits and nothing else**: it shows how Phi-3-vision
looks, not how well. It tells photographs apart by little more than light and shape."""
UPLOADS = f"Up to {MAX_UPLOADS} of {MAX_FILE_MB} MB, also dropped or pasted. They are kept for this session alone."
LOOK_FOR = {
    "Similar": """
The images most like yours, as CLIP sees them and as Phi-3 does. **Look for** what each takes for alike: colours,
shapes, or what is shown. Similarities are at most 1. Compare those of one list, never of both: each model has a
scale of its own.""",
    "Crops": """
A large image is cut into crops, each seen as sharply as the whole image, which stands last. **Look for** small
things: the whole image loses them, the crops keep them. Beside it are the tokens that Phi-3 makes of it; like
tokens have like colours.""",
    "Matches": """
Parts of two images that the model takes for alike are golden. **Look for** the same thing in both. Click a part of
your image, or go to it by arrow keys, and its like in the other image lights up. Escape shows all parts again.""",
    "Search": """
Words and images become vectors of one space. **Look for** images that fit your words, though nobody has described
them.""",
    "Ask": """
Ask about your image. **Look for** what is in the image and what is made up: the model writes both with the same
confidence.""",
}
# What a visitor may try: the chosen image, the other one, the most crops, and a part of the chosen one.
TRY = {
    "Similar": {
        "A motorcycle, and what the other eye sees": ("motorcycle, left", "motorcycle, right", 16, None),
        "A handwritten 3": ("a 3", "another 3", 16, None),
    },
    "Crops": {
        "Galaxies": ("galaxies", "blackboard", 16, None),
        "A printed page": ("printed page", "blackboard", 16, None),
        "A blackboard": ("blackboard", "a 7", 16, None),
        "The blackboard in 1 crop": ("blackboard", "a 7", 1, None),
    },
    "Matches": {
        "Each 3 on the blackboard": ("a 3", "blackboard", 16, [0.46, 0.63]),
        "A wheel, in both eyes": ("motorcycle, left", "motorcycle, right", 16, [0.2, 0.7]),
        "All of two photographs": ("cat", "coffee", 16, None),
    },
    "Search": {text: text for text in ("seven", "a motorcycle", "something to drink")},
    "Ask": {text: text for text in ("What is this?", "Which digit is this?", "What colours do you see?")},
}

# Pillow refuses to decode twice as many pixels as this, and warns before that.
Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 10**6 // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
except ImportError:
    register_heif_opener = None


uploads_of_all = weakref.WeakSet()  # an upload leaves it with its session


@dataclass(eq=False)
class Entry:
    """An image of the collection or an upload; `vectors` keeps those computed of it, by what made them."""

    image: Image.Image
    name: str
    is_upload: bool = False
    vectors: dict = field(default_factory=dict)

    def __post_init__(self):
        self.key = uuid4().hex if self.is_upload else self.name
        self.thumbnail = data_url(self.image, "jpeg", THUMBNAIL)

    def option(self, note=""):
        """What an image list shows."""
        return {"key": self.key, "image": self.thumbnail, "name": html.escape(self.name), "note": note}


# What is shown of it


def data_url(image, kind="png", size=None):
    """A PIL image as a URL that needs no file, fitted to `size` pixels a side; a small one gets larger pixels."""
    if size and (factor := size // max(image.size)) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif size:
        image = image.copy()
        image.thumbnail((size, size))
    file = io.BytesIO()
    image.save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def views_html(crops, global_view, grid, title, kind):
    """Crops as they lie in the image, gaps between them, and the global view below: arrays of any resolution."""
    rows, cols = grid
    places = [(x * 100 / max(cols - 1, 1), y * 100 / max(rows - 1, 1)) for y in range(rows) for x in range(cols)]
    cells = "".join(f'<i style="background-position: {x}% {y}%"></i>' for x, y in places)
    crops, global_view = (data_url(Image.fromarray(pixels), kind) for pixels in (crops, global_view))
    return (
        f'<div class="views" style="--cols: {cols}" role="img" aria-label="{title}: {rows} rows of {cols} crops">'
        f'<div style="--size: {cols * 100}% {rows * 100}%; --image: url({crops})">{cells}</div>'
        f'<div style="--size: 100%; --image: url({global_view})"><i></i></div></div>'
    )


def colours(*tokens):
    """Tokens `(rows, columns, hidden_size)` -> the same as colours, uint8: three principal components of them all."""
    flat = [grid.reshape(-1, grid.shape[-1]) for grid in map(unit, tokens)]
    three = PCA(3, random_state=0).fit_transform(np.concatenate(flat))
    three = (three - three.min(0)) / np.maximum(np.ptp(three, axis=0), 1e-12) * 255
    parts = np.split(three.astype(np.uint8), np.cumsum([len(rows) for rows in flat])[:-1])
    return [part.reshape(*grid.shape[:2], 3) for part, grid in zip(parts, tokens)]


def map_html(pixels, shape, at=None, cosines=None):
    """An image of `shape` parts, with the one `at` a place outlined, or all darker or more golden by their cosines."""
    (height, width), (rows, cols) = pixels.shape[:2], shape
    layers = f'<img src="{data_url(Image.fromarray(pixels), "jpeg", SHOWN)}" alt="">'
    if cosines is not None:
        shares = (cosines - cosines.min()) / max(np.ptp(cosines), 1e-12)
        # Black over the worst matches, a glow over the best: what is black shows by a glow alone.
        alpha = np.interp(shares, (0, 0.7, 1), (225, 0, 150))[..., None]
        heat = np.concatenate([(shares > 0.7)[..., None] * GLOW, alpha], axis=-1).astype(np.uint8)
        layers += f'<img src="{data_url(Image.fromarray(heat))}" class="heat" alt="">'
    if at:
        place = f"left: {at[1] / cols:%}; top: {at[0] / rows:%}; width: {1 / cols:%}; height: {1 / rows:%}"
        layers += f'<i style="{place}"></i>'
    style = f"aspect-ratio: {width} / {height}; --ratio: {width / height}"
    return f'<div class="map" style="{style}" data-rows="{rows}" data-cols="{cols}">{layers}</div>'


# What the page's events do. What they are given may be made up.


def find(uploads, key):
    for entry in uploads + collection:
        if entry.key == key:
            return entry
    raise gr.Error("This image is no longer here. Choose another one.", print_exception=False)


def options(uploads):
    return [entry.option() for entry in uploads + collection]


def read_upload(path):
    """An uploaded file -> an entry, shrunk to what is kept. ValueError if it cannot be read."""
    if path.is_file() and not path.stat().st_size:  # page.js sends one that is too large without its content
        raise ValueError(f"{path.name} is empty, or larger than {MAX_FILE_MB} MB.")
    try:
        image = sight.image_processor.open_image(path)
    except ValueError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise ValueError(f"{path.name} has more than {MAX_MEGAPIXELS} megapixels.") from error
        if path.suffix.lower() in (".heic", ".heif") and not register_heif_opener:
            raise ValueError(f"{path.name} is a HEIC image, which this page cannot read: save it as JPEG.") from error
        raise ValueError(str(error).replace(repr(str(path)), path.name)) from error
    if (share := math.sqrt(KEPT_MEGAPIXELS * 1e6 / (image.width * image.height))) < 1:
        image.thumbnail([max(int(length * share), 1) for length in image.size])
    return Entry(image, path.name, is_upload=True)


def upload(files, uploads, progress=gr.Progress()):  # noqa: B008
    """Readable files come first in the collection, and the first of them is chosen; others are named in a message."""
    paths, added, wrong = [Path(path) for path in files or []], [], []
    room = max(min(MAX_UPLOADS - len(uploads), MAX_UPLOADS_OF_ALL - len(uploads_of_all)), 0)
    for path in progress.tqdm(paths[:room], desc="Reading", unit="images"):
        try:
            added.append(read_upload(path))
        except ValueError as error:
            wrong.append(str(error))
    for path in paths:
        path.unlink(missing_ok=True)
    if more := len(paths[room:]):
        is_mine = room == MAX_UPLOADS - len(uploads)
        limit = f"you may add {MAX_UPLOADS} in all." if is_mine else "the page is full. Try again in an hour."
        wrong.append(f"{more} more: {limit}")
    if wrong:
        gr.Warning("<br>".join(map(html.escape, wrong)), title="Not added", duration=None)
    if not added:
        return gr.skip()
    uploads_of_all.update(added)
    items = options(uploads := added + uploads)
    return uploads, gr.update(value=added[0].key, items=items), gr.update(items=items)


def remove(key, other, uploads):
    """An upload leaves the page, and the image behind it is chosen in its place."""
    if not (entry := find(uploads, key)).is_upload:
        return gr.skip()
    place = uploads.index(entry)
    uploads = [upload for upload in uploads if upload is not entry]
    sight.look_once.cache_clear()  # which holds the last images
    items, left = options(uploads), (uploads + collection)[place].key
    return uploads, gr.update(value=left, items=items), gr.update(value=left if other == key else other, items=items)


def show_chosen(key, uploads):
    """The chosen image and its size, and whether it can be removed."""
    entry = find(uploads, key)
    size = "{:,} × {:,} pixels".format(*entry.image.size)
    shown = f'<img src="{entry.thumbnail}" alt=""><p><b>{html.escape(entry.name)}</b><br>{size}</p>'
    return f'<div class="chosen">{shown}</div>', gr.update(interactive=entry.is_upload)


def ranked(entries, vectors, query, count):
    """The entries whose vectors are nearest to the query, for an image list."""
    cosines = np.stack(vectors) @ query
    order = np.argsort(-cosines, kind="stable")[:count]
    return gr.update(value=None, items=[entries[place].option(f"{cosines[place]:.2f}") for place in order])


def show_similar(chosen, uploads, progress):
    """The images nearest to the chosen one under CLIP and under Phi-3."""
    others = [entry for entry in uploads + collection if entry is not chosen]
    query = sight.vectors_of(chosen)
    vectors = [sight.vectors_of(entry) for entry in progress.tqdm(others, desc="Looking", unit="images")]
    return [ranked(others, [vector[side] for vector in vectors], query[side], NUM_SIMILAR) for side in (CLIP, PHI3)]


def show_crops(chosen, num_crops):
    """The crops and the global view, and in the same layout their tokens."""
    seen = sight.look(chosen, num_crops)
    rows, cols = grid = seen["grid"]
    said = (
        f"**{rows} × {cols} crops** of {sight.crop_size} × {sight.crop_size} pixels, and the whole image at the size "
        f"of one: **{seen['num_tokens']:,} tokens**."
    )
    colored = colours(seen["tokens"], seen["global_tokens"])
    crops = views_html(seen["crops"], seen["global_view"], grid, "Crops", "jpeg")
    return said, crops, views_html(*colored, grid, "Tokens", "png")


def show_matches(chosen, other, num_crops, side, place):
    """
    Two images, each part of them as golden as its best match in the other; or, with a `place` in the first (shares of
    its width and height), the part there outlined, and those of the second as golden as they are like it.
    """
    (first, pixels), (second, other_pixels) = (
        sight.look(entry, num_crops)["parts"][side] for entry in (chosen, other)
    )
    shape, other_shape = first.shape[:2], second.shape[:2]
    try:
        at = tuple(min(max(int(float(share) * count), 0), count - 1) for share, count in zip(place[::-1], shape))
        row, column = at
    except (TypeError, ValueError, OverflowError, LookupError):  # none, or a made-up one
        cosines = np.einsum("abd,xyd->abxy", first, second, optimize=True)
        said = "The more golden a part, the better its best match in the other image."
        best = map_html(pixels, shape, cosines=cosines.max((2, 3)))
        return said, gr.update(image=best), map_html(other_pixels, other_shape, cosines=cosines.max((0, 1)))
    cosines = second @ first[at]
    said = (
        f"The part in row {row + 1}, column {column + 1}: its best match has similarity **{cosines.max():.2f}**, "
        f"its worst {cosines.min():.2f}."
    )
    return said, gr.update(image=map_html(pixels, shape, at)), map_html(other_pixels, other_shape, cosines=cosines)


def search(words, uploads, progress=gr.Progress()):  # noqa: B008
    """The images nearest to words."""
    if not words.strip():
        return gr.skip()
    entries = uploads + collection
    vectors = [sight.vector_for_words(entry) for entry in progress.tqdm(entries, desc="Looking", unit="images")]
    return ranked(entries, vectors, sight.vector_of_words(words[:MAX_CHARACTERS]), NUM_FOUND)


def ask(question, key, uploads, num_crops):
    """What the model answers about the chosen image, as far as it has come."""
    if question.strip():
        yield from sight.answer(question[:MAX_CHARACTERS], find(uploads, key), num_crops)


# The page


def image_list(items, value=None, follow=False, **kwargs):
    """
    Images to choose from, in one Tab stop. Arrow keys go through them; they choose too where `follow` is set, else
    Enter does. The value is the key of the chosen one; `items` are options of entries.
    """
    # JavaScript in place of Handlebars, whose output, names of files too, is taken for JavaScript afterwards.
    option = (
        '<div role="option" id="${id}-${place}" aria-selected="${item.key === value}" class="${place === active}">'
        '<img src="${item.image}" alt=""><span>${item.name}</span><b>${item.note}</b></div>'
    )
    listbox = 'role="listbox" tabindex="0" aria-label="${label}" aria-activedescendant="${id}-${active}" class="list"'
    return gr.HTML(
        value,
        items=items,
        active=0,
        follow=follow,
        id=kwargs["elem_id"],
        html_template=f"<div {listbox}>${{items.map((item, place) => `{option}`).join('')}}</div>",
        js_on_load="imageList(element, props, trigger, watch)",
        apply_default_css=False,
        **kwargs,
    )


def image_map(**kwargs):
    """An image of which a part can be chosen, by mouse or arrow keys: the value is its place, shares of the sides."""
    return gr.HTML(
        image="",
        html_template='<div role="group" tabindex="0" aria-label="${label}" class="choose">${image}</div>',
        js_on_load="imageMap(element, props)",
        apply_default_css=False,
        **kwargs,
    )


def tab_list(titles, **kwargs):
    """
    Tabs whose value is the title of the open one. Those of gradio render a tab when it is first opened, and lose the
    properties of an image list that is updated before.
    """
    tab = """<button role="tab" class="{0}" aria-selected="${{value === '{0}'}}">{0}</button>"""
    return gr.HTML(
        titles[0],
        html_template=f'<div role="tablist">{"".join(map(tab.format, titles))}</div>',
        js_on_load="tabList(element, props)",
        apply_default_css=False,
        **kwargs,
    )


def panel(title):
    """What a tab holds: what to look for, and buttons to try -> its context, and each button with what it sets."""
    with gr.Column(elem_classes=title) as context:
        gr.Markdown(LOOK_FOR[title])
        with gr.Row(elem_classes="try"):
            gr.Markdown("Try this:")
            return context, [(gr.Button(label, size="sm", min_width=0), sets) for label, sets in TRY[title].items()]


def build(name):
    """The page."""
    about = f"This page runs `{Path(name).name if Path(name).is_absolute() else name}`."
    start, other_start, most_crops, _ = next(iter(TRY["Similar"].values()))
    with gr.Blocks(title="What Phi-3-vision sees", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        # The last images that were looked at are held beside a session: no longer than that.
        uploads = gr.State([], delete_callback=lambda uploads: sight.look_once.cache_clear())
        gr.Markdown(f"{INTRODUCTION} {ABOUT_SMALL if Path(name) == ROOT else about}")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                with gr.Row():
                    kinds = {"file_count": "multiple", "file_types": ["image", ".heic", ".heif"]}
                    sent = gr.UploadButton("Upload images", variant="primary", min_width=120, scale=2, **kinds)
                    removed = gr.Button("Remove", interactive=False, elem_id="remove", min_width=80)
                chosen = image_list(options([]), start, follow=True, elem_id="images", label="Images to choose from")
                gr.Markdown(UPLOADS)
                crops = [1, 4, 16]
                info = "An image smaller than a crop is not cut."
                detail = gr.Radio(crops, value=most_crops, label="Crops of an image, at most", info=info)
            with gr.Column(scale=3, min_width=320):
                facts = gr.HTML(elem_id="chosen")
                missing = {"Search": not sight.embedder, "Ask": not sight.speaks}
                opened = tab_list([title for title in LOOK_FOR if not missing.get(title)], elem_id="tabs")
                context, tries = panel("Similar")
                with context:
                    similar = []
                    for name, elem_id in ((CLIP, "clip"), (PHI3, "phi3")):
                        gr.Markdown(f"### As {name} sees it")
                        similar.append(image_list([], elem_id=elem_id, label=f"Similar images, by {name}"))
                context, buttons = panel("Crops")
                tries += buttons
                with context:
                    said = gr.Markdown(elem_id="tokens-said")
                    with gr.Row(elem_classes="pair"):
                        sheets = [gr.HTML(elem_id=elem_id) for elem_id in ("crops", "tokens")]
                context, buttons = panel("Matches")
                tries += buttons
                with context:
                    side = gr.Radio([CLIP, PHI3], value=PHI3, label="As seen by")
                    match_said = gr.Markdown(elem_id="match-said")
                    with gr.Row(elem_classes="pair"):
                        part = image_map(elem_id="first", label="Parts of your image")
                        match = gr.HTML(elem_id="second")
                    names = {"elem_id": "others", "label": "The other image"}
                    other = image_list(options([]), other_start, follow=True, **names)
                if sight.embedder:
                    search_panel(chosen, uploads)
                if sight.speaks:
                    ask_panel(chosen, uploads, detail)

        def show(opened, key, other_key, uploads, num_crops, side, place, progress=gr.Progress()):  # noqa: B008
            """What the open tab shows; others wait until they are opened."""
            entry = find(uploads, key)
            if opened == "Similar":
                return dict(zip(similar, show_similar(entry, uploads, progress)))
            if opened == "Crops":
                return dict(zip((said, *sheets), show_crops(entry, num_crops)))
            if opened == "Matches":
                shown = show_matches(entry, find(uploads, other_key), num_crops, side, place)
                return dict(zip((match_said, part, match), shown))
            return {said: gr.skip()}

        quiet = {"show_progress": "hidden"}
        sent.upload(upload, [sent, uploads], [uploads, chosen, other], show_progress_on=chosen)
        removed.click(remove, [chosen, other, uploads], [uploads, chosen, other], **quiet)
        gr.on([page.load, chosen.change], show_chosen, [chosen, uploads], [facts, removed], **quiet)
        settings = [opened, chosen, other, detail, side, part]
        gr.on(
            [page.load, *(setting.change for setting in settings)],
            show,
            [opened, chosen, other, uploads, detail, side, part],
            [*similar, said, *sheets, match_said, part, match],
            trigger_mode="always_last",  # of events that follow each other quickly
            show_progress_on=similar,
        )
        for shown in similar:
            shown.select(lambda key: key, shown, chosen, **quiet)
        for button, sets in tries:
            button.click(lambda sets=sets: sets, None, [chosen, other, detail, part], **quiet)
    return page


def search_panel(chosen, uploads):
    context, tries = panel("Search")
    with context:
        words = gr.Textbox(label="What should the image show?", submit_btn="Search", elem_id="words")
        found = image_list([], elem_id="found", label="Images that fit")
    found.select(lambda key: key, found, chosen, show_progress="hidden")
    run(words, tries, search, [words, uploads], found)


def ask_panel(chosen, uploads, detail):
    context, tries = panel("Ask")
    with context:
        question = gr.Textbox(label="Your question", submit_btn="Ask", elem_id="question")
        answer = gr.Markdown(container=True, min_height=120, elem_id="answer")
        stop = gr.Button("Stop", size="sm")
    stop.click(None, cancels=run(question, tries, ask, [question, chosen, uploads, detail], answer))


def run(box, tries, *event):
    """What follows from a text in the box, entered or put there by a button."""
    filled = [button.click(lambda text=text: text, None, box, show_progress="hidden") for button, text in tries]
    return [box.submit(*event), *(filling.then(*event) for filling in filled)]


def main():
    """Loads what MODEL and REVISION name, and opens the page."""
    global sight, collection
    name, revision = os.environ.get("MODEL") or str(ROOT), os.environ.get("REVISION")
    try:
        if not os.environ.get("MODEL") and not (ROOT / "config.json").is_file():
            raise ValueError("set the variable MODEL to a Hub id or folder of a phi3-embed model.")
        sight = Sight(name, revision)
        collection = [Entry(image, name) for name, image in sight.first_images().items()]
        for entry in tqdm(collection, desc="Looking", unit="image"):
            if not all(np.isfinite(vector).all() for vector in sight.vectors_of(entry).values()):
                raise ValueError(f"{name} gives vectors that are not finite. Are its weights whole?")
    except (OSError, ValueError) as error:
        sys.exit(f"app: {error}")
    build(name).launch(
        theme=gr.themes.Soft(primary_hue="teal", neutral_hue="slate", **FONTS),
        css_paths=HERE / "page.css",
        head=f"<script>const MAX_FILE_MB = {MAX_FILE_MB};\n{(HERE / 'page.js').read_text()}</script>",
        max_file_size=f"{MAX_FILE_MB}mb",
        footer_links=[],
        show_error=True,
    )


if __name__ == "__main__":
    main()
