"""The images of a folder that are nearest to another: `python search_images.py FOLDER IMAGE [MODEL]`."""

import sys
from pathlib import Path

from phi3_embed import FOLDER
from PIL import Image
from sentence_transformers import SentenceTransformer, util

folder, query, model = [*sys.argv[1:], FOLDER][:3]
suffixes = Image.registered_extensions()
paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes)

embedder = SentenceTransformer(model, trust_remote_code=True)
vectors = embedder.encode(paths, batch_size=8, show_progress_bar=True)
for hit in util.semantic_search(embedder.encode([query]), vectors, top_k=5)[0]:
    print(f"{hit['score']:.3f}  {paths[hit['corpus_id']]}")
