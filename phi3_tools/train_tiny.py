"""
Makes the small checkpoint at the repository's root: Phi-3-vision with narrow layers, trained on scikit-learn's digits.
Interrupted, the same command goes on.

The image embedding is trained by `phi3-embed finetune`, in two steps. With crops of 112 pixels a patch is one pixel of
a digit, and an image costs a ninth; what is learned there is then enlarged to crops of 336 pixels, and trained on. The
language model is trained on top of it, which stays as it is: to answer, and to give words and images one space.
"""

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from phi3_tools import ROOT
from phi3_tools.checkpoint import recipes
from phi3_tools.checkpoint.layout import from_module
from phi3_tools.digits import ANSWERS, NAME_IT, PHRASES, ask
from phi3_tools.finetune.data import change
from phi3_tools.finetune.settings import Changes
from phi3_tools.images import DIGIT_NAMES, digits_split
from phi3_tools.measures import nearest, pixel_vectors, recall, unit
from phi3_tools.models import in_batches, prompt_inputs
from phi3_tools.results import TEMPLATES, folder_beside, write_beside, write_text

SEED = 0
UNKNOWN, START, END = "<unk>", "<s>", "<|endoftext|>"
SPECIAL_TOKENS = (*(UNKNOWN, START, "</s>", END, "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|system|>"),)
WORDS = (
    *DIGIT_NAMES,
    *("what", "which", "digit", "number", "is", "this", "the", "a", "picture", "of", "and", "in", "word", "?"),
    *(".", ",", ":", "first", "second", "two", "larger", "so", "neither", "even", "yes", "no", "next"),
)
WORK, PAGE = ROOT / ".tiny", ROOT / "docs" / "small-checkpoint.md"
CHAT_TEMPLATE = ROOT / "chat_template.jinja"
POSITIONS = "vision_embed_tokens.img_processor.embeddings.position_embedding.weight"
CHANGES = {"rotate": 12.0, "shift": 0.1, "zoom": 0.15}
COMMON = (
    "digits --task embedding --words --validation 0 --num-crops 0 "
    + " ".join(f"--{name} {size}" for name, size in CHANGES.items())
    + " --per-device-train-batch-size 32 --lr-scheduler-type cosine --weight-decay 0.05"
)
# Pixels of a crop, and the arguments of `phi3-embed finetune`. Chosen with --validation 0.15: on that share of the
# training digits they reach a recall@1 of 97.7 %, raw pixels 95.4 %.
STEPS = {
    112: f"{COMMON} --learning-rate 1.5e-3 --warmup-steps 0.2 --num-train-epochs 40",
    336: f"{COMMON} --learning-rate 5e-4 --warmup-steps 0.2 --num-train-epochs 4",
}
LANGUAGE_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
BATCH_SIZE, NUM_BATCHES, NUM_WHOLE_BATCHES, TEMPERATURE = 32, 460, 60, 0.05
NUM_VARIANTS, NUM_WITH_CROPS, KEPT_TOKENS, NUM_GLOBAL_TOKENS = 4, 16, 24, 157
IMAGE_TAG = re.compile(r"<\|image_\d+\|>")
NUM_ASKED_WITH_CROPS = 60
NEXT = "the next digit"
# The last token of such a text is where an answer begins, so its state tells the digit.
RECIPE = recipes.Recipe(
    name="digits",
    title="phi3-embed's small checkpoint",
    checkpoints=[],
    source="docs/small-checkpoint.md",
    text="<|user|>\n{text} in a word<|end|>\n<|assistant|>\n",
    image="<|user|>\n{images}in a word<|end|>\n<|assistant|>\n",
    text_with_image="<|user|>\n{images}{text} in a word<|end|>\n<|assistant|>\n",
    image_tag="<|image_{number}|>\n",
    without_prompt={},
    prompts={},
    pooling="lasttoken",
    num_crops=0,
    note="",
)


# The image embedding


def make_tokenizer():
    """Whole lower-case words; like Phi-3's it begins a text with `<s>`, and pads on the left."""
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # words part by spaces, but not before commas
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (UNKNOWN, START, END)],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer, crop_size):
    """A fresh image embedding with Phi-3-vision's geometry of crops, patches and tokens, and narrow layers."""
    config = from_module("modeling_phi3_embed.Phi3EmbedConfig")(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": crop_size,
            "patch_size": 14,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "projection_dim": 64,
        },
        hidden_size=LANGUAGE_MODEL["hidden_size"],
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return from_module("modeling_phi3_embed.Phi3EmbedModel")(config)


