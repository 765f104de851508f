"""Floating-point operations of a graph's nodes, from the shapes in their metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten

# PyTorch's own registry counts these attention ops as zero.
_SDPA_WITHOUT_FORMULA = tuple(
    getattr(aten, name)
    for name in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
)


def concrete(size: Any) -> int:
    """An int for a size that may be symbolic: the value that the graph was captured with.

    For a size that depends on data it is the largest it can be, or 1 where that is not known.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint
    if hint is None:
        bound = size.node.shape_env.bound_sympy(size.node.expr).upper
        return int(bound) if bound.is_Integer and bound < sys.maxsize - 1 else 1
    return int(hint)


def depends_on_data(value: torch.Tensor) -> bool:
    """Whether a size of the tensor is known only once the model has run so far (as after ``nonzero``)."""
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in value.shape)


def _shape_only(value: Any) -> Any:
    """The node's value with concrete sizes and no storage, so that formulas add no guards."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        return torch.empty([concrete(s) for s in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return concrete(value)
    return value


def node_flops(node: Node) -> int:
    """FLOPs of one call_function node; 0 for ops without a formula (pointwise work, opaque ops)."""
    if node.op != "call_function":
        return 0
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in _SDPA_WITHOUT_FORMULA:
        query, key, value = (_shape_only(arg) for arg in node.args[:3])
        return int(sdpa_flop_count(query.shape, key.shape, value.shape))
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    args, kwargs = tree_map(_shape_only, (tuple(node.args), dict(node.kwargs)))
    return int(formula(*args, **kwargs, out_val=tree_map(_shape_only, node.meta.get("val"))))


def count_flops(nodes: Graph | Iterable[Node]) -> int:
    """FLOPs of a graph or of some of its nodes; one multiply-add counts as two."""
    if isinstance(nodes, Graph):
        nodes = nodes.nodes
    return sum(node_flops(node) for node in nodes)
