"""Lower residual adds to kernels that add and store, or load and add, in one pass over memory.

Before, where site 0 is computed and sites 1 and 2 are reused::

    gated = mul(gate_0, attn);  copy_ = copy_(cache_0, attn);  a = add(x, gated)
    b = add(a, mul(gate_1, cache_1))
    c = add(b, cache_2)

After::

    a = residual_store(x, gate_0, attn, cache_0)
    c = residual_accumulate(a, [gate_1, None], [cache_1, cache_2])

Reused branches that follow on each other in one stream are a run, forecasts (``passes/forecast.py``) among them, and
become one op. A forecast that stands alone becomes ``residual_forecast(x, gate, caches, coefficients)``. Between two
adds of a run the stream may be cast to another dtype and back, as where sums are in float32: the op keeps it so.

Which of these pays is said in ``passes/lowering.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from .. import kernels  # noqa: F401 - registers the ops
from ..kernels.operands import DTYPES
from .counting import count
from .facts import aten, is_product, packet, prims, same_sizes, tensor_value
from .flops import concrete
from .forecast import CAST, FORECAST, read_forecast
from .guard import CACHE
from .lowering import Lowering
from .rewriting import copy_graph, emit, remove_dead_code, with_graph
from .sums import addends

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
    """One residual add of a reused branch: ``add = x + gate * branch``, whose value is a cache or a forecast."""

    add: Node
    x: Node
    term: Term


def fuse(variant: GraphModule, lowering: Lowering) -> GraphModule:
    """A copy of a variant with its residual adds lowered, wherever the kernels give the same sum."""
    graph, _ = copy_graph(variant)
    loads: list[Load] = []
    counts = dict.fromkeys(("stored", "loaded", "forecast", "accumulated"), 0)
    for node in [node for node in graph.nodes if FORECAST not in node.meta]:
        for x, term in _sums(node):
            if _is_read(term.value):
                if can_join(node, x, term):
                    loads.append(Load(node, x, term))
                    break
            elif lowering.singles and (copy := _store_of(term.value)) is not None and can_fuse(node, x, term):
                _lower_store(graph, node, x, term, copy)
                counts["stored"] += 1
                break
    for run in _runs(loads):
        if len(run) > 1 and lowering.runs:
            _lower_run(graph, run)
            counts["accumulated"] += len(run)
        elif lowering.singles:
            for load in run:
                if can_fuse(load.add, load.x, load.term):
                    forecast = read_forecast(load.term.value) is not None
                    counts["forecast" if forecast else "loaded"] += 1
                    (_lower_forecast if forecast else _lower_load)(graph, load)
    remove_dead_code(graph)
    count(**{f"branches_{what}": number for what, number in counts.items()})
    log.info("fused residual adds: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    return with_graph(variant, graph)


def can_join(add: Node, x: Node, term: Term) -> bool:
    """Whether a reused branch's add may be part of a run: floating-point numbers of one shape, without gaps."""
    out, stream, branch = (tensor_value(node) for node in (add, x, term.branch))
    gate = None if term.gate is None else tensor_value(term.gate)
    if any(value.dtype not in DTYPES or value.device != out.device for value in (out, stream, branch)):
        return False
    if not (same_sizes(out.shape, stream.shape) and same_sizes(out.shape, branch.shape)):
        return False
    if gate is not None and (
        gate.dtype not in DTYPES
        or gate.device != out.device
        or torch.broadcast_shapes(gate.shape, out.shape) != out.shape
    ):
        return False
    return all(_is_dense(value) for value in (out, branch))


