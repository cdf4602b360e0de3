"""The page, as a Space runs it, in a real browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pillow_heif
import published
import pytest
import torch
from conftest import ROOT, copy_checkpoint, run_python
from fresh_process import run_alone
from PIL import Image
from playwright.sync_api import expect
from sklearn.datasets import load_digits

from phi3_tools.checkpoint.convert import convert

pytestmark = pytest.mark.browser
SECONDS = 120
sys.path.insert(0, str(ROOT / "space"))


@contextmanager
def started(app, log, **environment):
    """Runs the page in a fresh process -> its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"} | environment
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-u", app],
            env=os.environ | environment,
            cwd="/",
            stdout=written,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + SECONDS
            while "Running on local URL" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(tmp_path_factory, temporary):
    log = tmp_path_factory.mktemp("app") / "log"
    with started(ROOT / "space" / "app.py", log, TMPDIR=str(temporary)) as address:
        yield address
    assert "Traceback" not in log.read_text()


@contextmanager
def opened(browser, address):
    """The page in a new session, with similar images shown. Errors on its console fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SECONDS * 1000)
    expect.set_options(timeout=SECONDS * 1000)
    page, errors, urls = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(address)
    expect(page.locator("#phi3 [role=option]")).to_have_count(6)
    yield page
    context.close()
    assert errors == [] and all(url.startswith((address, "data:", "blob:")) for url in urls)


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def upload(page, *paths):
    page.locator("input[type=file]").set_input_files(paths)


def choose(page, name, within="#images"):
    page.locator(within).get_by_text(name, exact=True).click()


def chosen(page, within="#images"):
    return page.locator(f"{within} [aria-selected=true]")


def write_digit(path, label=7):
    digits, labels = load_digits(return_X_y=True)
    digit = (digits[labels == label][0].reshape(8, 8) * (255 / 16)).round().astype("uint8")
    Image.fromarray(digit).save(path)


def test_an_upload_is_chosen_in_view_and_finds_similar_images_under_both(page, tmp_path):
    write_digit(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    expect(chosen(page)).to_have_text("mine.png")
    expect(chosen(page)).to_be_in_viewport(ratio=1)
    expect(page.locator("#chosen")).to_contain_text("8 × 8 pixels")
    for side in ("#clip", "#phi3"):
        expect(page.locator(f"{side} [role=option]").first).to_have_text("a 71.00")
        cosines = [float(text) for text in page.locator(f"{side} [role=option] b").all_inner_texts()]
        assert len(cosines) == 6 and cosines == sorted(cosines, reverse=True)
    assert page.locator("#clip").inner_text() != page.locator("#phi3").inner_text()
    choose(page, "a 7", within="#phi3")
    expect(chosen(page)).to_have_text("a 7")


def test_of_several_files_the_good_are_taken_and_the_others_named(page, tmp_path):
    write_digit(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.heic").write_bytes(b"no image")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48))).save(tmp_path / "good.heic")
    (tmp_path / "heavy.png").write_bytes(bytes(33 * 2**20))
    Image.new("1", (9000, 8000)).save(tmp_path / "wide.png")
    names = ("broken.png", "heavy.png", "good.png", "wide.png", "broken.heic", "good.heic")
    upload(page, *(tmp_path / name for name in names))
    said = page.locator(".toast-body")
    for text in (
        "broken.png cannot be read as an image",
        "heavy.png is empty, or larger than 32 MB.",
        "wide.png has more than 64 megapixels.",
        "broken.heic cannot be read as an image",
    ):
        expect(said).to_contain_text(text)
    expect(said).not_to_contain_text(re.compile("/|good"))
    expect(page.locator("#images [role=option]").nth(1)).to_have_text("good.heic")
    page.locator(".toast-close").click()
    expect(chosen(page)).to_have_text("good.png")
    upload(page, tmp_path / "broken.png")  # alone it changes nothing
    expect(said).to_contain_text("broken.png")
    expect(chosen(page)).to_have_text("good.png")
    expect(page.locator("#phi3 [role=option]")).to_have_count(6)
    expect(page.locator("body")).not_to_contain_text(re.compile("^Error$"))


def test_what_is_dropped_is_taken_and_can_be_removed(page, temporary):
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 700, height: 40 });
            const blob = await new Promise((done) => canvas.toBlob(done)), files = new DataTransfer();
            files.items.add(new File([blob], "dropped.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));
        }"""
    )
    expect(chosen(page)).to_have_text("dropped.png")
    assert list(temporary.rglob("dropped.png")) == []  # read, and kept in memory for the session
    remove = page.get_by_role("button", name="Remove")
    remove.click()
    expect(chosen(page)).to_have_text("motorcycle, left")
    expect(page.get_by_text("dropped.png")).to_have_count(0)
    expect(remove).to_be_disabled()


