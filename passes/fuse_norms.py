"""Take the norm behind a lowered residual add, and its modulation, into the same pass over memory.

Before::

    a = residual_store(x, gate, attn, cache)
    h = add(mul(getitem(native_layer_norm(a, [width], None, None, eps), 0), add(scale, 1)), shift)

After::

    a, h = residual_norm(x, gate, attn, cache, None, None, scale, shift, eps)

Behind a run of reused branches it is ``residual_accumulate_norm``, which does not write the stream where nothing else
reads it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node

from .. import kernels  # noqa: F401 - registers the ops
from ..kernels._norms import WIDEST
from ..kernels.operands import DTYPES
from .counting import count
from .facts import aten, packet, prims, tensor_value
from .rewriting import copy_graph, remove_dead_code, with_graph

log = logging.getLogger(__name__)
ops = torch.ops.smoothcache

#: Residual adds that have a form with the norm behind them.
ADDS = (ops.residual_store, ops.residual_load, ops.residual_accumulate)
#: The kernel applies them in this order.
OPERANDS = ("weight", "bias", "modulation", "shift")


@dataclass
class Norm:
    """``normed * weight + bias``, that times ``1 + modulation``, plus ``shift``, as nodes of a graph.

    Attributes:
        nodes: all that computes it, the result last.
    """

    nodes: list[Node]
    eps: float
    rms: bool
    operands: dict[str, Node] = field(default_factory=dict)

    @property
    def result(self) -> Node:
        return self.nodes[-1]


def fuse_norms(variant: GraphModule) -> GraphModule:
    """A copy of what ``fuse`` made, with the norms behind its adds taken in wherever ``can_fuse_norm``."""
    graph, _ = copy_graph(variant)
    fused = 0
    for out in [node for node in graph.nodes if packet(node) in ADDS]:
        order = {node: position for position, node in enumerate(graph.nodes)}
        norm = next((norm for norm in _norms(out) if can_fuse_norm(out, norm, order)), None)
        if norm is not None:
            _lower(graph, out, norm, order)
            fused += 1
    remove_dead_code(graph)
    count(norms_fused=fused)
    log.info("fused %d norms with the residual adds before them", fused)
    return with_graph(variant, graph)


def can_fuse_norm(out: Node, norm: Norm, order: dict[Node, int]) -> bool:
    """Whether the kernel gives this norm: it takes such rows and operands, and nothing else needs what it spares.

    It rounds once, where the graph may round after each step. All that uses ``out`` must come when the operands are
    known: a block's modulation may be computed after the add of the block before.
    """
    stream, result = tensor_value(out), tensor_value(norm.result)
    width = stream.shape[-1] if stream.dim() else 0
    if not isinstance(width, int) or not 1 <= width <= WIDEST or stream.dim() > 4:
        return False
    if (result.shape, result.dtype, result.stride()) != (stream.shape, stream.dtype, stream.stride()):
        return False
    if not all(_fits(tensor_value(operand), stream) for operand in norm.operands.values()):
        return False
    ready = _ready(out, norm, order)
    spared = set(norm.nodes)
    return all(order[user] > ready for user in out.users.keys() - spared) and all(
        node.users.keys() <= spared for node in norm.nodes[:-1]
    )


def _fits(operand: torch.Tensor | None, stream: torch.Tensor) -> bool:
    return (
        operand is not None
        and operand.dtype in DTYPES
        and operand.device == stream.device
        and operand.dim() <= stream.dim()
        and torch.broadcast_shapes(operand.shape, stream.shape) == stream.shape
    )


def _ready(out: Node, norm: Norm, order: dict[Node, int]) -> int:
    """The position from which on ``out`` and all operands are known."""
    return max(order[node] for node in (out, *norm.operands.values()))


def _norms(out: Node) -> Iterator[Norm]:
    for value in (out, *filter(_is_cast, out.users)):
        for user in value.users:
            norm = _layer_norm(user, value) or _rms_norm(user, out)
            if norm is not None:
                norm.nodes[:0] = [value] if value is not out and value not in norm.nodes else []
                _follow(norm, tensor_value(out).dtype)
                yield norm


def _layer_norm(node: Node, value: Node) -> Norm | None:
    if packet(node) is not aten.native_layer_norm or node.args[0] is not value or len(node.args[1]) != 1:
        return None
    if len(node.users) != 1:  # mean and standard deviation are wanted, too
        return None
    (first,) = node.users
    if first.target is not operator.getitem or first.args[1] != 0:
        return None
    operands = {name: given for name, given in zip(OPERANDS, node.args[2:4], strict=False) if given is not None}
    return Norm([node, first], node.args[4], rms=False, operands=operands)


def _rms_norm(node: Node, out: Node) -> Norm | None:
    """``value * rsqrt(mean(value ** 2) + eps)``, as PyTorch decomposes ``nn.RMSNorm`` and as it is written by hand."""
    if packet(node) is not aten.mul or node.kwargs:
        return None
    for value, factor in (node.args[:2], node.args[1::-1]):
        chain: list[Node] = []
        total = _argument(_strip(factor, chain), aten.rsqrt, chain)
        total = _strip(total, chain)
        if not isinstance(total, Node) or packet(total) is not aten.add or not isinstance(total.args[1], float):
            continue
        chain.append(total)
        mean = _strip(total.args[0], chain)
        square = _strip(_argument(mean, aten.mean, chain), chain)
        if square is None or not _over_rows(mean):
            continue
        base = _squared(square, chain)
        if base is not None and _strip(base, chain) is out and _strip(value, chain) is out:
            return Norm([*dict.fromkeys(reversed(chain)), node], total.args[1], rms=True)
    return None


def _squared(node: Node, chain: list[Node]) -> Node | None:
    if packet(node) is aten.pow and node.args[1] == 2:
        return _argument(node, aten.pow, chain)
    if packet(node) is aten.mul and node.args[0] is node.args[1]:
        return _argument(node, aten.mul, chain)
    return None


def _over_rows(mean: Node) -> bool:
    last = tensor_value(mean.args[0]).dim() - 1
    return len(mean.args) > 2 and list(mean.args[1]) in ([-1], [last]) and mean.args[2] is True


def _argument(node: object, kind: object, chain: list[Node]) -> Node | None:
    """The first argument of a node of this kind, which joins the chain."""
    if not isinstance(node, Node) or packet(node) is not kind:
        return None
    chain.append(node)
    return node.args[0]


def _strip(node: Node | None, chain: list[Node]) -> Node | None:
    """What a value is before it was cast; the casts join the chain."""
    while isinstance(node, Node) and _is_cast(node):
        chain.append(node)
        node = node.args[0]
    return node


def _is_cast(node: Node) -> bool:
    """Another floating-point dtype, and nothing else."""
    if packet(node) not in (aten._to_copy, prims.convert_element_type):
        return False
    value, given = tensor_value(node), tensor_value(node.args[0])
    same = (value.device, value.layout, value.stride()) == (given.device, given.layout, given.stride())
    return same and value.dtype in DTYPES and given.dtype in DTYPES


def _follow(norm: Norm, dtype: torch.dtype) -> None:
    """Take in what is multiplied and added behind the norm, as far as the kernel can and ends in the dtype."""
    nodes, operands, value = list(norm.nodes), dict(norm.operands), norm.result
    while len(value.users) == 1:
        (value,) = value.users
        if not _is_cast(value):
            taken = _operand(value, nodes[-1])
            name = None if taken is None else _place(taken[0], operands)
            if name is None:
                return
            operands[name] = taken[1]
        nodes.append(value)
        if tensor_value(value).dtype == dtype:
            norm.nodes, norm.operands = list(nodes), dict(operands)


def _operand(node: Node, value: Node) -> tuple[tuple[str, ...], Node] | None:
    """Which operands a product or sum with ``value`` may stand for, and the other factor or summand."""
    if node.kwargs or packet(node) not in (aten.mul, aten.add) or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is value else node.args[0]
    if not isinstance(other, Node) or other is value:
        return None
    if packet(node) is aten.add:
        return ("bias", "shift"), other
    if packet(other) is aten.add and not other.kwargs and other.args[1] == 1 and isinstance(other.args[0], Node):
        return ("modulation",), other.args[0]
    return ("weight",), other


def _place(names: tuple[str, ...], operands: dict[str, Node]) -> str | None:
    """The first of the names that comes after all that is taken."""
    last = max((OPERANDS.index(name) for name in operands), default=-1)
    return next((name for name in names if OPERANDS.index(name) > last), None)


def _lower(graph: Graph, out: Node, norm: Norm, order: dict[Node, int]) -> None:
    keep = not out.users.keys() <= set(norm.nodes)
    with graph.inserting_after(list(order)[_ready(out, norm, order)]):
        both = graph.call_function(*_call(out, norm, keep))
    stream = tensor_value(out)
    both.meta = {"val": (stream if keep else stream.new_empty(0), norm.result.meta["val"])}
    for index, node in ((1, norm.result), (0, out)):
        with graph.inserting_after(both):
            value = graph.call_function(operator.getitem, (both, index))
        value.meta = {**node.meta, "val": both.meta["val"][index]}
        node.replace_all_uses_with(value)
    for node in (*sorted(norm.nodes, key=order.__getitem__, reverse=True), out):
        graph.erase_node(node)


def _call(out: Node, norm: Norm, keep: bool) -> tuple[Callable[..., object], tuple[object, ...]]:
    """The op for an add and the norm behind it, and its arguments."""
    behind = *(norm.operands.get(name) for name in OPERANDS), norm.eps, norm.rms
    if packet(out) is ops.residual_accumulate:
        run = out.args if len(out.args) == 4 else (*out.args, None)
        return ops.residual_accumulate_norm.default, (*run, *behind, keep)
    add = out.args if packet(out) is ops.residual_store else (*out.args, None)
    return ops.residual_norm.default, (*add, *behind)
