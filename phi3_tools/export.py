"""
A checkpoint -> an ONNX file of pixels -> image tokens and one vector an image, with its preprocessing beside it.

The output folder is made, and must not exist. It gets `model.onnx` (weights above 2 GB in `model.onnx.data`),
`preprocessor_config.json` and `config.json` with the code that they name.

The graph takes any number of images of any grids at once. transformers' own exporter makes the sizes of the images it
traces constants of the graph (5.23), so this is `torch.onnx.export`.
"""

import logging
import warnings

import numpy as np
import onnxruntime
import torch
from PIL import Image

from phi3_tools.models import find_model, load_model
from phi3_tools.results import console, folder_beside

INPUTS = {
    "pixel_values": "(num_images, max_views, 3, height, width): the global view, the crops row by row, zeros",
    "image_sizes": "(num_images, 2): height and width in pixels of each image's grid of crops",
}
OUTPUTS = {
    "last_hidden_state": "(num_images, max_num_tokens, hidden_size): the image tokens. An image's own are its first "
    "`num_image_tokens`, which the image processor gives; the rest are zeros",
    "pooler_output": "(num_images, hidden_size): one vector an image",
}
# The greatest difference to torch, as a share of the greatest value.
TOLERANCE = 1e-4


def run(name, folder):
    model = find_model(name)
    with folder_beside(folder) as part:
        loaded, image_processor = load_model(model, device="cpu", pad_views=True)
        console.print("Tracing and writing.")
        export(loaded, image_processor).save(part / "model.onnx")
        image_processor.save_pretrained(part)
        loaded.config.save_pretrained(part)
        console.print("Comparing with torch.")
        for output, difference in differences(loaded, image_processor, part / "model.onnx").items():
            console.print(f"{output}: differs by {difference:.1e} of its greatest value.")
            if not difference <= TOLERANCE:
                raise ValueError(f"`{output}` differs by more than {TOLERANCE}. Nothing was written.")
    console.print(f"Written: {folder}")


def export(model, image_processor) -> torch.onnx.ONNXProgram:
    images, views = torch.export.Dim("num_images"), torch.export.Dim("max_views")
    inputs = sample_inputs(model.config, image_processor, num_images=3, num_crops=4)
    dims = {"pixel_values": {0: images, 1: views}, "image_sizes": {0: images}}
    if not model.config.use_hd_transform:
        dims["pixel_values"] = {0: images}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which is not needed
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            dynamic_shapes={key: dims[key] for key in inputs},
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            dynamo=True,
            verbose=False,
        )
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        value.doc_string = (INPUTS | OUTPUTS)[value.name]
    return program


def sample_inputs(config, image_processor, num_images, num_crops):
    """Images of noise, upright and wide in turn, as the model takes them."""
    generator = np.random.default_rng(0)
    shapes = [(90, 30, 3) if number % 2 else (40, 80, 3) for number in range(num_images)]
    images_of_noise = [Image.fromarray(generator.integers(0, 256, shape, np.uint8)) for shape in shapes]
    inputs = image_processor(images_of_noise, num_crops=num_crops, pad_views=True, return_tensors="pt")
    if config.use_hd_transform:
        return {key: inputs[key] for key in INPUTS}
    return {"pixel_values": inputs.pixel_values[:, 0]}


@torch.inference_mode()
def differences(model, image_processor, path) -> dict[str, float]:
    """The greatest difference of each output to torch's, as a share of its greatest value."""
    inputs = sample_inputs(model.config, image_processor, num_images=2, num_crops=2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(list(OUTPUTS), {key: value.numpy() for key, value in inputs.items()})
    wanted = model(**inputs)
    found = {}
    for name, left in zip(OUTPUTS, given):
        right = wanted[name].numpy()
        if not np.isfinite(right).all():
            raise ValueError(f"`{name}` of the model itself holds NaN or infinite values. Are its weights whole?")
        left = left[:, : right.shape[1]]  # a graph's padding is longer
        found[name] = float(np.abs(left - right).max() / np.abs(right).max())
    return found