def test_it_begins_with_a_photograph_and_each_tab_says_what_to_look_for_and_to_try(page):
    from app import TRY

    expect(chosen(page)).to_have_text("motorcycle, left")
    expect(page.get_by_label("16", exact=True)).to_be_checked()
    expect(page.locator(".column.Similar")).to_contain_text("Compare those of one list, never of both")
    names = {*page.locator("#images [role=option] span").all_inner_texts()}
    for tab in ("Similar", "Crops", "Matches"):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(f".column.{tab}")).to_contain_text("Look for")
        for label, (first, second, *_) in TRY[tab].items():
            expect(page.locator(f".column.{tab}").get_by_role("button", name=label)).to_be_visible()
            assert {first, second} <= names


def test_on_a_tablet_nothing_covers_the_title_and_names_are_whole(page, tmp_path):
    page.set_viewport_size({"width": 820, "height": 1180})
    name = "a long name of a photograph that somebody took in the holidays of last summer.png"
    write_digit(tmp_path / name)
    upload(page, tmp_path / name)
    expect(chosen(page)).to_have_text(name)
    title, wrong = page.evaluate(
        """() => {
            const box = document.querySelector("h1").getBoundingClientRect();
            const at = (share) => document.elementFromPoint(box.x + share * box.width, box.y + box.height / 2).tagName;
            const wrong = [...document.querySelectorAll("#images [role=option]")].filter((option) => {
                const image = option.querySelector("img"), name = option.querySelector("span");
                const below = name.getBoundingClientRect().top - image.getBoundingClientRect().bottom;
                return below < 0 || name.scrollHeight > name.clientHeight || name.scrollWidth > name.clientWidth;
            });
            return [[0.01, 0.5, 0.99].map(at), wrong.map((option) => option.innerText)];
        }"""
    )
    assert title == ["H1"] * 3 and wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") == 820


def test_the_page_is_used_by_keyboard_in_few_tab_stops(page):
    page.get_by_role("button", name="Upload images").focus()
    page.keyboard.press("Tab")
    for key, name in (("ArrowRight", "motorcycle, right"), ("End", "another 9"), ("ArrowUp", "another 6")):
        page.keyboard.press(key)
        expect(chosen(page)).to_have_text(name)
        expect(chosen(page)).to_be_in_viewport(ratio=1)
    expect(page.locator("#chosen")).to_contain_text("another 6")
    stops = 0
    while not page.evaluate("document.activeElement.closest('#phi3') !== null"):
        page.keyboard.press("Tab")
        stops += 1
    assert stops < 12
    expect(page.locator("#phi3 [role=option]").first).not_to_have_text(re.compile("motorcycle"))
    page.keyboard.press("ArrowRight")
    second = page.locator("#phi3 [role=option] span").nth(1).inner_text()
    page.keyboard.press("Enter")
    expect(chosen(page)).to_have_text(second)


