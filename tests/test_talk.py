"""`phi3-embed finetune --task align` and `--task instruct`: what is said of images, on small models."""

import json
import re
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from fresh_process import run_fresh
from parts import save_language_model, save_tower
from PIL import Image
from sentence_transformers import SentenceTransformer
from spaces import RECIPE
from trainings import arguments_of, assert_same_weights, finetune, killed, losses, make_images
from transformers import AutoModelForImageTextToText, AutoProcessor

from phi3_tools.checkpoint.assemble import run as assemble
from phi3_tools.finetune import align, talk
from phi3_tools.finetune.conversations import load_conversations
from phi3_tools.finetune.settings import DataOptions
from phi3_tools.finetune.talk import LORA_TARGETS
from phi3_tools.models import PROJECTION

sys.path.insert(0, str(ROOT / "benchmarks"))
import towers  # noqa: E402

pytestmark = pytest.mark.train

PROJECTOR = "model.vision_embed_tokens.projector."
ALIGN = "--task align --validation 0.2 --num-crops 0 --per-device-train-batch-size 8 --disable-tqdm true"

LONG = f"{ALIGN} --words --num-train-epochs 30 --learning-rate 3e-3 --token-dropout 0.2 --feature-dropout 0.1"

FOUR_STEPS = (
    "--validation 0 --num-crops 0 --max-steps 4 --logging-steps 1 --save-strategy steps --save-steps 2 "
    "--per-device-train-batch-size 8 --disable-tqdm true"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "colours", ("dog", "front", "cat"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """DINOv2's form before Llama's, assembled with a recipe -> its folder."""
    path = tmp_path_factory.mktemp("start")
    tower, text = save_tower(path / "tower", "dinov2"), save_language_model(path / "text", "llama", copies=True)
    recipe = path / "own.json"
    recipe.write_text(json.dumps({name: value for name, value in asdict(RECIPE).items() if name != "name"}))
    assemble(path / "both", recipe=str(recipe), tower=tower, language_model=text, layer_idx=-1, num_crops=2)
    return path / "both"


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def changed_weights(before, after):
    after = after.state_dict()
    return [name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])]


@pytest.fixture(scope="module")
def aligned(images, start, tmp_path_factory):
    output = tmp_path_factory.mktemp("aligned") / "output"
    return output, finetune(start, images, output, LONG)


def test_an_aligned_model_names_colours_that_it_has_not_seen(aligned):
    output, metrics = aligned
    assert metrics["held out"]["fine-tuned"]["exact answers"] > 0.8
    assert (output / "curves.png").exists() and "| dog |" in (output / "README.md").read_text()


