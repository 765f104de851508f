"""A graph as a Python file that people read and that runs: ``Graph()(*inputs)``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..passes.facts import module_path, source_line
from ..passes.guard import CACHE, COEFFICIENTS, DECISION, SITE, SLOT
from ..passes.names import WEIGHT

#: Where a file of constants lies, beside the Python file.
CONSTANTS = "constants.pt"


def as_python(heading: str, gm: GraphModule, note: Callable[[Node], str | None]) -> str:
    """The source of a module ``Graph`` whose ``forward`` is the graph.

    Args:
        heading: the file's docstring.
        gm: a graph as the passes have it: ATen ops, guards, the kernels' ops.
        note: what to say behind a node's line, such as the site that a cache belongs to.
    """
    imports = {"import torch"}
    if constants_of(gm):
        imports.add("from pathlib import Path")
    lines = _class("Graph", gm, note, imports)
    return f'"""{heading}"""\n\n' + "\n".join([*sorted(imports), "", "", *lines]) + "\n"


def constants_of(gm: GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that are part of the graph itself, by their names."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(gm)
            if isinstance(value, torch.Tensor):
                found[node.target] = value.detach()
    return found


def notes(names: Sequence[str]) -> Callable[[Node], str | None]:
    """What to say of a node: which parameter it is, or what it is to the site of this name."""

    def note(node: Node) -> str | None:
        if WEIGHT in node.meta:
            return node.meta[WEIGHT]
        if COEFFICIENTS in node.meta:
            return "a cache's share in a forecast"
        if SITE not in node.meta:
            return None
        name = names[node.meta[SITE]]
        if CACHE in node.meta:
            slot = node.meta[SLOT]
            return f"cache of {name}" + (f", slot {slot} of its ring" if slot else "")
        return f"whether {name} is computed" if DECISION in node.meta else f"site {name}"

    return note


def _class(name: str, gm: GraphModule, note: Callable[[Node], str | None], imports: set[str]) -> list[str]:
    attributes = {node.target: node for node in gm.graph.nodes if node.op == "get_attr"}
    inner = {target: operator.attrgetter(target)(gm) for target in attributes}
    lines = [f"class {name}(torch.nn.Module):"]
    if inner:
        lines += ["    def __init__(self):", "        super().__init__()"]
        if any(isinstance(value, torch.Tensor) for value in inner.values()):
            lines.append(f'        constants = torch.load(Path(__file__).with_name("{CONSTANTS}"), weights_only=True)')
    nested: list[str] = []
    for target, value in inner.items():
        own = _attribute(target)
        if isinstance(value, torch.Tensor):
            lines.append(f"        self.{own} = constants[{target!r}]")
        else:
            nested += [*_class(f"{name}_{own}", value, note, imports), "", ""]
            lines.append(f"        self.{own} = {name}_{own}()")
    if inner:
        lines.append("")
    arguments = [node for node in gm.graph.nodes if node.op == "placeholder"]
    lines += ["    def forward(", "        self,"]
    lines += [_with_note(f"        {node.name},", _described(node, note)) for node in arguments]
    lines.append("    ):")
    place = None
    for node in gm.graph.nodes:
        if node.op == "call_function":
            came_from = module_path(node), source_line(node)
            if came_from != place and any(came_from):
                lines += ["", f"        # {': '.join(filter(None, came_from))}"]
            place = came_from
            call = f"{_target(node.target, imports)}({_arguments(node)})"
            lines.append(_with_note(f"        {node.name} = {call}", _described(node, note)))
        elif node.op == "get_attr":
            lines.append(f"        {node.name} = self.{_attribute(node.target)}")
        elif node.op == "output":
            lines += ["", f"        return {_literal(node.args[0])}"]
    return nested + lines


def _attribute(target: str) -> str:
    return target.replace(".", "_")


def _with_note(line: str, note: str) -> str:
    return f"{line}  # {note}" if note else line


def _described(node: Node, note: Callable[[Node], str | None]) -> str:
    """Dtype and shape of a node's value, and the note on it."""
    value = node.meta.get("val")
    shape = f"{_SHORT.get(value.dtype, value.dtype)}{list(value.shape)}" if isinstance(value, torch.Tensor) else None
    return ", ".join(filter(None, (shape, note(node))))


_SHORT: Mapping[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


def _target(target: Any, imports: set[str]) -> str:
    """An expression for what a node calls; the import that it takes is added."""
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == "smoothcache":
            imports.add("import smoothcache_fx.kernels")
        return f"torch.ops.{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = target.__module__.removeprefix("_")  # operator's functions say that they are of _operator
    if module == "builtins":
        return target.__qualname__
    if module in ("operator", "math"):
        imports.add(f"import {module}")
        return f"{module}.{target.__qualname__}"
    name = f"{target.__qualname__}_"  # without the underscore the first node that calls it would be called the same
    imports.add(f"from {module} import {target.__qualname__} as {name}")
    return name


def _arguments(node: Node) -> str:
    given = [_literal(value) for value in node.args]
    given += [f"{name}={_literal(value)}" for name, value in node.kwargs.items()]
    return ", ".join(given)


def _literal(value: Any) -> str:
    """An expression for a node's argument."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(_literal, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_literal(value.start)}, {_literal(value.stop)}, {_literal(value.step)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
