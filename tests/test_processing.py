"""Image processor and processor: what they take, what they give, and what they refuse."""

import copy
import io
import os
import re
import struct
import tracemalloc
import zlib

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor, Phi3EmbedProcessor, hd_target_size
from PIL import Image, ImageCms
from transformers import AutoProcessor, PreTrainedTokenizerFast

RGB = golden.image(1, 50, 70)
SMALL = {"size": {"height": 28, "width": 28}, "num_img_tokens": 4}


@pytest.fixture(scope="module")
def image_processor():
    return Phi3EmbedImageProcessor(num_crops=4)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Phi3EmbedProcessor(Phi3EmbedImageProcessor(num_crops=4, **SMALL), tokenizer)


def views(image_processor, images, **kwargs):
    return image_processor(images, return_tensors="pt", **kwargs)["pixel_values"]


# Images in


@pytest.mark.parametrize(
    "same",
    [
        RGB.transpose(2, 0, 1),
        RGB.astype(np.float32) / 255,
        RGB.astype(np.float64) / 255,
        torch.from_numpy(RGB),
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch.from_numpy(RGB) / 255,
        np.dstack([RGB, np.zeros_like(RGB[..., :1])]),
        Image.fromarray(RGB),
        [Image.fromarray(RGB)],
        [[RGB]],
        RGB[None],
    ],
    ids=lambda same: f"{type(same).__name__}{list(getattr(same, 'shape', []))}",
)
def test_every_form_of_an_image_gives_the_same_views(image_processor, same):
    assert torch.equal(views(image_processor, same), views(image_processor, RGB))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La"]
)
def test_every_mode_of_pillow_is_what_pillow_makes_of_it(image_processor, mode):
    image = Image.fromarray(RGB)
    for step in {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "LAB": ()}.get(mode, (mode,)):
        image = image.convert(step)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert image.mode == mode
    as_rgb = image.convert("LA").convert("RGB") if mode == "La" else image.convert("RGB")
    assert torch.equal(views(image_processor, image), views(image_processor, as_rgb))


def test_grey_arrays_and_flat_images(image_processor):
    grey = RGB[..., 0]
    assert torch.equal(views(image_processor, grey), views(image_processor, Image.fromarray(grey)))
    assert torch.equal(views(image_processor, grey[None]), views(image_processor, grey))
    line = RGB[:1]  # a colour image one pixel high is no image of one channel
    assert torch.equal(views(image_processor, line), views(image_processor, Image.fromarray(line)))


def test_input_data_format_settles_what_a_shape_cannot(image_processor):
    odd = golden.image(2, 3, 3)
    last = views(image_processor, odd, input_data_format="channels_last")
    assert torch.equal(last, views(image_processor, Image.fromarray(odd)))
    assert not torch.equal(last, views(image_processor, odd, input_data_format="channels_first"))


def test_inputs_are_left_unchanged(image_processor):
    array, image = RGB.copy(), Image.fromarray(RGB)
    views(image_processor, [array, image])
    assert np.array_equal(array, RGB) and np.array_equal(np.asarray(image), RGB)


# Views out


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1366, 768), (300, 900), (20000, 1), (1, 20000), (1, 1)])
@pytest.mark.parametrize("num_crops", [0, 1, 4, 16])
def test_sizes_and_token_counts_agree_with_the_pixels(size, num_crops):
    processor = Phi3EmbedImageProcessor(**SMALL)
    out = processor(Image.new("RGB", size), num_crops=num_crops, return_tensors="np")
    (height, width), rows = out["image_sizes"][0], out["image_sizes"][0][0] // 28
    crops = rows * width // 28
    assert out["pixel_values"].shape == (crops + 1, 3, 28, 28) and crops <= num_crops
    assert height % 28 == width % 28 == 0
    assert out["num_image_tokens"][0] == (crops + 1) * 4 + 1 + (rows + 1) * 2
    assert processor.num_image_tokens(*size, num_crops=num_crops) == out["num_image_tokens"][0]


def test_a_line_of_pixels_is_kept_where_the_original_computes_a_height_of_0():
    assert hd_target_size(20000, 1, 16, 336) == (5376, 1)
    assert hd_target_size(1, 20000, 16, 336) == (1, 5376)


