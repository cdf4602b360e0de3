"""A classifier of images by transformers' Trainer: `python train_classifier.py FOLDER OUTPUT [MODEL]`.

FOLDER has a subfolder of images for each class. Only the classifier learns; `phi3-embed finetune` does more.
"""

import sys

import torch
from datasets import load_dataset
from phi3_embed import FOLDER
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

folder, output, source = [*sys.argv[1:], FOLDER][:3]
images = load_dataset("imagefolder", data_dir=folder, split="train")
halves = images.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
names = images.features["label"].names

image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True, num_crops=1)
model = AutoModelForImageClassification.from_pretrained(
    source, trust_remote_code=True, id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
)
for name, weight in model.named_parameters():
    weight.requires_grad_(name.startswith("classifier"))


def collate(rows):
    # One row an image, as Trainer counts rows.
    inputs = image_processor([row["image"] for row in rows], pad_views=True, return_tensors="pt")
    return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}


def accuracy(predicted):
    return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean()}


arguments = TrainingArguments(
    output, num_train_epochs=20, learning_rate=0.02, per_device_train_batch_size=16, remove_unused_columns=False
)
trainer = Trainer(model, arguments, collate, halves["train"], halves["test"], compute_metrics=accuracy)
trainer.train()
print(trainer.evaluate())
trainer.save_model(output)
image_processor.save_pretrained(output)
