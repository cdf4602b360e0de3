"""What type checkers and `help()` say of the public surface."""

import json
import os
import pydoc
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, small_model


def test_pyright_accepts_a_program_on_the_public_surface(tmp_path):
    package = tmp_path / "phi3_embed"
    package.mkdir()
    for module in ROOT.glob("*_phi3_embed.py"):
        shutil.copy(module, package)
    program = shutil.copy(ROOT / "tests" / "typed_program.py", tmp_path)
    # A node that is installed is used; else pyright fetches one.
    node = {"PYRIGHT_PYTHON_GLOBAL_NODE": "1" if shutil.which("node") else "0", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, program]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | node, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
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
