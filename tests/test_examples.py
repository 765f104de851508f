"""The scripts in ``examples/`` run, and reuse what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--backend", "eager"])
    runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    assert float(re.findall(r"MAC ratio ([\d.]+)", text)[-1]) > 1.4, text
    assert "computed beyond the schedule" not in text
