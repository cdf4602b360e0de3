"""The whole model: generation in all its forms, caches, loss, loading, and errors, at small size."""

import contextlib
import copy
import json

import pytest
import torch
from conftest import ROOT, run_python, small_config, small_pixels, whole_config, whole_model
from phi3_embed.modeling_phi3_embed import (
    Phi3EmbedModel,
    Phi3VisionForConditionalGeneration,
    Phi3VisionModel,
)
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

IMAGE = 5  # image_token_id of the small config
PAD = 0
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def run(rows, cols):
    return [IMAGE] * ((rows * 2) * (cols * 2 + 1) + 1 + 2 * 3)


TEXTS = [
    [1, 9, *run(1, 1), 7, *run(1, 2), 8, 30],
    [1, 40, 41, 42],
    [1, *run(0, 0), 17, 18],
]
GRIDS = [[(1, 1), (1, 2)], [], [(0, 0)]]


def prompt(*numbers, pad_to=0):
    """Texts with their images, padded on the left."""
    rows = [TEXTS[number] for number in numbers]
    width = max(pad_to, *map(len, rows))
    input_ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    # All images of all texts are made at once, so that a text's are the same in any batch.
    everything = small_pixels(*sum(GRIDS, []), pad_views=True)
    places = [place for number in numbers for place in {0: [0, 1], 1: [], 2: [2]}[number]]
    return inputs | ({key: value[places] for key, value in everything.items()} if places else {})


@pytest.fixture(scope="module")
def model():
    return whole_model()


@pytest.fixture(scope="module")
def answers(model):
    """What each text is answered alone, without a cache: the truth."""
    return [generate(model, prompt(number), use_cache=False)[0] for number in range(3)]


def generate(model, inputs, **options):
    sequences = model.generate(**inputs, **(GREEDY | options))
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def encodings(model):
    """The views of each run of the tower."""
    counts = []
    hook = model.model.vision_embed_tokens.img_processor.register_forward_pre_hook(
        lambda _, args: counts.append(len(args[0]))
    )
    yield counts
    hook.remove()


# Generation


def test_answers_depend_on_text_and_images(model, answers):
    assert len({tuple(answer) for answer in answers}) == 3 and all(len({*answer}) > 3 for answer in answers)
    other = prompt(2)
    other["pixel_values"] = -other["pixel_values"]
    assert generate(model, other)[0] != answers[2]


def test_a_left_padded_batch_with_two_no_and_one_image_equals_each_alone_and_encodes_once(model, answers, encodings):
    assert generate(model, prompt(0, 1, 2)) == answers
    assert encodings == [2 + 3 + 1]


class InOrder(contextlib.nullcontext):
    """Stands for the stream of an accelerator, on which an offloaded cache moves keys: a CPU works in order anyway."""

    waits = 0

    def wait_stream(self, other):
        InOrder.waits += 1


@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_every_kind_of_cache_gives_the_same(model, answers, implementation, monkeypatch):
    monkeypatch.setattr(torch, "Stream", InOrder)
    monkeypatch.setattr(torch.cuda, "default_stream", InOrder)
    before = InOrder.waits
    assert generate(model, prompt(0, 1, 2), cache_implementation=implementation) == answers
    assert (InOrder.waits > before) == implementation.startswith("offloaded")


def test_beams_and_several_sequences_encode_once(model, encodings):
    options = {"num_beams": 4, "num_return_sequences": 2}
    together = generate(model, prompt(0, 1, 2), **options)
    assert encodings == [6]
    assert together == sum([generate(model, prompt(number), use_cache=False, **options) for number in range(3)], [])


def test_sampling_returns_several_sequences_of_one_encoding(model, encodings):
    torch.manual_seed(0)
    sampled = generate(model, prompt(0, 2), do_sample=True, num_return_sequences=3, temperature=2.0)
    assert len(sampled) == 6 and len({tuple(answer) for answer in sampled}) > 2 and encodings == [6]


def test_assisted_decoding_gives_the_same(model, answers):
    assert generate(model, prompt(0), assistant_model=copy.deepcopy(model))[0] == answers[0]
    assert generate(model, prompt(0), prompt_lookup_num_tokens=3)[0] == answers[0]