def make_processor(tokenizer, crop_size=336):
    """An image processor of 16 crops, the tokenizer, and the templates of chats and of embeddings."""
    image_processor = from_module("processing_phi3_embed.Phi3EmbedImageProcessor")(
        num_crops=16, size={"height": crop_size, "width": crop_size}, num_img_tokens=(crop_size // 28) ** 2
    )
    processor_class = from_module("processing_phi3_embed.Phi3EmbedProcessor")
    processor_class.register_for_auto_class("AutoProcessor")
    templates = recipes.chat_templates(CHAT_TEMPLATE.read_text(), RECIPE)
    return processor_class(image_processor, tokenizer, chat_template=templates)


@torch.no_grad()
def prepare(model, image_processor, images):
    """Starts that let a training of minutes succeed: unit-gain matrices, known positions, and centred embeddings."""
    table, positions = model.get_input_embeddings().weight, model.get_parameter(POSITIONS)
    for weight in model.parameters():
        if weight.ndim == 2 and weight is not table:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    positions[1:] = wave_positions(model.config.patches_per_side, positions.shape[1])
    inputs = image_processor(list(images[:160]), num_crops=0, return_tensors="pt")
    last = model.vision_embed_tokens.projector.img_projection[-1]
    last.bias -= model(**inputs).pooler_output.mean(0)


def wave_positions(side, width):
    """Sines and cosines of each patch's row and column, `(side ** 2, width)`."""
    angles = 24 / side * (torch.arange(side)[:, None] + 0.5) * 100.0 ** -torch.linspace(0, 1, width // 4)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, width / 2)
    return torch.cat((waves.repeat_interleave(side, 0), waves.repeat(side, 1)), dim=1)


def enlarge(small, model):
    """The weights of a model with small crops in one with large ones: its positions are interpolated."""
    weights = small.state_dict()
    first, others = weights[POSITIONS][:1], weights[POSITIONS][1:]
    side, new_side = (sized.config.patches_per_side for sized in (small, model))
    grid = F.interpolate(others.T.reshape(1, -1, side, side), size=(new_side, new_side), mode="bicubic")
    model.load_state_dict(weights | {POSITIONS: torch.cat((first, grid.flatten(2)[0].T))})


def train_embedding():
    """Both steps -> the folder of the trained image embedding."""
    training, _, _, _ = digits_split()
    done = None
    for crop_size, arguments in STEPS.items():
        start, output = WORK / f"start-{crop_size}", WORK / f"trained-{crop_size}"
        if not start.exists():
            set_seed(SEED)
            tokenizer = make_tokenizer()
            processor, model = make_processor(tokenizer, crop_size), make_model(tokenizer, crop_size)
            if done is None:
                prepare(model, processor.image_processor, training)
            else:
                enlarge(AutoModel.from_pretrained(done, trust_remote_code=True), model)
            with folder_beside(start) as whole:
                model.save_pretrained(whole)
                processor.save_pretrained(whole)
        command = [sys.executable, "-m", "phi3_tools", "finetune", *arguments.split()]
        subprocess.run([*command, "--model", start, "--output", output], check=True)
        done = output
    return done


# The language model


def make_whole(embedding, tokenizer):
    """A trained image embedding under a fresh language model, which alone is to be trained."""
    settings = LANGUAGE_MODEL | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    about = embedding.config.to_dict() | {"text_config": settings}
    set_seed(SEED)
    config = type(embedding.config).from_dict(about)
    whole = from_module("modeling_phi3_embed.Phi3VisionForConditionalGeneration")(config)
    whole.model.vision_embed_tokens.load_state_dict(embedding.vision_embed_tokens.state_dict())
    whole.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[embedding.config.image_token_id],
    )
    whole.model.vision_embed_tokens.img_processor.requires_grad_(False)
    whole.model.vision_embed_tokens.projector.requires_grad_(False)
    return whole


def training_tokens(embedding, image_processor):
    """
    Tokens of training digits, kept in files, with the digits: of the global view of each as it is, and changed at
    random a few times; and of some with all their crops.
    """
    training, _, digits, _ = digits_split()
    rng = np.random.default_rng(SEED)
    some = np.concatenate([rng.permutation(np.flatnonzero(digits == digit))[:NUM_WITH_CROPS] for digit in range(10)])
    kinds = {f"tokens-{variant}": (np.arange(len(training)), 0) for variant in range(NUM_VARIANTS)}
    sets = []
    for number, (name, (indices, num_crops)) in enumerate((kinds | {"tokens-crops": (some, 16)}).items()):
        path = WORK / f"{name}.npy"
        if not path.exists():
            rng, changes = np.random.default_rng((SEED, number)), Changes(**(CHANGES if number else {}))
            images = [Image.fromarray(digit).convert("RGB") for digit in training[indices]]
            images = [change(image, rng, changes, image_processor.size["height"]) for image in images]
            encoded = encode(embedding, image_processor, images, num_crops, f"Encoding {name}")
            tokens = [image for output in encoded for image in output.pooler_output]
            write_beside(path, functools.partial(np.save, arr=torch.stack(tokens).half().numpy()))
        sets.append((np.load(path, mmap_mode="r"), digits[indices]))
    return sets


@torch.inference_mode()
def encode(embedding, image_processor, images, num_crops, title):
    """What `get_image_features` gives for images of one size, batch by batch."""
    for batch in in_batches(images, 1 if num_crops else BATCH_SIZE, title):
        inputs = image_processor(list(batch), num_crops=num_crops, return_tensors="pt")
        yield embedding.get_image_features(inputs.pixel_values, inputs.image_sizes)


class Lessons(Dataset):
    """
    What is learnt, one lesson after another, each drawn by its number: a conversation about one or two images, or
    about digits that are named in it; and an image and a text that belong together.
    """

    def __init__(self, sets, processor):
        self.sets, self.processor = sets, processor

    def __len__(self):
        return (NUM_BATCHES + NUM_WHOLE_BATCHES) * BATCH_SIZE

    def __getitem__(self, number):
        rng, batch = np.random.default_rng((SEED, number)), number // BATCH_SIZE
        keep = KEPT_TOKENS if batch < NUM_BATCHES else NUM_GLOBAL_TOKENS
        # Every fourth batch is of images with all their crops: its texts are longer than those of the others.
        tokens, digits = self.sets[-1 if batch % 4 == 3 else rng.integers(NUM_VARIANTS)]
        drawn = rng.integers(len(tokens), size=rng.integers(1, 3))
        shown = [int(digits[index]) for index in drawn]
        images = [tokens[index] for index in drawn]

        parts = [{"type": "image"} for _ in shown]
        if is_told := rng.random() < 0.25:
            parts = [{"type": "text", "text": f"{draw_phrase(rng, digit)}. "} for digit in shown]
        conversation, questions = [], list(ANSWERS[len(shown)].items())
        for order in rng.permutation(len(questions))[: rng.integers(1, len(questions) + 1)]:
            question, answer = questions[order]
            conversation += [
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer(*shown)},
            ]
            parts = []
        # An image belongs to the texts of its digit, and with words for the next digit to those of that.
        is_next = rng.random() < 0.25
        digit = (shown[0] + is_next) % 10
        of_image = ask(NEXT if is_next else None, images[:1])
        return {
            "chat": self.row(conversation, [] if is_told else images, keep, rng),
            "image": self.row(of_image, images[:1], keep, rng, recipes.TEMPLATE),
            "text": self.row(ask(draw_phrase(rng, digit)), [], keep, rng, recipes.TEMPLATE),
            "digit": digit,
        }

    def row(self, conversation, images, keep, rng, template="default"):
        """
        A conversation as ids, positions, and the tokens of its images in place of placeholders. A lesson
        stays cheap because few of an image's tokens are kept, at their true places; of its crops three times as many.
        """
        placeholder = self.processor.replace_image_token({"num_image_tokens": [1]}, 0)
        template = self.processor.chat_template[template]
        text = self.processor.tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
        ids, positions, tokens, position, images = [], [], [], 0, iter(images)
        for token in self.processor.tokenizer(IMAGE_TAG.sub(placeholder, text)).input_ids:
            kept, length = np.zeros(1, int), 1
            if token == self.processor.image_token_id:
                image = next(images)
                length = len(image)
                first = length - NUM_GLOBAL_TOKENS  # of the global view, which the crops go before
                of_global = first + rng.permutation(NUM_GLOBAL_TOKENS)[:keep]
                kept = np.sort(np.concatenate((rng.permutation(first)[: 3 * keep], of_global)))
                tokens.append(image[kept])
            ids += [token] * len(kept)
            positions += (position + kept).tolist()
            position += length
        return {"input_ids": ids, "position_ids": positions, "tokens": tokens}


