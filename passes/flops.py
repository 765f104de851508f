"""Floating-point operations of a graph's nodes, from the shapes in their metadata."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from .names import WEIGHT

aten = torch.ops.aten

# Fused attention. PyTorch's own registry counts some of these as zero, and torch 2.11's formula for the others refuses
# keys and values that have fewer heads than the queries.
SDPA = tuple(
    getattr(aten, name)
    for name in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
)

#: Products that PyTorch's registry lacks: each element of the output is a dot product along the input's last dimension.
#: A grouped product of experts has for each row one expert's weight, so that this holds for it, too.
PRODUCTS_WITHOUT_FORMULA = tuple(
    getattr(aten, name)
    for name in (
        "linear",
        "_int_mm",
        "_weight_int8pack_mm",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
        "_dyn_quant_matmul_4bit",
        "_grouped_mm",
        "_scaled_grouped_mm",
    )
    if hasattr(aten, name)
)


def sdpa_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """FLOPs of attention between tensors of these shapes, ``[..., heads, tokens, width]``.

    Each of the queries' heads meets one of the keys', however few the keys have.
    """
    *outer, queries, width = query
    return 2 * math.prod(outer) * queries * key[-2] * (width + value[-1])


def is_flex_attention(node: Node) -> bool:
    """Whether the op is ``flex_attention``: torch 2.11 has no formula for it, later versions one for its dense form."""
    return getattr(node.target, "__name__", None) == "flex_attention"


def concrete(size: Any, estimates: Mapping[Any, int] | None = None) -> int:
    """An int for a size that may be symbolic: the value that the graph was captured with.

    A size that depends on data is estimated: each symbol of it as ``estimates`` says, or else as large as it can be,
    or as 1 where that is not known.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is not None:
        return int(size.node.hint)
    values = dict(estimates or {})
    for symbol in size.node.expr.free_symbols - set(values):
        bound = size.node.shape_env.bound_sympy(symbol).upper
        values[symbol] = int(bound) if bound.is_Integer and bound < sys.maxsize - 1 else 1
    return int(size.node.expr.xreplace(values))


def is_custom(packet: Any) -> bool:
    """Whether the packet of an op is a custom op's, which PyTorch cannot see into."""
    namespace = getattr(packet, "_qualified_op_name", "").partition("::")[0]
    return namespace not in ("", "aten", "prims", "prim")


def custom_product_flops(activation: torch.Tensor, weights: Sequence[torch.Tensor], output: Any) -> int:
    """FLOPs of a custom op if it is a linear layer's, as those of quantized models are; else 0.

    It is if each row of the activation becomes one of the output, and a weight has a bit or more for each pair of their
    columns. A norm's weight has too few.
    """
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    if not isinstance(output, torch.Tensor) or not activation.ndim or not output.ndim:
        return 0
    if activation.shape[:-1] != output.shape[:-1]:
        return 0
    inner, columns = activation.shape[-1], output.shape[-1]
    for weight in weights:
        if weight.numel() > max(inner, columns) and 8 * weight.numel() * weight.element_size() >= inner * columns:
            return 2 * output.numel() * inner
    return 0


def estimate_sizes(graph: Graph) -> dict[Any, int]:
    """Estimates of data-dependent sizes: the parts of a split, as of tokens to experts, share what is split."""
    estimates = {}
    for node in graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        whole, parts = node.args[:2]
        dim = node.args[2] if len(node.args) > 2 else 0
        sizes = [part.meta.get("val") if isinstance(part, Node) else part for part in parts]
        unknown = [size for size in sizes if isinstance(size, torch.SymInt) and size.node.hint is None]
        known = sum(concrete(size) for size in sizes if not any(size is other for other in unknown))
        for size in unknown:
            share = (concrete(whole.meta["val"].shape[dim]) - known) // len(unknown)
            estimates[size.node.expr] = max(1, share)
    return estimates


def depends_on_data(value: torch.Tensor) -> bool:
    """Whether a size of the tensor is known only once the model has run so far (as after ``nonzero``)."""
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in value.shape)


def _shape_only(value: Any, estimates: Mapping[Any, int]) -> Any:
    """The node's value with concrete sizes and no storage, so that formulas add no guards."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        sizes = [concrete(size, estimates) for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return concrete(value, estimates)
    return value


def node_flops(node: Node, estimates: Mapping[Any, int]) -> int:
    """FLOPs of one call_function node; 0 for ops without a formula (pointwise work, opaque ops).

    ``flex_attention`` counts as if each query saw all keys, whatever its mask leaves out.
    """
    if node.op != "call_function":
        return 0
    packet = getattr(node.target, "overloadpacket", node.target)
    shape_only = functools.partial(_shape_only, estimates=estimates)
    if packet in SDPA or is_flex_attention(node):
        return sdpa_flops(*(shape_only(arg).shape for arg in node.args[:3]))
    if packet in PRODUCTS_WITHOUT_FORMULA:
        left, out = shape_only(node.args[0]), shape_only(node)
        return 2 * out.numel() * left.shape[-1]
    formula = flop_registry.get(packet)
    if formula is None:
        if not is_custom(packet):
            return 0
        values = [(arg, shape_only(arg)) for arg in node.all_input_nodes]
        weights = [value for arg, value in values if WEIGHT in arg.meta and isinstance(value, torch.Tensor)]
        others = [value for arg, value in values if WEIGHT not in arg.meta and isinstance(value, torch.Tensor)]
        output = tree_map(shape_only, node.meta.get("val"))
        return custom_product_flops(others[0], weights, output) if others and weights else 0
    args, kwargs = tree_map(shape_only, (tuple(node.args), dict(node.kwargs)))
    return int(formula(*args, **kwargs, out_val=tree_map(shape_only, node.meta.get("val"))))


def count_flops(nodes: Graph | Collection[Node]) -> int:
    """FLOPs of a graph or of some of its nodes; one multiply-add counts as two."""
    if isinstance(nodes, Graph):
        nodes = nodes.nodes
    if not nodes:
        return 0
    estimates = estimate_sizes(next(iter(nodes)).graph)
    return sum(node_flops(node, estimates) for node in nodes)
