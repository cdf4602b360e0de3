"""The repository as an importable package, whatever its folder is called, and what all tests share."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

# Before transformers is imported, here and in the processes that tests start: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
spec = ModuleSpec("phi3_embed", None, is_package=True)
spec.submodule_search_locations = [str(ROOT)]
sys.modules["phi3_embed"] = importlib.util.module_from_spec(spec)
