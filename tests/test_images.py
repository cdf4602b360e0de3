"""Images of every kind of source, as rows of one layout."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

from phi3_tools.images import (
    _own_columns,
    image_bytes,
    image_hash,
    load_images,
    load_rows,
    make_shards,
    read_image,
    read_shard,
    readable,
)


def png(shade=0, size=(9, 9)):
    file = io.BytesIO()
    PILImage.new("L", size, shade).save(file, "PNG")
    return file.getvalue()


def make_images(folder, *names):
    """Images of different shades -> the folder."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (20, 10), 20 * number).save(path)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images each."""
    return make_images(tmp_path / "set", "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")


def names(source, **kwargs):
    return [row["name"] for split in load_images(source, **kwargs).values() for row in split]


# Folders


def test_subfolders_are_classes(folder):
    split = load_images(folder)["train"]
    assert split.features["label"].names == ["cat", "dog"] and split["label"] == [0, 0, 1, 1]
    assert split["name"] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    image = read_image(split[1]["image"])
    assert image.mode == "RGB" and image.size == (20, 10) and image.getpixel((0, 0)) == (20, 20, 20)
    assert len({image_hash(image) for image in split["image"]}) == 4


def test_splits_and_a_stream_of_them(folder):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            (folder / label / ("0.png" if split == "train" else "1.png")).rename(folder / split / label / "x.png")
    for streaming in (False, True):
        for split in load_images(folder, streaming=streaming).values():
            assert [row["name"] for row in split] == ["cat/x.png", "dog/x.png"]
    assert set(load_images(folder)) == {"train", "test"}
    assert list(load_rows(folder)["name"]) == [
        f"{split}/{n}" for split in ("test", "train") for n in ("cat/x.png", "dog/x.png")
    ]


def test_images_and_classes_named_like_splits_hide_none(folder):
    (folder / "cat" / "0.png").rename(folder / "cat" / "my-test.png")
    (folder / "dog").rename(folder / "train")
    split = load_images(folder)["train"]
    assert split.features["label"].names == ["cat", "train"] and len(split) == 4


@pytest.mark.parametrize("name", ["set [ab]", "run*", "alone [1]", "a::b", "50%", "what?"])
def test_names_are_taken_as_they_stand(name, tmp_path):
    wanted = ["mine/1::2.png", "mine/[0].png"]
    make_images(tmp_path / name, *wanted)
    neighbour = {"set [ab]": "set a", "run*": "run_other", "what?": "whats"}.get(name, "other")
    make_images(tmp_path / neighbour, "other/x.png")
    for streaming in (False, True):
        assert names(tmp_path / name, streaming=streaming) == wanted
    rows = Dataset.from_dict({"image": [PILImage.new("L", (9, 9))] * 3}, Features({"image": Image()}))
    rows.to_parquet(tmp_path / "rows")
    (tmp_path / "rows").rename(tmp_path / f"{name}.parquet")
    assert len(load_images(tmp_path / f"{name}.parquet")["train"]) == 3