def test_aligning_leaves_tower_language_model_and_text_to_the_bit(aligned, start):
    (before, processor), (after, _) = load(start), load(aligned[0])
    changed = changed_weights(before, after)
    assert changed and all(name.startswith(PROJECTOR) for name in changed)
    assert before.config.untrained and not after.config.untrained
    inputs = processor(text=["what is this", "a picture of the cat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = [model(**inputs, output_hidden_states=True).hidden_states[-1] for model in (before, after)]
        answers = [model.generate(**inputs, max_new_tokens=8) for model in (before, after)]
    assert torch.equal(*vectors) and torch.equal(*answers)


def test_an_assembly_has_one_number_of_crops_whatever_its_recipe_says(start):
    given = json.loads((start / "sentence_bert_config.json").read_text())["processing_kwargs"]
    assert RECIPE.num_crops == 1 and "image" not in given  # so that the processor's own count
    assert load(start)[1].image_processor.num_crops == 2
    assert "The recipe own says `num_crops` 1, and 2 is taken." in (start / "README.md").read_text()


def test_an_aligned_model_embeds_words_and_images_by_the_recipe_that_it_was_assembled_with(aligned, images):
    embedder = SentenceTransformer(str(aligned[0]), trust_remote_code=True, device="cpu")
    image = Image.open(images / "dog" / "0.png")
    of_text, of_image = embedder.encode(["the dog", image])
    model, processor = load(aligned[0])
    with torch.no_grad():
        last = model.model(**processor(text="the dog", return_tensors="pt")).last_hidden_state[0, -1]
        inputs = processor(text="<|image_1|> a picture", images=image, num_crops=0, return_tensors="pt")
        seen = model.model(**inputs).last_hidden_state[0, -1]
    assert np.allclose(of_text, last / last.norm(), atol=1e-5)
    assert np.allclose(of_image, seen / seen.norm(), atol=1e-5)  # with the crops that it was aligned on


def test_what_aligning_trained_is_put_between_tower_and_language_model_again(aligned, start, tmp_path):
    tower, text = (str(start.parent / name) for name in ("tower", "text"))
    assemble(tmp_path / "again", aligned[0] / "aligned", tower=tower, language_model=text)
    (whole, _), (again, processor) = load(aligned[0]), load(tmp_path / "again")
    assert not again.config.untrained and again.config.layer_idx == -1 and processor.image_processor.num_crops == 0
    assert not changed_weights(whole, again)
    size = sum(weight.nbytes for weight in again.model.vision_embed_tokens.projector.parameters())
    assert sum(path.stat().st_size for path in (aligned[0] / "aligned").iterdir()) < 2 * size


def test_standard_features_give_what_the_projection_gives_of_the_towers_own(start):
    model, _ = load(start)
    torch.manual_seed(0)
    for weight in model.model.vision_embed_tokens.projector.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    features, sizes = 3 + 5 * torch.randn(4, 16, 32) * torch.rand(32), torch.tensor([[56, 168]])
    rows = [{"features": features.numpy()}]
    with torch.no_grad():
        expected = model.get_image_features(features, sizes).pooler_output[0]
        alignment = align.Alignment(model, 0.5, torch.tensor([]), rows, is_fresh=False).eval()
        kept = torch.ones(len(expected), dtype=torch.bool)
        assert torch.allclose(alignment.tokens(features, sizes, kept).pooler_output[0], expected, atol=1e-5)
        within = model.get_image_features((features - alignment.mean) / alignment.std, sizes).pooler_output[0]
        assert torch.allclose(within, expected, atol=1e-5)
        finished = alignment.finish().get_image_features(features, sizes).pooler_output[0]
    assert torch.allclose(finished, expected, atol=1e-5)


def test_a_killed_aligning_goes_on_as_if_it_had_not_been(aligned, images, start, tmp_path, caplog):
    output = killed(aligned[0], tmp_path / "output")
    shutil.rmtree(output / "aligned")
    finetune(start, images, output, LONG)
    assert_same_weights(output, aligned[0], f"aligned/{PROJECTION}")
    assert "has never been trained" not in caplog.text  # while that is mended


def test_instructing_trains_adapters_of_the_language_model_and_the_projection(aligned, images, tmp_path):
    options = "--task instruct --validation 0 --num-crops 0 --max-steps 2 --save-strategy no --disable-tqdm true"
    finetune(aligned[0], images, tmp_path, f"{options} --gradient-checkpointing --bf16")
    (before, _), (after, _) = load(aligned[0]), load(tmp_path)
    changed = [name for name in changed_weights(before, after) if "projector" not in name]
    assert len(changed) == 2 * 4 and all(re.fullmatch(LORA_TARGETS, name.removesuffix(".weight")) for name in changed)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_killed_instructing_goes_on_as_if_it_had_not_been(train, aligned, images, tmp_path):
    options = f"--task instruct --train {train} {FOUR_STEPS}"
    finetune(aligned[0], images, tmp_path / "whole", options)
    finetune(aligned[0], images, killed(tmp_path / "whole", tmp_path / "killed"), options)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


# The launched processes train one after the other.
TRAININGS = """
import sys
import torch
from phi3_tools.finetune import command
torch.distributed.destroy_process_group = lambda: None
for words in sys.argv[1:]:
    command.run(words.split())
    assert torch.distributed.get_world_size() == 2
"""


@pytest.mark.hub
def test_two_processes_align_and_instruct_as_one_does_and_push(aligned, images, start, hub, tmp_path):
    (tmp_path / "script.py").write_text(TRAININGS)
    trainings = {"align": start, "instruct": aligned[0]}
    commands = []
    for task, model in trainings.items():
        finetune(model, images, tmp_path / "alone" / task, f"--task {task} {FOUR_STEPS}")
        halved = f"--task {task} {FOUR_STEPS.replace('batch-size 8', 'batch-size 4')}"
        push = f"--push-to-hub --hub-model-id someone/{task}"
        commands.append(" ".join(arguments_of(model, images, tmp_path / task, f"{halved} {push}")))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", tmp_path / "script.py"]
    done = run_fresh(*launcher, *commands, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    for task in trainings:
        assert losses(tmp_path / task) == pytest.approx(losses(tmp_path / "alone" / task), abs=1e-4)
        pushed = hub.files(f"someone/{task}", "main")
        assert {"README.md", "model.safetensors", "modeling_phi3_embed.py", "metrics.json"} <= pushed.keys()
        assert not any(str(tmp_path).encode() in content for content in pushed.values())


@pytest.mark.parametrize("task", ["align", "instruct"])
def test_all_conversations_validate_a_training_that_drops_its_last_batch(task, aligned, images, tmp_path):
    options = f"{ALIGN.replace('align', task)} --max-steps 1 --dataloader-drop-last --gradient-checkpointing"
    by_step = "--eval-strategy steps --eval-steps 1 --save-strategy steps --save-steps 1"
    history = finetune(aligned[0], images, tmp_path, f"{options} {by_step}")["history"]
    assert sum("eval_loss" in entry for entry in history) == 1


def test_the_benchmark_counts_as_exact_what_the_model_answers(aligned, images):
    splits, names = load_conversations(str(images), DataOptions(validation=0), 1)
    (model, processor), rows = load(aligned[0]), splits["test"]
    found = towers.ask(model, processor, rows, names, 0, "Asked")
    answers, _ = talk.ask(model, processor, rows, 0, 4, "Answered")
    assert (found["exact"] > 0).tolist() == [[answer == name for name in names] for answer in answers]
    assert found["exact"].any() and found["scores"].shape == (len(rows), len(names))


def test_words_that_find_their_photographs_first_have_full_precision():
    labels = np.array([0, 0, 1, 1])
    right = np.log([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    assert towers.average_precision(right, labels) == (1, 1)
    swapped = np.log([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])  # the first is likeliest to be called 1
    precision = ((1 + 2 / 4) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert towers.average_precision(swapped, labels) == (0.5, pytest.approx(precision))