def test_num_crops_0_is_the_global_view_of_one_crop_alone(image_processor):
    one = views(image_processor, RGB, num_crops=1)
    assert torch.equal(one[0], one[1])
    assert torch.equal(views(image_processor, RGB, num_crops=0), one[:1])
    assert torch.equal(views(Phi3EmbedImageProcessor(num_crops=0), RGB), one[:1])


def test_a_batch_equals_its_images_one_by_one(image_processor):
    images = [RGB, golden.image(3, 90, 30), golden.image(4, 60, 60)]
    batch = image_processor(images, return_tensors="pt")
    for number, image in enumerate(images):
        alone = image_processor(image, return_tensors="pt")
        first = int(batch["image_sizes"][:number].prod(1).sum()) // 336**2 + number
        assert torch.equal(batch.pixel_values[first : first + len(alone.pixel_values)], alone.pixel_values)
        for key in ("image_sizes", "num_image_tokens"):
            assert torch.equal(batch[key][number : number + 1], alone[key])


def test_crops_lie_row_by_row_behind_the_global_view():
    pixels = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 28, 0), 28, 1)
    out = Phi3EmbedImageProcessor(num_crops=6, do_normalize=False, **SMALL)(pixels, return_tensors="np")
    assert out["image_sizes"].tolist() == [[56, 84]]
    np.testing.assert_allclose(out["pixel_values"][1:].mean((1, 2, 3)) * 255, np.arange(6) * 40, atol=1e-4)


@pytest.mark.parametrize("factors", [(2, 3), (4, 5), (1, 2), (7, 6)])
def test_the_global_view_is_torchs_bicubic_interpolation(factors):
    rows, cols = factors
    image = golden.image(5, 28 * rows, 28 * cols)
    processor = Phi3EmbedImageProcessor(num_crops=rows * cols, **SMALL)
    out = processor(image, return_tensors="pt")
    assert out["image_sizes"].tolist() == [[28 * rows, 28 * cols]]
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    wanted = torch.nn.functional.interpolate(pixels[None], size=(28, 28), mode="bicubic")
    torch.testing.assert_close(out["pixel_values"][:1], wanted, atol=2e-6, rtol=0)


def test_rescaling_and_normalising_follow_their_arguments():
    processor = Phi3EmbedImageProcessor(num_crops=1, **SMALL)
    raw = views(processor, RGB, do_rescale=False, do_normalize=False)
    assert raw.max() > 1 and torch.equal(raw, raw.round())
    torch.testing.assert_close(views(processor, RGB, do_normalize=False), raw / 255)
    torch.testing.assert_close(views(processor, RGB, do_normalize=False, rescale_factor=0.5), raw / 2)
    half = views(processor, RGB, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    torch.testing.assert_close(half, (raw / 255 - 0.5) / 0.25)


def test_a_mean_of_wrong_length_is_an_error_of_ours(image_processor):
    with pytest.raises(ValueError, match="`image_mean` has 2 values, but must have 3"):
        image_processor(RGB, image_mean=[0.5, 0.5])
    for value in (0, [0.5, 0.5, -1], None, "half"):
        with pytest.raises(ValueError, match="`image_std` is .*, but must be "):
            Phi3EmbedImageProcessor(image_std=value)


def test_views_are_packed_or_one_row_an_image(image_processor):
    images = [Image.fromarray(golden.image(3, *size)) for size in [(60, 60), (40, 170), (10, 300)]]
    packed = image_processor(images, num_crops=3, return_tensors="pt")
    padded = image_processor(images, num_crops=3, pad_views=True, return_tensors="pt")
    num_views = [1 + rows * cols for rows, cols in (packed["image_sizes"] // 336).tolist()]
    assert num_views == [2, 4, 4] and padded["pixel_values"].shape[:2] == (3, 4)
    assert not padded["pixel_values"][0, 2:].any()
    kept = torch.cat([row[:used] for row, used in zip(padded.pop("pixel_values"), num_views)])
    assert torch.equal(packed.pop("pixel_values"), kept)
    assert all(torch.equal(packed[key], padded[key]) for key in ("image_sizes", "num_image_tokens"))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 900), (20000, 1)])
