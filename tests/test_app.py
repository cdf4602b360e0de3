"""The page, as a Space runs it, in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from playwright.sync_api import expect
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModel

SECONDS = 120


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
    # By the second variable what a session holds is deleted a second after its end, rather than an hour.
    environment = {"TMPDIR": str(temporary), "GRADIO_IS_E2E_TEST": "1"}
    with started(ROOT / "space" / "app.py", log, **environment) as address:
        yield address
    assert "Traceback" not in log.read_text()


@pytest.fixture
def page(browser, address):
    """The page in a new session, with its neighbours shown. Errors on its console fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SECONDS * 1000)
    expect.set_options(timeout=SECONDS * 1000)
    page, errors, elsewhere = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: elsewhere.append(request.url) if is_elsewhere(request.url, address) else None)
    page.goto(address)
    expect(page.locator("#phi3 button img")).to_have_count(6)
    yield page
    context.close()
    assert errors == [] and elsewhere == []


def is_elsewhere(url, address):
    return not url.startswith((address, "data:", "blob:"))


def upload(page, *paths):
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files(paths)


def size(page, image):
    return page.locator(image).evaluate("image => [image.naturalWidth, image.naturalHeight]")


def test_an_uploaded_picture_finds_its_neighbours_under_both(page, tmp_path):
    digits, labels = load_digits(return_X_y=True)
    seven = (digits[labels == 7][0].reshape(8, 8) * (255 / 16)).round().astype("uint8")
    Image.fromarray(seven).save(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    expect(page.locator("#pictures")).to_contain_text("mine.png")
    for side in ("#clip", "#phi3"):
        expect(page.locator(f"{side} button").first).to_contain_text("1.00 · 7")
        found = [float(text.split(" · ")[0]) for text in page.locator(f"{side} .caption-label").all_inner_texts()]
        assert len(found) == 6 and found == sorted(found, reverse=True)
    assert page.locator("#clip").inner_text() != page.locator("#phi3").inner_text()


def test_crops_and_their_tokens_are_shown_in_one_layout(page):
    for number in (9, 5, 0):  # each while the one before is worked on: the last is shown
        page.locator("#pictures button img").nth(number).click()
    page.get_by_role("tab", name="Crops").click()
    expect(page.locator("#tokens-said")).to_contain_text("640 x 427 pixels become 3 x 4 crops")
    expect(page.locator("#tokens-said")).to_contain_text("1,921 tokens")
    for sheet in ("#crops img", "#tokens img"):
        expect(page.locator(sheet)).to_be_visible()
        assert size(page, sheet) == [4 * 344 - 8, 4 * 344 + 8]  # a row for the global view
    page.get_by_label("4", exact=True).locator("visible=true").check()
    expect(page.locator("#tokens-said")).to_contain_text("757 tokens")


@pytest.mark.parametrize("side", ["CLIP's tower", "Phi-3"], ids=["clip", "phi3"])
def test_a_patch_matches_itself(page, side):
    page.locator("#pictures button img").first.click()
    page.get_by_role("tab", name="Patches").click()
    page.get_by_label(side).check()
    page.locator("#others button img").first.click()
    expect(page.locator("#match-said")).to_contain_text("The brighter a patch")
    # The temple is there, and laid out.
    page.wait_for_function(
        "(() => { const image = document.querySelector('#first img');"
        " return image?.naturalHeight < 672 && image.clientHeight < 0.7 * image.clientWidth })()"
    )
    shown = page.locator("#first img").bounding_box()
    page.locator("#first img").click(position={"x": shown["width"] / 4, "y": shown["height"] / 3})
    expect(page.get_by_label("Follow one patch")).to_be_checked()
    for slider, percent in (("#across", 25), ("#down", 33.3)):
        number = page.locator(f"{slider} input[type=number]")
        expect(number).not_to_have_value("50")
        assert float(number.input_value()) == pytest.approx(percent, abs=0.6)  # the browser clicks whole pixels
    expect(page.locator("#match-said")).to_contain_text("outlined patch has cosine 1.000")
    assert size(page, "#second img") == [672, 448]


def test_a_patch_is_followed_by_keyboard(page):
    page.get_by_role("tab", name="Patches").click()
    page.get_by_label("Follow one patch").focus()
    page.keyboard.press("Space")
    said = page.locator("#match-said")
    expect(said).to_contain_text("The best match of the outlined patch")
    before = said.inner_text()
    page.get_by_role("slider", name=re.compile("Across")).focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    expect(said).not_to_contain_text(before)
    expect(said).to_contain_text("The best match of the outlined patch")


@pytest.mark.parametrize("order", ["sub_glb", "glb_sub"])
def test_patches_lie_where_the_picture_shows_them(order, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "space"))
    import app

    where = {"pretrained_model_name_or_path": ROOT, "trust_remote_code": True}
    # Features before the first layer are of one patch alone: attention would spread what differs.
    app.model = AutoModel.from_pretrained(**where, layer_idx=0, hd_transform_order=order).eval()
    app.image_processor = AutoImageProcessor.from_pretrained(**where)
    plain, marked = Image.new("RGB", (672, 500)), Image.new("RGB", (672, 500))
    marked.paste("red", (504, 198, 532, 226))  # one token, of the upper right crop: 86 pixels of padding are above
    without, seen = (app.look(app.Entry(picture, ""), 4) for picture in (plain, marked))
    assert seen["grid"] == (2, 2) and seen["box"] == (0, 86, 672, 585) and seen["num_tokens"] == 757
    assert not without["crops"][86:585].any() and (without["crops"][585:] == 255).all()
    for side, place in ((app.PHI3, (10, 18)), (app.CLIP, (10, 18))):  # both have 24 x 24 here
        moved = np.linalg.norm(seen["patches"][side] - without["patches"][side], axis=-1)
        assert moved.shape == (24, 24) and np.unravel_index(moved.argmax(), moved.shape) == place
    moved = np.linalg.norm(seen["overview_tokens"] - without["overview_tokens"], axis=-1)
    assert moved.shape == (12, 12) and np.unravel_index(moved.argmax(), moved.shape) == (5, 9)
    assert app.inside(seen, (24, 24)).sum(0).tolist() == [18] * 24
    assert app.patch_at(seen, (24, 24), 100 * 518 / 672, 100 * 212 / 500) == (10, 18)  # the centre of the mark
    assert app.patch_at(seen, (24, 24), 0, 0) == (3, 0)
    edge = app.look(app.Entry(Image.new("RGB", (672, 504)), ""), 4)  # its lower edge lies between two patches
    assert edge["box"] == (0, 84, 672, 588)
    assert app.patch_at(edge, (24, 24), 100, 100) == (20, 23)


