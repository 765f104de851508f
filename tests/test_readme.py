"""README and docs: commands are single lines, code runs, files exist."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import smoothcache_fx as smoothcache
from capture import Stack
from cases import randomize

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_two_commands_stand_on_a_line_of_their_own():
    lines = README.splitlines()
    assert lines.count('pip install -e ".[demo]" && python -m smoothcache_fx demo') == 1
    assert lines.count('pip install -e ".[test]" && python -m pytest') == 1


@each_page
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    """The blocks in order, with a model and a sampler as a reader would have them."""
    monkeypatch.chdir(tmp_path)
    model = randomize(Stack(), 0).eval()

    @torch.no_grad()
    def sample(model, seed):
        x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))
        for step in range(50):
            x = x - model(x, torch.full((2, 16), 1 - step / 50)) / 50
        return x

    names = {"model": model, "sample": sample, "smoothcache": smoothcache, "torch": torch}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.setattr(logging.getLogger("smoothcache_fx"), "level", logging.NOTSET)  # a page may set it
    for block in blocks:
        exec(compile(block.replace('backend="inductor"', 'backend="eager"'), page.name, "exec"), names)  # noqa: S102
    assert "MAC ratio" in capsys.readouterr().out
    assert (tmp_path / {"README.md": "schedule.json", "debugging.md": "graphs/sites.json"}[page.name]).exists()


@each_page
def test_every_file_that_is_linked_exists(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
