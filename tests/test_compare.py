"""`phi3-embed compare`: figures of several models, the vectors that are kept, and the report in a browser."""

import json
import re
import signal
import subprocess
import sys
import time

import lancedb
import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from fresh_process import run_fresh
from parts import save_tower
from phi3_embed.modeling_phi3_embed import Phi3EmbedModel
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    pipeline,
)

from phi3_tools.cli import main
from phi3_tools.compare import command as compare
from phi3_tools.compare.report import describe, measured_tasks, verdict
from phi3_tools.compare.vectors import Key, embed
from phi3_tools.cookbook import load_phi3_model, process_for_phi3_model
from phi3_tools.digits import NAME_IT, ask
from phi3_tools.images import DIGIT_NAMES as NAMES
from phi3_tools.images import digits_split
from phi3_tools.measures import Figure, ari, gram, linear_cka, recall, retrieval, same_class_retrieval, summarise, unit
from phi3_tools.models import find_model

TINY = str(ROOT)
COMPARE = ("-m", "phi3_tools", "compare")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_VISION = SMALL | {"image_size": 32, "patch_size": 8}


def compare_here(folder, *arguments):
    """As from the command line, in this process, which spares the imports -> results.json."""
    rest = ["--resamples", "100"] * ("--resamples" not in arguments)
    rest += ["--output", folder / "out", "--cache", folder / "vectors"]
    main(["compare", *map(str, [*arguments, *rest])])
    assert "Image embeddings compared" in (folder / "out" / "report.html").read_text()
    return json.loads((folder / "out" / "results.json").read_text())


def figure(results, name):
    return next(figure for figure in results["figures"] if figure["name"] == name)