def test_crops_and_their_tokens_are_shown_in_one_layout(page):
    for name in ("coins", "galaxies", "temple"):  # each while the one before is worked on: the last is shown
        choose(page, name)
    page.get_by_role("tab", name="Similar").press("ArrowRight")
    expect(page.get_by_role("tab", name="Crops", selected=True)).to_be_focused()
    expect(page.locator("#phi3")).to_be_hidden()
    expect(page.locator("#tokens-said")).to_contain_text("3 × 4 crops of 336 × 336 pixels")
    expect(page.locator("#tokens-said")).to_contain_text("1,921 tokens")
    for sheet in ("#crops i", "#tokens i"):
        expect(page.locator(sheet)).to_have_count(3 * 4 + 1)
    page.get_by_label("4", exact=True).check()
    expect(page.locator("#tokens-said")).to_contain_text("757 tokens")
    page.get_by_role("button", name="The blackboard in 1 crop").click()
    expect(page.locator("#tokens-said")).to_contain_text("1 × 1 crops")
    expect(page.get_by_label("1", exact=True)).to_be_checked()


@pytest.mark.parametrize("side", ["CLIP", "Phi-3"])
def test_a_part_matches_itself_by_mouse_and_by_keys(page, side):
    page.get_by_role("tab", name="Matches").click()
    page.get_by_label("4", exact=True).check()
    page.get_by_label(side, exact=True).check()
    choose(page, "motorcycle, left", within="#others")
    said = page.locator("#match-said")
    expect(said).to_contain_text("The more golden a part")
    expect(page.locator("#first .heat")).to_be_visible()
    # The 24 patches of a line of the global view, and the tokens of a line of 2 x 2 crops; before it were 4 x 4.
    expect(page.locator("#first .map")).to_have_attribute("data-cols", "24")
    shown = page.locator("#first .map").bounding_box()
    page.locator("#first .map").click(position={"x": 0.3 * shown["width"], "y": 0.4 * shown["height"]})
    rows, cols = (int(page.locator("#first .map").get_attribute(f"data-{name}")) for name in ("rows", "cols"))
    row, column = int(0.4 * rows) + 1, int(0.3 * cols) + 1
    expect(said).to_contain_text(f"row {row}, column {column}: its best match has similarity 1.00")
    outline = page.locator("#first .map i").bounding_box()
    assert outline["x"] - shown["x"] == pytest.approx((column - 1) / cols * shown["width"], abs=1)
    page.locator("#first [role=group]").focus()
    page.keyboard.press("ArrowDown")
    expect(said).to_contain_text(f"row {row + 1}, column {column}: its best match has similarity 1.00")
    page.keyboard.press("Escape")
    expect(said).to_contain_text("The more golden a part")


def call(address, name, *data):
    """What the page answers to an event of anyone's making: the kind of the last message, and its data."""
    event = httpx.post(f"{address}/gradio_api/call/{name}", json={"data": data}, timeout=SECONDS).json()["event_id"]
    lines = httpx.get(f"{address}/gradio_api/call/{name}/{event}", timeout=SECONDS).text.split("\n")
    return lines[-4].removeprefix("event: "), json.loads(lines[-3].removeprefix("data: "))


@pytest.mark.parametrize("key", [43, -1, None, "no such image", ["cat"], {"cat": 1}])
def test_a_made_up_image_is_refused_in_words(address, key):
    for name, data in (("show_chosen", [key]), ("remove", [key, "cat"])):
        kind, said = call(address, name, *data)
        assert kind == "error" and "This image is no longer here" in said["error"]


@pytest.mark.parametrize("place", [[None, {}], ["nan", "inf"], "far", {"x": 1}, [-1e9, 1e9], [1], 7])
def test_a_made_up_part_is_no_error(address, place):
    kind, shown = call(address, "show", "Matches", "a 3", "a 7", 1, "Phi-3", place)
    assert kind == "complete" and 'class="map"' in shown[-1]


