"""Pictures of every kind of source, in one layout."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from phi3_tools.pictures import load_pictures, picture_hash, read_picture, readable  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Two classes of two pictures each."""
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(2):
            PILImage.new("L", (20, 10 + number), 50 * number).save(tmp_path / label / f"{number}.png")
    return tmp_path


def test_subfolders_are_classes(folder):
    split = load_pictures(folder)["train"]
    assert split.features["label"].names == ["cat", "dog"] and split["label"] == [0, 0, 1, 1]
    assert split["name"] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    picture = read_picture(split[1]["image"])
    assert picture.mode == "RGB" and picture.size == (20, 11)
    assert picture_hash(split[0]["image"]) == picture_hash(split[2]["image"]) != picture_hash(split[1]["image"])


def test_16_bit_pictures_keep_their_greys(tmp_path):
    PILImage.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "grey.png")
    picture = read_picture(load_pictures(tmp_path)["train"][0]["image"])
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("value", "number"), [(300, np.int32), (0.5, np.float32), (-1, np.float32), (np.nan, np.float32)]
)
def test_numbers_of_an_unknown_range_are_refused(value, number, tmp_path):
    PILImage.fromarray(np.full((4, 4), value, number)).save(tmp_path / "numbers.tiff")
    with pytest.raises(ValueError, match="cannot be read as a picture: its values .* must be in 0..255: scale it"):
        read_picture(load_pictures(tmp_path)["train"][0]["image"])


def test_numbers_in_0_to_255_are_greys(tmp_path):
    PILImage.fromarray(np.full((4, 4), 128, np.float32)).save(tmp_path / "grey.tiff")
    picture = read_picture(load_pictures(tmp_path)["train"][0]["image"])
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (128, 128, 128)


def test_pages_of_small_text_are_built_in_and_always_the_same():
    first, again = (load_pictures("small-text")["train"] for _ in range(2))
    assert [picture_hash(row["image"]) for row in first] == [picture_hash(row["image"]) for row in again]
    assert len({picture_hash(row["image"]) for row in first}) == 100 and len(first.features["label"].names) == 10
    page = np.asarray(read_picture(first[0]["image"]))
    assert page.shape == (672, 672, 3) and 0 < (page < page[0, 0] - 20).mean() < 0.1  # ink is little


def test_splits_and_a_stream_of_them(folder):
    for split in ("train", "test"):
        (folder / split).mkdir()
        for label in ("cat", "dog"):
            (folder / split / label).mkdir()
            (folder / label / ("0.png" if split == "train" else "1.png")).rename(folder / split / label / "x.png")
    for streaming in (False, True):
        for split in load_pictures(folder, streaming=streaming).values():
            assert [row["name"] for row in split] == ["cat/x.png", "dog/x.png"]
    assert set(load_pictures(folder)) == {"train", "test"}


def test_pictures_and_classes_named_like_splits_hide_none(folder):
    (folder / "cat" / "0.png").rename(folder / "cat" / "my-test.png")
    (folder / "dog").rename(folder / "train")
    split = load_pictures(folder)["train"]
    assert split.features["label"].names == ["cat", "train"] and len(split) == 4


@pytest.mark.parametrize("labels, names", [(["b", "a"], ["a", "b"]), ([7, 5], ["5", "7"])])
def test_metadata_with_words_or_numbers_as_labels_and_captions(folder, labels, names):
    rows = "".join(f"cat/{number}.png,{label},a {label}\n" for number, label in enumerate(labels))
    (folder / "metadata.csv").write_text(f"file_name,label,caption\n{rows}")
    split = load_pictures(folder)["train"]
    assert split.features["label"].names == names and split["label"] == [1, 0]
    assert split["text"] == [f"a {label}" for label in labels]


def test_a_parquet_file_with_columns_of_other_names(tmp_path):
    rows = {"picture": [PILImage.new("RGB", (9, 9))] * 3, "score": [0.5, 1.5, 2.5]}
    path = tmp_path / "data.parquet"
    Dataset.from_dict(rows, Features({"picture": Image(), "score": Value("float32")})).to_parquet(path)
    split = load_pictures(path, label_column="score")["train"]
    assert split["label"] == [0.5, 1.5, 2.5] and split["name"] == ["row 0", "row 1", "row 2"]
    with pytest.raises(ValueError, match="no column 'mark', but 'picture', 'score'"):
        load_pictures(path, label_column="mark")
    with pytest.raises(ValueError, match="'score' holds no images"):
        load_pictures(path, image_column="score")


def test_the_digits():
    splits = load_pictures("digits")
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    assert read_picture(splits["test"][0]["image"]).size == (8, 8)


@pytest.mark.parametrize("name, message", [("no/such/folder", "There is no"), ("empty", "cannot be read as pictures")])
def test_a_source_without_pictures_is_an_error_that_says_what_is_accepted(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{message}.*Give 'digits'"):
        load_pictures(tmp_path / name)


def test_broken_pictures_are_named_and_left_out_on_request_only(folder, capsys):
    (folder / "dog" / "bad.jpg").write_bytes(b"no picture")
    split = load_pictures(folder)["train"]
    with pytest.raises(ValueError, match=r"(?s)1 of 5 pictures are broken.*--skip_broken.*dog/bad.jpg: "):
        readable(split)
    assert readable(split, skip_broken=True)["label"] == [0, 0, 1, 1]
    assert "dog/bad.jpg" in capsys.readouterr().out
