"""README and docs: commands are single lines, code runs, files exist."""

from __future__ import annotations

import logging
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import smoothcache_fx as smoothcache
from capture import Stack
from cases import randomize
from smoothcache_fx.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
#: What the code of a page writes. The pages that are not here have none.
WRITTEN = {
    "README.md": "schedule.json",
    "choosing-a-schedule.md": "frontier.png",
    "debugging.md": "graphs/sites.json",
    "quick-start.md": "schedule.json",
}
each_page_with_code = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name in WRITTEN], ids=lambda page: page.name
)


def test_the_two_commands_stand_on_a_line_of_their_own():
    lines = README.splitlines()
    assert lines.count('pip install -e ".[demo]" && python -m smoothcache_fx demo') == 1
    assert lines.count('pip install -e ".[test]" && python -m pytest') == 1


def blocks_of(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_every_page_with_code_is_run():
    assert {page.name for page in PAGES if blocks_of(page, "python")} == set(WRITTEN)


@each_page
def test_the_commands_exist(page):
    """Each line that starts with our command is one that the command line takes."""
    for block in blocks_of(page, "bash"):
        for line in block.splitlines():
            words = shlex.split(line.partition("&&")[2] or line)
            if words[:3] == ["python", "-m", "smoothcache_fx"]:
                words = ["smoothcache", *words[3:]]
            if words[:1] == ["smoothcache"]:
                assert callable(parser().parse_args(words[1:]).run), line


@each_page_with_code
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
    monkeypatch.setattr(logging.getLogger("smoothcache_fx"), "level", logging.NOTSET)  # a page may set it
    for block in blocks_of(page, "python"):
        exec(compile(block.replace('backend="inductor"', 'backend="eager"'), page.name, "exec"), names)  # noqa: S102
    assert "MAC ratio" in capsys.readouterr().out
    assert (tmp_path / WRITTEN[page.name]).exists()


@each_page
def test_every_file_that_is_linked_exists(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_what_is_made_of_the_code_is_up_to_date(tmp_path):
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == generate["api"](), "run python docs/generate.py"
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    again = generate["replaced"](page, generate["graphs"](tmp_path))
    if torch.__version__.startswith("2.13"):  # others name nodes otherwise
        assert page == again, "run python docs/generate.py"
