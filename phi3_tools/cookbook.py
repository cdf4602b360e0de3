"""The two functions that the comparison of Microsoft's cookbook calls: https://github.com/microsoft/PhiCookBook"""

from pathlib import Path

from transformers import AutoImageProcessor, AutoModel

from phi3_tools import ROOT


def load_phi3_model(fine_tuned=False):
    """
    Our model from the folder `phi3-vision-embed`, as the README converts it; `fine_tuned`: a folder or Hub id, or True
    for the repository's small checkpoint, which is trained on digits. Its `get_image_features` takes what
    `process_for_phi3_model` gives.
    """
    source = {False: "phi3-vision-embed", True: str(ROOT)}.get(fine_tuned, fine_tuned)
    if fine_tuned is False and not Path(source).is_dir():
        raise ValueError(
            "There is no folder phi3-vision-embed. Make it by `python convert_phi3_vision.py "
            "microsoft/Phi-3-vision-128k-instruct phi3-vision-embed`, or give `fine_tuned`."
        )
    model = AutoModel.from_pretrained(source, device_map="auto", trust_remote_code=True).eval()
    of_pixels = model.get_image_features
    model.get_image_features = lambda inputs: of_pixels(**inputs.to(model.device)).image_embeds
    return model


def process_for_phi3_model(images, num_crops=None):
    """Images -> the inputs of `get_image_features` in Phi-3-vision's geometry, which fine-tunes share."""
    image_processor = AutoImageProcessor.from_pretrained(str(ROOT), trust_remote_code=True)
    return image_processor(images, num_crops=num_crops, return_tensors="pt")