def noise(seed=0, size=(40, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def embed_here(folder, specs, images, texts=(), **settings):
    """[`embed`], with its cache in `folder` -> for each model the images' vectors in order, and what else is known."""
    models, keys = [find_model(spec) for spec in specs], [Key(str(number)) for number in range(len(images))]
    opened = {key: lambda opener, image=image: image.copy() for key, image in zip(keys, images)}
    found = embed(models, opened, texts, cache=folder / "vectors", **settings)
    return [(np.stack([made.images[key] for key in keys if key in made.images]), made) for made in found.values()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 30 held-out digits of three classes, and a file that is none."""
    folder = tmp_path_factory.mktemp("digits")
    _, images, _, labels = digits_split()
    for label in range(3):
        (folder / NAMES[label]).mkdir()
        for number in np.flatnonzero(labels == label)[:10]:
            Image.fromarray(images[number]).save(folder / NAMES[label] / f"{number}.png")
    (folder / "one" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def report(digits, tmp_path_factory):
    """Three models compared, and the arguments of that."""
    folder = tmp_path_factory.mktemp("report")
    arguments = ["--model", f"{TINY}:mean", "--model", f"{TINY}:tower", "--model", "pixels", digits, "--num-crops", 1]
    arguments += ["--probe", 5, "--resamples", 200]
    done = run_fresh(*COMPARE, *arguments, "--output", folder / "out", "--cache", folder / "vectors")
    assert done.returncode == 0, done.stderr
    return folder / "out", arguments, done


def test_figures_have_intervals_and_paired_tests(report):
    folder, _, done = report
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "report.html").read_text()
    assert "recall@1" in done.stdout and "parameters" in done.stdout
    for name in ("recall@1", "mAP", "linear-probe accuracy", "NMI", "blur: finds itself", "1/4 size: moved"):
        found = figure(results, name)
        for value in found["values"].values():
            assert value["low"] <= value["value"] <= value["high"]
        assert len(found["differences"]) == 3
        assert all(0 < difference["p"] <= difference["p_adjusted"] for difference in found["differences"])
        assert name in page
    vectors, mean, tower = load_file(folder / "embeddings.safetensors"), f"{ROOT.name} (mean)", f"{ROOT.name} (tower)"
    widths = {name: len(rows[0]) for name, rows in vectors.items()}
    assert widths == {mean: 128, tower: 64, "pixels": 3072}
    labels = np.repeat(np.arange(3), 10)[np.argsort(np.repeat(["one", "two", "zero"], 10), kind="stable")]
    for name, rows in vectors.items():
        expected = recall(unit(rows), labels, 1)
        assert figure(results, "recall@1")["values"][name]["value"] == pytest.approx(expected)


def test_an_unreadable_file_is_named_counted_and_left_out_of_all(report):
    folder, _, done = report
    assert "Left out 1 of 31 images" in done.stdout and "one/broken.png" in done.stdout
    about = json.loads((folder / "results.json").read_text())["about"]
    assert about["left_out"]["unreadable"] == 1 and about["images"] == 30 and about["arguments"]["seed"] == 0


def test_a_second_run_embeds_nothing_and_gives_the_same(report, capsys):
    folder, arguments, first = report
    before = json.loads((folder / "results.json").read_text())
    after = compare_here(folder.parent, *arguments)
    assert "Embedding" in first.stderr and "Embedding" not in capsys.readouterr().err
    assert after["figures"] == before["figures"] and after["models"] == before["models"]


def test_a_killed_run_goes_on_where_it_stopped(digits, tmp_path, capsys):
    cache = tmp_path / "vectors"
    arguments = ["--model", f"{TINY}:global", digits, "--num-crops", 0, "--probe", 1]
    arguments += ["--batch-size", 1, "--resamples", 100]
    there = ["--output", tmp_path / "out", "--cache", cache]

    def count():
        return sum(lancedb.connect(cache).open_table(path.stem).count_rows() for path in cache.glob("*.lance"))

    command = [sys.executable, *COMPARE, *map(str, (*arguments, *there))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(cache.glob("*.lance/data/*"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = count()
    assert 2 <= kept < 39 and not (tmp_path / "out" / "report.html").exists()
    compare_here(tmp_path, *arguments)
    assert f"/{39 - kept} " in capsys.readouterr().err


@pytest.fixture
def open_report(report, browser):
    """Opens the report at a width in pixels -> the page. It must neither complain nor ask for anything but itself."""
    pages, complaints, requests = [], [], []

    def open_page(width, scheme="light", **context):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **context)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((report[0] / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt') && image.src)")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints and all(url.startswith(("file:", "data:", "blob:")) for url in requests)


def chosen_numbers(page):
    return page.locator(".mark.chosen").evaluate_all("marks => marks.map(mark => mark.dataset.number)")


def test_an_image_is_chosen_by_mouse_by_keyboard_and_by_name_in_both_maps(open_report):
    page = open_report(1400, "dark")
    first, second = page.locator(".map").all()
    assert first.locator(".mark").count() == second.locator(".mark").count() == 30 and not chosen_numbers(page)
    first.locator(".mark").nth(7).click()
    assert chosen_numbers(page) == ["7", "7"]
    assert page.locator(".mark.near").count() == 10 and page.locator("#nearest .found img").count() == 15
    status = page.locator("#chosen").inner_text()
    second.focus()
    ways = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")
    assert any(page.keyboard.press(way) or page.locator("#chosen").inner_text() != status for way in ways)
    assert len(set(chosen_numbers(page))) == 1 != ["7", "7"]
    page.keyboard.press("Escape")
    assert not chosen_numbers(page)
    page.fill("#find", "two/")
    page.press("#find", "Enter")
    assert "two/" in page.locator("#chosen").inner_text()
    assert page.locator("#count").inner_text().startswith("10 of 30")


def test_a_map_zooms_shows_images_and_changes_its_model(open_report):
    page = open_report(800)
    first = page.locator(".map").first
    page.locator("[data-zoom=in]").first.click()
    assert float(first.get_attribute("viewBox").split()[2]) == pytest.approx(1000 / 1.5)
    first.focus()
    page.keyboard.press("0")
    assert first.get_attribute("viewBox") == "0 0 1000 1000"
    page.click("#images")
    assert first.locator("image").count() == 30
    before = first.locator(".mark[data-number='3']").get_attribute("transform")
    page.locator(".pane select").first.select_option("pixels")
    assert first.locator(".mark[data-number='3']").get_attribute("transform") != before


def test_classes_are_filtered_and_the_selection_is_saved_as_csv(open_report):
    page = open_report(1400, accept_downloads=True)
    page.locator("#legend button", has_text="zero").click()
    assert page.locator(".map").first.locator(".mark:not(.dim)").count() == 10
    page.click("#select-shown")
    page.locator("#legend button", has_text="zero").click()
    page.locator(".map").first.locator(".mark[data-number='0']").click()
    page.click("text=Add to the selection")
    with page.expect_download() as download:
        page.click("#export")
    header, *rows = download.value.path().read_text().splitlines()
    assert header == "name,class" and len(rows) == 11 and sum(row.endswith('"zero"') for row in rows) == 10
    page.click("#unselect")
    assert page.locator("#export").is_disabled()


def test_on_a_phone_the_report_is_short_and_answers_beside_the_finger(open_report):
    page = open_report(390, has_touch=True)
    assert page.locator(".map:visible").count() == 1 and page.locator("details[open]").count() == 0
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    mark = page.locator(".map").first.locator(".mark").nth(4)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    bubble = page.locator(".bubble:visible").bounding_box()
    assert bubble["x"] >= 0 and bubble["x"] + bubble["width"] <= 390
    assert bubble["y"] - 40 < box["y"] + box["height"] and box["y"] - 40 < bubble["y"] + bubble["height"]


def test_the_report_begins_with_a_verdict_and_tells_which_model_is_which(report, digits):
    page = (report[0] / "report.html").read_text()
    opening = page.split('id="tasks"')[0]
    assert "On 30 images of 3 classes" in opening and "noise" in opening.split('id="verdict"')[1].split("</p>")[0]
    assert "CLIP’s side of the comparison" in opening and "32 × 32 pixels" in opening and "linear probe" in opening
    assert str(digits.parent) not in page and str(ROOT.parent) not in page and "phi3-embed compare" in page
    for title, highest in (("Copies that find their original", "100%"), ("Share of pairs", r"\d+%")):  # of y axes
        assert re.search(rf'{title}</div>\s*<div class="y"><span>{highest}</span>', page)
    about = {"kind": "phi3_embed", "architecture": "clip_vision_model"}
    meanings = {"mean": "of the crops in full detail and of the global view", "global": "the global view alone"}
    assert all(words in describe(about | {"pooling": pooling}) for pooling, words in meanings.items())


def made_up(values, differences):
    """Results with one task: {model: (value, low, high)}, {(model, model): (difference, low, high, beyond noise)}."""
    names = ("difference", "low", "high", "beyond_noise")
    recall = {
        "group": "Same-class retrieval",
        "name": "recall@1",
        "higher_is_better": True,
        "values": {model: dict(zip(("value", "low", "high"), numbers)) for model, numbers in values.items()},
        "differences": [{"models": list(pair)} | dict(zip(names, numbers)) for pair, numbers in differences.items()],
    }
    models = [{"label": model, "undefined": None} for model in values]
    return {"about": {"images": 250, "classes": 10}, "models": models, "figures": [recall]}


def test_a_verdict_names_the_best_model_or_says_that_none_is():
    values = {"<A>": (0.469, 0.41, 0.53), "B": (0.410, 0.35, 0.47), "C": (0.411, 0.37, 0.45)}
    noise = {("<A>", "B"): (0.059, -0.01, 0.13, False), ("<A>", "C"): (0.058, -0.01, 0.11, False)}
    results = made_up(values, noise)
    assert "no model is better than another beyond noise" in verdict(results, measured_tasks(results))
    ahead = {pair: (*numbers[:1], 0.01, *numbers[2:3], True) for pair, numbers in noise.items()}
    results = made_up(values, ahead)
    words = verdict(results, measured_tasks(results))
    assert "<strong>&lt;A&gt;</strong> is the best of 3 models: ahead of every other beyond noise at 1 of 1" in words
    results = made_up({"B": values["B"]}, {})
    assert "<strong>B</strong> alone was measured" in verdict(results, measured_tasks(results))


def test_where_tests_and_intervals_seem_to_contradict_the_report_says_why():
    values = {"A": (0.469, 0.41, 0.53), "B": (0.410, 0.35, 0.47), "C": (0.411, 0.37, 0.45)}
    tests = {("A", "B"): (0.059, -0.01, 0.13, False), ("C", "A"): (-0.058, -0.1, -0.02, True)}
    task = measured_tasks(made_up(values, tests))[0]
    assert task["line"] == "A 46.9%; within noise: B 41.0%; behind: C 41.1%" and task["level"] == ["A", "B"]
    assert "B is within noise and C, whose value is no lower, is not" in task["note"]
    assert [row["against"] and row["against"]["difference"] for row in task["rows"]] == [None, -0.058, -0.059]
    task = measured_tasks(made_up({"A": values["A"], "C": values["C"]}, dict([list(tests.items())[1]])))[0]
    assert "The interval of C overlaps that of A, and yet it is behind" in task["note"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path


def save_all(folder, classes):
    """{class: images}, as a folder of folders."""
    for name, images in classes.items():
        (folder / "images" / name).mkdir()
        for number, image in enumerate(images):
            image.save(folder / "images" / name / f"{number}.png")


FEW = {
    "one image": ({"a": [noise()]}, "there is one image only"),
    "one class": ({"a": [noise(0), noise(1), noise(2)]}, "there are no two classes"),
    "one image a class": ({f"c{n}": [noise(n)] for n in range(12)}, "no class has two images"),
    "equal images": ({"a": [noise()] * 3, "b": [noise()] * 2}, "there is one image only"),
}


@pytest.mark.parametrize("case", FEW)
def test_a_figure_without_meaning_is_undefined_and_says_why(case, folder):
    classes, reason = FEW[case]
    save_all(folder, classes)
    results = compare_here(folder, "--model", "pixels", folder / "images")
    for name in ("recall@1", "linear-probe accuracy", "NMI"):
        assert reason in figure(results, name)["values"]["pixels"]["undefined"]
    assert results["about"]["left_out"]["copies"] == (4 if case == "equal images" else 0)


def save_vit(path, image_processor=None, pooler=True, scale=1.0):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SMALL_VISION), add_pooling_layer=pooler)
    with torch.no_grad():
        model.embeddings.cls_token += 1
        model.layernorm.weight *= scale
    model.save_pretrained(path)
    size = {"height": 32, "width": 32}
    (image_processor or CLIPImageProcessorPil(size=size, do_center_crop=False)).save_pretrained(path)
    return str(path)


def test_clusters_of_too_few_images_have_a_value_without_an_interval(digits, tmp_path):
    arguments = ["--model", f"{TINY}:tower", "--model", "pixels", digits, "--limit", 12, "--probe", 3]
    results = compare_here(tmp_path, *arguments, "--num-crops", 0)
    for name in ("NMI", "ARI"):
        assert not figure(results, name)["differences"]
        for value in figure(results, name)["values"].values():
            assert -1 <= value["value"] <= 1 and value["low"] is None and "too few images" in value["no_interval"]


def test_intervals_of_clusters_lie_around_their_value_and_hold_the_true_one():
    rng = np.random.default_rng(0)

    def draw(number):  # classes, and clusters that match them at 60%
        classes = rng.integers(0, 5, number)
        return np.stack((classes, np.where(rng.random(number) < 0.5, classes, rng.integers(0, 5, number))), axis=1)

    true, held = ari(draw(100_000)), 0
    for _ in range(8):
        made = summarise([Figure("", "ARI", {"A": draw(100), "B": draw(100)}, {}, ari)], 100, 0)[0]
        for value in made["values"].values():
            assert value["value"] - value["low"] == pytest.approx(value["high"] - value["value"])
            held += value["low"] <= true <= value["high"]
    assert held >= 14  # of 16


def test_a_model_that_gives_nan_has_no_figures_and_the_others_have(folder):
    broken = save_vit(folder / "broken", scale=float("nan"))
    save_all(folder, {name: [noise(n + 3 * k) for n in range(3)] for k, name in enumerate("ab")})
    results = compare_here(folder, "--model", broken, "--model", "pixels", folder / "images")
    values = figure(results, "mAP")["values"]
    assert "6 of 6 vectors hold NaN" in values["broken"]["undefined"] and values["pixels"]["value"] > 0


def test_an_image_that_one_model_refuses_is_left_out_of_all(folder, monkeypatch, capsys):
    strict = save_vit(folder / "strict", CLIPImageProcessorPil(do_resize=False, do_center_crop=False))
    images = [noise(n, (32, 32)) for n in range(4)]
    save_all(folder, {"a": [*images[:2], noise(9, (32, 48))], "b": images[2:]})
    (vectors, made), (_, pixels) = embed_here(folder, [strict, "pixels"], [*images, noise(9, (32, 48))])
    assert list(made.refused) == [Key("4")] and len(vectors) == 4 and np.isfinite(vectors).all()
    assert not pixels.refused and len(pixels.images) == 5
    monkeypatch.setattr(compare, "SHRINKS", {})
    monkeypatch.setitem(compare.CHANGES, "crop", lambda image: image.rotate(90))
    results = compare_here(folder, "--model", strict, "--model", "pixels", folder / "images")
    assert results["about"]["images"] == 4 and list(results["about"]["left_out"]["refused"]) == ["a/2.png"]
    assert "Left out 1 of 5 images:\na/2.png: strict does not take it" in capsys.readouterr().out


def test_a_dataset_on_the_hub_is_compared_as_its_parquet_file_is(hub, folder):
    rows = {"image": [noise(n) for n in range(6)], "label": list("aaabbb")}
    parquet = folder / "train.parquet"
    Dataset.from_dict(rows, Features({"image": ImageFeature(), "label": Value("string")})).to_parquet(parquet)
    hub.add_repo("someone/noise", {"data/train.parquet": parquet})
    arguments = ["--model", "pixels", "--resamples", 100]
    there = ["--cache", folder / "c", "--output", folder / "hub"]
    done = run_fresh(*COMPARE, *arguments, "someone/noise", *there, env=hub.environment(folder / "home"))
    assert done.returncode == 0, done.stderr
    here = compare_here(folder, *arguments, parquet)
    assert json.loads((folder / "hub" / "results.json").read_text())["figures"] == here["figures"]
    assert here["about"]["classes"] == 2 and here["about"]["images"] == 6


BAD = {
    "no such folder": (["--model", "./none"], "There is no folder ./none"),
    "pooling of another model": (["--model", "pixels:mean"], "no pooling 'mean'"),
    "a folder without a model": (["--model", str(ROOT / "tests")], "holds no model"),
    "no such split": (["--model", "pixels", "--split", "val"], "no split 'val', but 'train', 'test'"),
    "not on the hub": (["--model", "nobody/nothing"], "no model of that name to be had"),
    "output is a file": (["--model", "pixels", "--output", str(ROOT / "LICENSE")], "cannot be written to"),
    "cache is no cache": (["--model", "pixels", "--cache", str(ROOT / "LICENSE")], "LICENSE cannot be written to"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_a_line_before_the_work(case, folder, capsys):
    arguments, message = BAD[case]
    given = ["digits", "--limit", "2", "--output", str(folder / "out"), "--cache", str(folder / "c")]
    with pytest.raises(SystemExit) as error:
        main(["compare", *given, *arguments])
    assert error.value.code.startswith("phi3-embed compare: ") and message in error.value.code
    assert "Embedding" not in capsys.readouterr().err


def test_poolings_of_one_pass_are_those_of_the_model(tmp_path):
    images = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((90, 30), (30, 90), (50, 50))]
    specs = [TINY, f"{TINY}:mean", f"{TINY}:global", f"{TINY}:tower"]
    together = embed_here(tmp_path, specs, images, num_crops=2)
    for spec, (vectors, _) in zip(specs, together):
        alone = embed_here(tmp_path / spec[-6:], [spec], images, num_crops=2)
        np.testing.assert_allclose(vectors, alone[0][0], atol=1e-4)
    image_processor = AutoImageProcessor.from_pretrained(TINY, trust_remote_code=True)
    inputs = image_processor(images, num_crops=2, return_tensors="pt")
    for pooling, found in zip(("mean", "global"), together[1:]):
        model = AutoModel.from_pretrained(TINY, trust_remote_code=True, pooling_mode=pooling).eval()
        with torch.no_grad():
            output = model(**inputs)
        np.testing.assert_allclose(found[0], output.pooler_output.numpy(), atol=1e-4)
    assert together[1][1].cost["tokens"] == np.mean(inputs.num_image_tokens.numpy())
    assert together[3][0].shape == (3, 64) and together[0][1].cost["parameters"] == model.num_parameters()


def save_clip(path):
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 12, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL_VISION, projection_dim=8)).save_pretrained(path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(path)
    words = {word: number for number, word in enumerate(["<s>", "</s>", "a", "red", "blue", "square"])}
    core = Tokenizer(models.WordLevel(words, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="</s>", eos_token="</s>").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["clip", "vit", "dinov2", "siglip_vision_model"])
def test_models_of_transformers_embed_by_their_own_processor(name, tmp_path):
    path = save_clip(tmp_path / name) if name == "clip" else save_tower(tmp_path / name, name, image_size=224)
    images = [noise(0), noise(1, (50, 30))]
    vectors, made = embed_here(tmp_path, [path], images)[0]
    model = AutoModel.from_pretrained(path).eval()
    inputs = AutoImageProcessor.from_pretrained(path)(images, return_tensors="pt")
    with torch.no_grad():
        output = model.get_image_features(**inputs) if name == "clip" else model(**inputs)
    np.testing.assert_allclose(vectors, output.pooler_output.numpy(), atol=1e-5)
    assert made.cost["tokens"] == output.last_hidden_state.shape[1]


@pytest.mark.parametrize("has_class_token", [True, False])
def test_without_a_pooler_a_vector_is_the_class_token_or_the_mean_of_the_tokens(has_class_token, tmp_path):
    path = save_vit(tmp_path / "vit", pooler=False)
    if not has_class_token:
        IJepaModel(IJepaConfig(**SMALL_VISION), add_pooling_layer=False).save_pretrained(path)
    vectors, _ = embed_here(tmp_path, [path], [noise()])[0]
    inputs = AutoImageProcessor.from_pretrained(path)([noise()], return_tensors="pt")
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(path, add_pooling_layer=False).eval()(**inputs).last_hidden_state
    np.testing.assert_allclose(vectors, tokens[:, 0] if has_class_token else tokens.mean(1), atol=1e-5)


def test_a_model_that_hides_patches_at_random_is_refused(tmp_path):
    path = save_vit(tmp_path / "mae")
    ViTMAEModel(ViTMAEConfig(**SMALL_VISION)).save_pretrained(path)
    with pytest.raises(ValueError, match="mae cannot be loaded: ViTMAEModel hides patches at random"):
        embed_here(tmp_path, [path], [noise()])


def test_captions_add_text_to_image_retrieval_for_models_with_a_text_side(folder):
    clip = save_clip(folder / "clip")
    save_all(folder, {"a": [noise(n) for n in range(3)]})
    rows = "".join(f"a/{n}.png,a {word} square\n" for n, word in enumerate(["red", "blue", "red blue"]))
    (folder / "images" / "metadata.csv").write_text(f"file_name,caption\n{rows}")
    results = compare_here(folder, "--model", clip, "--model", "pixels", folder / "images")
    values = [figure for figure in results["figures"] if figure["group"] == "Text to image"][1]["values"]
    assert values["clip"]["value"] == 1 and values["pixels"]["undefined"] == "it has no text side"
    assert figure(results, "recall@1")["values"]["pixels"]["undefined"] == "there are no two classes"
    values = [figure for figure in results["figures"] if figure["group"] == "Image to text"][0]["values"]
    assert 0 <= values["clip"]["value"] <= 1 and values["clip"]["n"] == 3


def test_whole_models_are_asked_and_their_answers_kept(digits, folder, embedding_checkpoint, capsys):
    specs = ["--model", TINY, "--model", f"{TINY}:tower", "--model", embedding_checkpoint, "--model", "pixels"]
    arguments = [*specs, digits, "--num-crops", 0, "--probe", 1, "--question", NAME_IT]
    results = compare_here(folder, *arguments)
    exact, loss = figure(results, "exact answers")["values"], figure(results, "loss a token")["values"]
    whole, embedding = ROOT.name, f"{ROOT.name} (tower)"
    assert exact[whole]["value"] > 0.9 and 0 <= loss[whole]["low"] <= loss[whole]["value"] < 0.2
    assert exact[whole] == exact[embedding]  # of one language model, whatever makes the vectors
    assert exact["pixels"]["undefined"] == exact["phi3-embed"]["undefined"] == "it has no language model"
    assert "Answering with the right words" in (folder / "out" / "report.html").read_text()
    # What a model is likeliest to say is what it says.
    answer = pipeline("image-text-to-text", model=TINY, trust_remote_code=True)
    paths = [next((digits / name).glob("[0-9]*.png")) for name in NAMES[:3]]
    settings = {"return_full_text": False, "max_new_tokens": 8, "processor_kwargs": {"num_crops": 0}}
    told = [answer(text=ask(NAME_IT, [Image.open(path)]), **settings)[0]["generated_text"] for path in paths]
    assert [text.strip() for text in told] == [*NAMES[:3]]
    capsys.readouterr()
    assert compare_here(folder, *arguments)["figures"] == results["figures"]
    assert "Answers by" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--question has no right answers here"):
        compare_here(folder, "--model", TINY, digits / "one", "--question", "?")


def test_several_captions_an_image_are_refused(folder):
    save_all(folder, {"a": [noise(n) for n in range(2)]})
    rows = "".join(json.dumps({"file_name": f"a/{n}.png", "caption": ["one", "other"]}) + "\n" for n in range(2))
    (folder / "images" / "metadata.jsonl").write_text(rows)
    with pytest.raises(SystemExit, match=r"(?s)captions are List.*but must be a text an image. Name .*--text-column"):
        compare_here(folder, "--model", "pixels", folder / "images")


def test_a_sentence_transformers_model(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Transformer

    SentenceTransformer(modules=[Transformer(save_clip(tmp_path / "clip"))]).save(str(tmp_path / "st"))
    images = [noise(0), noise(1)]
    vectors, made = embed_here(tmp_path, [str(tmp_path / "st")], images, ["a red square"])[0]
    model = SentenceTransformer(str(tmp_path / "st"))
    np.testing.assert_allclose(vectors, model.encode(images), atol=1e-5)
    np.testing.assert_allclose(made.texts["a red square"], model.encode("a red square"), atol=1e-5)


def test_arithmetic_on_spaces_whose_answer_is_known():
    vectors = unit(np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]]))
    assert same_class_retrieval(vectors, np.array([0, 0, 1, 1]))["mAP"].tolist() == [1] * 4
    assert same_class_retrieval(vectors, np.array([0, 1, 0, -1]))["mAP"].tolist() == pytest.approx([1 / 3, 1 / 3])
    turn = np.array([[0, -1], [1, 0]], np.float32)
    assert linear_cka(gram(vectors), gram(vectors @ turn)) == pytest.approx(1)
    words = np.eye(3, dtype=np.float32)
    found = retrieval(words, np.arange(3), words[[0, 2, 1, 2]], np.array([0, 1, 2, 2]))
    assert found["recall@1"].tolist() == [1, 0, 0] and found["mAP"].tolist() == pytest.approx([1, 1 / 3, 0.5], abs=0.2)
    unanswered = retrieval(words, np.arange(3), words[[0, 2, 1]], np.array([0, -1, -1]))
    assert unanswered["recall@1"].tolist() == [1]  # no caption, no query


# The cookbook's comparison as its page has it, but for the images.
COOKBOOK = """
from transformers import CLIPProcessor, CLIPModel
import torch

# Load pre-trained CLIP model and processor
clip_model = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
clip_processor = CLIPProcessor.from_pretrained("openai/clip-vit-base-patch32")

# Load Phi-3 model (vanilla or fine-tuned)
phi3_model = load_phi3_model(fine_tuned=True)

# Prepare your data
inputs = clip_processor(images=images, return_tensors="pt")

# Generate embeddings using CLIP (for comparison)
with torch.no_grad():
    clip_embeddings = clip_model.get_image_features(**inputs)

# Generate embeddings using Phi-3
phi3_inputs = process_for_phi3_model(images)
with torch.no_grad():
    phi3_embeddings = phi3_model.get_image_features(phi3_inputs)
"""


def test_the_cookbooks_comparison_runs_as_written(tmp_path, monkeypatch):
    (tmp_path / "openai").mkdir()
    save_clip(tmp_path / "openai" / "clip-vit-base-patch32")
    monkeypatch.chdir(tmp_path)
    images = [noise(0), noise(1, (50, 30))]
    names = {"images": images, "load_phi3_model": load_phi3_model, "process_for_phi3_model": process_for_phi3_model}
    exec(COOKBOOK, names)
    assert names["clip_embeddings"].pooler_output.shape == (2, 8)
    expected, _ = embed_here(tmp_path, [f"{TINY}:mean"], images)[0]
    np.testing.assert_allclose(names["phi3_embeddings"].numpy(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="no folder phi3-vision-embed. Make it by"):
        load_phi3_model()
    # A base lies in that folder; here the image embedding alone, of the same weights as the whole model's.
    Phi3EmbedModel.from_pretrained(ROOT).save_pretrained("phi3-vision-embed")
    loaded = [load_phi3_model(), load_phi3_model(fine_tuned=True), load_phi3_model(str(ROOT))]
    assert [hasattr(model, "language_model") for model in loaded] == [False, True, True]
    with torch.no_grad():
        base, *others = (model.get_image_features(process_for_phi3_model(images[:1])) for model in loaded)
    for other in others:
        torch.testing.assert_close(base, other)
