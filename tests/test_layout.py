"""The rooms of the package: which may import which, and what none of them may need."""

from __future__ import annotations

import ast
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "smoothcache_fx"
#: From the top: a room imports from rooms below it.
ORDER = (
    ("cli",),
    ("demo",),
    ("measure",),
    ("reports",),
    ("plots",),
    ("compiled",),
    ("capture",),
    ("runtime",),
    ("importers",),
    ("calibration",),
    ("schedules",),
    ("graphs",),
    ("passes",),
    ("kernels",),
    ("checks",),
    ("errors", "_version"),
)
#: What a room must do without, and why its docstring says so.
WITHOUT = {
    "schedules": ("torch", "triton"),
    "calibration": ("torch", "triton"),
    "runtime": ("torch.fx", "torch._dynamo", "torch._functorch", "torch._inductor", "triton"),
    "kernels": ("torch.fx", "torch._dynamo", "torch._inductor"),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each module, as installed."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        yield ".".join((PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts)), path
    for folder in ("passes", "kernels"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{PACKAGE}.{folder}.{path.stem}", path


def imports() -> dict[str, set[str]]:
    """What each module imports, absolute; imports for type checkers are left out."""
    names = {name for name, _ in modules()}
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        package = name.removesuffix(".__init__") if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                found[name] |= {
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base for alias in node.names
                }
    return found


def room(module: str) -> str | None:
    """The part of the package that a module is in; None for what is above all rooms, or not of the package."""
    parts = module.removeprefix(f"{PACKAGE}.").split(".")
    return None if not module.startswith(f"{PACKAGE}.") or parts[0] in ("__init__", "__main__") else parts[0]


FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}


def test_every_room_has_its_place():
    assert {room(name) for name, _ in modules()} - {None} == set(FLOOR)


def test_no_import_goes_up():
    up = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) and room(other) and room(other) != room(module) and FLOOR[room(other)] <= FLOOR[room(module)]
    ]
    assert not up, up


@pytest.mark.parametrize("name", WITHOUT)
def test_what_a_room_does_without(name):
    """Neither itself nor through what it imports from below."""
    graph = imports()
    pending = {module for module in graph if room(module) == name}
    seen: set[str] = set()
    while pending:
        module = pending.pop()
        seen.add(module)
        # A package's own __init__ imports everything; nothing is read from it.
        pending |= {other for other in graph.get(module, ()) if other not in seen and room(other)}
    bad = {
        f"{module} imports {other}"
        for module in seen
        for other in graph.get(module, ())
        for banned in WITHOUT[name]
        if other == banned or other.startswith(f"{banned}.")
    }
    assert not bad, bad


def test_no_circle_between_modules():
    graph = {module: {other for other in others if other.startswith(PACKAGE)} for module, others in imports().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        if not module.endswith("__init__"):
            visit(module, ())


def test_no_module_is_hidden_by_a_name_of_its_package():
    """``passes.narrow`` is the file; its function is imported from there."""
    inner = {name.rpartition(".")[0] for name, _ in modules()} - {PACKAGE}
    for package in sorted(inner):
        importlib.import_module(package)
    hidden = [
        name
        for name, _ in modules()
        if name in sys.modules and not name.endswith("__init__") and name.count(".") > 1
        if getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) is not sys.modules[name]
    ]
    assert not hidden, hidden
