"""Checkpoints in Microsoft's layout: the published names and files, under rule-made weights or as holes."""

import json
from pathlib import Path

import golden
import torch
from huggingface_hub import save_torch_state_dict
from phi3_embed.configuration_phi3_embed import CLIP_VIT_LARGE_PATCH14_336
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from phi3_tools.checkpoint.source import safetensors_header

DATA = Path(__file__).resolve().parent / "data"
CONFIG = json.loads((DATA / "phi-3-vision-128k-instruct.config.json").read_text())
INDEX = json.loads((DATA / "phi-3-vision-128k-instruct.index.json").read_text())
WTE, EMBED_TOKENS = "model.vision_embed_tokens.wte.weight", "model.embed_tokens.weight"

# The widths of the golden data's small cases, with Phi-3's vocabulary.
SMALL_TOWER = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128}
SMALL_CONFIG = CONFIG | {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 1024,
    "rope_scaling": golden.load("lm_small")[1]["cases"]["images"]["config"]["rope_scaling"],
    "img_processor": CONFIG["img_processor"] | {"image_dim_out": 64},
    "vision_config": CLIP_VIT_LARGE_PATCH14_336 | SMALL_TOWER,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
)
CARD = "---\nlicense: mit\npipeline_tag: text-generation\n---\n\n# A test of Phi-3-vision's layout\n"


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The published names, as far as the config has layers for them, and their shapes."""
    tower = config.get("vision_config", CLIP_VIT_LARGE_PATCH14_336)
    hidden, width, inner = config["hidden_size"], tower["hidden_size"], config["intermediate_size"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    by_owner = {
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "qkv_proj": (3 * hidden, hidden),
        "o_proj": (hidden, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
        "0": (hidden, 4 * width),
        "2": (hidden, hidden),
        "patch_embedding": (width, 3, tower["patch_size"], tower["patch_size"]),
        "position_embedding": (patches + 1, width),
        "fc1": (tower["intermediate_size"], width),
        "fc2": (width, tower["intermediate_size"]),
    }
    by_owner |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width))
    by_owner |= dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), (hidden,))
    by_owner |= dict.fromkeys(("layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm"), (width,))
    by_last = {"class_embedding": (width,), "glb_GN": (1, 1, 4 * width), "sub_GN": (1, 1, 1, 4 * width)}
    found = {}
    for name in INDEX["weight_map"]:
        is_tower = ".encoder.layers." in name
        layers = tower["num_hidden_layers"] if is_tower else config["num_hidden_layers"]
        _, has_layer, after = name.partition(".layers.")
        if has_layer and int(after.partition(".")[0]) >= layers:
            continue
        *_, owner, last = name.split(".")
        shape = by_last[last] if last in by_last else by_owner[owner]
        found[name] = shape[:1] if last == "bias" else shape
    return found


def weights(config: dict = SMALL_CONFIG, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights by the golden data's rule; of the word embeddings and the head the first 512 rows."""
    made = {
        name: torch.from_numpy(golden.weight(name, shape)).to(dtype)
        for name, shape in shapes(config).items()
        if name not in (EMBED_TOKENS, "lm_head.weight")
    }
    for name, rule in ((EMBED_TOKENS, WTE), ("lm_head.weight", "lm_head.weight")):
        rows = torch.from_numpy(golden.weight(rule, (512, config["hidden_size"]))).to(dtype)
        made[name] = torch.zeros(config["vocab_size"], config["hidden_size"], dtype=dtype)
        made[name][: len(rows)] = rows
    return made


def save(folder: Path, tensors=None, config: dict = SMALL_CONFIG, num_crops=16, max_shard_size="1GB") -> Path:
    """A whole repository."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights(config) if tensors is None else tensors, folder, max_shard_size=max_shard_size)
    save_small_files(folder, config, num_crops)
    return folder


def save_small_files(folder, config, num_crops):
    preprocessor = {
        "auto_map": {"AutoImageProcessor": "image_processing_phi3_v.Phi3VImageProcessor"},
        "image_processor_type": "Phi3VImageProcessor",
        "num_crops": num_crops,
        "num_img_tokens": 144,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("The licence of the weights\n")
    (folder / "modeling_phi3_v.py").write_text("raise AssertionError('the code of a source is never run')\n")
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(token_id): {"content": token.content, "special": token.special, "rstrip": token.rstrip}
        | {"lstrip": False, "normalized": False, "single_word": False}
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
    }
    settings = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "processor_class": "Phi3VProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_tokenizer() -> Tokenizer:
    """Of Phi-3's make: LLaMA's BPE of 32000, most of them here beyond the merges' reach, and the added tokens."""
    words = ["▁a", "▁cat", "▁what", "▁is", "▁this"]
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    characters = sorted({character for word in words for character in word})
    pieces = [*characters, *dict.fromkeys(left + right for left, right in merges)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += [f"▁unreached{number}" for number in range(32000 - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>"])
    core.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    names = {32000: "endoftext", 32001: "assistant", 32006: "system", 32007: "end", 32010: "user", 32044: "image"}
    added = [f"<|{names.get(number, f'placeholder{number}')}|>" for number in range(32000, 32045)]
    core.add_special_tokens([AddedToken(token, rstrip=token == "<|end|>", normalized=False) for token in added])
    return core


def save_true_size(folder: Path) -> Path:
    """A whole repository of the published sizes, 8.3 GB; all weights are zero, and holes on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    save_small_files(folder, CONFIG, num_crops=16)
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    for file in set(INDEX["weight_map"].values()):
        # In the order of names, as safetensors writes.
        inside = {name: shape for name, shape in sorted(shapes(CONFIG).items()) if INDEX["weight_map"][name] == file}
        header = safetensors_header({name: ("BF16", shape) for name, shape in inside.items()})
        with open(folder / file, "wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + 2 * sum(torch.Size(shape).numel() for shape in inside.values()))
    return folder