@pytest.mark.parametrize("num_crops", [0, 1, 4])
def test_the_box_of_an_image_is_where_its_grid_is_not_white(size, num_crops):
    processor = Phi3EmbedImageProcessor(**SMALL, num_crops=num_crops, do_normalize=False)
    out = processor(Image.new("RGB", size), return_tensors="np")
    if num_crops:
        (height, width), crops = out["image_sizes"][0], out["pixel_values"][1:]
        grid = crops.reshape(height // 28, width // 28, 3, 28, 28).transpose(0, 3, 1, 4, 2).reshape(height, width, 3)
    else:
        grid = out["pixel_values"][0].transpose(1, 2, 0)
    rows, columns = ((grid[..., 0] < 1).any(axis).nonzero()[0] for axis in (1, 0))
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    assert processor.image_box(*size) == Phi3EmbedImageProcessor(**SMALL).image_box(*size, num_crops=num_crops) == box


# Opening images


def encoded(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def test_paths_bytes_and_files_open_alike_and_upright(image_processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    (tmp_path / "image.png").write_bytes(content)
    upright = np.rot90(RGB, -1)
    with open(tmp_path / "image.png", "rb") as file:
        for kind in (tmp_path / "image.png", str(tmp_path / "image.png"), content, io.BytesIO(content), file):
            opened = image_processor.open_image(kind)
            assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), upright)
            assert torch.equal(views(image_processor, kind), views(image_processor, opened))


@pytest.mark.parametrize("error", [IndexError, KeyError, NotImplementedError, struct.error, RecursionError])
def test_whatever_a_decoder_raises_is_an_error_that_names_the_file(image_processor, tmp_path, monkeypatch, error):
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)

    def load(self):
        raise error("stumbled")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for kind in (path, Image.open(path)):
        with pytest.raises(ValueError, match="image.png.* cannot be read as an image: .*stumbled"):
            image_processor.open_image(kind)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("as_object", [False, True])
