"""The tools of phi3-embed; `phi3-embed --help` lists them."""

from pathlib import Path

# The repository is a checkpoint too: a small one, which knows handwritten digits and nothing else.
ROOT = Path(__file__).resolve().parent.parent
