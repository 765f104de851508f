"""What docs/generate.py makes is up to date, and what pages repeat is what they repeat it from."""

from __future__ import annotations

import json
import re
import runpy
import statistics
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import smoothcache_fx as smoothcache

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STALE = "run python docs/generate.py"


@pytest.fixture
def generate() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate.py"))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_api_reference_is_up_to_date(generate):
    page = text_of(DOCS / "api.md")
    assert page == generate["api"](), STALE
    for name in set(smoothcache.__all__) - {"__version__"}:
        shown = (f"### `smoothcache.{name}`", f"### `{name}`", f"## Module `{name}`", f"- `{name}` (")
        assert any(line.startswith(shown) for line in page.splitlines()), name


def test_a_public_name_that_it_cannot_show_is_an_error(generate, monkeypatch):
    monkeypatch.setattr(smoothcache, "__all__", [*smoothcache.__all__, "DEFAULT"])
    monkeypatch.setattr(smoothcache, "DEFAULT", 3, raising=False)
    with pytest.raises(TypeError, match="DEFAULT is neither"):
        generate["api"]()


def test_a_new_module_is_shown(generate, monkeypatch):
    module = types.ModuleType("extra", "What is new.")
    module.__all__ = ["reset"]
    module.reset = smoothcache.reset
    monkeypatch.setattr(smoothcache, "__all__", [*smoothcache.__all__, "extra"])
    monkeypatch.setattr(smoothcache, "extra", module, raising=False)
    assert "## Module `extra`\n\nWhat is new.\n\n### `extra.reset`" in generate["api"]()


def test_every_environment_variable_that_is_read_is_listed(generate):
    sources = [path for folder in ("smoothcache_fx", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()["'](\w+)""")
    names = {name for path in sources for name in read.findall(text_of(path))}
    assert {"SMOOTHCACHE_DUMP", "TRITON_INTERPRET"} <= names <= set(generate["ENVIRONMENT"])


@pytest.mark.skipif(
    not (2, 13) <= torch.__version__ < (2, 14),
    reason="the page has the graphs of torch 2.13; others name nodes otherwise",
)
def test_the_graphs_are_up_to_date(generate, tmp_path):
    page = text_of(DOCS / "how-it-works.md")
    assert page == generate["replaced"](page, generate["graphs"](tmp_path)), STALE
    for stage in generate["DRAWN"]:
        assert text_of(DOCS / "graphs" / f"{stage}.dot") == text_of(tmp_path / "graph_0" / f"{stage}.dot"), STALE


@pytest.mark.parametrize("page", ["no marker", "<!-- one -->\n```text\n```\n<!-- end -->\n" * 2])
def test_a_marker_that_is_missing_or_there_twice_is_an_error(generate, page):
    with pytest.raises(ValueError, match="places marked <!-- one -->, expected one"):
        generate["replaced"](page, {"one": ["line"]})


def test_the_demos_figures_are_those_of_the_benchmarks():
    lines = text_of(DOCS / "choosing-a-schedule.md").splitlines()
    rows = [line for line in lines if re.match(r"\| (torch\.compile|alpha|\d+ steps)", line)]
    assert len(rows) == 7
    assert not set(rows) - set(text_of(DOCS / "benchmarks.md").splitlines())


def test_the_table_of_grains_is_what_the_bench_wrote():
    runs = json.loads((DOCS.parent / "bench/results/grains.json").read_text(encoding="utf-8"))["runs"]
    lines = text_of(DOCS / "choosing-a-schedule.md").splitlines()
    for sampler, computed in {(run["sampler"], run["computed"]): None for run in runs}:
        near = [run for run in runs if (run["sampler"], run["computed"]) == (sampler, computed)]
        cells = " | ".join(f"{statistics.median(run['psnr']):.1f}" for run in near)
        assert any(line.startswith("| ") and line.endswith(f", {computed} | {cells} |") for line in lines), cells


def test_the_table_of_transfers_is_what_the_bench_wrote():
    runs = json.loads((DOCS.parent / "bench/results/transfer.json").read_text(encoding="utf-8"))["runs"]
    lines = text_of(DOCS / "choosing-a-schedule.md").splitlines()
    for sampler, steps, guidance in {(run["sampler"], run["steps"], run["guidance"]): None for run in runs}:
        near = [run for run in runs if (run["sampler"], run["steps"], run["guidance"]) == (sampler, steps, guidance)]
        cells = " | ".join(f"{run[kind]:.1f}" for run in near for kind in ("fresh", "transferred"))
        assert any(line.endswith(f"| {steps} | {guidance} | {cells} |") for line in lines), cells