def draw_phrase(rng, digit):
    return PHRASES[rng.integers(len(PHRASES))].format(DIGIT_NAMES[digit])


class LessonTrainer(Trainer):
    """Next tokens of the answers, and in a batch each image's vector nearest to those of its digit's texts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        answers = model(**embedded(model, inputs["chat"]), use_cache=False).loss
        images, texts = (last_token(model.model, embedded(model, inputs[name])) for name in ("image", "text"))
        scores = images @ texts.T / TEMPERATURE
        belong = (inputs["digits"][:, None] == inputs["digits"]).float()
        search = [F.cross_entropy(rows, belong / belong.sum(1, keepdim=True)) for rows in (scores, scores.T)]
        return answers + sum(search) / 2


def embedded(model, inputs):
    """Inputs with embeddings in place of ids: those of words, and at placeholders the images' tokens."""
    ids, tokens = inputs["input_ids"], inputs["tokens"]
    is_image = (ids == model.config.image_token_id)[..., None]
    inputs_embeds = model.get_input_embeddings()(ids).masked_scatter(is_image, tokens)
    others = {name: value for name, value in inputs.items() if name not in ("input_ids", "tokens")}
    return {"inputs_embeds": inputs_embeds, **others}


def last_token(model, inputs):
    """The unit vectors `(n, width)` of texts: the last token's final state. Padding may be on either side."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    states = model(**inputs, use_cache=False).last_hidden_state
    places = torch.arange(states.shape[1]) * inputs["attention_mask"]
    return F.normalize(states[torch.arange(len(states)), places.argmax(1)], dim=1)


def collate(tokenizer, lessons):
    """Lessons -> their digits, and for each of their rows a batch that [`embedded`] takes, padded on the right."""
    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    batch = {"digits": torch.tensor([lesson["digit"] for lesson in lessons])}
    for name in ("chat", "image", "text"):
        rows = [lesson[name] for lesson in lessons]
        ids, positions = (
            pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True)
            for key in ("input_ids", "position_ids")
        )
        is_text = torch.arange(ids.shape[1]) < torch.tensor([[len(row["input_ids"])] for row in rows])
        # User and assistant take turns, so an odd number of ends lies before an answer.
        is_end = ids == end
        is_answer = ((is_end.cumsum(1) - is_end.int()) % 2 == 1) & (ids != begin) & is_text
        tokens = [image for row in rows for image in row["tokens"]]
        batch[name] = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": is_text.long(),
            "labels": ids.masked_fill(~is_answer, -100),
            "tokens": torch.from_numpy(np.concatenate(tokens)).float() if tokens else torch.zeros(0),
        }
    return batch


def train_language_model(embedding_folder):
    """-> the model in training, with its processor."""
    embedding = AutoModel.from_pretrained(embedding_folder, trust_remote_code=True).eval()
    tokenizer = make_tokenizer()
    processor, model = make_processor(tokenizer), make_whole(embedding, tokenizer)
    sets = training_tokens(embedding, processor.image_processor)
    output = WORK / "trained-whole"
    arguments = TrainingArguments(
        output,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",  # a lesson is drawn by its number
        num_train_epochs=1,
        learning_rate=3e-3,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        seed=SEED,
    )
    collator = functools.partial(collate, tokenizer)
    trainer = LessonTrainer(model, arguments, collator, Lessons(sets, processor))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.exists() else None)
    return model.eval(), processor


# The checkpoint


def save(model, processor, folder):
    """A checkpoint without code, which lies at the root already, as sentence-transformers takes it too."""
    with folder_beside(folder) as whole:
        recipes.write_files(RECIPE, model.config.hidden_size, whole)
        model.save_pretrained(whole)
        processor.tokenizer.chat_template = None
        processor.save_pretrained(whole)
        for path in whole.glob("*.py"):
            path.unlink()


def put_in_place(folder):
    """Moves the files of a folder to the same places at the root."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = ROOT / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)


