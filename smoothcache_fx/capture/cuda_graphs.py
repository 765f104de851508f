"""What CUDA graphs ask of variants and of callers. Inductor records and replays them (its "CUDA graph trees")."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..passes.mutation import arguments_by_name, written
from . import _torch

Boxed = Callable[[list[Any]], Sequence[Any]]


def may_run_twice(gm: GraphModule, caches: Collection[int]) -> bool:
    """Whether a second run on the same inputs does what one run does.

    Not where it draws random numbers, waits for the device or writes to other inputs than ``caches`` (positions).
    """
    holders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    writable = {holders[i] for i in caches}
    return not any(_is_random(node) or _waits(node) or written(node) - writable for node in gm.graph.nodes)


def _is_random(node: Node) -> bool:
    """Attention ops, which may drop out, are random only if they do."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and (
        arguments_by_name(node).get("dropout_p") != 0.0
    )


def _waits(node: Node) -> bool:
    return any(tag in getattr(node.target, "tags", ()) for tag in _torch.HOST_SYNC_TAGS)


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
    """A copy of a model's output: the next replay overwrites the original."""
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