def test_16_bit_pictures_keep_their_greys_and_numbers_of_an_unknown_range_are_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "space"))
    import app

    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "grey.png")
    picture = app.read_picture(tmp_path / "grey.png")
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (128, 128, 128)
    for number in (300, 0.5):
        Image.new("F", (4, 4), number).save(tmp_path / "numbers.tiff")
        with pytest.raises(ValueError, match="numbers.tiff cannot be read: its values .* must be in 0..255"):
            app.read_picture(tmp_path / "numbers.tiff")


def test_uploads_that_are_too_many_leave_no_thumbnails(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "space"))
    import app

    Image.new("L", (8, 8), 77).save(tmp_path / "mine.png")
    before = set(Path(app.THUMBNAILS.name).iterdir())
    with pytest.raises(app.gr.Error, match="30 uploads at most"):
        app.upload([tmp_path / "mine.png"] * 31, [])
    assert set(Path(app.THUMBNAILS.name).iterdir()) == before


def test_uploads_leave_the_disk_with_their_session(page, temporary, tmp_path):
    before = set(temporary.glob("tmp*/*.png"))
    Image.new("L", (8, 8), 77).save(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    expect(page.locator("#pictures")).to_contain_text("mine.png")
    (thumbnail,) = set(temporary.glob("tmp*/*.png")) - before
    page.context.close()
    until = time.monotonic() + SECONDS
    while thumbnail.exists():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_what_cannot_be_shown_is_told_in_a_message(page, address, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "heavy.png").write_bytes(bytes(50 * 2**20))
    Image.new("1", (6000, 5000)).save(tmp_path / "wide.png")
    for name, message in {
        "broken.png": "broken.png is no picture, or of an unknown format.",
        "heavy.png": "exceed the maximum allowed size of 20.0 Mb",
        "wide.png": "wide.png cannot be read: it has 6000 x 5000 pixels. Scale it down first.",
    }.items():
        upload(page, tmp_path / name)
        expect(page.locator(".toast-body")).to_contain_text(message)
        page.locator(".toast-close").click()
        expect(page.locator(".toast-body")).to_have_count(0)
    expect(page.locator("#phi3 button img")).to_have_count(6)
    with (tmp_path / "heavy.png").open("rb") as file:  # past the browser's own check
        answer = httpx.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=SECONDS)
    assert answer.status_code == 413


def test_the_folder_is_a_space_of_its_own(tmp_path):
    space = shutil.copytree(ROOT / "space", tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    card = dict(re.findall(r"^(\w+): (.*)$", (space / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert (
        card["sdk"] == "gradio" and f"gradio=={card['sdk_version']}\n" in (ROOT / "requirements-dev.txt").read_text()
    )
    with started(space / card["app_file"], tmp_path / "log", MODEL=str(ROOT)) as address:
        assert f"{ROOT}/tiny" in httpx.get(f"{address}/config", timeout=SECONDS).text