# Figures


class Figures(NamedTuple):
    """Shares on digits that the training did not see, two for each row of a table."""

    by_images: dict[str, list[float]]  # recall@1 and recall@5 of each kind of vectors
    by_words: dict[str, list[float]]  # of the ten images nearest to a digit's words; of images by their nearest words
    answers: dict[str, list[float]]  # exact ones, and those that the most frequent answer would get


@torch.inference_mode()
def evaluate(model, processor, images, labels) -> Figures:
    """Figures of the global view alone, which goes through the tower once."""
    encoded = list(encode(model, processor.image_processor, images, 0, "Encoding"))
    features = torch.cat([output.last_hidden_state for output in encoded])
    trained = Asker(model, processor, images, features)
    fresh = Asker(under_fresh_language_model(model, processor), processor, images, features)
    vectors = pixel_vectors(images)
    vectors["mean of the image tokens"] = unit(torch.cat([output.image_embeds for output in encoded]).numpy())
    vectors["last token"] = trained.image_vectors()
    partners = np.random.default_rng(SEED).permutation(len(images))
    answers = {}
    for count, questions in ANSWERS.items():
        shown = np.stack((np.arange(len(images)), partners)[:count], axis=1)
        for question, answer in questions.items():
            wanted = [answer(*labels[row]) for row in shown]
            right = np.mean([given == true for given, true in zip(trained.answers(question, shown), wanted)])
            answers[question] = [right, max(Counter(wanted).values()) / len(wanted)]
    return Figures(
        {name: [recall(rows, labels, k) for k in (1, 5)] for name, rows in vectors.items()},
        {"this checkpoint": trained.by_words(labels), "under a fresh language model": fresh.by_words(labels)},
        answers,
    )


