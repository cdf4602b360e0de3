"""Small vision towers and language models with random weights, as folders that transformers loads."""

import torch
from conftest import SMALL_TOWER
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, PreTrainedTokenizerFast

SHAPE = {name: size for name, size in SMALL_TOWER.items() if name != "model_type"}
# Model types, and what their configs need beside SHAPE. AIMv2 and DINOv3 have no table of positions to resample here.
TOWERS = {
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 2},
    "dinov3_vit": {"num_register_tokens": 2},
    "vit": {},
    "deit": {},
    "mlcd_vision_model": {},
    "aimv2_vision_model": {"is_native": True},
}
TEXT = {
    "vocab_size": 90,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 5,
    "pad_token_id": 3,
}
WORDS, QUESTION = ("cat", "dog", "front", "lower", "newer", "picture", "that", "and"), "what is this"
CHAT = "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}<|user|>"


def save_tower(folder, model_type, **settings):
    """A tower with random weights and its image processor -> its folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SHAPE | TOWERS.get(model_type, {}) | settings))
    tower = AutoModel.from_config(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1]).save_pretrained(folder)
    return str(folder)


def save_language_model(folder, model_type, copies=False, **settings):
    """A language model with random weights and a tokenizer with a chat template -> its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TEXT | settings)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), unk_token="<unk>", bos_token="<s>", eos_token="<|end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT
    if copies:
        teach_to_copy(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_tokenizer():
    """Whole words, and no room for images."""
    known = ("<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|end|>", *WORDS, *QUESTION.split())
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<|user|>", "<|end|>"])
    return tokenizer


def teach_to_copy(model, tokenizer, steps=250):
    """Trains a model to answer with the word that most of its question is: without that no projection can reach it."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        rows = []
        for number in range(16):
            word = WORDS[(step + number) % len(WORDS)]
            context = [
                WORDS[place] if chance < 0.3 else word
                for place, chance in zip(torch.randint(len(WORDS), (6,)), torch.rand(6))
            ]
            asked = [{"role": "user", "content": " ".join(context) + " " + QUESTION}]
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            answer = tokenizer(f"{word}<|end|>").input_ids
            asked = tokenizer(text).input_ids
            rows.append((asked + answer, [-100] * len(asked) + answer))
        input_ids, labels = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row[part]) for row in rows], batch_first=True, padding_value=pad
            )
            for part, pad in ((0, tokenizer.pad_token_id), (1, -100))
        )
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
