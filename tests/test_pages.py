"""What README and docs show, run as printed: every block of Python alone, in a fresh process, in an empty folder."""

import re

import pytest
from conftest import ROOT
from fresh_process import run_fresh

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block, and what the text below says that it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\nIt prints `(.*?)`)?", re.DOTALL)
BLOCKS = [
    pytest.param(*found, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, found in enumerate(BLOCK.findall(page.read_text()), start=1)
]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.hub
@pytest.mark.parametrize(("code", "printed"), BLOCKS)
def test_a_block_runs_alone_in_any_folder(code, printed, hub, tmp_path):
    done = run_fresh("-c", code, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_card_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
