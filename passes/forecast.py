"""What a reused branch reads where a schedule has an order: the polynomial through its last computed outputs.

An output's caches hold its last computed values. They are a ring: a store overwrites the oldest, by the buffer that
it is given, and nothing moves. So the coefficients, an input of each step, say which cache is how old: they are the
polynomial's at that step. In the graph of a variant::

    coefficient_0 = select(coefficients, 0, 0);  coefficient_1 = select(coefficients, 0, 1)
    branch = to(add(mul(to(cache_0, float32), coefficient_0), mul(to(cache_1, float32), coefficient_1)), bfloat16)

The sum is in float32 (float64 for float64 caches), and rounded once.

Where all caches but the first have a narrower dtype, the first always holds the newest value, and the others are a
ring of differences: of the newest value and the one before it, and of that and the one before. The same sum with other
coefficients is then the same polynomial (``schedules/coefficients.py``), and rounding a difference costs less than
rounding an output. A store is::

    clamp = clamp_max(clamp_min(sub(branch, cache_0), -65504), 65504)
    copy_(cache_1, clamp);  copy_(cache_0, branch)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from .facts import aten, packet
from .rewriting import emit

#: The cast that Inductor takes in a variant: it has taken ``aten._to_copy`` apart before.
CAST = torch.ops.prims.convert_element_type.default

#: Key in the metadata of the nodes that make a forecast, and its value on the last of them.
FORECAST = "smoothcache_forecast"
WHOLE = "whole"


def forecast(values: Sequence[torch.Tensor], coefficients: torch.Tensor) -> torch.Tensor:
    """``sum_i coefficients[i] * values[i]``: the reference.

    Args:
        values: tensors of one shape; the first one's dtype is the result's.
        coefficients: float32 [at least as many].
    """
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * coefficients[0]
    for value, coefficient in zip(values[1:], coefficients[1:], strict=False):
        total = total + value.to(wide) * coefficient
    return total.to(values[0].dtype)


def difference(value: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value - before``, in the dtype of a history of differences: the reference.

    What lies beyond the dtype's range becomes its largest number. The first output of a trajectory stands against
    zeros: its difference has a weight of 0, but an infinity times 0 would be NaN.

    Args:
        value: any shape; float32 or float64.
        before: of the same shape and dtype.
        dtype: float16 or bfloat16.
    """
    largest = torch.finfo(dtype).max
    return (value - before).clamp(-largest, largest).to(dtype)


def emit_difference(graph: Graph, value: Node, before: Node, dtype: torch.dtype) -> Node:
    """Nodes that compute ``difference`` but for its last rounding, which the copy into a cache does."""
    largest = torch.finfo(dtype).max
    node = _part(graph, aten.sub.Tensor, value, before)
    # Inductor has taken ``clamp`` apart before it is given a variant, and knows the two halves only.
    return _part(graph, aten.clamp_max.default, _part(graph, aten.clamp_min.default, node, -largest), largest)


def holds_differences(first: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all caches but the first hold differences: they then have a narrower dtype."""
    return other.dtype != first.dtype


def emit_forecast(graph: Graph, values: Sequence[Node], coefficients: Node) -> Node:
    """Nodes that compute ``forecast``, at the graph's insertion point; returns the last."""
    dtype = values[0].meta["val"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = None
    for index, value in enumerate(values):
        coefficient = _part(graph, aten.select.int, coefficients, 0, index)
        term = _part(graph, aten.mul.Tensor, _cast(graph, value, wide), coefficient)
        total = term if total is None else _part(graph, aten.add.Tensor, total, term)
    result = _cast(graph, total, dtype)
    result.meta[FORECAST] = WHOLE
    return result


def read_forecast(node: Node) -> tuple[list[Node], Node] | None:
    """The values and the coefficients of what ``emit_forecast`` returned; None for any other node."""
    if node.meta.get(FORECAST) != WHOLE:
        return None
    values: list[Node] = []
    node = _uncast(node)
    while packet(node) is aten.add:
        values.append(node.args[1])
        node = node.args[0]
    terms = [node, *reversed(values)]
    return [_uncast(term.args[0]) for term in terms], terms[0].args[1].args[0]


def _part(graph: Graph, target: torch._ops.OpOverload, *args: object) -> Node:
    node = emit(graph, target, *args)
    node.meta[FORECAST] = "part"
    return node


def _cast(graph: Graph, value: Node, dtype: torch.dtype) -> Node:
    fake = value.meta["val"]
    if fake.dtype == dtype:
        return value
    return _part(graph, CAST, value, dtype)


def _uncast(node: Node) -> Node:
    return node.args[0] if node.target is CAST else node
