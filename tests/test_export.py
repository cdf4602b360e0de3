"""torch.compile, torch.export and ONNX: one graph for any number of images of any grids."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, small_model, small_pixels
from fresh_process import run_fresh
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor
from PIL import Image
from torch._dynamo.utils import counters
from transformers import AutoImageProcessor, AutoModel

from phi3_tools import export
from phi3_tools.cli import main
from phi3_tools.models import load_model

# Grids and views of batches: more images and crops than traced, fewer, one alone, none but global views.
BATCHES = [
    ([(1, 1), (2, 3), (0, 0), (4, 1), (1, 7)], 9),
    ([(3, 3)], 10),
    ([(1, 1), (1, 1)], 2),
    ([(0, 0), (0, 0)], 1),
    ([(1, 8), (8, 1)], 9),
]


def small_image_processor():
    return Phi3EmbedImageProcessor(size={"height": 56, "width": 56}, num_img_tokens=4)


def assert_same_images(tokens, vectors, wanted):
    for left, right in zip(tokens, wanted.image_outputs.pooler_output, strict=True):
        torch.testing.assert_close(left[: len(right)], right, atol=1e-4, rtol=1e-4)
        assert not left[len(right) :].any()
    torch.testing.assert_close(vectors, wanted.pooler_output, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_exported_program_takes_any_images():
    model = small_model(tower={"model_type": "siglip_vision_model"})
    images, crops = torch.export.Dim("num_images"), torch.export.Dim("max_crops")
    shapes = {"pixel_values": {0: images, 1: crops}, "image_sizes": {0: images}}
    inputs = small_pixels((1, 2), (2, 1), (2, 2), pad_views=True)
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for grids, views in BATCHES:
        inputs = small_pixels(*grids, max_views=views)
        outputs = program(**inputs)
        assert_same_images(outputs.last_hidden_state, outputs.pooler_output, model(**inputs))


@pytest.mark.parametrize("settings", [{}, {"hd_transform_order": "glb_sub", "pooling_mode": "global"}])
@torch.no_grad()
def test_one_onnx_graph_takes_any_images(settings, tmp_path):
    model = small_model(**settings)
    export.export(model, small_image_processor()).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for grids, views in BATCHES:
        inputs = small_pixels(*grids, max_views=views)
        outputs = session.run(["last_hidden_state", "pooler_output"], {key: inputs[key].numpy() for key in inputs})
        assert_same_images(*map(torch.from_numpy, outputs), model(**inputs))


@torch.no_grad()
def test_onnx_without_the_hd_transform(tmp_path):
    model = small_model(use_hd_transform=False)
    export.export(model, small_image_processor()).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    pixel_values = small_pixels(*[(0, 0)] * 5)["pixel_values"]
    tokens, vectors = session.run(None, {"pixel_values": pixel_values.numpy()})
    assert_same_images(torch.from_numpy(tokens), torch.from_numpy(vectors), model(pixel_values=pixel_values))


@torch.no_grad()
def test_one_compiled_graph_takes_any_images():
    model = small_model()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for grids, views in BATCHES[0], ([(1, 8), (8, 1), (0, 0)], 10), ([(2, 2), (1, 1), (3, 1), (1, 2)], 5):
        inputs = small_pixels(*grids, max_views=views)
        outputs = compiled(**inputs)
        assert_same_images(outputs.last_hidden_state, outputs.pooler_output, model(**inputs))
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_export_writes_onnx_with_its_preprocessing(tmp_path):
    folder = tmp_path / "onnx"
    done = run_fresh("-m", "phi3_tools", "export", ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "pooler_output: differs by" in done.stdout and "Warning" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]

    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in [(90, 60), (40, 200), (400, 30)]
    ]
    inputs = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(
        images, num_crops=3, return_tensors="np"
    )
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [value.name for value in session.get_inputs()]
    tokens, vectors = session.run(None, {name: inputs[name] for name in names})
    wanted = AutoModel.from_pretrained(ROOT, trust_remote_code=True)(
        **{name: torch.from_numpy(inputs[name]) for name in names}
    )
    assert_same_images(torch.from_numpy(tokens), torch.from_numpy(vectors), wanted)
    for number, length in enumerate(inputs["num_image_tokens"]):
        assert len(wanted.image_outputs.pooler_output[number]) == length

    with pytest.raises(SystemExit, match=f"phi3-embed export: {folder} exists already"):
        main(["export", str(ROOT), str(folder)])

    model, image_processor = load_model(str(ROOT))
    model.vision_embed_tokens.projector.glb_GN.fill_(torch.nan)
    with pytest.raises(ValueError, match="`last_hidden_state` of the model itself holds NaN"):
        export.differences(model, image_processor, folder / "model.onnx")
