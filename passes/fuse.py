"""Lower residual adds to kernels that add and store, or load and add, in one pass over memory.

Before, where site 0 is computed and sites 1 and 2 are reused::

    gated = mul(gate_0, attn);  copy_ = copy_(cache_0, attn);  a = add(x, gated)
    b = add(a, mul(gate_1, cache_1))
    c = add(b, cache_2)

After::

    a = residual_store(x, gate_0, attn, cache_0)
    c = residual_accumulate(a, [gate_1, None], [cache_1, cache_2])

A forecast (``passes/forecast.py``) that is gated and added becomes ``residual_forecast(x, gate, caches, weights)``.

An inner compiler that fuses pointwise work by itself needs none of this (``should_fuse``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ..kernels import residual_accumulate, residual_forecast, residual_load, residual_store  # noqa: F401 - registers
from ..kernels.operands import DTYPES
from .branches import addends
from .facts import aten, is_product, packet, tensor_value
from .forecast import FORECAST, read_forecast
from .guard import CACHE, copy_graph, with_graph
from .specialize import remove_dead_code

log = logging.getLogger(__name__)
ops = torch.ops.smoothcache

#: Ops whose result is memory of their argument, whatever its strides: a cache can be written through them.
VIEWS = frozenset(
    (aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.squeeze, aten.unsqueeze, aten.alias)
)


@dataclass(frozen=True)
class Term:
    """A summand ``gate * branch``: ``views`` lead from ``value`` to ``branch``.

    ``value`` is a cache, what is stored in one, or a forecast from several.
    """

    gate: Node | None
    branch: Node
    value: Node
    views: tuple[Node, ...]


@dataclass(frozen=True)
class Load:
    """One residual add of a reused branch: ``add = x + gate * cache``."""

    add: Node
    x: Node
    term: Term


def fuse(variant: GraphModule) -> GraphModule:
    """A copy of a variant with its residual adds lowered, wherever ``can_fuse`` says that it is the same sum."""
    graph, _ = copy_graph(variant)
    loads: list[Load] = []
    counts = {"stored": 0, "loaded": 0, "accumulated": 0, "forecast": 0}
    for node in [node for node in graph.nodes if FORECAST not in node.meta]:
        for x, term in _sums(node):
            if not can_fuse(node, x, term):
                continue
            if CACHE in term.value.meta:
                loads.append(Load(node, x, term))
                break
            if read_forecast(term.value):
                _lower_forecast(graph, node, x, term)
                counts["forecast"] += 1
                break
            if (copy := _store_of(term.value)) is not None:
                _lower_store(graph, node, x, term, copy)
                counts["stored"] += 1
                break
    lowered: dict[Node, Node] = {}
    for run in _runs(loads):
        counts["loaded" if len(run) == 1 else "accumulated"] += len(run)
        lowered[run[-1].add] = _lower_loads(graph, lowered.get(run[0].x, run[0].x), run)
    remove_dead_code(graph)
    log.info("fused residual adds: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    return with_graph(variant, graph)


def should_fuse(variant: GraphModule, fuses_by_itself: bool) -> bool:
    """Whether the kernels pay: on CUDA, and under inner compilers that do not fuse pointwise work themselves."""
    devices = {value.device.type for node in variant.graph.nodes if (value := tensor_value(node)) is not None}
    return "cuda" in devices and not fuses_by_itself


def can_fuse(add: Node, x: Node, term: Term) -> bool:
    """Whether a kernel gives this sum: dtypes that it takes, its output like ``x``, no other use of what it spares.

    In 16-bit dtypes the kernel rounds once, the graph after the product and after the sum: the kernel is nearer.
    """
    out, stream, branch = (tensor_value(node) for node in (add, x, term.branch))
    gate = None if term.gate is None else tensor_value(term.gate)
    values = [value for value in (stream, branch, gate) if value is not None]
    if any(value.dtype not in DTYPES or value.device != out.device for value in values):
        return False
    if (out.shape, out.dtype) != (stream.shape, stream.dtype) or branch.shape != out.shape:
        return False
    if gate is not None and torch.broadcast_shapes(gate.shape, out.shape) != out.shape:
        return False
    with out.fake_mode:
        return torch.empty_like(stream).stride() == out.stride()


def _sums(node: Node) -> list[tuple[Node, Term]]:
    """The ways to read a node as ``x + gate * branch``."""
    found = []
    summands = addends(node)
    if len(summands) == 2 and packet(node) is aten.add and node.kwargs.get("alpha", 1) == 1:
        for x, other in (summands, summands[::-1]):
            for gate, branch in _products(other) if other.users.keys() == {node} else ():
                found.append((x, _term(gate, branch)))
            found.append((x, _term(None, other)))
    elif len(summands) == 3 and not node.kwargs:
        x, left, right = summands
        found += [(x, _term(left, right)), (x, _term(right, left))]
    return [(x, term) for x, term in found if x is not term.branch]


def _products(node: Node) -> list[tuple[Node, Node]]:
    if not is_product(node) or packet(node) is aten.div or node.kwargs:
        return []
    left, right = node.args[:2]
    return [(left, right), (right, left)] if isinstance(left, Node) and isinstance(right, Node) else []


def _term(gate: Node | None, branch: Node) -> Term:
    """Follow views, which only this branch uses, back to a cache, a forecast or what is stored in a cache."""
    value, views = branch, []
    while not {CACHE, FORECAST} & value.meta.keys() and _store_of(value) is None and packet(value) in VIEWS:
        views.append(value)
        value = value.args[0]
    return Term(gate, branch, value, tuple(reversed(views)))


def _store_of(value: Node) -> Node | None:
    """The write of a value into its cache."""
    return next((user for user in value.users if packet(user) is aten.copy_ and user.args[1] is value), None)


def _lower_store(graph: Graph, add: Node, x: Node, term: Term, copy: Node) -> None:
    """The kernel writes the cache as the branch is looked at: through the same views."""
    with graph.inserting_before(add):
        cache = _again(graph, term.views, copy.args[0])
        node = graph.call_function(ops.residual_store.default, (x, term.gate, term.branch, cache))
    node.meta = dict(add.meta)
    add.replace_all_uses_with(node)
    graph.erase_node(add)
    graph.erase_node(copy)


def _lower_forecast(graph: Graph, add: Node, x: Node, term: Term) -> None:
    """The kernel reads each cache as the branch is looked at: through the same views."""
    values, weights = read_forecast(term.value)
    with graph.inserting_before(add):
        seen = [_again(graph, term.views, value) for value in values]
        weight = weights.meta["val"]
        if len(values) < len(weight):
            weights = graph.call_function(aten.slice.Tensor, (weights, 0, 0, len(values)))
            weights.meta = {"val": weight[: len(values)]}
        node = graph.call_function(ops.residual_forecast.default, (x, term.gate, seen, weights))
    node.meta = dict(add.meta)
    add.replace_all_uses_with(node)
    graph.erase_node(add)


def _again(graph: Graph, views: Sequence[Node], base: Node) -> Node:
    """The same views of another base, which may have another dtype."""
    dtype = base.meta["val"].dtype
    for view in views:
        copy = graph.call_function(view.target, (base, *view.args[1:]), dict(view.kwargs))
        value = view.meta["val"]
        with value.fake_mode:
            copy.meta = {"val": torch.empty_like(value, dtype=dtype)}
        base = copy
    return base


def _runs(loads: Sequence[Load]) -> list[list[Load]]:
    """Loads that follow directly on each other in one stream, nothing else using the stream between them."""
    runs: dict[Node, list[Load]] = {}
    for load in loads:
        run = runs.pop(load.x) if load.x in runs and load.x.users.keys() == {load.add} else []
        runs[load.add] = [*run, load]
    return list(runs.values())


def _lower_loads(graph: Graph, x: Node, run: Sequence[Load]) -> Node:
    """One op for a run that starts from ``x``."""
    last = run[-1].add
    gates, caches = [load.term.gate for load in run], [load.term.branch for load in run]
    with graph.inserting_before(last):
        if len(run) == 1:
            node = graph.call_function(ops.residual_load.default, (x, gates[0], caches[0]))
        else:
            node = graph.call_function(ops.residual_accumulate.default, (x, gates, caches))
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for load in reversed(run):
        graph.erase_node(load.add)
    return node