def test_many_large_uploads_take_little_memory(tmp_path):
    pixels = np.tile(np.arange(5000, dtype=np.uint8), (5000, 1))
    Image.fromarray(pixels).save(tmp_path / "0.png")
    for number in range(1, 31):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{number}.png")
    Image.new("RGB", (8064, 6048)).save(tmp_path / "phone.jpg", exif=turned())
    code = """
import sys, resource, app
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
app.sight, app.collection, app.MAX_UPLOADS = app.Sight(sys.argv[1]), [], 4
(photograph,), *_ = app.upload([sys.argv[2] + "/phone.jpg"], [])
before = peak()
uploads, *_ = app.upload([f"{sys.argv[2]}/{number}.png" for number in range(31)], [photograph])
size = photograph.image.size
app.MAX_UPLOADS_OF_ALL, said = 4, []
app.gr.Warning = lambda text, **_: said.append(text)
app.upload([sys.argv[2] + "/another.png"], [])  # in a session that has none yet
assert said == ["1 more: the page is full. Try again in an hour."], said
print(size, len(uploads), peak() - before)
del uploads, photograph
print(len(app.uploads_of_all))
"""
    printed = run_python(code, ROOT, tmp_path, run=run_alone, PYTHONPATH=str(ROOT / "space"))
    size, taken, megabytes, left = printed.rsplit(maxsplit=3)
    assert size == "(1224, 1632)"  # 48 megapixels on their side
    assert left == "0"  # with the session they are gone
    assert int(taken) == 4 and int(megabytes) < 200  # of each 8 are kept; all 31 at once took 3 GB
    assert list(tmp_path.iterdir()) == []


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("order", ["sub_glb", "glb_sub"])
def test_parts_lie_where_the_image_shows_them(order, tmp_path):
    from app import Entry, Sight

    # Features before the first layer are of one patch alone: attention would spread what differs.
    config = json.loads((copy_checkpoint(tmp_path / "model") / "config.json").read_text())
    config |= {"layer_idx": 0, "hd_transform_order": order}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    sight = Sight(str(tmp_path / "model"))
    plain, marked = Image.new("RGB", (672, 500)), Image.new("RGB", (672, 500))
    marked.paste("red", (504, 198, 532, 226))  # one token, of the upper right crop: 86 pixels of padding are above
    without, seen = (sight.look(Entry(image, ""), 4) for image in (plain, marked))
    assert seen["grid"] == (2, 2) and seen["crops"].shape == (672, 672, 3) and seen["num_tokens"] == 757
    for side in ("CLIP", "Phi-3"):  # both have 24 x 24 here, of which 3 are above and below the image
        (parts, pixels), (plain_parts, _) = (look["parts"][side] for look in (seen, without))
        moved = np.linalg.norm(parts - plain_parts, axis=-1)
        assert moved.shape == (18, 24) and np.unravel_index(moved.argmax(), moved.shape) == (7, 18)
        assert pixels.shape == (504, 672, 3) and pixels[7 * 28 + 14, 18 * 28 + 14].tolist() == [255, 0, 0]
    moved = np.linalg.norm(seen["global_tokens"] - without["global_tokens"], axis=-1)
    assert moved.shape == (12, 12) and np.unravel_index(moved.argmax(), moved.shape) == (5, 9)
    (parts, pixels) = sight.look(Entry(Image.new("RGB", (1000, 2)), ""), 16)["parts"]["CLIP"]
    assert parts.shape[:2] == (1, 24) and pixels.size  # an image thinner than a part


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small Phi-3-vision of rule-made weights, converted by a recipe of few crops -> its folder."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = json.loads((ROOT / "phi3_tools" / "checkpoint" / "recipes" / "vlm2vec.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe | {"num_crops": 0}))
    source = published.save(folder / "source", published.weights(dtype=torch.float32), published.SMALL_CONFIG)
    convert(str(source), folder / "model", whole=True, recipe=str(folder / "recipe.json"))
    return folder / "model"


