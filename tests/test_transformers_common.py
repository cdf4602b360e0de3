"""
What transformers asks of its own models, image processors and processors, asked of ours: the common tests of the
release that the project is tested with, from its source distribution, which `make test` unpacks.
"""

import sys
import types
import unittest
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from conftest import SMALL_TEXT, SMALL_TOWER, make_tokenizer, small_config, small_pixels, whole_config
from phi3_embed.modeling_phi3_embed import (
    Phi3EmbedForImageClassification,
    Phi3EmbedModel,
    Phi3VisionForConditionalGeneration,
    Phi3VisionModel,
)
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor, Phi3EmbedProcessor
from transformers import AutoImageProcessor, AutoTokenizer

CHAT_TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{% for part in message.content %}{{ "<|image|>" if part.type == "image" else part.text }}{% endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
PHOTOGRAPH = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
SOURCE = Path(sys.prefix) / "transformers-tests" / "tests"


def add_module(name, **names):
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


spec = ModuleSpec("transformers_tests", None, is_package=True)
spec.submodule_search_locations = [str(SOURCE)]
sys.modules["transformers_tests"] = module_from_spec(spec)
# The distribution leaves out these parts of transformers' tests, which are for other kinds of model.
for package in ("exporters", "generation", "utils"):
    add_module(f"transformers_tests.{package}")
add_module("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
add_module("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
add_module("transformers_tests.utils.test_configuration_utils", config_common_kwargs={})
add_module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(PHOTOGRAPH))

from transformers_tests.test_image_processing_common import (  # noqa: E402
    ImageProcessingTester,
    ImageProcessingTestMixin,
)
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from transformers_tests.test_processing_common import ProcessorTesterMixin  # noqa: E402


@pytest.fixture
def trusted(monkeypatch):
    """What is saved with its code is loaded with it: the common tests never say `trust_remote_code`."""
    for cls in (Phi3EmbedProcessor, AutoImageProcessor, AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", partial(cls.from_pretrained, trust_remote_code=True))


class Phi3EmbedModelTester:
    """The tower's shapes: 4 x 4 patches and a class token, two of its three layers, and so three hidden states."""

    batch_size, seq_length, is_training = 7, 20, False
    encoder_seq_length = key_length = 17
    hidden_size, num_attention_heads = SMALL_TOWER["hidden_size"], SMALL_TOWER["num_attention_heads"]
    num_hidden_layers, expected_num_hidden_layers = 2, 3

    def prepare_config_and_inputs_for_common(self):
        """One image of one crop, so of 13 tokens, in each text; one row an image: the tests cut batches by rows."""
        config, images = small_config(), small_pixels(*[(1, 1)] * self.batch_size, pad_views=True)
        input_ids = torch.randint(6, config.vocab_size, (self.batch_size, self.seq_length))
        input_ids[:, :13] = config.image_token_id
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}


class CommonTests(ModelTesterMixin):
    # The tower's batch is one of crops, not of images.
    skip_test_image_features_output_shape = True
    _is_composite = True

    def test_model_weights_reload_no_missing_tied_weights(self):
        with pytest.raises(ValueError, match="The checkpoint lacks [45][0-9] of the model's weights"):
            super().test_model_weights_reload_no_missing_tied_weights()


class TestModel(CommonTests, unittest.TestCase):
    all_model_classes = (Phi3EmbedModel,)
    additional_model_inputs = ("pixel_values", "image_sizes")

    def setUp(self):
        self.model_tester = Phi3EmbedModelTester()


class Phi3EmbedForImageClassificationTester(Phi3EmbedModelTester):
    is_training = True

    def prepare_config_and_inputs_for_common(self):
        return small_config(num_labels=3), small_pixels(*[(1, 2)] * self.batch_size, pad_views=True)


class TestImageClassification(CommonTests, unittest.TestCase):
    all_model_classes = (Phi3EmbedForImageClassification,)
    additional_model_inputs = ("image_sizes",)
    test_resize_embeddings = False
    # The word embeddings and the separators do not reach the classes.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = Phi3EmbedForImageClassificationTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        return inputs | ({"labels": torch.zeros(self.model_tester.batch_size).long()} if return_labels else {})


class Phi3VisionModelTester(Phi3EmbedModelTester):
    """The language model's shapes: two layers, and so three hidden states."""

    is_training = True
    encoder_seq_length = key_length = 20
    hidden_size, num_attention_heads = SMALL_TEXT["hidden_size"], SMALL_TEXT["num_attention_heads"]
    num_hidden_layers, expected_num_hidden_layers = SMALL_TEXT["num_hidden_layers"], 3

    def prepare_config_and_inputs_for_common(self):
        _, inputs = super().prepare_config_and_inputs_for_common()
        return whole_config(), inputs


class TestWholeModel(CommonTests, unittest.TestCase):
    all_model_classes = (Phi3VisionModel, Phi3VisionForConditionalGeneration)
    additional_model_inputs = ("pixel_values", "image_sizes")

    def setUp(self):
        self.model_tester = Phi3VisionModelTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        with_loss = return_labels and model_class is Phi3VisionForConditionalGeneration
        return inputs | ({"labels": inputs["input_ids"].clone()} if with_loss else {})

    # The base model has no loss, which the common tests know of the library's own models alone.
    def test_training(self):
        self.all_model_classes = (Phi3VisionForConditionalGeneration,)
        super().test_training()

    def check_training_gradient_checkpointing(self, **settings):
        self.all_model_classes = (Phi3VisionForConditionalGeneration,)
        super().check_training_gradient_checkpointing(**settings)

    def test_correct_missing_keys(self):
        with pytest.raises(ValueError, match="The checkpoint lacks 1 of the model's weights: lm_head.weight"):
            super().test_correct_missing_keys()

    @unittest.skip("The distribution leaves out the common tests of generation; test_generation.py has ours.")
    def test_generation_tester_mixin_inheritance(self):
        pass


class Phi3EmbedImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent):
        size = SMALL_TOWER["image_size"]
        # One row an image, because the common tests count rows.
        geometry = {"size": {"height": size, "width": size}, "num_img_tokens": 4, "num_crops": 1}
        super().__init__(parent, **geometry, pad_views=True)

    def _get_image_processing_classes(self):
        return {"pil": Phi3EmbedImageProcessor}

    def expected_output_image_shape(self, images):
        return self.num_crops + 1, self.num_channels, self.size["height"], self.size["width"]


@pytest.mark.usefixtures("trusted")
class TestImageProcessor(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Phi3EmbedImageProcessingTester

    @unittest.skip("Images always become RGB, by Pillow, without torchvision: there is no `do_convert_rgb`.")
    def test_call_numpy_4_channels(self):
        pass

    test_image_processor_from_dict_with_kwargs_has_attributes = test_call_numpy_4_channels

    @unittest.skip("torchvision is never needed.")
    def test_new_models_require_torchvision_backend(self):
        pass


@pytest.mark.usefixtures("trusted")
class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = Phi3EmbedProcessor

    @classmethod
    def _setup_image_processor(cls):
        return Phi3EmbedImageProcessor(size={"height": 56, "width": 56}, num_img_tokens=4, num_crops=4, pad_views=True)

    @classmethod
    def _setup_tokenizer(cls):
        return make_tokenizer()

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": CHAT_TEMPLATE}

    @unittest.skip("Saving a class of a repository's own code leaves its `auto_map` on the object.")
    def test_processor_from_and_save_pretrained(self):
        pass

    test_processor_from_and_save_pretrained_as_nested_dict = test_processor_from_and_save_pretrained
