"""Writes what the documentation takes from the code: ``python docs/generate.py``.

``api.md`` from the docstrings; in ``how-it-works.md`` the graphs between the markers, and ``graphs/*.dot``, from a
dump of a small DiT (``*.svg`` too, where Graphviz is installed); ``graphs/schedules.png`` from published schedules. The
tests check that text and ``.dot`` files are up to date.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import smoothcache_fx as smoothcache
from smoothcache_fx import plots
from smoothcache_fx.cli.main import parser
from smoothcache_fx.demo.model import DiT, randomize
from smoothcache_fx.graphs.diff import diff_files

DOCS = Path(__file__).parent
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
#: Stages of which a drawing is kept.
DRAWN = ("guarded", "variant_1")
#: What is read from the environment: PyTorch's own variables only as far as this package adds to them.
ENVIRONMENT = {
    "SMOOTHCACHE_DUMP": "a folder: each compiled model writes its graphs there, as `dump` does, "
    "whenever it has a new variant",
    "TORCH_LOGS": "`smoothcache_fx` logs what each pass found and which variants were compiled, "
    "`+smoothcache_fx` each step, too",
    "TORCH_TRACE": "a folder: PyTorch's structured trace, with the guarded graph and each variant in it",
    "TRITON_INTERPRET": "`1` when the package is imported: the kernels run in Triton's interpreter, on CPU tensors, "
    "for tests",
}
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
    objects = {name: getattr(smoothcache, name) for name in smoothcache.__all__ if name != "__version__"}
    modules = {name: value for name, value in objects.items() if isinstance(value, ModuleType)}
    functions = {name: value for name, value in objects.items() if inspect.isfunction(value)}
    kinds = {name: value for name, value in objects.items() if inspect.isclass(value)}
    errors = {name: value for name, value in kinds.items() if issubclass(value, Exception)}
    classes = {name: value for name, value in kinds.items() if name not in errors}
    if left := objects.keys() - modules.keys() - functions.keys() - kinds.keys():
        raise TypeError(f"{', '.join(sorted(left))} is neither a function, a class nor a module: say how to show it")
    lines += ["", "## Functions"]
    for name, function in functions.items():
        lines += _function(f"smoothcache.{name}", function, "###")
    lines += ["", "## Classes"]
    for name, kind in classes.items():
        lines += _class(name, kind)
    lines += ["", "## Errors", ""]
    for name, error in errors.items():
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        lines.append(f"- `{name}` ({bases}): {_item(_code(inspect.getdoc(error)))}")
    for name, module in modules.items():
        lines += ["", f"## Module `{name}`", "", *_described(module)]
        for member in module.__all__:
            lines += _function(f"{name}.{member}", getattr(module, member), "###")
    lines += ["", "## Figures", "", "In `smoothcache_fx.plots`; they need matplotlib (the extra `plot`)."]
    for name, function in inspect.getmembers(plots, inspect.isfunction):
        if name.startswith("plot_"):
            lines += _function(f"plots.{name}", function, "###")
    lines += ["", "## Command line", "", "`smoothcache COMMAND --help` says the same, with examples."]
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for choice in commands._choices_actions:
        lines += ["", f"### `smoothcache {choice.dest}`", "", f"{choice.help[0].upper()}{choice.help[1:]}.", ""]
        lines += _options(commands.choices[choice.dest])
    lines += ["", "## Environment", "", *(f"- `{name}`: {text}" for name, text in ENVIRONMENT.items())]
    return "\n".join(lines) + "\n"


def _options(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in command._actions:
        if not isinstance(action, argparse._HelpAction):
            name = ", ".join(action.option_strings) or action.metavar or action.dest
            text = (action.help or "").replace("*", r"\*")  # globs, not emphasis
            yield f"- `{name}`: {text}" if text else f"- `{name}`"


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
    if len(text) > 110:  # a parameter a line
        keywords = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        shown = [f"    {parameter}," for parameter in parameters]
        if keywords and all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters):
            shown.insert(parameters.index(keywords[0]), "    *,")
        end = ")" if inspect.isclass(function) else f") -> {returned}"
        text = "\n".join([f"{name}(", *shown, end])
    return ["", f"{heading} `{name}`", "", "```text", text, "```", "", *_described(function)]


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


def _item(text: str) -> str:
    """A text of several paragraphs as one item of a list."""
    first, *more = text.splitlines()
    return "\n".join([first, *(f"  {line}" if line else "" for line in more)])


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
    captured, guarded, variant, nothing = (folder / f"{stage}.py" for stage in ("captured", *DRAWN, "variant_3"))
    before = captured.read_text(encoding="utf-8").splitlines()
    guards = [line for line in guarded.read_text(encoding="utf-8").splitlines() if " = guard_(" in line]
    attention = next(re.search(r"guard_\((\w+), (\w+)", line) for line in guards if "site blocks.0.attn" in line)
    after = variant.read_text(encoding="utf-8").splitlines()
    return {
        "captured": _until_add(before, f"{attention[1]} ="),
        "guards": _changes(list(diff_files(captured, guarded))),
        "attention": _table(list(diff_files(captured, variant))),
        "attention-read": _until_add(after, f"({attention[2]},"),
        "store": [line.strip() for line in after if ".copy_.default(" in line],
        "nothing": _table(list(diff_files(captured, nothing))),
    }


def _until_add(graph: list[str], begin: str) -> list[str]:
    """The lines of a dumped graph from the call that has ``begin`` in it to the next residual add."""
    start = next(i for i, line in enumerate(graph) if line.startswith("        ") and begin in line)
    end = next(i for i, line in enumerate(graph) if i > start and "aten.add.Tensor(" in line)
    return [line.strip() for line in graph[start : end + 1]]


def _table(diff: list[str]) -> list[str]:
    return diff[: diff.index("")]


def _changes(diff: list[str]) -> list[str]:
    """The changed calls: neither the files' names, nor the graph's inputs, nor what is the same in both."""
    return [line[0] + line[1:].strip() for line in diff if re.match(r"[+-]        \w+ = ", line)]


def replaced(page: str, excerpts: Mapping[str, list[str]]) -> str:
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
        for stage in DRAWN:
            for suffix in (".dot", ".svg"):
                drawing = Path(directory) / "graph_0" / f"{stage}{suffix}"
                if drawing.exists():  # an .svg only where Graphviz is installed
                    shutil.copy(drawing, pictures / drawing.name)
    rows = {name: [int(digit) for digit in row] for name, row in PUBLISHED.items()}
    schedules = {name: smoothcache.Schedule(50, {"attn": row}) for name, row in rows.items()}
    schedules |= {f"FORA, every {n}": smoothcache.Schedule.uniform(50, n, ["attn"]) for n in (2, 3)}
    plots.plot_schedules(schedules, pictures / "schedules.png")


if __name__ == "__main__":
    main()
