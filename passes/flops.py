"""Floating-point operations of a graph's nodes, from the shapes in their metadata."""

from __future__ import annotations

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
    """An int for a size that may be symbolic: the value that the graph was captured with."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        if hint is None:
            raise ValueError(f"the size {size} depends on data, so it has no value before the model runs")
        return int(hint)
    return int(size)


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
