"""
The whole model's numerical agreement with the original computation: states, logits, pooled vectors, generated tokens
and prompts. The tolerances are those that the golden data state.
"""

import gc

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT
from phi3_embed.configuration_phi3_embed import CLIP_VIT_LARGE_PATCH14_336, Phi3EmbedConfig
from phi3_embed.modeling_phi3_embed import Phi3EmbedModel, Phi3VisionForConditionalGeneration
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor, Phi3EmbedProcessor
from transformers import PreTrainedTokenizerFast

SMALL, SMALL_NOTE = golden.load("lm_small")
GENERATED, GENERATED_NOTE = golden.load("lm_generate")
BEAMS = [name for name in GENERATED_NOTE["cases"] if name.startswith("beam")]
GREEDY = [name for name in GENERATED_NOTE["cases"] if name not in (*BEAMS, "batch_eos")]
IMAGE = 511  # of these small vocabularies an id that no prompt has


def small_config(note, case):
    tower = {"hidden_size": "width", "num_attention_heads": "heads", "num_hidden_layers": "layers"}
    tower = {name: note["tower"][short] for name, short in (tower | {"intermediate_size": "mlp"}).items()}
    return Phi3EmbedConfig(
        vision_config=CLIP_VIT_LARGE_PATCH14_336 | tower,
        text_config=note["config"] | case["config"],
        image_token_id=IMAGE,
    )


def rule_made(module, prefix=""):
    """The weights of a module, by the names that they have in it."""
    return {
        name: torch.from_numpy(golden.weight(golden.published(prefix + name), tuple(weight.shape)))
        for name, weight in module.named_parameters()
    }


def build(config, attn_implementation="sdpa", dtype=torch.float32):
    """A model with the rule-made weights, which all have to be found by name."""
    with torch.device("meta"):
        weights = rule_made(Phi3VisionForConditionalGeneration(config))
    model = Phi3VisionForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, attn_implementation=attn_implementation, dtype=dtype
    )
    return model.eval()


def inputs_of(case, arrays):
    """What a case's prompt and images are for the model."""
    inputs = {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")}
    if case["images"]:
        images = [golden.image(**image) for image in case["images"]]
        pixels = Phi3EmbedImageProcessor(num_crops=case["num_crops"])(images, return_tensors="pt")
        np.testing.assert_array_equal(pixels["image_sizes"], arrays["image_sizes"])
        inputs |= {name: pixels[name] for name in ("pixel_values", "image_sizes")}
    return inputs


def cosine(left, right):
    left, right = (torch.as_tensor(value).double() for value in (left, right))
    return torch.cosine_similarity(left, right, dim=-1).min().item()


def last_places(attention_mask):
    """The column of each row's last token that is no padding."""
    return attention_mask.shape[1] - 1 - torch.as_tensor(attention_mask).flip(1).argmax(1)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SMALL_NOTE["cases"])
def test_states_logits_and_vectors_equal_the_original(name, attn_implementation):
    case, arrays = SMALL_NOTE["cases"][name], golden.case(SMALL, name)
    model = build(small_config(SMALL_NOTE, case), attn_implementation)
    inputs = inputs_of(case, arrays)
    if "position_ids" in arrays:
        inputs["position_ids"] = torch.from_numpy(arrays["position_ids"])
    with torch.inference_mode():
        outputs = model(**inputs, output_hidden_states=True)
    states = [state.numpy() for state in outputs.hidden_states]
    real, at = arrays["attention_mask"] == 1, tuple(arrays["at"].T)
    probe = golden.weight("probe", (8, states[0].shape[-1]))
    assert len(states) == len(arrays["norms"])
    for state, norms, probes in zip(states, arrays["norms"], arrays["probe"]):
        np.testing.assert_allclose(np.linalg.norm(state, axis=-1)[real], norms[real], atol=4e-5, rtol=0)
        np.testing.assert_allclose(state[at] @ probe.T, probes, atol=4e-5, rtol=0)
    np.testing.assert_allclose(states[-1][at], arrays["hidden"], atol=4e-5, rtol=0)
    logits = outputs.logits.numpy()[tuple(arrays["logits_at"].T)]
    np.testing.assert_allclose(logits, arrays["logits"], atol=1.5e-4, rtol=0)
    last = states[-1][np.arange(len(real)), last_places(real.astype(int))]
    assert cosine(last, arrays["last"]) > 1 - 1e-10
    assert cosine(last, arrays["pooled"]) > 1 - 1e-10


