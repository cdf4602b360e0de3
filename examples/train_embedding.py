"""An embedding in which images of one class lie together: `python train_embedding.py FOLDER OUTPUT [MODEL]`.

By sentence-transformers' own trainer, whose losses, samplers and evaluators all take the model.
"""

import sys

from datasets import load_dataset
from phi3_embed import FOLDER
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import BatchAllTripletLoss
from sentence_transformers.training_args import BatchSamplers

folder, output, source = [*sys.argv[1:], FOLDER][:3]
images = load_dataset("imagefolder", data_dir=folder, split="train")

embedder = SentenceTransformer(source, trust_remote_code=True, processor_kwargs={"num_crops": 1})
arguments = SentenceTransformerTrainingArguments(
    output_dir=output,
    num_train_epochs=3,
    per_device_train_batch_size=16,
    learning_rate=1e-4,
    batch_sampler=BatchSamplers.GROUP_BY_LABEL,
)
trainer = SentenceTransformerTrainer(embedder, arguments, images, loss=BatchAllTripletLoss(embedder))
trainer.train()
embedder.save_pretrained(output)
