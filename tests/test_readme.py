"""README: its commands are single lines, its code runs, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from capture import Stack
from cases import randomize

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_on_a_line_of_their_own():
    lines = README.splitlines()
    assert lines.count('pip install -e ".[demo]" && python -m smoothcache_fx demo') == 1
    assert lines.count('pip install -e ".[test]" && python -m pytest') == 1


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    """The blocks in order, with a model and a sampler as a reader would have them."""
    monkeypatch.chdir(tmp_path)
    model = randomize(Stack(), 0).eval()

    @torch.no_grad()
    def sample(model, seed):
        x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))
        for step in range(50):
            x = x - model(x, torch.full((2, 16), 1 - step / 50)) / 50
        return x

    names = {"model": model, "sample": sample, "torch": torch}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace('backend="inductor"', 'backend="eager"'), "README.md", "exec"), names)  # noqa: S102
    assert "MAC ratio" in capsys.readouterr().out
    assert (tmp_path / "schedule.json").exists()


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link