@pytest.mark.parametrize("name", ["image_long", "batch_left", "text_longer"])
def test_bfloat16_is_near_the_original(name):
    case, arrays = SMALL_NOTE["cases"][name], golden.case(SMALL, name)
    model = build(small_config(SMALL_NOTE, case), dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = model.model(**inputs_of(case, arrays)).last_hidden_state.float()
    last = hidden[torch.arange(len(hidden)), last_places(arrays["attention_mask"])]
    assert cosine(last, arrays["last"]) > 0.998
    assert cosine(hidden[tuple(arrays["at"].T)], arrays["hidden"]) > 0.998


def generate(name, **options):
    case, arrays = GENERATED_NOTE["cases"][name], golden.case(GENERATED, name)
    model = build(small_config(GENERATED_NOTE, case))
    inputs = inputs_of(case, arrays)
    names = ("max_new_tokens", "num_beams", "num_return_sequences", "length_penalty", "eos_token_id")
    options = {key: case[key] for key in names if key in case} | options
    before = inputs["input_ids"].clone()
    outputs = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(inputs["input_ids"], before)
    return arrays, outputs, outputs.sequences[:, before.shape[1] :].numpy()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", GREEDY)
def test_generated_tokens_equal_the_original(name, use_cache):
    arrays, outputs, tokens = generate(name, use_cache=use_cache, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(tokens, arrays["tokens"])
    np.testing.assert_allclose(
        np.delete(outputs.scores[0], IMAGE, 1), np.delete(arrays["first_logits"], IMAGE, 1), atol=1.5e-4, rtol=0
    )
    best = torch.stack(outputs.scores, 1).topk(2).values
    np.testing.assert_allclose(best[..., 0] - best[..., 1], arrays["margins"], atol=3e-4, rtol=0)


def test_rows_that_have_ended_are_filled_up():
    arrays, _, tokens = generate("batch_eos", pad_token_id=0)
    np.testing.assert_array_equal(tokens, arrays["tokens_eos"][:, : tokens.shape[1]])
    assert not arrays["tokens_eos"][:, tokens.shape[1] :].any()


@pytest.mark.parametrize("name", BEAMS)
def test_beams_equal_the_original_each_image_in_its_place(name):
    arrays, outputs, tokens = generate(name, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(tokens, arrays["tokens"])
    np.testing.assert_allclose(outputs.sequences_scores, arrays["scores"], atol=1e-4, rtol=0)


# Prompts


@pytest.fixture(scope="module")
def processor():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.tokenizer.json"),
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )
    template = (ROOT / "chat_template.jinja").read_text()
    return Phi3EmbedProcessor(Phi3EmbedImageProcessor(num_crops=1), tokenizer, chat_template=template)


TEXTS, TEXTS_NOTE = golden.load("lm_text")


@pytest.mark.parametrize("number", range(len(TEXTS_NOTE["cases"])))
def test_prompts_and_their_ids_equal_the_original(processor, number):
    case, wanted = TEXTS_NOTE["cases"][number], TEXTS[f"{number}.input_ids"]
    if "messages" in case:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        assert processor.apply_chat_template(case["messages"], **options) == case["prompt"]
    images = [golden.image(**image) for image in TEXTS_NOTE["images"][: case["images"]]]
    out = processor(images=images or None, text=case["prompt"], return_tensors="np")
    np.testing.assert_array_equal(out["input_ids"], np.where(wanted < 0, processor.image_token_id, wanted))
    # Each image stands where its number is, as often as it is named.
    starts = np.flatnonzero((wanted[0] < 0) & (np.diff(wanted[0], prepend=0) != 0))
    pixels = [processor.image_processor(images[-wanted[0, start] - 1])["pixel_values"] for start in starts]
    np.testing.assert_array_equal(out.get("pixel_values", []), np.concatenate(pixels) if pixels else [])


# Full size: layer after layer, because the whole takes 16 GB


@pytest.mark.full_size
def test_all_32_layers_equal_the_original_at_full_size():
    arrays, note = golden.load("lm_full")
    config = Phi3EmbedConfig.from_pretrained(ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.config.json")
    images = [golden.image(**image) for image in note["images"]]
    pixels = Phi3EmbedImageProcessor(num_crops=note["num_crops"])(images, return_tensors="pt")
    with torch.device("meta"):
        embedding, model = Phi3EmbedModel(config), Phi3VisionForConditionalGeneration(config)
        weights = rule_made(embedding, "model.")
    embedding = Phi3EmbedModel.from_pretrained(None, config=embedding.config, state_dict=weights, dtype=torch.float32)
    states, language_model = {}, model.model.language_model
    language_model.rotary_emb = type(language_model.rotary_emb)(language_model.config)

    def load(module, _, prefix):
        module.load_state_dict(rule_made(module, prefix), assign=True)

    def unload(module, _, output, prefix):
        states[prefix] = output
        module.to("meta")

    names = [f"model.language_model.layers.{number}." for number in range(config.text_config.num_hidden_layers)]
    for name in (*names, "model.language_model.norm.", "lm_head."):
        module = model.get_submodule(name[:-1])
        module.register_forward_pre_hook(lambda module, inputs, name=name: load(module, inputs, name))
        module.register_forward_hook(lambda module, inputs, output, name=name: unload(module, inputs, output, name))
    with torch.inference_mode():
        encoded = embedding.get_image_features(pixels["pixel_values"], pixels["image_sizes"])
        np.testing.assert_array_equal(pixels["image_sizes"], arrays["image_sizes"])
        input_ids = torch.from_numpy(arrays["input_ids"])
        inputs_embeds = embedding.vision_embed_tokens.merge(encoded.pooler_output, input_ids)
        del embedding, weights
        gc.collect()
        hidden = language_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state[0].numpy()
        logits = model.lm_head(torch.from_numpy(hidden[-1:])).numpy()[0]
    close = {"atol": 6e-5, "rtol": 1e-5}
    probe = golden.weight("probe", (8, hidden.shape[1]))
    streams = [inputs_embeds, *(states[name] for name in names)]
    for layer, norms, probes in zip(arrays["layers"], arrays["norms"], arrays["probe"]):
        stream = streams[layer][0].numpy()
        np.testing.assert_allclose(np.linalg.norm(stream, axis=-1), norms, **close)
        np.testing.assert_allclose(stream @ probe.T, probes, **close)
    close = {"atol": 4e-5, "rtol": 0}
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), arrays["final_norms"], **close)
    np.testing.assert_allclose(hidden @ probe.T, arrays["final_probe"], **close)
    np.testing.assert_allclose(hidden[arrays["at"]], arrays["hidden"], **close)
    close = {"atol": 1.5e-4, "rtol": 0}
    np.testing.assert_array_equal(np.argsort(-logits)[:20], arrays["top_ids"])
    np.testing.assert_allclose(logits[arrays["top_ids"]], arrays["top_logits"], **close)
    np.testing.assert_allclose(logits[::97], arrays["logits_sample"], **close)
    pooled, length = hidden[-1], np.linalg.norm(hidden[-1])
    np.testing.assert_allclose(length, arrays["pooled_norm"][0], atol=4e-5, rtol=0)
    np.testing.assert_allclose((pooled / length)[:64], arrays["pooled_first"], atol=4e-5, rtol=0)
    np.testing.assert_allclose(pooled / length @ probe.T, arrays["pooled_probe"], atol=4e-5, rtol=0)