def test_in_a_space_of_its_own_a_whole_model_searches_by_words_and_answers(browser, whole, tmp_path):
    space = shutil.copytree(ROOT / "space", tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    with started(space / "app.py", tmp_path / "log", MODEL=str(whole)) as address:
        with opened(browser, address) as page:
            expect(page.locator("h1 + p")).to_contain_text("This page runs model.")  # and not where it lies
            page.get_by_role("tab", name="Search").click()
            page.get_by_label("What should the image show?").fill("a cat")
            page.get_by_role("button", name="Search").click()
            expect(page.locator("#found [role=option]")).to_have_count(12)
            best = page.locator("#found [role=option] span").first.inner_text()
            page.locator("#found [role=option]").first.click()
            expect(chosen(page)).to_have_text(best)
            choose(page, "a 3")
            page.get_by_role("tab", name="Ask").click()
            page.evaluate(
                """() => {
                    const answer = document.querySelector("#answer");
                    window.lengths = new Set();
                    new MutationObserver(() => lengths.add(answer.innerText.length))
                        .observe(answer, { subtree: true, childList: true, characterData: true });
                }"""
            )
            page.get_by_role("button", name="Which digit is this?").click()
            page.wait_for_function("lengths.size > 3")  # it grows
            expect(page.get_by_label("Your question")).to_have_value("Which digit is this?")
            page.get_by_role("button", name="Stop").click()
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_words_of_a_whole_model_are_those_of_its_own_libraries(whole):
    code = """
import sys, threading, time, numpy as np, sight
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import pipeline
from app import Entry
folder, entry = sys.argv[1], Entry(Image.linear_gradient("L").convert("RGB"), "")
seeing, embedder = sight.Sight(folder), SentenceTransformer(folder, trust_remote_code=True)
np.testing.assert_allclose(seeing.vector_for_words(entry), embedder.encode(entry.image), atol=1e-6)
np.testing.assert_allclose(seeing.vector_of_words("a cat"), embedder.encode_query("a cat"), atol=1e-6)
sight.MAX_ANSWER_TOKENS = 40
*_, text = seeing.answer("What is this?", entry, 4)
content = [{"type": "image", "image": entry.image}, {"type": "text", "text": "What is this?"}]
answer = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
settings = {"max_new_tokens": 40, "processor_kwargs": {"num_crops": 1}, "return_full_text": False}
(said,) = answer([{"role": "user", "content": content}], **settings)
assert text[:40] == said["generated_text"][:40]
sight.MAX_ANSWER_TOKENS, before = 10_000, threading.active_count()
stream = seeing.answer("What is this?", entry, 4)
next(stream)
assert threading.active_count() == before + 1
stream.close()  # as Stop and leaving do
time.sleep(1)
print(threading.active_count() - before)
"""
    assert run_python(code, whole, PYTHONPATH=str(ROOT / "space")).endswith("0\n")


def test_the_card_and_the_requirements_of_the_space_are_what_is_tested():
    space, pinned = ROOT / "space", (ROOT / "requirements-dev.txt").read_text()
    card = dict(re.findall(r"^(\w+): (.*)$", (space / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert card["sdk"] == "gradio" and f"gradio=={card['sdk_version']}\n" in pinned
    assert (space / card["app_file"]).is_file()
    for requirement in re.findall(r"^[\w-]+", (space / "requirements.txt").read_text(), re.MULTILINE):
        assert f"\n{requirement}==" in pinned


def test_a_model_that_does_not_serve_is_told_in_a_line(tmp_path):
    from sight import Sight

    for name, about in {"none": {}, "microsofts": {"model_type": "phi3_v"}, "clip": {"model_type": "clip"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(about))
    for name, text in (
        ("nowhere", "nowhere is no folder with a model, nor a model on a Hub"),
        ("/nowhere", "There is no"),
        (str(tmp_path / "none"), "none is no folder with a model"),
        (str(tmp_path / "microsofts"), "checkpoints go through `phi3-embed convert` first"),
        (str(tmp_path / "clip"), "is a model of type 'clip'. Give one of type 'phi3_embed'"),
    ):
        with pytest.raises(ValueError, match=text):
            Sight(name)


def test_a_git_lfs_pointer_in_place_of_weights_is_told_in_a_line(tmp_path):
    from sight import Sight

    model = copy_checkpoint(tmp_path / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer in place of the weights. Run `git lfs pull`"):
        Sight(str(model))
