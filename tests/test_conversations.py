"""Conversations about images, as trainings of a whole model take them."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from trainings import make_images
from transformers import AutoProcessor

from phi3_tools.finetune.conversations import _conversations, encode, load_conversations
from phi3_tools.finetune.settings import DataOptions
from phi3_tools.finetune.talk import said

ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what digit is this ?"}]}
SAID = {"role": "assistant", "content": "seven"}
LLAVA = [{"from": "human", "value": "<image>\nwhat digit is this ?"}, {"from": "gpt", "value": "seven"}]


def save(folder, rows):
    Image.new("L", (8, 8)).save(folder / "digit.png")
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder / "data.json")


def load(folder, rows):
    return load_conversations(save(folder, rows), DataOptions(validation=0), 0)[0]


def test_the_hubs_convention_and_llavas_give_the_same(tmp_path):
    rows = [{"images": ["digit.png"], "messages": [ASKED, SAID]}, {"image": "digit.png", "conversations": LLAVA}]
    rows.append({"images": ["digit.png"], "messages": [{"role": "user", "content": LLAVA[0]["value"]}, SAID]})
    splits = load(tmp_path, rows * 2)
    found = [row for split in splits.values() for row in split]
    assert len(found) == 6 and all(row["messages"] == found[0]["messages"] for row in found)
    assert said(found[0]) == "seven"


def test_the_answer_alone_is_learnt_and_must_fit_into_the_context(tmp_path):
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    (row, *_) = load(tmp_path, [{"images": ["digit.png"], "messages": [ASKED, SAID]}] * 2)["train"]
    inputs = encode(row, processor, 0, 400)
    learnt = inputs["labels"][inputs["labels"] != -100]
    assert processor.decode(learnt, skip_special_tokens=True).strip() == "seven"
    with pytest.raises(ValueError, match="takes .* tokens, and the language model reads 20"):
        encode(row, processor, 0, 20)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    (row, *_) = load(tmp_path, [{"images": ["digit.png"], "messages": [ASKED | {"role": "assistant"}]}] * 2)["train"]
    with pytest.raises(ValueError, match="row . of 'train' in .*data.json: An image is in a turn of 'assistant'"):
        encode(row, processor, 0, 400)


def test_what_is_left_out_of_classes_is_named_once(tmp_path, capfd):
    make_images(tmp_path, ("cat", "dog"), 5)
    (tmp_path / "notes.txt").write_text("of no use")
    load_conversations(str(tmp_path), DataOptions(validation=0), 0)
    assert "".join(capfd.readouterr()).count("Left out 1 of 11 files") == 1


@pytest.mark.parametrize("caption", [7, ["one", "other"]])
def test_captions_that_are_no_texts_are_an_error_of_ours(tmp_path, caption):
    make_images(tmp_path, ("cat",), 2)
    rows = "".join(json.dumps({"file_name": f"cat/{n}.png", "caption": caption}) + "\n" for n in range(2))
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="captions of .* hold .*, but each must be a text. Name a column"):
        load_conversations(str(tmp_path), DataOptions(validation=0), 0)


def test_a_dataset_on_the_hub_opens_no_file_of_the_machine(tmp_path, monkeypatch):
    save(tmp_path, [])
    monkeypatch.chdir(tmp_path)
    row = {"images": [{"path": "digit.png", "bytes": None}], "messages": [ASKED, SAID]}
    with pytest.raises(ValueError, match="outside of the data's own folder"):
        _conversations([row], "train", "data")
    row["images"][0]["bytes"] = Path("digit.png").read_bytes()
    assert len(_conversations([row], "train", "data")) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["digit.png"] * 2, "messages": [ASKED, SAID]}, "it has 2 images, and 1 places for them"),
        ({"images": [], "messages": [ASKED, SAID]}, "it has 0 images, and 1 places"),
        ({"image": "digit.png", "conversations": LLAVA[:1]}, "nothing in it is said by the assistant"),
        ({"images": [], "messages": [SAID | {"role": "tool"}]}, "the role 'tool'"),
        ({"images": ["../digit.png"], "messages": [ASKED, SAID]}, "outside of the data's own folder"),
        ({"image": "digit.png", "conversations": [{"from": "human"}]}, "it is {'image'.*, but must have `messages`"),
        ("words", "it is 'words', but must have `messages`"),
        ({"images": ["none.png"], "messages": [ASKED, SAID]}, "there is no image .*none.png"),
    ],
)
def test_a_conversation_that_does_not_serve_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"row 0 of 'train' in .*data.json: .*{message}"):
        load(tmp_path, [row])


def test_a_file_that_holds_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.json holds {'image': .*, but must hold a list of conversations"):
        load(tmp_path, {"image": "digit.png", "conversations": LLAVA})