def can_fuse(add: Node, x: Node, term: Term) -> bool:
    """Whether a kernel gives this sum as it stands: dtypes that it takes, and its output like ``x``.

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
    """Follow views, which only this branch uses, back to a cache, a forecast or what is stored in a cache.

    A cast to float32 on the way changes no number, and the kernels make it themselves.
    """
    value, views, casts = branch, [], 0
    while not _is_read(value) and _store_of(value) is None:
        if _widens(value):
            casts += 1
        elif packet(value) in VIEWS:
            views.append(value)
        else:
            break
        value = value.args[0]
    found = tuple(reversed(views))
    if casts and (_is_read(value) or _store_of(value) is not None):
        with branch.graph.inserting_before(branch):
            branch = _again(branch.graph, found, value)
    return Term(gate, branch, value, found)


def _is_read(value: Node) -> bool:
    return CACHE in value.meta or read_forecast(value) is not None


def _is_cast(node: Node) -> bool:
    """Whether a node is a tensor in another floating-point dtype, and nothing else changes."""
    if node.op != "call_function" or packet(node) not in (aten._to_copy, prims.convert_element_type):
        return False
    before, after = tensor_value(node.args[0]), tensor_value(node)
    return (
        {before.dtype, after.dtype} <= set(DTYPES)
        and before.device == after.device
        and same_sizes(before.stride(), after.stride())
    )


def _widens(node: Node) -> bool:
    return _is_cast(node) and tensor_value(node).dtype == torch.float32


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


def _lower_load(graph: Graph, load: Load) -> None:
    with graph.inserting_before(load.add):
        arguments = load.x, load.term.gate, load.term.branch
        _replace(graph, load.add, graph.call_function(ops.residual_load.default, arguments))


def _lower_forecast(graph: Graph, load: Load) -> None:
    with graph.inserting_before(load.add):
        values, coefficients = _values(graph, load.term)
        arguments = load.x, load.term.gate, values, coefficients
        _replace(graph, load.add, graph.call_function(ops.residual_forecast.default, arguments))


def _replace(graph: Graph, add: Node, node: Node) -> None:
    node.meta = dict(add.meta)
    add.replace_all_uses_with(node)
    graph.erase_node(add)


def _values(graph: Graph, term: Term) -> tuple[list[Node], Node | None]:
    """What a branch is read from, each as the branch is looked at, and the coefficients of a forecast."""
    found = read_forecast(term.value)
    if found is None:
        return [term.branch], None
    values, coefficients = found
    if len(values) < len(tensor_value(coefficients)):
        coefficients = emit(graph, aten.slice.Tensor, coefficients, 0, 0, len(values))
    return [_again(graph, term.views, value) for value in values], coefficients


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
        before, user = load.x, load.add
        while before not in runs and _is_cast(before) and before.users.keys() == {user}:
            before, user = before.args[0], before
        run = runs.pop(before) if before in runs and before.users.keys() == {user} else []
        runs[load.add] = [*run, load]
    return list(runs.values())


def _lower_run(graph: Graph, run: Sequence[Load]) -> None:
    """One op for a run, in its values' layout and in the dtype of the stream around it."""
    first, last = run[0].x, run[-1].add
    like = tensor_value(run[0].term.branch)
    replaced = last
    if _widens(first) and len(last.users) == 1:
        # The stream is in float32 for the sums alone: the op takes it as it is, and rounds as the cast behind does.
        (user,) = last.users
        if _is_cast(user) and tensor_value(user).dtype == tensor_value(first.args[0]).dtype:
            first, replaced = first.args[0], user
    wide = torch.promote_types(tensor_value(first).dtype, tensor_value(replaced).dtype)
    with graph.inserting_before(replaced):
        x = in_layout(graph, _cast(graph, first, wide), like)
        gates, values, coefficients = [load.term.gate for load in run], [], []
        for load in run:
            own, coefficient = _values(graph, load.term)
            values += own
            coefficients.append(coefficient)
        arguments = (x, gates, values) if not any(coefficients) else (x, gates, values, coefficients)
        node = graph.call_function(ops.residual_accumulate.default, arguments)
        value = tensor_value(x)
        with value.fake_mode:
            node.meta = {**last.meta, "val": torch.empty_like(value)}
        node = in_layout(graph, _cast(graph, node, tensor_value(replaced).dtype), tensor_value(replaced))
    replaced.replace_all_uses_with(node)


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    return node if tensor_value(node).dtype == dtype else emit(graph, CAST, node, dtype)


def in_layout(graph: Graph, node: Node, like: torch.Tensor) -> Node:
    """The node's values with their dimensions in memory in another tensor's order; itself where they are already.

    The copy is pointwise: compilers that fuse make it part of what computes the values, or of what reads them.
    """
    value = tensor_value(node)
    if _same_layout(value, like):
        return node
    order = sorted(range(like.dim()), key=lambda dim: (-concrete(like.stride(dim)), dim))
    back = [order.index(dim) for dim in range(like.dim())]
    in_order = order == list(range(like.dim()))
    node = node if in_order else emit(graph, aten.permute.default, node, order)
    node = emit(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
    return node if in_order else emit(graph, aten.permute.default, node, back)


def _same_layout(left: torch.Tensor, right: torch.Tensor) -> bool:
    pairs = zip(left.stride(), right.stride(), left.shape, strict=True)
    return all(same_sizes((a,), (b,)) or same_sizes((size,), (1,)) for a, b, size in pairs)


def _is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(
        (concrete(stride), concrete(size)) for stride, size in zip(value.stride(), value.shape, strict=True)
    ):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
