"""README and docs: commands are single lines, code runs, files exist."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import smoothcache_fx as smoothcache
from helpers.capture import Denoiser
from helpers.cases import randomize
from smoothcache_fx.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
#: What the code of a page writes, or None. The pages that are not here have no blocks of Python or of commands.
WRITTEN = {
    "README.md": "schedule.json",
    "architecture.md": None,
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
    assert lines.count('pip install -e ".[test]" && python -m pytest -n 2 --dist worksteal') == 1


#: The inner compiler is not what the pages are about, and would take minutes; CUDA graphs need a GPU.
QUICKER = re.compile(r'backend="inductor"|mode="reduce-overhead"')

#: What a reader would have in the file that the commands name.
MY_MODEL = """
import torch
from helpers.capture import Denoiser, inputs
from helpers.cases import randomize

model = randomize(Denoiser(), 0).eval()

def build():
    return model, inputs()

def sampler():
    return model, sample

@torch.no_grad()
def sample(model):
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    for step in range(50):
        x = x - model(x, torch.full((2, 16), 1 - step / 50)) / 50
    return x
"""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """The language and the code of each block."""
    return re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_every_page_with_code_is_run():
    found = {page.name for page in PAGES if {"python", "bash"} & {language for language, _ in blocks_of(page)}}
    assert found == set(WRITTEN)


@each_page_with_code
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    """The blocks in order, with a model and a sampler as a reader would have them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(MY_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    model = randomize(Denoiser(), 0).eval()

    @torch.no_grad()
    def sample(model, seed, steps=50):
        x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = x - model(x, torch.full((2, 16), 1 - step / steps)) / steps
        return x

    names = {"model": model, "sample": sample, "smoothcache": smoothcache, "torch": torch}
    monkeypatch.setattr(logging.getLogger("smoothcache_fx"), "level", logging.NOTSET)  # a page may set it
    for language, block in blocks_of(page):
        if language == "python":
            exec(compile(QUICKER.sub('backend="eager"', block), page.name, "exec"), names)  # noqa: S102
        for line in block.splitlines() if language == "bash" else ():
            run_command(line)
    if written := WRITTEN[page.name]:
        assert "MAC ratio" in capsys.readouterr().out
        assert (tmp_path / written).exists()


def run_command(line: str) -> None:
    """Run a line that starts with our command. The two that set all up are for CI and for the demo's own tests."""
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "smoothcache_fx"]:
        words = ["smoothcache", *words[3:]]
    if words[:2] == ["smoothcache", "compare"]:
        words += ["--backend", "eager"]
    if words[0] == "smoothcache":
        assert main(words[1:]) == 0, line
    else:
        assert words[:2] == ["pip", "install"], line


@each_page
def test_every_file_that_is_linked_exists(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, place = link.partition("#")
        assert (page.parent / path).exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)", (page.parent / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert place in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link
