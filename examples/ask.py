"""A question about images, answered word by word: `python ask.py QUESTION IMAGE... [--model MODEL]`."""

import argparse

from phi3_embed import FOLDER
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question")
parser.add_argument("images", nargs="+")
parser.add_argument("--model", default=FOLDER, help="a Hub id or a folder of a whole checkpoint")
arguments = parser.parse_args()

processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(arguments.model, trust_remote_code=True, device_map="auto")

content = [{"type": "image", "path": path} for path in arguments.images] + [
    {"type": "text", "text": arguments.question}
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**inputs.to(model.device), max_new_tokens=200, streamer=streamer)
