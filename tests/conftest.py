"""What all tests share."""

import copy
import functools
import os
import shutil
from pathlib import Path

# Before transformers is imported, here and in the processes that tests start: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The workers share two cores: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

import pytest  # noqa: E402
import torch  # noqa: E402
from fresh_process import run_fresh  # noqa: E402
from hub_server import HubServer  # noqa: E402
from phi3_embed.configuration_phi3_embed import Phi3EmbedConfig  # noqa: E402
from phi3_embed.modeling_phi3_embed import Phi3EmbedModel, Phi3VisionForConditionalGeneration  # noqa: E402
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor, Phi3EmbedProcessor  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast, dynamic_module_utils  # noqa: E402

# transformers parses a checkpoint's code at each load, a third of a second; here that of one file once.
parse_imports = dynamic_module_utils.get_imports
parse_once = functools.cache(lambda path, _: parse_imports(path))
dynamic_module_utils.get_imports = lambda path: parse_once(path, os.stat(path).st_mtime_ns)


# Begun first, because they take longest: so no worker waits at the end for another.
LONGEST = (
    "test_finetune_command.py",
    "test_typing.py",
    "test_golden_language_model.py",
    "test_golden.py",
    "test_ray.py",
    "test_app.py",
    "test_talk.py",
    "test_transformers_common.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


SMALL_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 56,
    "patch_size": 14,
}


# A language model of 4 heads of 12, whose rotary factors change at 64 tokens.
SMALL_TEXT = {
    "model_type": "phi3",
    "hidden_size": 48,
    "vocab_size": 100,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small_config(tower=(), **kwargs):
    """A config with 56-pixel crops of 4 x 4 patches, so of 2 x 2 tokens."""
    defaults = {
        "vision_config": SMALL_TOWER | dict(tower),
        "hidden_size": 48,
        "vocab_size": 100,
        "image_token_id": 5,
    }
    return Phi3EmbedConfig(**(defaults | kwargs))


def small_model(tower=(), **kwargs):
    """A small model with fixed random weights, none of them zero."""
    torch.manual_seed(0)
    model = Phi3EmbedModel(small_config(tower, **kwargs)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def whole_config(text=(), tower=(), **kwargs):
    """A small config with a language model."""
    text = copy.deepcopy(SMALL_TEXT) | dict(text)  # a config changes the rope_scaling that it is given
    defaults = {"hidden_size": None, "vocab_size": None, "text_config": text}
    return small_config(tower, **(defaults | kwargs))


def whole_model(text=(), tower=(), **kwargs):
    """A small whole model with fixed random weights, none of them zero, that says no word twice in a row for long."""
    torch.manual_seed(0)
    model = Phi3VisionForConditionalGeneration(whole_config(text, tower, **kwargs)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def small_pixels(*grids, pad_views=False, max_views=None):
    """
    Random pixels of images with these grids of crops, and their sizes in pixels: the views one after another, or with
    `pad_views` or `max_views` one row an image, zeros behind its views.
    """
    size, generator = SMALL_TOWER["image_size"], torch.Generator().manual_seed(0)
    num_views = [rows * cols + 1 for rows, cols in grids]
    views = [torch.randn(count, 3, size, size, generator=generator) for count in num_views]
    pixel_values = torch.cat(views)
    if pad_views or max_views:
        pixel_values = torch.zeros(len(grids), max_views or max(num_views), 3, size, size)
        for row, image in zip(pixel_values, views):
            row[: len(image)] = image
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(grids) * size}


@pytest.fixture(scope="module")
def model():
    return small_model()


def make_tokenizer():
    """A tokenizer of Phi-3's make: LLaMA's BPE, which begins every piece by a space, `<s>` first, tags split off."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>", "<|image|>"]
    words = ["what is this and that ? a picture of the cat dog in front lower newer \n"] * 4
    core.train_from_iterator(words, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_checkpoint(folder, tokenizer):
    small_model(image_token_id=tokenizer.convert_tokens_to_ids("<|image|>")).save_pretrained(folder)
    image_processor = Phi3EmbedImageProcessor(num_crops=4, size={"height": 56, "width": 56}, num_img_tokens=4)
    Phi3EmbedProcessor(image_processor, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def hub():
    """A Hub on loopback, empty."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium: the machine's, or else the one that playwright has installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without the switches Chromium calls its maker's hosts at each start; as root it runs only without a sandbox.
        switches = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=switches)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def repository(tmp_path_factory, tokenizer):
    """A whole small checkpoint with its code, as a user of transformers saves one -> its folder."""
    path = tmp_path_factory.mktemp("repository")
    save_checkpoint(path, tokenizer)
    return str(path)


@pytest.fixture(scope="session")
def whole_checkpoint(tmp_path_factory):
    """A whole small Phi-3-vision with the recipe of VLM2Vec, so that it embeds texts too -> its folder."""
    import published

    from phi3_tools.checkpoint.convert import convert

    folder = tmp_path_factory.mktemp("whole")
    # The published limit: one row beyond it would change the rotary factors of all rows of a batch.
    config = published.SMALL_CONFIG | {"original_max_position_embeddings": 4096}
    source = published.save(folder / "source", published.weights(dtype=torch.float32), config)
    convert(str(source), folder / "model", whole=True, recipe="vlm2vec")
    return str(folder / "model")


@pytest.fixture(scope="session")
def embedding_checkpoint(tmp_path_factory):
    """The small checkpoint's image embedding alone, as a user takes it out of the whole -> its folder."""
    folder = tmp_path_factory.mktemp("embedding") / "phi3-embed"
    Phi3EmbedModel.from_pretrained(ROOT).save_pretrained(folder)
    Phi3EmbedProcessor.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)
    return str(folder)


# What makes the repository's root a checkpoint: the files that loading it takes.
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "additional_chat_templates/embedding.jinja"),
    *("checks_phi3_embed.py", "configuration_phi3_embed.py", "modeling_phi3_embed.py", "processing_phi3_embed.py"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
)


def copy_checkpoint(folder):
    """A copy of the small checkpoint alone -> its folder."""
    folder.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_python(code, *arguments, run=run_fresh, **environment):
    """Runs code in a fresh process outside the repository -> what it printed. Fails as the process does."""
    done = run("-c", code, *arguments, env={"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