def test_features_go_in_place_of_pixels_and_are_left_as_they_are(model, answers, encodings):
    inputs = prompt(0, 2)
    pixels = {key: inputs.pop(key) for key in ("pixel_values", "image_sizes")}
    features = model.get_image_features(**pixels)
    tokens = features.pooler_output
    for encoded in (features, BaseModelOutputWithPooling(pooler_output=[tensor.clone() for tensor in tokens])):
        for _ in range(2):
            given = generate(model, inputs | {"mm_encoder_outputs": {"image": encoded}}, num_beams=3)
            assert len(encoded.pooler_output) == 3
        assert given == generate(model, inputs | pixels, num_beams=3)
    assert generate(model, inputs | {"mm_encoder_outputs": {"image": features}}) == [answers[0], answers[2]]


def test_microsofts_negative_ids_generate_the_same(model, answers):
    inputs = prompt(0, 1, 2)
    ids = inputs["input_ids"]
    starts = (ids == IMAGE) & (ids.roll(1, 1) != IMAGE)
    negative = torch.where(ids == IMAGE, -starts.cumsum(1), ids)
    before = negative.clone()
    assert generate(model, inputs | {"input_ids": negative}) == answers and torch.equal(negative, before)
    assert generate(model, inputs | {"input_ids": negative}, num_beams=2) == generate(model, inputs, num_beams=2)


def test_one_text_without_a_batch_generates_the_same(model, answers):
    ids = prompt(1)["input_ids"]
    assert model.generate(ids[0], **GREEDY)[:, ids.shape[1] :].tolist() == [answers[1]]


def test_inputs_embeds_generate_the_same(model, answers):
    inputs = prompt(0, 2)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(inputs_embeds=embeds, **inputs, **GREEDY).tolist() == [answers[0], answers[2]]


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_turns_go_on_with_a_kept_cache_and_new_images(model, name):
    first = prompt(2)
    done = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat((done.sequences, torch.tensor([[50, *run(1, 1), 51]])), dim=1)
    new = small_pixels((1, 1))
    both = {"pixel_values": torch.cat((first["pixel_values"][0, :1], new["pixel_values"]))}
    both["image_sizes"] = torch.cat((first["image_sizes"], new["image_sizes"]))
    wanted = generate(model, {"input_ids": ids} | both, use_cache=False)
    kept = copy.deepcopy(done[CACHE])
    assert generate(model, {"input_ids": ids, **new}, **{name: kept}) == wanted
    with pytest.raises(ValueError, match="13 image placeholders, .* take 0 tokens"):
        generate(model, {"input_ids": ids}, **{name: copy.deepcopy(done[CACHE])})


def test_the_image_token_is_never_generated():
    model = whole_model()
    model.model.language_model.norm.weight.data[:] = 1
    hidden = model.model(**prompt(0)).last_hidden_state[0, -1]
    model.lm_head.weight.data[IMAGE] = 10 * hidden.detach()
    assert model(**prompt(0)).logits[0, -1].argmax() == IMAGE
    for options in ({}, {"suppress_tokens": [7]}, {"num_beams": 2}):
        answer = generate(model, prompt(0), max_new_tokens=40, **options)[0]
        assert IMAGE not in answer and (7 not in answer or "suppress_tokens" not in options)


