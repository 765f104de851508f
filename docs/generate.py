"""Writes what the documentation takes from the code: ``python docs/generate.py``.

``api.md`` from the docstrings; in ``how-it-works.md`` the graphs between the markers, and ``graphs/*.svg``, from a dump
of a small DiT; ``graphs/schedules.png`` from published schedules. The tests check that nothing of it is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import smoothcache_fx as smoothcache
from smoothcache_fx import importers, plots
from smoothcache_fx.cli import parser
from smoothcache_fx.demo.model import DiT, randomize
from smoothcache_fx.graph_diff import diff_files

DOCS = Path(__file__).parent
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
#: SmoothCache's published schedules for DiT-XL/2 with 50 DDIM steps, equal for attention and feed-forward.
PUBLISHED = {
    "published, alpha 0.08": "10010101" + "1" * 42,
    "published, alpha 0.18": "1000100100" + "10" * 19 + "11",
}


def api() -> str:
    """The API reference, from docstrings and the command line's parser."""
    lines = [
        "# API reference",
        "",
        "Made of the docstrings by `docs/generate.py`. `import smoothcache_fx as smoothcache`.",
    ]
    names = [name for name in smoothcache.__all__ if name not in ("__version__", "importers")]
    objects = {name: getattr(smoothcache, name) for name in names}
    functions = {name: value for name, value in objects.items() if inspect.isfunction(value)}
    errors = {name: value for name, value in objects.items() if name not in functions and issubclass(value, Exception)}
    classes = {name: value for name, value in objects.items() if name not in functions and name not in errors}
    lines += ["", "## Functions"]
    for name, function in functions.items():
        lines += _function(f"smoothcache.{name}", function, "###")
    lines += ["", "## Classes"]
    for name, kind in classes.items():
        lines += _class(name, kind)
    lines += ["", "## Errors", ""]
    for name, error in errors.items():
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        lines.append(f"- `{name}` ({bases}): {inspect.getdoc(error)}")
    lines += ["", "## Plans of other methods", "", "In `smoothcache_fx.importers`."]
    for name in importers.__all__:
        lines += _function(f"importers.{name}", getattr(importers, name), "###")
    lines += ["", "## Figures", "", "In `smoothcache_fx.plots`; they need matplotlib (the extra `plot`)."]
    for name, function in inspect.getmembers(plots, inspect.isfunction):
        if name.startswith("plot_"):
            lines += _function(f"plots.{name}", function, "###")
    lines += ["", "## Command line", "", "`smoothcache COMMAND --help` says more.", ""]
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    lines += [f"- `{choice.dest}`: {choice.help}" for choice in commands._choices_actions]
    return "\n".join(lines) + "\n"


def _class(name: str, kind: type) -> Iterator[str]:
    yield from _function(name, kind, "###")
    for member, value in vars(kind).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield from ["", f"#### `{name}.{member}`", "", *_described(value)]
        elif isinstance(value, classmethod) or inspect.isfunction(value):
            yield from _function(f"{name}.{member}", getattr(kind, member), "####")


class _Annotation(str):
    """An annotation that is shown as it was written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _function(name: str, function: Any, heading: str) -> list[str]:
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_Annotation(parameter.annotation))
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    returned = inspect.Signature.empty if inspect.isclass(function) else _Annotation(signature.return_annotation)
    text = f"{name}{signature.replace(parameters=parameters, return_annotation=returned)}"
    return ["", f"{heading} `{name}`", "", "```text", *textwrap.wrap(text, 110), "```", "", *_described(function)]


def _described(thing: Any) -> list[str]:
    """The docstring, its sections as lists."""
    lines, section = [], None
    for line in (inspect.getdoc(thing) or "").splitlines():
        title = line.rstrip(":")
        if line.endswith(":") and title in SECTIONS:
            section = title
            lines += [f"*{title}*", ""]
        elif section and (entry := re.match(r"    (\S[\w, *]*): (.*)", line)) and section != "Returns":
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}" if section != "Returns" else line.strip())
        else:
            lines.append(line)
    return [_code(line) for line in lines]


def _code(line: str) -> str:
    return line.replace("``", "`")


def graphs(directory: Path) -> dict[str, list[str]]:
    """Excerpts of a dump by marker, from a DiT of one block whose attention and feed-forward are reused in turns."""
    model = randomize(DiT(depth=1, width=64))
    rows = {"attn": [1, 0, 1, 0], "ffn": [1, 1, 0, 0]}
    smoothcache.compile(model, smoothcache.Schedule(4, rows), backend="eager")
    labels = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        for step in range(4):
            model(torch.randn(2, 1, 8, 8), torch.full((2,), 1 - step / 4), labels)
    smoothcache.dump(model, directory)
    folder = directory / "graph_0"
    captured = folder / "captured.py"
    guarded = list(diff_files(captured, folder / "guarded.py"))
    attention = list(diff_files(captured, folder / "variant_1.py"))
    nothing = list(diff_files(captured, folder / "variant_3.py"))
    return {
        "guards": _changes(guarded),
        "attention": _table(attention),
        "attention-read": [line for line in _changes(attention) if line.startswith("+") and "cache_" in line],
        "nothing": _table(nothing),
    }


def _table(diff: list[str]) -> list[str]:
    return diff[: diff.index("")]


def _changes(diff: list[str]) -> list[str]:
    """The changed lines of the graph's calls, without the heading and the arguments."""
    calls = ("-        addmm", "-        view", "+        guard")
    start = next(i for i, line in enumerate(diff) if line.startswith(calls))
    return [line for line in diff[start:] if line[:1] in "+-" and line[1:].strip()]


def replaced(page: str, excerpts: dict[str, list[str]]) -> str:
    """The page with the text between each pair of markers exchanged."""
    for name, lines in excerpts.items():
        pattern = rf"(<!-- {name} -->\n```\w+\n).*?(```\n<!-- end -->)"
        text = "".join(f"{line}\n" for line in lines)
        page, count = re.subn(pattern, lambda match, text=text: match[1] + text + match[2], page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page has {count} places marked <!-- {name} -->, expected one")
    return page


def main() -> None:
    (DOCS / "api.md").write_text(api(), encoding="utf-8")
    page = DOCS / "how-it-works.md"
    pictures = DOCS / "graphs"
    pictures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        page.write_text(replaced(page.read_text(encoding="utf-8"), graphs(Path(directory))), encoding="utf-8")
        for stage in ("guarded", "variant_1"):
            drawing = Path(directory) / "graph_0" / f"{stage}.svg"
            if drawing.exists():  # Graphviz is installed
                shutil.copy(drawing, pictures / drawing.name)
    rows = {name: [int(digit) for digit in row] for name, row in PUBLISHED.items()}
    schedules = {name: smoothcache.Schedule(50, {"attn": row}) for name, row in rows.items()}
    schedules |= {f"FORA, every {n}": smoothcache.Schedule.uniform(50, n, ["attn"]) for n in (2, 3)}
    plots.plot_schedules(schedules, pictures / "schedules.png")


if __name__ == "__main__":
    main()
