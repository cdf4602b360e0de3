"""The checkpoint at the repository's root: what its page says of it, and that it loads by the repository's name."""

import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT_FILES, ROOT, run_python
from transformers import AutoModelForImageTextToText, AutoProcessor

from phi3_tools import train_tiny
from phi3_tools.digits import IS_IT_EVEN, LARGER, NAME_IT, true_answer
from phi3_tools.images import digits_split

WHERE = {"pretrained_model_name_or_path": ROOT, "trust_remote_code": True}
# What a machine does that knows the repository's name alone: images by their mean, by words, and asked about.
USE = """
import sys
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from phi3_tools.digits import NAME_IT, ask
from phi3_tools.images import DIGIT_NAMES, digits_split
from PIL import Image

name, options = sys.argv[1], {"trust_remote_code": True}
_, images, _, labels = digits_split()
images = [Image.fromarray(image) for image in images[:2]]
print(*labels[:2])
extract = pipeline("image-feature-extraction", model=name, **options)
print(len(extract(images, pool=True, batch_size=2)[1][0]))
answer = pipeline("image-text-to-text", model=name, **options)
print(answer(text=ask(NAME_IT, images[:1]), max_new_tokens=12, return_full_text=False)[0]["generated_text"].strip())
embedder = SentenceTransformer(name, **options)
vectors, words = embedder.encode(images), embedder.encode([f"the number {digit}" for digit in DIGIT_NAMES])
print(*(vectors @ words.T).argmax(1))
print(type(AutoModel.from_pretrained(name, **options)).__name__)
print(type(AutoModelForImageTextToText.from_pretrained(name, **options)).__name__)
"""


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForImageTextToText.from_pretrained(**WHERE).eval(), AutoProcessor.from_pretrained(**WHERE)


def test_it_is_small_and_has_the_figures_of_its_page(loaded):
    assert sum((ROOT / name).stat().st_size for name in CHECKPOINT_FILES) < 4_000_000
    training, images, _, labels = digits_split()
    figures = train_tiny.evaluate(*loaded, images, labels)
    page = train_tiny.PAGE.read_text()
    with_crops = int(re.search(r"it names (\d+)% of", page)[1]) / 100
    shares, again = (
        [float(share) for share in re.findall(r"([\d.]+)%", text)]
        for text in (page, train_tiny.card(figures, with_crops, len(training)))
    )
    assert shares == pytest.approx(again, abs=0.6)  # two of 360, for another machine's order of sums
    assert figures.by_images["mean of the image tokens"][0] > 0.97
    assert min(figures.by_words["this checkpoint"]) > 0.95
    assert figures.answers[NAME_IT][0] > 0.95 and figures.answers[IS_IT_EVEN][0] > 0.95
    assert figures.answers[LARGER][0] > 0.5  # the names of both and the verdict, to the letter


def test_it_names_digits_with_all_their_crops_too(loaded):
    _, images, _, labels = digits_split()
    asker = train_tiny.Asker(*loaded, images, num_crops=16)
    answers = asker.answers(NAME_IT, np.arange(10)[:, None])
    assert np.mean([answer == true_answer(NAME_IT, label) for answer, label in zip(answers, labels)]) > 0.5


def test_the_whole_repository_loads_from_the_hub_by_its_name_alone(hub, tmp_path):
    """What `git push` would bring there: every file that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hub.add_repo("someone/phi3-embed", {name: ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()})
    printed = run_python(USE, "someone/phi3-embed", **hub.environment(tmp_path, "")).splitlines()
    first, second = map(int, printed[0].split())
    assert printed[1:] == [
        "128",
        true_answer(NAME_IT, first),
        printed[0],
        "Phi3VisionModel",
        "Phi3VisionForConditionalGeneration",
    ]


def test_what_is_learnt_of_small_crops_lies_in_the_same_places_of_large_ones():
    tokenizer = train_tiny.make_tokenizer()
    small, large = (train_tiny.make_model(tokenizer, size) for size in (112, 336))
    train_tiny.enlarge(small, large)
    learnt, there = (model.get_parameter(train_tiny.POSITIONS) for model in (small, large))
    # A patch of a small crop is three by three patches of a large one.
    middles = there[1:].reshape(24, 24, -1)[1::3, 1::3].flatten(0, 1)
    torch.testing.assert_close(middles, learnt[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(there[0], learnt[0])
    assert torch.equal(large.get_input_embeddings().weight, small.get_input_embeddings().weight)


def test_answers_alone_are_learnt():
    processor = train_tiny.make_processor(train_tiny.make_tokenizer())
    tokens, digits = np.ones((40, 157, 128), np.float16), np.arange(40) % 10
    lessons = train_tiny.Lessons([(tokens, digits)] * (train_tiny.NUM_VARIANTS + 1), processor)
    batch = train_tiny.collate(processor.tokenizer, [lessons[number] for number in range(24)])["chat"]
    texts = processor.tokenizer.batch_decode(batch["input_ids"])
    for text, labels in zip(texts, batch["labels"]):
        answers = re.findall(r"<\|assistant\|>(.*?<\|end\|>)", text)
        assert processor.tokenizer.decode(labels[labels >= 0]) == "".join(answers).strip()
    assert len(batch["tokens"]) == (batch["input_ids"] == processor.image_token_id).sum()
