"""How checkpoints embed: recipes as data, and sentence-transformers by them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sentence_transformers import SentenceTransformer
from spaces import last_token
from transformers import AutoModel, AutoProcessor

from phi3_tools.checkpoint import recipes
from phi3_tools.checkpoint.convert import convert

LAST_TOKEN = [name for name in recipes.names() if recipes.load(name).pooling == "lasttoken"]
IMAGE = Image.linear_gradient("L").convert("RGB").resize((90, 60))
OTHER = IMAGE.rotate(180)

# What the authors' own code gives to the processor, for the text "a cat", for an image, and for both.
WRITTEN = {
    "vlm2vec": (
        "a cat",
        "<|image_1|> Represent the given image.",
        "<|image_1|> Represent the given image with the following question: a cat",
    ),
    "unime": (
        "<|user|>\na cat\nSummary above sentence in one word: <|end|>\n<|assistant|>\n",
        "<|user|>\n<|image_1|>\nSummary above image in one word: <|end|>\n<|assistant|>\n",
        None,
    ),
    "dse": ("a cat</s>", "<|image_1|>\nWhat is shown in this image?</s>", None),
    "vdocretriever": ("a cat</s>", "<|image_1|>\nWhat is shown in this image?</s>", None),
}
QUERIES = {
    "vlm2vec": "Find me an everyday image that matches the given caption: a cat",
    "dse": "query: a cat</s>",
    "vdocretriever": "Instruct: I’m looking for an image that answers the question.\nQuery: a cat</s>",
}


@pytest.fixture(scope="module")
def converted(whole_checkpoint):
    return Path(whole_checkpoint)


@pytest.fixture(scope="module")
def by_recipe(converted, tmp_path_factory):
    """The folder of a recipe -> what sentence-transformers makes of it, and what a hand makes of a text."""
    model = AutoModel.from_pretrained(converted, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)

    def load(name):
        recipe = recipes.load(name)
        folder = shutil.copytree(converted, tmp_path_factory.mktemp("recipe") / name)
        (folder / "additional_chat_templates" / "embedding.jinja").write_text(recipes.chat_template(recipe))
        recipes.write_files(recipe, 96, folder)

        def by_hand(text, *images):
            num_crops = recipe.num_crops or 16
            return last_token(model, processor, text=text, images=list(images) or None, num_crops=num_crops)

        return SentenceTransformer(str(folder), trust_remote_code=True), by_hand

    return load


@pytest.mark.parametrize("name", LAST_TOKEN)
def test_sentence_transformers_gives_the_last_token_of_what_the_authors_write(name, by_recipe):
    model, by_hand = by_recipe(name)
    text, image, both = WRITTEN[name]
    wanted = {"text": by_hand(text), "image": by_hand(image, IMAGE)}
    np.testing.assert_allclose(model.encode("a cat"), wanted["text"], atol=1e-6)
    np.testing.assert_allclose(model.encode(IMAGE), wanted["image"], atol=1e-6)
    mixed = model.encode(["a cat", IMAGE, "a"])
    np.testing.assert_allclose(mixed[:2], [wanted["text"], wanted["image"]], atol=1e-5)
    if both:
        np.testing.assert_allclose(model.encode({"text": "a cat", "image": IMAGE}), by_hand(both, IMAGE), atol=1e-6)
    else:
        with pytest.raises(Exception, match="has no form for text with image"):
            model.encode({"text": "a cat", "image": IMAGE})
    if name in QUERIES:
        np.testing.assert_allclose(model.encode_query("a cat"), by_hand(QUERIES[name]), atol=1e-6)
    if name == "dse":
        np.testing.assert_allclose(model.encode_document("a cat"), by_hand("passage: a cat</s>"), atol=1e-6)
    np.testing.assert_allclose(model.encode_document(IMAGE), wanted["image"], atol=1e-6)
    with pytest.raises(Exception, match="A text is empty, so it has no vector"):
        model.encode(["a cat", " "])


def test_a_model_is_saved_and_loaded_again_with_its_recipe(by_recipe, tmp_path):
    model, by_hand = by_recipe("vlm2vec")
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    for what in ("a cat", IMAGE, {"text": "a cat", "image": IMAGE}):
        np.testing.assert_array_equal(again.encode(what), model.encode(what))
    asked = model.encode("a cat", prompt="Find it: ")
    np.testing.assert_allclose(asked, by_hand("Find it: a cat"), atol=1e-6)
    np.testing.assert_allclose(
        model.encode(IMAGE, prompt="Find it."), by_hand("<|image_1|> Find it.", IMAGE), atol=1e-6
    )


def test_the_card_says_which_prompts_and_pooling_made_the_vectors(converted):
    card = (converted / "README.md").read_text()
    recipe = recipes.load("vlm2vec")
    for text in (recipe.source, recipe.note, "Represent the given image.", *recipe.prompts.values(), "lasttoken"):
        assert text in card
    assert "--recipe vlm2vec --whole" not in card and "sentence-transformers" in card


def test_the_mean_of_the_image_tokens_is_a_recipe_of_a_whole_checkpoint_too(converted, tmp_path, capsys):
    convert(str(converted.parent / "source"), tmp_path / "whole", whole=True, recipe="mean")
    convert(str(converted.parent / "source"), tmp_path / "alone")
    vectors = [
        SentenceTransformer(str(tmp_path / name), trust_remote_code=True).encode(IMAGE) for name in ("whole", "alone")
    ]
    np.testing.assert_allclose(*vectors, atol=1e-6)


@pytest.mark.parametrize(
    "name, checkpoint", [("vlm2vec", "TIGER-Lab/VLM2Vec-LoRA"), ("dse", "MrLight/dse-phi35-vidore-ft")]
)
def test_known_checkpoints_have_their_recipe(name, checkpoint):
    assert recipes.known_for(checkpoint).name == name
    assert recipes.known_for("someone/else") is None


def test_a_checkpoint_of_one_recipe_converted_by_another_is_told(hub, converted, tmp_path, monkeypatch, capsys):
    """Before anything is fetched; tests are offline."""
    with pytest.raises(ValueError, match="cannot be reached"):
        convert("TIGER-Lab/VLM2Vec-Full", tmp_path / "output", whole=True, recipe="dse")
    assert "was trained by the recipe vlm2vec, but is converted by dse" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot be reached"):
        convert("TIGER-Lab/VLM2Vec-Full", tmp_path / "output", whole=True)
    assert "recipe" not in capsys.readouterr().out


def test_an_unknown_checkpoint_is_asked_for_a_recipe_and_none_is_guessed(converted, tmp_path, capsys):
    convert(str(converted.parent / "source"), tmp_path / "output", whole=True)
    assert "No recipe is known for" in capsys.readouterr().out
    assert not list((tmp_path / "output").glob("*odules.json"))
    assert not (tmp_path / "output" / "additional_chat_templates").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not in Phi-3-vision's layout"):
        convert(str(tmp_path), tmp_path / "other", whole=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="goes with `--whole`"):
        convert(str(converted.parent / "source"), tmp_path / "other", recipe="dse")


def test_a_recipe_of_ones_own_is_a_json_file(converted, tmp_path):
    own = json.loads((recipes.RECIPES / "vlm2vec.json").read_text()) | {
        "title": 'My "own" {{ recipe }}',
        "text": 'say "it": {text} \\ {{ 7 * 7 }}',
        "checkpoints": [],
    }
    (tmp_path / "own.json").write_text(json.dumps(own))
    convert(str(converted.parent / "source"), tmp_path / "output", whole=True, recipe=str(tmp_path / "own.json"))
    processor = AutoProcessor.from_pretrained(tmp_path / "output", trust_remote_code=True)
    said = processor.apply_chat_template([{"role": "user", "content": "a cat"}], chat_template="embedding")
    assert said == 'say "it": a cat \\ {{ 7 * 7 }}'  # a form is text, and no code
    assert 'My "own" {{ recipe }}' in (tmp_path / "output" / "README.md").read_text()


def test_the_recipe_in_the_docs_is_one(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL)
    (tmp_path / "my.json").write_text(example)
    assert recipes.load(str(tmp_path / "my.json")).num_crops == 4


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"text": "{txt}"}, r"`text` has \['txt'\], but must be of \['prompt', 'text'\]"),
        ({"text": "nothing of it"}, "`text` has"),
        ({"image": 7}, "`image` is 7, but must be a text"),
        ({"image_tag": "<image>"}, "`image_tag` is '<image>', but must have {number}"),
        ({"pooling": "cls"}, "`pooling` is 'cls', but must be one of lasttoken, mean"),
        ({"pooling": "mean"}, "`mean` goes without any"),
        ({"num_crops": -1}, "`num_crops` is -1"),
        ({"num_crops": 257}, "`num_crops` is 257, but must be a number of crops up to 256"),
        ({"prompts": {"query": 7}}, "`prompts` is .*, but must be texts by name"),
        (
            {"text": "{text}", "image": "{images}", "text_with_image": None, "without_prompt": {}},
            "no form has {prompt}",
        ),
        ({"without_prompt": {"video": "x"}}, "`without_prompt` names 'video', a form that is not there"),
        ({"new": 1}, "Missing: nothing. Unknown: new"),
    ],
)
def test_a_recipe_that_is_not_as_it_should_be_is_told(changes, said, tmp_path):
    own = json.loads((recipes.RECIPES / "vlm2vec.json").read_text()) | changes
    (tmp_path / "own.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match=said) as raised:
        recipes.load(str(tmp_path / "own.json"))
    assert "\n" not in str(raised.value)


def test_files_that_are_no_recipes_are_told(tmp_path):
    for name in ("nothing", "../recipes/dse", str(tmp_path)):
        with pytest.raises(
            ValueError, match="There is no recipe .*Give one of dse, mean, unime, vdocretriever, vlm2vec"
        ):
            recipes.load(name)
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(ValueError, match="is no JSON|must hold a JSON object"):
            recipes.load(str(tmp_path / "own.json"))
