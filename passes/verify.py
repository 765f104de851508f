"""Check what a pass made, before anything compiles or runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .facts import is_view_or_cast, packet
from .guard import CACHE, DECISION, guard, restore
from .mutation import arguments_written
from .rewriting import placeholders


class GraphError(RuntimeError):
    """A pass made a graph that must not run: a defect of this package, never of the user's model."""


def check_graph(gm: GraphModule, *, like: GraphModule, stage: str) -> GraphModule:
    """Return ``gm`` if it is sound and has the outputs of ``like``, else raise ``GraphError``.

    Args:
        gm: the graph after the pass.
        like: the captured graph that it was made of.
        stage: ``"guarded"`` (guards, caches and decisions are allowed) or ``"variant"`` (only caches are, and each
            is either written, with a computed output, or read, never both; but before a cache is written, what it
            holds may be subtracted from the output, and the difference written to another cache; and what a product
            has written is read behind it).
    """
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise GraphError(f"after {stage}: the graph is malformed: {error}") from error
    _check_placeholders(gm, stage)
    _check_outputs(gm, like, stage)
    for node in gm.graph.nodes:
        if stage == "variant" and (node.target in (guard, restore) or DECISION in node.meta):
            raise GraphError(f"after {stage}: the guard {node.name} is not resolved")
        if node.target is guard:
            _check_guard(node)
    if stage == "variant":
        for node in placeholders(gm.graph):
            if CACHE in node.meta:
                _check_cache(node)
    return gm


def _check_placeholders(gm: GraphModule, stage: str) -> None:
    seen_call = None
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            seen_call = node
        elif seen_call is not None:
            raise GraphError(f"after {stage}: the input {node.name} comes after the call {seen_call.name}")


def _flat_outputs(gm: GraphModule) -> list[object]:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return list(output.args[0])


def _check_outputs(gm: GraphModule, like: GraphModule, stage: str) -> None:
    ours, theirs = _flat_outputs(gm), _flat_outputs(like)
    if len(ours) != len(theirs):
        raise GraphError(f"after {stage}: {len(ours)} outputs, the captured graph has {len(theirs)}")
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(our, Node) or not isinstance(their, Node):
            if our is not their and our != their:
                raise GraphError(f"after {stage}: output {index} is {our}, the captured graph's is {their}")
            continue
        mine, wanted = _signature(our), _signature(their)
        if mine != wanted:
            raise GraphError(f"after {stage}: output {index} is {mine}, the captured graph's is {wanted}")


def _signature(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return tuple(str(size) for size in value.shape), value.dtype, value.device
    return str(value)


def _check_guard(node: Node) -> None:
    value, cache, decision, *rest = node.args
    if CACHE not in cache.meta or DECISION not in decision.meta:
        raise GraphError(f"the guard {node.name} does not take a cache and a decision: {cache.name}, {decision.name}")
    older = rest[0] if rest else ()
    for one in (cache, *older):
        if _signature(value) != _signature(one) and not (one in older and _is_difference(value, one, older)):
            raise GraphError(f"the guard {node.name} stores {_signature(value)} in a cache of {_signature(one)}")
    others = [user.name for user in value.users if user is not node]
    if others:
        raise GraphError(f"the guard {node.name} is passed by: {', '.join(others)} use {value.name} itself")


def _is_difference(value: Node, cache: Node, older: Sequence[Node]) -> bool:
    """Whether a cache differs from what is stored in a narrower dtype only, that of its whole history."""
    shape, dtype, device = _signature(value)
    own_shape, own_dtype, own_device = _signature(cache)
    return (
        (own_shape, own_device) == (shape, device)
        and dtype.is_floating_point
        and own_dtype.is_floating_point
        and own_dtype.itemsize < dtype.itemsize
        and all(_signature(other) == _signature(cache) for other in older)
    )


def _check_cache(cache: Node) -> None:
    writes: list[Node] = []
    reads: list[Node] = []
    pending = [(cache, user) for user in cache.users]
    while pending:
        value, user = pending.pop()
        if is_view_or_cast(user) and any(_writes(after, user) for after in user.users):
            pending += [(user, after) for after in user.users]
        else:
            (writes if _writes(user, value) else reads).append(user)
    order = {node: position for position, node in enumerate(cache.graph.nodes)}
    # Before it is written, a cache may give the difference that another one keeps.
    subtracted = [n for n in reads if _goes_into_a_difference(n, cache)]
    reads = [n for n in reads if n not in subtracted or any(order[n] > order[write] for write in writes)]
    if len(writes) == 1 and str(packet(writes[0])) == "smoothcache.matmul_store":
        reads = [n for n in reads if order[n] < order[writes[0]]]
    if len(writes) > 1 or (writes and reads):
        raise GraphError(
            f"the cache {cache.name} is written by {[n.name for n in writes]} and read by "
            f"{[n.name for n in reads]}; one step does one or the other"
        )
    if writes and cache in writes[0].args[1:2]:
        raise GraphError(f"the cache {cache.name} is copied onto itself")


def _goes_into_a_difference(user: Node, cache: Node) -> bool:
    """Whether an op subtracts the cache from what replaces it, and only another cache takes the difference."""
    aten = torch.ops.aten
    if packet(user) is not aten.sub or user.args[1] is not cache:
        return False
    while packet(user) in (aten.sub, aten.clamp_min, aten.clamp_max) and len(user.users) == 1:
        (user,) = user.users
    return packet(user) is aten.copy_ and user.args[0] is not cache and CACHE in user.args[0].meta


def _writes(user: Node, cache: Node) -> bool:
    """Whether an op writes to the argument that is the cache, or a view of it."""
    return cache in arguments_written(user)
