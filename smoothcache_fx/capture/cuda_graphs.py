"""What CUDA graphs ask of variants and of callers. Inductor records and replays them (its "CUDA graph trees")."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from . import _torch

Boxed = Callable[[list[Any]], Sequence[Any]]


def may_run_twice(gm: GraphModule, caches: Collection[int]) -> bool:
    """Whether a second run on the same inputs does what one run does.

    Not where it draws random numbers, waits for the device or writes to other inputs than ``caches`` (positions).
    """
    holders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    writable = {holders[i] for i in caches}
    return not any(_is_random(node) or _waits(node) or _written(node) - writable for node in gm.graph.nodes)


def _is_random(node: Node) -> bool:
    """Attention ops, which may drop out, are random only if they do."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and (
        _arguments(node).get("dropout_p") != 0.0
    )


def _waits(node: Node) -> bool:
    return any(tag in getattr(node.target, "tags", ()) for tag in _torch.HOST_SYNC_TAGS)


def _written(node: Node) -> set[Node]:
    """The nodes whose values, seen through views, this one writes to."""
    given = _arguments(node)
    schema = getattr(node.target, "_schema", None)
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] if schema else ()
    leaves = pytree.tree_leaves([given[name] for name in written])
    return {_base(value) for value in leaves if isinstance(value, Node)}


def _arguments(node: Node) -> dict[str, Any]:
    """An op's arguments by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_view(node: Node) -> bool:
    """Whether an op only looks at its input in another shape."""
    schema = getattr(node.target, "_schema", None)
    aliases = [value.alias_info for value in schema.returns if value.alias_info] if schema else []
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _base(node: Node) -> Node:
    while node.op != "placeholder" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def read_and_written(gm: GraphModule) -> list[int]:
    """Positions of the inputs that a graph reads before it writes them: caches from which a difference is taken.

    What it reads behind the write it has put there itself, and a second run does again.
    """
    holders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    read: set[Node] = set()
    written: set[Node] = set()
    for node in gm.graph.nodes:
        own = _written(node)
        if not _is_view(node):
            read |= {_base(value) for value in node.all_input_nodes if node.op == "call_function"} - own - written
        written |= own
    return [i for i, holder in enumerate(holders) if holder in read & written]


def recorded_at_once(run: Boxed, sizes: Sequence[int], moved: Sequence[int]) -> Boxed:
    """A graph that Inductor records as CUDA graph, such that it does so at the first call for some sizes.

    Inductor runs it once to warm up, records the second run and replays from the third on. A variant that a schedule
    uses once in a trajectory would be recorded in the second trajectory, so its first call runs it twice. ``sizes``
    are positions of symbolic sizes among its inputs: there is a recording for each. Inputs at ``moved`` get back what
    they had before the second run.
    """
    recorded: set[tuple[int, ...]] = set()

    def call(arguments: list[Any]) -> Sequence[Any]:
        key = tuple([arguments[i] for i in sizes])
        if key not in recorded:
            before = [(arguments[i], arguments[i].clone()) for i in moved]
            run(list(arguments))  # what it returns is dropped: Inductor records only when nothing of it lives
            for there, value in before:
                there.copy_(value)
            recorded.add(key)
        return run(arguments)

    call.__wrapped__ = run  # type: ignore[attr-defined]
    return call


def owned(output: Any) -> Any:
    """A model's output with tensors of its own: the next replay writes over those it came in."""
    return pytree.tree_map(_owned_leaf, output)


def _owned_leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    result = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(result, field.name, owned(getattr(value, field.name)))
    return result
