"""What type checkers and `help()` say of the public surface."""

import json
import os
import pydoc
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, small_model


@pytest.mark.slow  # two minutes
def test_pyright_accepts_modules_tools_and_a_program_on_the_public_surface():
    # A node that is installed is used; else pyright fetches one. With room for what is young it is a fifth faster.
    node = {"PYRIGHT_PYTHON_GLOBAL_NODE": "1" if shutil.which("node") else "0", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    node["NODE_OPTIONS"] = "--max-semi-space-size=128"
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | node, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 40
    assert not report["generalDiagnostics"], done.stdout


@pytest.mark.parametrize("method", ["get_image_features", "forward"])
def test_help_tells_shapes_dtypes_and_errors(method):
    text = pydoc.render_doc(getattr(small_model(), method), renderer=pydoc.plaintext)
    for part in (
        "pixel_values: torch.Tensor",
        "`torch.LongTensor` of shape `(",
        "Returns:\n        [`Phi3Embed",
        "Raises:\n        ValueError",
    ):
        assert part in text
