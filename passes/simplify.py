"""Remove what does nothing, so that the rules which look for branches and runs of them see only what counts.

Before, as diffusers' attention ends with ``/ rescale_output_factor``::

    attn = div(addmm(bias, heads, weight), 1.0)
    dropped = clone(attn)                          # dropout that is off
    out = add(x, mul(gate, dropped))

After::

    attn = addmm(bias, heads, weight)
    out = add(x, mul(gate, attn))

Every value that is left has the dtype, shape and strides that it had, and the same bits but for one case: ``x + 0.0``
turns a negative zero into a positive one, and is removed where nothing that reads it can tell the two apart. What the
graph returns stays as it is: an output with its own memory must not become an alias. A copy is removed
only where no input that the graph writes to lies beneath it.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable

from torch.fx import GraphModule, Node

from .counting import count
from .facts import VIEWS_AND_CASTS, aten, is_opaque, is_view_or_cast, packet, prims, same_sizes, tensor_value
from .rewriting import copy_graph, remove_dead_code, with_graph

log = logging.getLogger(__name__)


def simplify(gm: GraphModule) -> GraphModule:
    """A copy of a functional ATen graph without the calls that ``can_remove`` says do nothing; ``gm`` if none does."""
    graph, _ = copy_graph(gm)
    returned = set(graph.output_node().all_input_nodes)
    written = {_base(node.args[0]) for node in graph.nodes if packet(node) is aten.copy_}
    removed = 0
    for node in list(graph.nodes):
        source = can_remove(node)
        if source is None or node in returned or _base(source) in written:
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        removed += 1
    if not removed:
        return gm
    remove_dead_code(graph)
    count(calls_removed=removed)
    log.info("removed %d calls that do nothing", removed)
    return with_graph(gm, graph)


def _base(node: Node) -> Node:
    """What a value is a view of, or a copy that may go: as far back as memory could be shared."""
    while node.op == "call_function" and (packet(node) in VIEWS_AND_CASTS or packet(node) in RULES):
        inputs = node.all_input_nodes
        if not inputs:
            break
        node = inputs[0]
    return node


def can_remove(node: Node) -> Node | None:
    """The argument that a call returns as it is, value by value, or None."""
    if node.target is operator.getitem and node.args[1] == 0 and packet(node.args[0]) is aten.native_dropout:
        dropout = node.args[0]
        return dropout.args[0] if _drops_nothing(dropout, node) and _same_metadata(node, dropout.args[0]) else None
    if packet(node) is aten.cat:
        source = _whole_of_pieces(node)
        return source if source is not None and _same_metadata(node, source) else None
    rule = RULES.get(packet(node)) if node.op == "call_function" else None
    if rule is None:
        return None
    source = node.args[0]
    if packet(node) in COMMUTATIVE and not isinstance(source, Node):
        source = node.args[1]
    if not isinstance(source, Node) or not _same_metadata(node, source):
        return None
    return source if rule(node, source) else None


def _same_metadata(node: Node, source: Node) -> bool:
    before, after = tensor_value(source), tensor_value(node)
    return (
        before is not None
        and after is not None
        and (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
        and same_sizes(before.shape, after.shape)
        and same_sizes(before.stride(), after.stride())
    )


def _scalar(node: Node, source: Node) -> float | None:
    """The number beside the tensor, or None."""
    others = [arg for arg in node.args[:2] if arg is not source]
    number = others[0] if len(others) == 1 else None
    plain = isinstance(number, (int, float)) and not isinstance(number, bool)
    return float(number) if plain and node.kwargs.get("alpha", 1) == 1 and "rounding_mode" not in node.kwargs else None


def _is_one(node: Node, source: Node) -> bool:
    return _scalar(node, source) == 1.0


def _adds_nothing(node: Node, source: Node) -> bool:
    number = _scalar(node, source)
    return number == 0.0 and (math.copysign(1.0, number) < 0 or not _sign_of_zero_matters(node, source))


def _subtracts_nothing(node: Node, source: Node) -> bool:
    number = _scalar(node, source)
    if number != 0.0 or node.args[0] is not source:
        return False
    return math.copysign(1.0, number) > 0 or not _sign_of_zero_matters(node, source)


def _sign_of_zero_matters(node: Node, source: Node) -> bool:
    """Whether something that reads the sum makes another number of ``-0.0`` than of ``0.0``."""
    if not source.meta["val"].is_floating_point():
        return False
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_view_or_cast(user):
            pending += user.users
        elif packet(user) in SEES_SIGN_OF_ZERO or is_opaque(user) or user.op == "output":
            return True
    return False


def _drops_nothing(node: Node, source: Node) -> bool:
    probability, train = (*node.args, None, None)[1:3]
    return probability == 0.0 or train is False


def _always(node: Node, source: Node) -> bool:
    """What the result looks like says it all: a cast to its dtype, a view of its shape and strides."""
    return True


def _keeps_order(node: Node, source: Node) -> bool:
    """A permutation can leave sizes and strides alone where sizes are equal, and still move values: not this one."""
    dims = source.meta["val"].dim()
    if packet(node) is aten.t:
        return dims < 2
    if packet(node) is aten.transpose:
        first, second = (dim % dims if dims else 0 for dim in node.args[1:3])
        return first == second
    return [dim % dims for dim in node.args[1]] == list(range(dims))


def _takes_all(node: Node, source: Node) -> bool:
    """A slice as long as its source starts where that does."""
    return len(node.args) < 5 or node.args[4] == 1


def _whole_of_pieces(node: Node) -> Node | None:
    """The tensor of which a cat puts all pieces together again, as they lay."""
    pieces, dim = node.args[0], (*node.args, 0)[1]
    whole, end = None, 0
    for piece in pieces:
        found = _piece(piece)
        if found is None or (whole is not None and found[0] is not whole):
            return None
        whole, own_dim, start, stop = found
        dims = tensor_value(whole).dim()
        if own_dim % dims != dim % dims or start != end:
            return None
        end = stop
    size = None if whole is None else tensor_value(whole).shape[dim]
    return whole if isinstance(size, int) and end == size else None


def _piece(node: object) -> tuple[Node, int, int, int] | None:
    """What a node is a piece of, along which dimension, from where to where; or None."""
    if not isinstance(node, Node):
        return None
    if packet(node) is aten.slice and not node.kwargs and (*node.args, 1)[4:5] in ((), (1,)):
        dim = (*node.args, 0)[1] if len(node.args) > 1 else 0
        start, stop = [*node.args[2:4], *(0, None)[len(node.args[2:4]) :]]
        size = tensor_value(node.args[0]).shape[dim]
        bounds = [0 if start is None else start, size if stop is None else stop]
        if not all(type(bound) is int for bound in (*bounds, size)):
            return None
        begin, end = (min(max(bound + size if bound < 0 else bound, 0), size) for bound in bounds)
        return node.args[0], dim, begin, end
    if node.target is operator.getitem and packet(node.args[0]) in (aten.split, aten.split_with_sizes):
        split, index = node.args
        dim = (*split.args, *((0,) if len(split.args) < 3 else ()))[2]
        sizes = [value.shape[dim] for value in split.meta["val"]]
        if split.kwargs or not all(type(size) is int for size in sizes):
            return None
        return split.args[0], dim, sum(sizes[:index]), sum(sizes[: index + 1])
    return None


Rule = Callable[[Node, Node], bool]
COMMUTATIVE = frozenset((aten.add, aten.mul, prims.mul))
SEES_SIGN_OF_ZERO = frozenset(
    (aten.div, prims.div, aten.reciprocal, aten.rsqrt, aten.pow, aten.atan2, aten.copysign, aten.signbit)
)
RULES: dict[object, Rule] = {
    aten.mul: _is_one,
    aten.div: lambda node, source: node.args[0] is source and _is_one(node, source),
    aten.add: _adds_nothing,
    aten.sub: _subtracts_nothing,
    aten.dropout: _drops_nothing,
    **dict.fromkeys((aten.clone, aten._to_copy, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh), _always),
    **dict.fromkeys((aten.to, prims.convert_element_type), _always),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten.expand), _always),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), _keeps_order),
    aten.slice: _takes_all,
}
