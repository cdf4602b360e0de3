"""Whether whole models answer a question about images with the words that the data has for them."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from phi3_tools.compare.vectors import VECTORS, Kept
from phi3_tools.measures import Undefined
from phi3_tools.models import PHI3_EMBED, Model, encode_conversation, in_batches, pick_device, score_answer

EXACT, LOSS = "exact answers", "loss a token"


def answer(
    model: Model, items: Sequence, question: str, num_crops: int | None = None, cache: Path = VECTORS
) -> dict[str, np.ndarray]:
    """
    A question asked about each item that has words -> {figure: a value for each of these}: whether the model would
    say just these words, and the loss of theirs a token. What `cache` holds is not computed again.

    Raises:
        Undefined: the model has no language model.
    """
    model = model._replace(pooling=None, has_recipe=False)  # which make vectors, and no answers
    if model.kind != PHI3_EMBED or AutoConfig.from_pretrained(**model.pinned).text_config is None:
        raise Undefined("it has no language model")
    processor = AutoProcessor.from_pretrained(**model.pinned)
    load = functools.cache(lambda: AutoModelForImageTextToText.from_pretrained(**model.pinned, dtype="float32").eval())
    template = hashlib.sha256(str(processor.chat_template).encode()).hexdigest()
    kept = Kept(cache, model, num_crops, lambda: {"dimensions": 2}, of=f"answers to {question!r} by {template}")
    asked = {f"{item.key} {item.words}": item for item in items if item.words}
    held = kept.keys()
    for keys in in_batches([key for key in asked if key not in held], title=f"Answers by {model.name}"):
        scores = {}
        for key in keys:
            image = asked[key].read(processor.image_processor.open_image)
            said = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            answered = [{"type": "text", "text": asked[key].words}]
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
            inputs = encode_conversation(messages, processor, num_crops)
            scores[key] = np.array(score_answer(load().to(pick_device()), inputs))
        kept.add(scores)
    values = kept.read()
    exact, loss = np.stack([values[key] for key in asked]).astype(np.float64).T
    return {EXACT: exact, LOSS: loss}
