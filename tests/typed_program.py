"""A program on the public surface, for pyright to check by all its basic rules; it is not run."""

# pyright: basic

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BatchFeature

from configuration_phi3_embed import Phi3EmbedConfig
from modeling_phi3_embed import Phi3EmbedForImageClassification, Phi3EmbedModel, Phi3ImageEmbedding
from processing_phi3_embed import Phi3EmbedImageProcessor, Phi3EmbedProcessor

config = Phi3EmbedConfig(pooling_mode="global", vision_config={"model_type": "dinov2"}, num_labels=3)
assert_type(config.crop_size, int)
assert_type(config.tokens_per_side, int)

image_processor = Phi3EmbedImageProcessor(num_crops=4, size={"height": 56, "width": 56}, num_img_tokens=4)
image_processor = Phi3EmbedImageProcessor.from_pretrained("folder")
assert_type(image_processor.num_image_tokens(width=1366, height=768, num_crops=4), int)
images = [Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), Path("a.png"), "b.png"]
inputs = image_processor(images, num_crops=1, do_rescale=True, return_tensors="pt").to("cpu")
assert_type(inputs, BatchFeature)
processor = Phi3EmbedProcessor(image_processor, AutoTokenizer.from_pretrained("folder"))
batch = processor(text="a <|image_1|>", images=[Image.new("RGB", (8, 8))], padding=True, return_tensors="pt")
assert_type(batch, BatchFeature)

model = Phi3EmbedModel.from_pretrained("folder", dtype=torch.bfloat16, device_map="auto")
assert_type(model, Phi3EmbedModel)
assert_type(model.config, Phi3EmbedConfig)
features = model.get_image_features(torch.zeros(1, 2, 3, 56, 56), [(56, 56)], output_hidden_states=True)
vectors: torch.Tensor | None = features.image_embeds
tokens = features.pooler_output
outputs = model.forward(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
vectors = outputs.pooler_output
outputs = model.forward(torch.ones(1, 4, dtype=torch.long))
hidden: torch.Tensor | None = outputs.last_hidden_state
anything = model(**inputs)
table: nn.Module = model.get_input_embeddings()
model.save_pretrained("folder")

head = Phi3EmbedForImageClassification.from_pretrained("folder", num_labels=3)
loss: torch.Tensor | None = head.forward(inputs["pixel_values"], labels=torch.tensor([0])).loss

embedding = Phi3ImageEmbedding(config, wte=nn.Embedding(100, 48), use_hd_transform=True)
embedding.set_img_features(torch.zeros(1, 2, 3, 56, 56))
embedding.set_img_sizes(torch.tensor([[56, 56]]))
hidden = embedding.forward(torch.ones(1, 4, dtype=torch.long))