def test_streamed_and_scored_like_any_model(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    outputs = model.generate(
        **prompt(0),
        **GREEDY,
        streamer=streamer,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    text = "".join(streamer)
    assert text == tokenizer.decode(outputs.sequences[0, len(TEXTS[0]) :])
    assert len(outputs.scores) == 12 and outputs.hidden_states[0][-1].shape == (1, len(TEXTS[0]), 48)


def test_generation_stops_at_strings_and_any_end_token(model, answers):
    end = answers[0][3]
    answer = generate(model, prompt(0), eos_token_id=[99, end])[0]
    assert answer == answers[0][: answers[0].index(end) + 1]
    published = ROOT / "tests" / "data" / "phi-3-vision-128k-instruct.tokenizer.json"
    of_bytes = PreTrainedTokenizerFast(tokenizer_file=str(published))  # whose ids 3, 4, ... are bytes
    character = chr(answers[0][4] - 3)
    answer = generate(model, prompt(0), stop_strings=[character], tokenizer=of_bytes)[0]
    assert answer == answers[0][: answers[0].index(answers[0][4]) + 1]


# Where the rotary factors change (64 positions)


def long_prompt(length, pad=0):
    """A text of so many tokens with an image in it, and so much padding before it."""
    text = [1, *run(0, 0), *((torch.arange(length - 8) * 7) % 80 + 10).tolist()]
    mask = [[0] * pad + [1] * length]
    return prompt(2) | {"input_ids": torch.tensor([[PAD] * pad + text]), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "options",
    # Transformers before 5.24 hands all images to the first chunk.
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, *[{"prefill_chunk_size": 16}] * (CACHE == "cache")],
)
@pytest.mark.parametrize("pad", [0, 30])
def test_a_text_that_crosses_into_the_long_factors_is_computed_again(model, encodings, options, pad):
    inputs = long_prompt(58, pad)
    given = generate(model, inputs, **options)
    assert encodings == [1]
    chunked = {"prefill_chunk_size"} & options.keys()
    truth = generate(
        model, long_prompt(58), use_cache=False, **({} if chunked else {"num_beams": options.get("num_beams", 1)})
    )
    assert given == truth


def test_padding_does_not_bring_the_long_factors(model):
    lengths = []
    language_model = model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda *args: lengths.append(args[-1]["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generate(model, long_prompt(40, pad=22))
    crossing = len(lengths)
    generate(model, long_prompt(60))
    hook.remove()
    assert lengths[:crossing] == [62] + [1] * 11
    assert sorted(lengths[crossing:])[-2:] == [60, 65] and len(lengths) == 24


def test_rows_of_a_batch_cross_together(model):
    long, short = long_prompt(60), long_prompt(30, pad=30)
    batch = {key: torch.cat((long[key], short[key])) for key in long}
    assert generate(model, batch) == generate(model, batch, use_cache=False)


def test_inputs_embeds_cross_too(model, encodings):
    inputs = long_prompt(58)
    wanted = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(inputs_embeds=embeds, **inputs, **GREEDY).tolist() == wanted
    assert encodings == [1, 1]


def test_a_kept_cache_crosses_too(model):
    first = long_prompt(40)
    done = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat((done.sequences, torch.arange(20)[None] + 20), dim=1)
    inputs = {"input_ids": ids, **{key: first[key] for key in ("pixel_values", "image_sizes")}}
    given = generate(model, inputs, **{CACHE: done[CACHE]})
    assert given == generate(model, inputs, use_cache=False)


def test_guesses_that_copy_placeholders_break_nothing(model):
    inputs = long_prompt(58)
    given = generate(model, inputs, prompt_lookup_num_tokens=8, max_matching_ngram_size=1)
    assert len(given[0]) == 12 and IMAGE not in given[0]


# Values that are read, and values that are not


def test_a_step_of_generation_reads_no_values(model, monkeypatch):
    calls = []
    for name in ("check_input_ids", "check_placeholders", "check_inputs_embeds", "check_logits"):
        monkeypatch.setattr(f"{type(model).__module__}.{name}", lambda *args, name=name: calls.append(name))
    generate(model, prompt(0, 1))
    assert calls == ["check_input_ids", "check_placeholders", "check_logits"]


@pytest.mark.parametrize("inputs", [prompt(0), prompt(1)])
def test_weights_that_are_not_finite_generate_no_words(inputs):
    broken = whole_model()
    broken.model.language_model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="The logits hold NaN .*, in torch.float32. Are the weights whole"):
        generate(broken, inputs)
    assert broken(**inputs, labels=inputs["input_ids"]).loss.isnan()  # a training sees what it came to


ONE_IMAGE = {"input_ids": torch.tensor([TEXTS[2]])}
WIDE = {"image": BaseModelOutputWithPooling(pooler_output=[torch.zeros(7, 47)])}
SHORT = {"image": BaseModelOutputWithPooling(pooler_output=[torch.zeros(6, 48)])}
RIGHT = {"input_ids": torch.tensor([[1, 2, 3], [1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}


@pytest.mark.parametrize(
    "inputs, message",
    [
        (ONE_IMAGE, r"7 image placeholders, in runs of \[7\], but the images take 0 tokens"),
        (small_pixels((1, 1)), "There is no text: give `input_ids`"),
        ({"input_ids": torch.tensor([[1, 2]]), **small_pixels((1, 1))}, "0 image placeholders, .* take 13 tokens"),
        ({"input_ids": torch.ones(1, 300).long()}, "The text has 300 tokens, .* takes 256 .*lower `num_crops`"),
        (ONE_IMAGE | {"mm_encoder_outputs": WIDE}, r"of shape \(7, 47\), .* \(num_tokens, 48\)"),
        (ONE_IMAGE | {"mm_encoder_outputs": SHORT}, "7 image placeholders, .* take 6 tokens"),
        (ONE_IMAGE | {"mm_encoder_outputs": {"image": torch.zeros(1, 7, 48)}}, "hold images as Tensor, but must be"),
        (ONE_IMAGE | {"mm_encoder_outputs": WIDE["image"]}, "hold images as BaseModelOutputWithPooling, but must be"),
        ({"input_ids": [[1, 2]]}, "`input_ids` are of type list, .*return_tensors='pt'"),
        (RIGHT, "padded on the right, .* pad on the left"),
        ({"input_ids": torch.tensor([[100]] * 2).T}, "hold 100, but the vocabulary ends at 99"),
        (prompt(2) | {"mm_encoder_outputs": SHORT}, "raw pixels and pre-computed|Both `pixel_values` and"),
    ],
)
def test_bad_prompts_are_an_error_of_ours(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **GREEDY)


def test_misspelt_arguments_are_an_error(model):
    with pytest.raises(TypeError, match="got `pixel_value`. Accepted are .*`labels`"):
        model(torch.tensor([[1]]), pixel_value=torch.zeros(1))
    with pytest.raises(ValueError, match="There is no text"):
        model(**small_pixels((1, 1)))
    with pytest.raises(ValueError, match="`input_ids` are of type str, .*call the processor"):
        model.model("seven")


def test_a_config_without_a_language_model_is_an_error():
    for model_class in (Phi3VisionModel, Phi3VisionForConditionalGeneration):
        with pytest.raises(ValueError, match="has no `text_config`.*--whole"):
            model_class(small_config())


# Training


def test_the_loss_is_of_the_answer_and_reaches_every_weight():
    model, inputs = whole_model().train(), prompt(0)
    labels = torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])
    outputs = model(**inputs, labels=labels)
    logits, wanted = outputs.logits[0, :-1], labels[0, 1:]
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100))
    outputs.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = whole_model().train(), prompt(0, 1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(**inputs, labels=torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_the_vocabulary_grows_in_table_head_and_config(tmp_path):
    model = whole_model()
    before = model(**prompt(0)).logits
    model.resize_token_embeddings(110)
    after = model(**prompt(0)).logits
    torch.testing.assert_close(after[..., :100], before)
    assert after.shape[-1] == model.config.vocab_size == model.config.text_config.vocab_size == 110
    model.save_pretrained(tmp_path)
    again = Phi3VisionForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**prompt(0)).logits, after)


# Loading


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    model.save_pretrained(path)
    return path


def test_tied_weights_are_one_and_saved_once(tmp_path):
    model = Phi3VisionForConditionalGeneration(whole_config({"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.model.vision_embed_tokens.wte.weight
    model.save_pretrained(tmp_path)
    again, info = Phi3VisionForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.lm_head.weight is again.model.vision_embed_tokens.wte.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


PARTS = """
import json, logging, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
folder, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
options = {"trust_remote_code": True, "output_loading_info": True}
found = {}
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM):
    model, info = auto.from_pretrained(folder, device_map="auto", **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found[auto.__name__] = model.generate(ids, **greedy)[0].tolist()
model, info = AutoModel.from_pretrained(folder, **options)
assert not info["missing_keys"] and not info["unexpected_keys"], info
images = {"pixel_values": torch.ones(2, 3, 56, 56), "image_sizes": torch.zeros(2, 2).long()}
found["vector"] = model(**images).pooler_output.tolist()
found["hidden"] = model(ids).last_hidden_state.sum(-1).tolist()
head, info = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, **options)
assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
assert torch.equal(head.model(**images).pooler_output, model(**images).pooler_output)
head.save_pretrained(sys.argv[3])
assert AutoConfig.from_pretrained(sys.argv[3], trust_remote_code=True).text_config is None
print(json.dumps(found))
"""


def test_every_auto_class_takes_its_part_of_a_whole_checkpoint(checkpoint, model, answers, tmp_path):
    found = json.loads(run_python(PARTS, checkpoint, json.dumps(TEXTS[1]), tmp_path / "head"))
    for auto_class in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        assert found[auto_class] == TEXTS[1] + answers[1]
    embedding, info = Phi3EmbedModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    vectors = embedding(pixel_values=torch.ones(2, 3, 56, 56), image_sizes=torch.zeros(2, 2).long()).pooler_output
    torch.testing.assert_close(torch.tensor(found["vector"]), vectors)
    embedding.save_pretrained(tmp_path / "embedding")
    alone = json.loads((tmp_path / "embedding" / "config.json").read_text())
    assert alone["text_config"] is None and alone["auto_map"]["AutoModel"].endswith("Phi3EmbedModel")


def test_a_language_model_that_lacks_layers_or_has_others_is_an_error(checkpoint, model, tmp_path):
    weights = {name: weight for name, weight in model.state_dict().items() if "model.layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks 2 of the model's weights: model.language_model.layers.1.mlp"):
        Phi3VisionForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="(?s)size mismatch|mismatched"):
        Phi3VisionForConditionalGeneration.from_pretrained(checkpoint, text_config={"intermediate_size": 32})
    with pytest.raises(ValueError, match="the model's weights: lm_head.weight"):
        model.model.save_pretrained(tmp_path / "base")
        Phi3VisionForConditionalGeneration.from_pretrained(tmp_path / "base")


def test_layers_on_disk_generate_the_same(checkpoint, answers, tmp_path):
    device_map = {"model.vision_embed_tokens": "cpu", "model.language_model.layers.0": "cpu"}
    device_map |= dict.fromkeys(("model.language_model.layers.1", "model.language_model.norm", "lm_head"), "disk")
    device_map["model.language_model.rotary_emb"] = "cpu"
    for placement in (device_map, {"": "disk"}):
        model = Phi3VisionForConditionalGeneration.from_pretrained(
            checkpoint, device_map=placement, offload_folder=str(tmp_path)
        )
        assert generate(model, prompt(0, 1, 2)) == answers


def test_half_precision(checkpoint, model):
    half = Phi3VisionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    given, wanted = half(**prompt(0, 1, 2)).logits, model(**prompt(0, 1, 2)).logits
    assert given.dtype == torch.bfloat16
    assert (
        torch.cosine_similarity(given.float(), wanted, dim=-1)[prompt(0, 1, 2)["attention_mask"].bool()].min() > 0.99
    )


@pytest.mark.skipif(CACHE != "cache", reason="longrope before transformers 5.24 branches on values of a tensor")
@torch.no_grad()
def test_prefill_and_decode_compile_without_a_break(model, answers):
    torch._dynamo.reset()
    # What our code can break is the graph, which is traced here; to compile it takes Inductor minutes.
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    inputs = prompt(2)
    step = {"input_ids": torch.tensor([answers[2][:1]])}
    step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    first, wanted = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(first.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    second, wanted = compiled(**step, **{CACHE: first[CACHE]}), model(**step, **{CACHE: wanted[CACHE]})
    torch.testing.assert_close(second.logits, wanted.logits, atol=1e-4, rtol=1e-4)
