"""The scripts in ``examples/`` run, and reuse what they say."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--backend", "eager"])
    runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    assert float(re.findall(r"MAC ratio ([\d.]+)", text)[-1]) > 1.4, text
    assert "computed beyond the schedule" not in text


#: The inner compiler is not what it is about, and would take minutes; nor are fifty steps.
QUICKER = {
    "compile(model, schedule)": 'compile(model, schedule, backend="eager")',
    "}, sample)": '}, sample, backend="eager")',
    "steps=50": "steps=20",
    "uniform(50, 2)": "uniform(20, 2)",
}


def test_the_notebook_runs(monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    notebook = json.loads((ROOT / "examples/notebook.ipynb").read_text(encoding="utf-8"))
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    for given, quicker in QUICKER.items():
        assert given in code
        code = code.replace(given, quicker)
    names: dict[str, Any] = {}
    exec(compile(code, "notebook.ipynb", "exec"), names)  # noqa: S102
    best, other = names["comparison"].rows
    assert best.psnr > other.psnr + 3 and "every second step" in capsys.readouterr().out
