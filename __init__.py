"""The repository as a package: `FOLDER` is where it lies, and loads as the small checkpoint."""

from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)