class Asker:
    """A model asked about images by number, with the tower's features of their global views at hand (or pixels)."""

    def __init__(self, model, processor, images, features=None, num_crops=0):
        self.model, self.processor, self.images, self.features = model, processor, images, features
        self.num_crops = num_crops

    def inputs(self, text, shown, **kwargs):
        """What the model takes of a text about the images of each row of `shown` `(n, count)`."""
        conversations = [ask(text, [self.images[index] for index in row]) for row in shown]
        inputs = prompt_inputs(self.processor, conversations, self.num_crops, **kwargs)
        if self.features is not None:
            inputs["pixel_values"] = self.features[shown.ravel()]
        return inputs

    def answers(self, question, shown):
        """The answer to a question about each row of images."""
        for rows in in_batches(shown, BATCH_SIZE, question):
            inputs = self.inputs(question, rows, add_generation_prompt=True)
            ids = self.model.generate(**inputs, max_new_tokens=12, do_sample=False)
            yield from self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def image_vectors(self):
        batches = in_batches(np.arange(len(self.images))[:, None], BATCH_SIZE, "Embedding")
        inputs = (self.inputs(None, rows, chat_template=recipes.TEMPLATE) for rows in batches)
        return torch.cat([last_token(self.model.model, batch) for batch in inputs]).numpy()

    def by_words(self, labels):
        texts = [RECIPE.text.replace("{text}", f"the number {name}") for name in DIGIT_NAMES]
        words = last_token(self.model.model, self.processor(text=texts, padding=True, return_tensors="pt")).numpy()
        images = self.image_vectors()
        found = labels[nearest(images, words, 10)] == np.arange(10)[:, None]
        return [found.mean(), np.mean((images @ words.T).argmax(1) == labels)]


def under_fresh_language_model(model, processor):
    """The same image embedding and words under a language model that nothing was taught."""
    embedding = from_module("modeling_phi3_embed.Phi3EmbedModel")(model.config)
    embedding.vision_embed_tokens.load_state_dict(model.model.vision_embed_tokens.state_dict())
    return make_whole(embedding, processor.tokenizer).eval()


def card(figures, with_crops, num_training):
    """The checkpoint's page."""
    tables = {
        name: "\n".join(f"| {row} | {one:.1%} | {other:.1%} |" for row, (one, other) in rows.items())
        for name, rows in figures._asdict().items()
    }
    template = (TEMPLATES / "small_checkpoint.md").read_text()
    return template.format(
        **tables, with_crops=f"{with_crops:.0%}", num_with_crops=NUM_ASKED_WITH_CROPS, num_training=num_training
    )


def main():
    model, processor = train_language_model(train_embedding())
    training, images, _, labels = digits_split()
    some = np.arange(NUM_ASKED_WITH_CROPS)[:, None]
    asked = Asker(model, processor, images, num_crops=16).answers(NAME_IT, some)
    with_crops = np.mean([answer == DIGIT_NAMES[label] for answer, label in zip(asked, labels)])
    text = card(evaluate(model, processor, images, labels), with_crops, len(training))
    shutil.rmtree(WORK / "whole", ignore_errors=True)
    save(model, processor, WORK / "whole")
    put_in_place(WORK / "whole")
    write_text(PAGE, text)
    shutil.rmtree(WORK)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # `phi3-embed finetune` has said what went wrong
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit("\ntrain_tiny: Interrupted. The same command goes on.")