def test_files_of_all_formats_are_taken_by_name_or_content_or_named(folder, capsys):
    image = PILImage.radial_gradient("L").convert("RGB").resize((32, 32))
    image.save(folder / "cat" / "new.avif")
    image.save(folder / "cat" / "stereo.mpo", "MPO", save_all=True, append_images=[image])
    image.save(folder / "cat" / "no-suffix", "PNG")
    (folder / "cat" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (folder / "cat" / "film.mpg").write_bytes(b"no image")
    (folder / "cat" / ".DS_Store").write_bytes(b"of a desktop")
    split = load_images(folder)["train"]
    assert {"cat/new.avif", "cat/stereo.mpo", "cat/no-suffix", "cat/phone.heic"} <= set(split["name"])
    assert "film.mpg: it is no image" in (said := capsys.readouterr().out) and "Left out 1 of 9 files" in said
    assert len(readable(split, skip_broken=True)) == 7
    assert "cat/phone.heic: it cannot be read as an image" in capsys.readouterr().out


def test_links_are_followed_once_and_dead_ones_are_named(folder, tmp_path, capsys):
    make_images(tmp_path / "elsewhere", "bird.png")
    os.symlink(tmp_path / "elsewhere", folder / "bird")
    os.symlink(tmp_path / "elsewhere" / "bird.png", folder / "cat" / "linked.png")
    os.symlink(tmp_path / "nowhere.png", folder / "cat" / "dangling.png")
    os.symlink(folder, folder / "dog" / "loop")
    os.mkfifo(folder / "dog" / "pipe.png")
    assert {"bird/bird.png", "cat/linked.png"} <= set(names(folder))
    said = capsys.readouterr().out
    assert "dangling.png: it is a link that leads nowhere" in said and "pipe.png: it is no regular file" in said
    assert (
        f"loop: its images are taken already, because it is the same folder as {folder}\n" in said
        and "Left out 3 of 9 files" in said
    )


def test_photographs_of_phones_are_read(folder):
    pytest.importorskip("pillow_heif")
    read_image(load_images(folder)["train"][0]["image"])  # from here on Pillow knows the format
    PILImage.new("RGB", (64, 48), (200, 100, 50)).save(folder / "cat" / "phone.heic")
    row = next(row for row in load_images(folder)["train"] if row["name"] == "cat/phone.heic")
    image = read_image(row["image"])
    assert image.size == (64, 48) and np.abs(np.asarray(image, int) - (200, 100, 50)).max() < 10


def test_a_name_that_is_not_utf8_is_named(folder, capsys):
    (folder / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    assert len(names(folder)) == 4
    assert "caf?.png: its name is not UTF-8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "labels, classes", [(["b", "a"], ["a", "b"]), ([10, 9], ["9", "10"]), ([True, False], ["False", "True"])]
)
def test_metadata_with_words_numbers_or_truth_values_as_labels_and_captions(folder, labels, classes, capsys):
    rows = "".join(f"cat/{number}.png,{label},a {label}\n" for number, label in enumerate(labels))
    (folder / "metadata.csv").write_text(f"file_name,label,caption\n{rows}gone.png,{labels[0]},x\n")
    split = load_images(folder)["train"]
    assert split.features["label"].names == classes and split["label"] == [1, 0]
    assert split["text"] == [f"a {label}" for label in labels]
    said = capsys.readouterr().out  # what it does not list, and what is not there
    assert "dog/0.png: " in said and "does not list it" in said and "gone.png: " in said and "Left out 3 of" in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file_name,label\ncat/0.png,ä\n".encode("latin-1"), "metadata.csv is not UTF-8"),
        (b"file_name,text\ncat/0.png,a\ncat/0.png,b\n", "cat/0.png of .* is listed more than once"),
    ],
)
def test_metadata_that_would_be_misread_is_refused(folder, text, told):
    (folder / "metadata.csv").write_bytes(text)
    with pytest.raises(ValueError, match=told):
        load_images(folder)


def test_metadata_of_one_subfolder_hides_no_other(folder):
    (folder / "cat" / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "b"}\n'
    )
    split = load_images(folder)["train"]
    assert split["text"] == ["a", "b", None, None] and "label" not in split.features


def test_what_is_kept_of_an_image_is_not_taken_for_its_successor(folder):
    first, same = (load_images(folder)["train"]._fingerprint for _ in range(2))
    (folder / "cat" / "0.png").write_bytes(png(99))
    assert first == same != load_images(folder)["train"]._fingerprint


# Tables and tar files


def test_a_parquet_file_with_columns_of_other_names(tmp_path):
    rows = {"picture": [PILImage.new("RGB", (9, 9))] * 3, "score": [0.5, 1.5, 2.5]}
    path = tmp_path / "data.parquet"
    Dataset.from_dict(rows, Features({"picture": Image(), "score": Value("float32")})).to_parquet(path)
    split = load_images(path, label_column="score")["train"]
    assert split["label"] == [0.5, 1.5, 2.5] and split["name"] == ["row 0", "row 1", "row 2"]
    with pytest.raises(ValueError, match="no column 'mark', but 'score'.*--label-column"):
        load_images(path, label_column="mark")
    with pytest.raises(ValueError, match="'score' of .* holds no images"):
        load_images(path, image_column="score")


