"""What a phi3-embed model makes of images and words. It knows the model's public methods alone, and no page."""

import math
from functools import lru_cache
from pathlib import Path
from threading import Event, Lock, Thread

import numpy as np
import skimage.data
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

CLIP, PHI3, WORDS = "CLIP", "Phi-3", "words"
FEW_CROPS, MAX_ANSWER_TOKENS = 4, 256
BLACKBOARD = (3, 7, 1, 8, 0, 5, 9, 2, 4, 6, 7, 3)


class Sight:
    """
    The model of a folder or Hub id. `CLIP` is the tower inside it: the mean of its patches of the global view. It
    `speaks` where it has a language model. `embedder` is sentence-transformers', where the checkpoint says how it
    embeds words and images, else None. An entry has an `image`, in RGB, and a dict of `vectors` computed of it before.
    """

    def __init__(self, name: str, revision: str | None = None):
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError(f"There is no folder {name}. Give one with a model, or a Hub id.")
        code = {"code_revision": revision} if revision else {}
        pins = {"trust_remote_code": True, "revision": revision or "main", **code}
        try:
            config = transformers.AutoConfig.from_pretrained(name, **pins)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} is no folder with a model, nor a model on a Hub that can be reached. Microsoft's checkpoints "
                "go through `phi3-embed convert` first."
            ) from error
        if config.model_type != "phi3_embed":
            raise ValueError(f"{name} is a model of type {config.model_type!r}. Give one of type 'phi3_embed'.")
        if not config.use_hd_transform:
            raise ValueError(f"{name} works without the HD transform, which this page shows.")
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(name, **pins)
        self.crop_size = self.image_processor.size["height"]
        self.speaks = config.text_config is not None
        kind = transformers.AutoModelForImageTextToText if self.speaks else transformers.AutoModel
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.whole = kind.from_pretrained(name, device_map=device, **pins).eval()
        self.model = self.whole.model if self.speaks else self.whole
        self.processor = transformers.AutoProcessor.from_pretrained(name, **pins) if self.speaks else None
        self.embedder = None
        if self.speaks and "embedding" in (self.processor.chat_template or ""):
            from sentence_transformers import SentenceTransformer  # which takes seconds to import

            # It has no weights of its own, but takes those of this model.
            codes = {"model_kwargs": {"device_map": "meta", **code}, "config_kwargs": code, "processor_kwargs": code}
            self.embedder = SentenceTransformer(name, trust_remote_code=True, revision=revision, **codes)
            self.embedder[0].model = self.model
        self.lock, self.look_once = Lock(), lru_cache(maxsize=8)(self._look)

    def crops_of(self, entry, num_crops):
        """An image smaller than one crop is not cut, however many are allowed: there is no more to see in it."""
        return num_crops if max(entry.image.size) > self.crop_size else 1

    def look(self, entry, num_crops):
        """
        What the model makes of an image in at most `num_crops` crops (1 at least).

        Returns:
            A dict. `grid`: rows and columns of crops. `crops` and `global_view`: the image as the model sees it, its
            crops joined `(height, width, 3)`, and its global view, uint8. `tokens` and `global_tokens`: Phi-3's of
            both `(rows, columns, C)`. `num_tokens`: all of them. `parts`: of CLIP (global view) and Phi-3 (crops), see
            [`parts_within`]. `vectors`: of CLIP and Phi-3, of the whole image `(C,)`. All numbers are float32.
        """
        with self.lock:  # one at a time: what shows an image at once shares what is made of it
            return self.look_once(entry, self.crops_of(entry, num_crops))

    @torch.inference_mode()
    def _look(self, entry, num_crops):
        inputs = self.image_processor(entry.image, num_crops=num_crops, return_tensors="pt").to(self.model.device)
        outputs = self.model.get_image_features(inputs.pixel_values, inputs.image_sizes)
        tokens, grid = outputs.pooler_output[0].float().cpu(), tuple(outputs.grids[0].tolist())
        crop_tokens, global_tokens = (lines.numpy() for lines in self.model.split_image_tokens(tokens, grid))
        features = outputs.global_features[0].float().cpu().numpy()
        side = math.isqrt(len(features))
        features = features[-(side**2) :].reshape(side, side, -1)  # without a class token

        views = self.image_processor(entry.image, num_crops=num_crops, do_normalize=False, return_tensors="np")
        views = (views.pixel_values.transpose(0, 2, 3, 1) * 255).round().clip(0, 255).astype(np.uint8)
        crops = views[1:].reshape(*grid, *views.shape[1:]).swapaxes(1, 2).reshape(grid[0] * self.crop_size, -1, 3)
        box = self.image_processor.image_box(*entry.image.size, num_crops=num_crops)
        return {
            "grid": grid,
            "crops": crops,
            "global_view": views[0],
            "tokens": crop_tokens,
            "global_tokens": global_tokens,
            "num_tokens": len(tokens),
            "parts": {side: parts_within(box, crops, grid) for side, grid in ((CLIP, features), (PHI3, crop_tokens))},
            "vectors": {CLIP: unit(features.mean((0, 1))), PHI3: unit(outputs.image_embeds[0].float().cpu().numpy())},
        }

    def vectors_of(self, entry):
        """CLIP's and Phi-3's unit vector of an image, in few crops, as all images have to be looked at."""
        if PHI3 not in entry.vectors:
            entry.vectors |= self.look(entry, FEW_CROPS)["vectors"]
        return entry.vectors

    def vector_for_words(self, entry):
        """The unit vector of an image in the space of words, as the checkpoint's sentence-transformers files say."""
        if WORDS not in entry.vectors:
            entry.vectors[WORDS] = unit(self.embedder.encode_document([entry.image], show_progress_bar=False)[0])
        return entry.vectors[WORDS]

    def vector_of_words(self, words):
        return unit(self.embedder.encode_query(words, show_progress_bar=False))

    def answer(self, question, entry, num_crops):
        """Yields what the model answers to a question about an image, as far as it has come. Closing it ends that."""
        content = [{"type": "image", "image": entry.image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_crops": self.crops_of(entry, num_crops)},
        ).to(self.whole.device)
        streamer = transformers.TextIteratorStreamer(self.processor.tokenizer, True, skip_special_tokens=True)
        closed, errors = Event(), []
        settings = {"max_new_tokens": MAX_ANSWER_TOKENS, "stopping_criteria": [lambda *states, **_: closed.is_set()]}

        def generate():
            try:
                self.whole.generate(**inputs, **settings, streamer=streamer)
            except Exception as error:
                errors.append(error)
                streamer.end()

        Thread(target=generate, daemon=True).start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:
            closed.set()
        if errors:
            raise errors[0]

    def first_images(self):
        """Photographs of scikit-learn and scikit-image, a blackboard of digits, and two of each digit, by name."""
        left, right, _ = skimage.data.stereo_motorcycle()
        temple, flower = load_sample_images().images
        data = {"motorcycle, left": left, "motorcycle, right": right, "cat": skimage.data.cat(), "temple": temple}
        data |= {"flower": flower, "coffee": skimage.data.coffee(), "astronaut": skimage.data.astronaut()}
        data |= {"cameraman": skimage.data.camera(), "rocket": skimage.data.rocket(), "coins": skimage.data.coins()}
        data |= {"galaxies": skimage.data.hubble_deep_field(), "printed page": skimage.data.page()}
        images = {name: self.image_processor.open_image(pixels) for name, pixels in data.items()}

        pixels, labels = load_digits(return_X_y=True)
        pixels = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        digits = [[Image.fromarray(digit).convert("RGB") for digit in pixels[labels == label]] for label in range(10)]
        # Each digit is as large as a crop: that much the small checkpoint knows.
        images["blackboard"] = Image.new("RGB", (4 * self.crop_size, 3 * self.crop_size))
        for place, label in enumerate(BLACKBOARD):
            digit = digits[label][10 + place].resize((self.crop_size,) * 2, Image.Resampling.BICUBIC)
            images["blackboard"].paste(digit, (place % 4 * self.crop_size, place // 4 * self.crop_size))
        images |= {f"a {label}": digits[label][0] for label in range(10)}
        images |= {f"another {label}": digits[label][1] for label in range(10)}
        return images


def parts_within(box, crops, vectors):
    """The vectors of a grid `(rows, columns, C)` whose middle lies in the box, as units; and their pixels."""
    parts, pixels = [], []
    for start, end, length, count in zip(box[1::-1], box[:1:-1], crops.shape, vectors.shape):
        step = length / count
        first = min(round(start / step), count - 1)
        last = max(round(end / step), first + 1)
        parts.append(slice(first, last))
        pixels.append(slice(round(first * step), round(last * step)))
    return unit(vectors[tuple(parts)]), crops[tuple(pixels)]


def unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