def test_truncated_files_of_16_and_32_bits_are_an_error(image_processor, tmp_path, mode, as_object):
    path = tmp_path / "image.tif"
    values = np.arange(200 * 200, dtype={"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]).reshape(200, 200)
    Image.fromarray(values).save(path)
    path.write_bytes(path.read_bytes()[: values.nbytes // 2])
    with pytest.raises(ValueError, match="image.tif.* cannot be read as an image"):
        image_processor.open_image(Image.open(path) if as_object else path)


def test_a_pipe_is_an_error_and_not_waited_for(image_processor, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            image_processor.open_image(path)


def test_every_grey_of_16_bits_is_rounded_right(image_processor):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    opened = image_processor.open_image(Image.fromarray(values))
    assert np.array_equal(np.asarray(opened)[..., 0], np.round(values / 257))


def test_16_bits_take_no_floats(image_processor):
    image = Image.new("I;16", (4000, 4000), 7)
    tracemalloc.start()
    image_processor.open_image(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 7 * 4000 * 4000


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "La", "P", "L", "I;16", "array"])
def test_transparency_is_dropped_as_in_the_original_or_put_on_white(image_processor, kind):
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))  # a black logo on nothing
    image.paste((0, 0, 0, 255), (5, 0, 10, 10))
    if kind == "array":
        image = np.asarray(image)
    elif kind in ("P", "L"):
        image = Image.new(kind, (20, 10), 1)
        image.paste(0, (5, 0, 10, 10))
        image.info["transparency"] = 1
    elif kind == "I;16":
        image = Image.fromarray(np.repeat([[1] * 5 + [0] * 5 + [1] * 10], 10, 0).astype(np.uint16))
        image.info["transparency"] = 1
    elif kind == "PA":
        alpha, image = image.getchannel("A"), Image.new("P", (20, 10), 0)
        image.putalpha(alpha)
        assert image.mode == "PA"
    elif kind in ("LA", "La"):
        image = image.convert("LA").convert(kind)
    dropped, white = (image_processor.open_image(image, transparency=choice) for choice in ("drop", "white"))
    assert np.asarray(dropped).max() <= 1
    wanted = np.full((10, 20, 3), 255)
    wanted[:, 5:10] = 0
    assert np.array_equal(np.asarray(white), wanted)
    on_white = Phi3EmbedImageProcessor(num_crops=4, transparency="white")
    assert torch.equal(views(on_white, image), views(image_processor, image, transparency="white"))
    assert torch.equal(views(on_white, image), views(image_processor, white))


def test_json_round_trip(tmp_path):
    processor = Phi3EmbedImageProcessor(num_crops=7, **SMALL)
    processor.save_pretrained(tmp_path)
    again = Phi3EmbedImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and again.num_crops == 7
    assert torch.equal(views(again, RGB), views(processor, RGB))


def test_a_100_megapixel_photo_stays_uint8_until_it_is_reduced():
    photo = Image.new("RGB", (12000, 8400), (10, 20, 30))
    processor = Phi3EmbedImageProcessor()
    tracemalloc.start()
    pixel_values = views(processor, photo)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * pixel_values.nbytes < photo.width * photo.height * 3 / 2


# Images refused


def png_bomb():
    """A PNG of a few bytes that says it is 60000 x 60000."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


ENDLESS = []
ENDLESS.append(ENDLESS)
NAN = Image.fromarray(np.array([[1, np.nan]], np.float32))


def truncated_jpeg():
    return encoded(Image.fromarray(golden.image(6, 200, 200)), "JPEG")[:2000]


@pytest.mark.parametrize(
    "content, message",
    [
        (truncated_jpeg(), "cannot be read as an image: .*truncated"),
        (b"", "cannot be read as an image"),
        (b"not an image", "cannot be read as an image"),
        (png_bomb(), "too many pixels"),
    ],
)
def test_unreadable_files_are_named(image_processor, tmp_path, content, message):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)Image 1: .*broken.jpg.*{message}"):
        image_processor([RGB, path])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("no/such/file.png", "There is no image file 'no/such/file.png'"),
        ("https://example.org/cat.png", "is a URL. Fetch it first"),
        ("data:image/png;base64,AAAA", "is a URL. Fetch it first"),
        (os.devnull, "is not a regular file, but a folder, a pipe or a device"),
        ("a\0b", "cannot be read as an image: .*null"),
        (None, "An image is of type NoneType. Accepted are PIL images"),
        (3, "of type int"),
        ([], "There are no images"),
        ([[]], "There are no images"),
        (np.zeros((0, 10, 3), np.uint8), r"shape \(0, 10, 3\).*not empty"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((2, 2, 2, 5, 5), np.uint8), r"shape \(2, 2, 2, 5, 5\)"),
        (np.zeros((9, 9, 2), np.uint8), r"shape \(9, 9, 2\), but must have 1, 3 or 4 channels"),
        (np.zeros((3, 9, 3), np.uint8), "channels first or last. Say which by `input_data_format="),
        (np.zeros((9, 9, 3), np.int64), "dtype int64, but must be uint8, or float in"),
        (np.full((9, 9, 3), 2.0), r"values from 2.0 to 2.0, but must be in \[0, 1\]"),
        (np.full((9, 9, 3), -0.5), r"values from -0.5"),
        (np.full((9, 9, 3), np.nan), "values from nan to nan"),
        (torch.full((3, 9, 9), torch.inf), "values from inf"),
        (Image.new("I", (5, 5), 70000), "mode 'I' has values from 70000 to 70000, but must be in 0..255"),
        (Image.new("F", (5, 5), -1.0), "mode 'F' has values from -1.0"),
        (NAN, "mode 'F' has values from nan"),
        (
            Image.new("F", (5, 5), 0.5),
            r"mode 'F' has values from 0.5 to 0.5, .* Values in \[0, 1\] are taken as an array",
        ),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        ([[[0.5] * 3] * 4] * 5, "of type float"),
        (ENDLESS, "nested more than 8 deep"),
        (b"not an image", "An image of 12 bytes cannot be read as an image"),
        (io.StringIO("text"), "cannot be read as an image"),
        (Image.open(io.BytesIO(truncated_jpeg())), "Image 0: .*cannot be read as an image: .*truncated"),
        (torch.zeros(3, 9, 9, device="meta"), "device meta, but must be dense, on a device that holds its values"),
        (torch.zeros(3, 9, 9).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(3, 9, 9, dtype=torch.complex64), "dtype complex64, but must be uint8"),
        (torch.nested.nested_tensor([torch.zeros(9, 9)]), "must be dense"),
    ],
)
def test_wrong_images_are_an_error_of_ours(image_processor, wrong, message):
    with pytest.raises(ValueError, match=message):
        image_processor(wrong)


@pytest.mark.parametrize("num_crops", [-1, 257, 10**9, 1.5, "4", True])
def test_negative_and_absurd_num_crops(image_processor, num_crops):
    message = re.escape(f"`num_crops` is {num_crops!r}, but must be an int from 0")
    with pytest.raises(ValueError, match=message):
        image_processor(RGB, num_crops=num_crops)
    with pytest.raises(ValueError, match=message):
        image_processor.num_image_tokens(10, 10, num_crops=num_crops)


@pytest.mark.parametrize("unknown", [{"numcrops": 3}, {"do_resize": False}, {"do_center_crop": True}])
def test_arguments_without_effect_are_refused(image_processor, unknown):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(unknown))}'"):
        image_processor(RGB, **unknown)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_crops": -1}, "`num_crops` is -1"),
        ({"size": {"height": 28, "width": 56}}, "one and the same `height` and `width`"),
        ({"size": {"shortest_edge": 28}}, "one and the same `height` and `width`"),
        ({"num_img_tokens": 143}, "143, but must be a square"),
        ({"pad_views": "yes"}, "`pad_views` is 'yes', but must be True or False"),
        ({"transparency": "black"}, "`transparency` is 'black', but must be one of"),
        ({"num_img_tokens": 4.0}, "4.0, but must be a square"),
        ({"rescale_factor": float("nan")}, "`rescale_factor` is nan, but must be a finite number"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Phi3EmbedImageProcessor(**wrong)


@pytest.mark.parametrize("height", [0, 1.5, float("inf"), "2", None])
def test_token_counts_of_no_size(height):
    with pytest.raises(ValueError, match=f"`height` is {height!r}, but must be a positive whole number"):
        Phi3EmbedImageProcessor().num_image_tokens(10, height)


def test_float_arrays_are_not_left_unscaled(image_processor):
    with pytest.raises(ValueError, match="already and `do_rescale` is False"):
        image_processor(np.full((9, 9, 3), 0.5), do_rescale=False)
    # 8-bit images stay 0..255, as everywhere
    assert views(image_processor, RGB, do_rescale=False, do_normalize=False).max() > 1


# Texts with images

WIDE, TALL = Image.new("RGB", (56, 28)), Image.new("RGB", (28, 56), "red")
COUNTS = [Phi3EmbedImageProcessor(num_crops=4, **SMALL).num_image_tokens(*image.size) for image in (WIDE, TALL)]


def test_tags_become_as_many_tokens_as_their_image_has(processor):
    out = processor(images=[WIDE, TALL], text="what is <|image_1|> and <|image_2|> ?")
    ids = torch.tensor(out["input_ids"][0])
    assert (ids == processor.image_token_id).sum() == sum(COUNTS)
    placeholders = (ids == processor.image_token_id).int()
    starts = (placeholders.diff() == 1).nonzero().flatten() + 1
    ends = (placeholders.diff() == -1).nonzero().flatten() + 1
    assert (ends - starts).tolist() == COUNTS
    assert set(out) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}


NO_START = {"add_special_tokens": False}


@pytest.mark.parametrize("arguments", [{}, NO_START, {"text_kwargs": NO_START}])
def test_token_ids_are_those_of_the_pieces_one_by_one_as_in_the_original(processor, tokenizer, arguments):
    text = "<|user|>\n<|image_1|>\nwhat is this ?<|end|>\nthe cat <|image_2|>"
    out = processor(images=[WIDE, TALL], text=text, **arguments)
    wanted = []
    for piece, count in zip(re.split(r"<\|image_\d+\|>", text), [*COUNTS, 0]):
        ids = tokenizer(piece, add_special_tokens=not arguments)["input_ids"]
        wanted += ids + [processor.image_token_id] * count
    assert out["input_ids"][0] == wanted and (tokenizer.bos_token_id in wanted) == (not arguments)


@pytest.mark.parametrize("images", [[WIDE, TALL, WIDE], [[WIDE, TALL], [], [WIDE]]], ids=["flat", "nested"])
def test_batches_of_texts_with_none_one_and_two_images(processor, tokenizer, images):
    texts = ["<|image_1|> and <|image_2|>", "the cat", "what is <|image_1|>"]
    out = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert len(out["image_sizes"]) == 3
    alone = [processor(images=own, text=text) for own, text in zip([[WIDE, TALL], None, [WIDE]], texts)]
    for row, mask, one in zip(out["input_ids"], out["attention_mask"], alone):
        assert row[mask.bool()].tolist() == one["input_ids"][0]
    assert (out["input_ids"][out["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_numbers_name_images_in_any_order_and_again(processor):
    texts = ["<|image_2|> and <|image_1|> and <|image_2|>", "a <|image_1|>"]
    out = processor(images=[WIDE, TALL, WIDE], text=texts, padding=True, return_tensors="pt")
    plain = ["<|image|> and <|image|> and <|image|>", "a <|image|>"]
    wanted = processor(images=[TALL, WIDE, TALL, WIDE], text=plain, padding=True, return_tensors="pt")
    assert all(torch.equal(out[key], wanted[key]) for key in wanted)


def test_images_alone_and_texts_alone(processor, tokenizer):
    images = processor(images=[WIDE], return_tensors="pt")
    assert set(images) == {"pixel_values", "image_sizes", "num_image_tokens"}
    assert processor(text=["the cat"])["input_ids"] == tokenizer(["the cat"])["input_ids"]
    assert "pixel_values" not in processor(images=[[], []], text=["the cat", "the dog"])


def test_num_crops_per_call(processor):
    few, many = (processor(images=WIDE, text="<|image_1|>", num_crops=number) for number in (0, 4))
    assert few["input_ids"][0].count(processor.image_token_id) == 7 < COUNTS[0]
    assert many["input_ids"][0].count(processor.image_token_id) == COUNTS[0]


def test_token_counts_without_pixels(processor):
    sizes = [(28, 56), (56, 28), (900, 17)]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    out = processor(images=[Image.new("RGB", size[::-1]) for size in sizes], return_tensors="np")
    assert counted["num_image_tokens"] == out["num_image_tokens"].tolist()
    assert counted["num_image_patches"] == ((out["image_sizes"] // 28).prod(1) + 1).tolist()


@pytest.mark.parametrize(
    "images, text, message",
    [
        (None, None, "Neither `images` nor `text`"),
        ([], None, "There are no images"),
        (None, "<|image_1|>", "tags of 1 images, but there are 0 images"),
        ([WIDE], "the cat", "tags of 0 images, but there are 1 images"),
        ([WIDE], "<|image_1|> <|image_2|>", "tags of 2 images, but there are 1 images"),
        ([WIDE, TALL], "<|image_1|> <|image_3|>", r"image tags \[1, 3\], but must number its images 1, 2, 3, .* gap"),
        ([WIDE], "<|image_0|>", r"image tags \[0\]"),
        ([WIDE, TALL], "<|image_1|> <|image_1|>", "tags of 1 images, but there are 2 images"),
        ([WIDE, TALL], "<|image_1|> <|image|>", "both numbered tags and"),
        ([[WIDE, TALL], []], ["<|image_1|>", "<|image_1|>"], "Text 0 has tags of 1 images, but there are 2 images"),
        ([[WIDE]], ["<|image_1|>", "a"], "2 texts, but 1 lists of images"),
        ([WIDE], [3], r"`text` is \[3\], but must be a string or a list of strings"),
        ([WIDE], [], r"`text` is \[\], but must be a string or a list of strings, and not empty"),
        (None, 5, "`text` is 5, but must be"),
        ("a text", WIDE, "Images are the first argument"),
        (None, ["a", "cut \ud83d"], r"Text 1 has '\\ud83d' at place 4, which is half of a character"),
    ],
)
def test_tags_that_do_not_match_the_images_are_an_error(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_truncation_that_cuts_an_image_is_an_error(processor):
    processor = copy.deepcopy(processor)  # a fast tokenizer keeps the truncation of its last call
    with pytest.raises(ValueError, match="(?i)truncation"):
        processor(images=[WIDE], text="<|image_1|>", truncation=True, max_length=5)


def test_a_tokenizer_without_the_image_token_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="has no token '<img>'"):
        Phi3EmbedProcessor(Phi3EmbedImageProcessor(), tokenizer, image_token="<img>")


def test_save_and_reload_of_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = {"images": [WIDE], "text": "what is <|image_1|> ?", "return_tensors": "pt"}
    for key, value in processor(**inputs).items():
        assert torch.equal(again(**inputs)[key], value), key


def test_a_tokenizer_whose_own_config_is_lost_is_an_error(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="begins a text with '<s>', .* tokenizer_config.json missing"):
        Phi3EmbedProcessor(Phi3EmbedImageProcessor(), PreTrainedTokenizerFast.from_pretrained(tmp_path))


# Conversations


@pytest.fixture(scope="module")
def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    template = (ROOT / "chat_template.jinja").read_text()
    return Phi3EmbedProcessor(Phi3EmbedImageProcessor(num_crops=4, **SMALL), tokenizer, chat_template=template)


def image_part(image):
    return {"type": "image", "image": image}


def text_part(text):
    return {"type": "text", "text": text}


TURNS = [
    {"role": "system", "content": "lower"},
    {"role": "user", "content": [image_part(WIDE), text_part("what is this ?")]},
    {"role": "assistant", "content": [text_part("the cat")]},
    {"role": "user", "content": [text_part("and "), image_part(TALL), text_part("that ?")]},
    {"role": "assistant", "content": "the dog"},
]


def test_typed_images_are_numbered_over_the_whole_conversation(chat):
    prompt = chat.apply_chat_template(TURNS[:4], add_generation_prompt=True)
    assert prompt == (
        "<|system|>\nlower<|end|>\n<|user|>\n<|image_1|>\nwhat is this ?<|end|>\n<|assistant|>\nthe cat<|end|>\n"
        "<|user|>\nand <|image_2|>\nthat ?<|end|>\n<|assistant|>\n"
    )
    strings = [{"role": "user", "content": "<|image_1|>\nwhat ?"}, TURNS[3]]
    assert "<|image_2|>\nthat" in chat.apply_chat_template(strings)
    assert not chat.apply_chat_template(TURNS, add_generation_prompt=True).endswith("<|assistant|>\n")


def test_a_conversation_becomes_all_inputs_of_the_model(chat, tmp_path):
    WIDE.save(tmp_path / "wide.png")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    out = chat.apply_chat_template(TURNS[:4], **options)
    wanted = chat(images=[WIDE, TALL], text=chat.apply_chat_template(TURNS[:4], add_generation_prompt=True))
    assert out["input_ids"][0].tolist() == wanted["input_ids"][0]
    assert torch.equal(out["pixel_values"], views(chat.image_processor, [WIDE, TALL]))
    turn = {"role": "user", "content": [{"type": "image", "path": str(tmp_path / "wide.png")}, text_part("what ?")]}
    by_path = chat.apply_chat_template([turn], processor_kwargs={"num_crops": 0}, **options)
    assert torch.equal(by_path["pixel_values"], views(chat.image_processor, WIDE, num_crops=0))


def test_a_batch_of_conversations_with_two_one_and_no_images(chat):
    conversations = [TURNS[:4], [TURNS[1]], [{"role": "user", "content": [text_part("what ?")]}]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    out = chat.apply_chat_template(conversations, processor_kwargs={"padding": True}, **options)
    assert torch.equal(out["pixel_values"], views(chat.image_processor, [WIDE, TALL, WIDE]))
    for ids, mask, conversation in zip(out["input_ids"], out["attention_mask"], conversations):
        assert torch.equal(ids[mask.bool()], chat.apply_chat_template(conversation, **options)["input_ids"][0])
        assert mask[-1] == 1


def test_assistant_masks_cover_the_answers_and_their_end(chat):
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = chat.apply_chat_template(TURNS, **options)
    answers = [id for id, is_answer in zip(out["input_ids"][0], out["assistant_masks"][0]) if is_answer]
    assert chat.tokenizer.decode(answers).replace(" ", "") == "thecat<|end|>thedog<|end|>"


@pytest.mark.parametrize(
    "message, error",
    [
        ({"role": "tool", "content": "a"}, "has the role 'tool', but must be of 'system', 'user' or 'assistant'"),
        ({"role": "assistant", "content": [image_part(WIDE)]}, "An image is in a turn of 'assistant'"),
        ({"role": "user", "content": [{"type": "video", "video": "a"}]}, "a part of type 'video'"),
        ({"role": "user", "content": "<|image_1|>"}, "tags of 1 images, but there are 0 images"),
    ],
)
def test_conversations_that_the_template_does_not_know_are_an_error(chat, message, error):
    with pytest.raises(Exception, match=error):
        chat.apply_chat_template([message], tokenize=True, return_dict=True)