def test_parquet_files_without_rows_and_broken_ones_are_named(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet holds no images"):
        load_images(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="x.parquet cannot be read as parquet"):
        load_images(tmp_path)


def test_parquet_of_plain_bytes_and_of_many_files_with_splits(tmp_path, capfd):
    table = pa.table({"photo": pa.array([png(0), png(1), None], pa.binary()), "label": ["x", "y", "x"]})
    for name in ("train-00000", "train-00001", "test-00000"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for streaming in (False, True):
        splits = load_images(tmp_path, streaming=streaming)
        assert {split: len(list(rows)) for split, rows in splits.items()} == {"test": 3, "train": 6}
        assert image_bytes(next(iter(splits["test"]))["image"]) == png(0)
    assert load_images(tmp_path)["train"].features["label"].names == ["x", "y"]
    assert "Downloading" not in "".join(capfd.readouterr())  # nothing is


def write_image_column(path, *images):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
    pq.write_table(pa.table({"image": pa.array(images, kind)}).replace_schema_metadata(about), path)


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
def test_rows_without_an_image_are_broken_images(nothing, tmp_path, capsys):
    good = {"bytes": png(), "path": None}
    write_image_column(tmp_path / "x.parquet", good, nothing, good)
    split = load_images(tmp_path / "x.parquet")["train"]
    with pytest.raises(ValueError, match="1 of 3 images are broken(?s:.*)row 1: the row holds no image"):
        readable(split)
    assert len(readable(split, skip_broken=True)) == 2


@pytest.mark.parametrize("path", ["{outside}", "../secret.png", "link/secret.png", "/proc/self/environ"])
def test_data_does_not_decide_which_files_are_opened(path, tmp_path):
    make_images(tmp_path, "secret.png", "data/own.png")
    os.symlink(tmp_path, tmp_path / "data" / "link")
    (tmp_path / "data" / "own.png").rename(tmp_path / "data" / "own")
    rows = ({"bytes": None, "path": path.format(outside=tmp_path / "secret.png")}, {"bytes": None, "path": "own"})
    write_image_column(tmp_path / "data" / "x.parquet", *rows)
    table = tmp_path / "data" / "x.parquet"
    (shard,) = make_shards(table, 64)
    rows = [row["image"] for row in read_shard(shard)]
    for secret, own in (load_images(table)["train"]["image"][:], rows):
        with pytest.raises(ValueError, match="names a file outside of the data's own folder"):
            image_bytes(secret)
        assert read_image(own).size == (20, 10)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub_opens_no_file_of_the_machine(streaming, tmp_path):
    make_images(tmp_path, "secret.png")
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": png(), "path": "own.png"}]
    split = Dataset.from_dict({"image": rows}, Features({"image": Image(decode=False)})).cast_column("image", Image())
    split = split.to_iterable_dataset() if streaming else split
    secret, own = _own_columns(split, dict.fromkeys(("image", "label", "text")), "someone/data")
    with pytest.raises(ValueError, match="names a file outside of the data's own folder"):
        image_bytes(secret["image"])
    assert image_bytes(own["image"]) == png()


def write_tar(path, members):
    """A tar file of members and their contents, of which `None` is that of a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            if content is None:
                about.type, about.linkname = tarfile.SYMTYPE, "/etc/hostname"
            about.size = len(content or b"")
            archive.addfile(about, io.BytesIO(content or b""))


def test_a_webdataset_with_captions_and_classes(tmp_path):
    first, second = {"a.png": png(1), "a.txt": b"a caption\n", "a.cls": b"3"}, {"b.png": png(2), "b.cls": b"1"}
    write_tar(tmp_path / "x.tar", first | second)
    split = load_images(tmp_path / "x.tar")["train"]
    assert split["name"] == ["a.png", "b.png"] and split["text"] == ["a caption", None]
    assert split.features["label"].names == ["1", "3"] and split["label"] == [1, 0]
    assert image_bytes(split[1]["image"]) == png(2)
    assert [image_bytes(row["image"]) for shard in make_shards(tmp_path, 1) for row in read_shard(shard)] == [
        png(1),
        png(2),
    ]


def test_members_of_a_tar_file_that_are_no_images_are_named(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", dict.fromkeys(("a.png", "a.json", "film.mpg"), png()) | {"link.png": None})
    assert names(tmp_path / "x.tar") == ["a.png"]
    said = capsys.readouterr().out
    assert "Left out 2 of 4 members" in said and "#film.mpg: " in said and "#link.png: " in said


def test_tables_beside_images_are_left_out_and_named(folder, capsys):
    write_image_column(folder / "x.parquet", {"bytes": png(), "path": None})
    assert len(names(folder)) == 4
    assert "x.parquet: it lies beside images" in capsys.readouterr().out


# Built in, the Hub, and nothing at all


def test_pages_of_small_text_are_built_in_and_always_the_same():
    first, again = (load_images("small-text")["train"] for _ in range(2))
    assert [image_hash(row["image"]) for row in first] == [image_hash(row["image"]) for row in again]
    assert len({image_hash(row["image"]) for row in first}) == 100 and len(first.features["label"].names) == 10
    page = np.asarray(read_image(first[0]["image"]))
    assert page.shape == (672, 672, 3) and 0 < (page < page[0, 0] - 20).mean() < 0.1  # ink is little


def test_the_digits():
    splits = load_images("digits")
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    assert read_image(splits["test"][0]["image"]).size == (8, 8)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no/such/folder", "There is no"),
        ("x.parquet", "There is no"),
        ("nobody/nothing", "There is no folder nobody/nothing, and no dataset of that name to be had from the Hub"),
        ("empty", "holds no images"),
    ],
)
def test_a_source_without_images_is_an_error_that_says_what_is_accepted(tmp_path, name, message, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{message}(?s:.*)Give 'digits'"):
        load_images(name)


def test_a_source_without_classes_says_what_would_give_it_some(folder):
    assert "label" in load_images(folder, needs_labels=True)["train"].features
    make_images(folder, "flat.png")
    with pytest.raises(ValueError, match="has no labels. Its images lie in no subfolders, or not all at one depth"):
        load_images(folder, needs_labels=True)


# Opening


def test_broken_images_are_named_and_left_out_on_request_only(folder, capsys):
    (folder / "dog" / "bad.jpg").write_bytes(b"no image")
    (folder / "dog" / "lfs.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    split = load_images(folder)["train"]
    with pytest.raises(ValueError, match=r"(?s)2 of 6 images are broken.*--skip-broken.*dog/bad.jpg: .*git lfs pull"):
        readable(split)
    assert readable(split, skip_broken=True)["label"] == [0, 0, 1, 1]
    assert "dog/bad.jpg" in capsys.readouterr().out


def tiff_with_a_lost_part():
    file = io.BytesIO()
    PILImage.new("L", (9, 9)).save(file, "TIFF", tiffinfo={0xA005: 8})
    return file.getvalue()


STUMBLES = {
    "cut.qoi": (b"qoif" + bytes([0, 0, 0, 9, 0, 0, 0, 9, 3, 0]), IndexError),
    "tag.tif": (tiff_with_a_lost_part(), KeyError),
    "header.dds": (b"DDS " + bytes([124, 0, 0, 0]) + bytes(120), NotImplementedError),
}


@pytest.mark.parametrize("name", STUMBLES)
def test_a_file_at_which_pillow_stumbles_is_a_broken_image(name, folder, capsys):
    content, error = STUMBLES[name]
    (folder / "dog" / name).write_bytes(content)
    with pytest.raises(error):
        ImageOps.exif_transpose(PILImage.open(folder / "dog" / name))
    assert len(readable(load_images(folder)["train"], skip_broken=True)) == 4
    assert f"dog/{name}: it cannot be read as an image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "number"), [(300, np.int32), (0.5, np.float32), (-1, np.float32), (np.nan, np.float32)]
)
def test_numbers_of_an_unknown_range_are_refused(value, number, tmp_path):
    PILImage.fromarray(np.full((4, 4), value, number)).save(tmp_path / "numbers.tiff")
    with pytest.raises(ValueError, match="it cannot be read as an image: .*must be in 0..255"):
        read_image(load_images(tmp_path)["train"][0]["image"])
