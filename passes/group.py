"""Do the linears that make gates at once, all of one level and shape, and the pointwise work between levels with them.

Before, where all branches are reused and each block makes its gates from the timestep::

    a_0 = silu(addmm(bias_0, t, permute(weight_0)));  a_1 = silu(addmm(bias_1, t, permute(weight_1)));  ...
    gate_0 = addmm(bias_10, a_0, permute(weight_10));  gate_1 = addmm(bias_11, a_1, permute(weight_11));  ...

After::

    a = silu(grouped_linear([t, t, ...], [weight_0, weight_1, ...], [bias_0, bias_1, ...]))
    gates = grouped_linear([select(a, 0, 0), select(a, 0, 1), ...], [weight_10, ...], [bias_10, ...])
    gate_0 = select(gates, 0, 0);  gate_1 = select(gates, 0, 1);  ...

A linear's level is the number of linears on the longest way to it. Those of one level do not descend from each other,
and every way from one group to another goes to a higher level: so no two groups wait for each other, and each can stand
where its first member stood, once all that its members need has been moved before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from .. import kernels  # noqa: F401 - registers the ops
from ..kernels.operands import DTYPES
from .counting import count
from .facts import aten, packet, prims, tensor_value
from .guard import CACHE
from .names import WEIGHT
from .rewriting import copy_graph, emit, remove_dead_code, with_graph

log = logging.getLogger(__name__)

#: Rows above this are tokens, and their products are held up by arithmetic, not by reading weights.
MOST_ROWS = 128
#: A group replaces as many launches by two.
LEAST_MEMBERS = 3
#: Pointwise ops that do to each member of a stack what they do to one.
POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        *("add", "sub", "mul", "div", "neg", "exp", "silu", "gelu", "sigmoid", "tanh", "relu", "reciprocal", "rsqrt"),
        *("_to_copy", "clamp", "clamp_min", "clamp_max", "erf", "pow"),
    )
) | {prims.convert_element_type}


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias`` as a node: ``node = addmm(bias, x, t(weight))`` or ``mm(x, t(weight))``."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What members of a group have in common."""
        x, weight = tensor_value(self.x), tensor_value(self.weight)
        return x.dtype, x.device, *map(tuple, (x.shape, x.stride(), weight.shape, weight.stride())), self.bias is None


def group_linears(variant: GraphModule) -> GraphModule:
    """A copy of a variant with small linears grouped wherever ``can_group`` and ``should_group``.

    For variants that reuse something: with everything computed the conditioning is a small part of the work.
    """
    graph, _ = copy_graph(variant)
    found, fixed = _groups(graph)
    groups = [group for group in found if should_group(group)]
    for group in groups:
        # What they read may have become part of a stack by now.
        members = [can_group(linear.node) for linear in group]
        _Batch(graph, _rewrite(graph, members), fixed).run()
    remove_dead_code(graph)
    count(linears_grouped=sum(map(len, groups)))
    log.info("grouped %d linears in %d launches", sum(map(len, groups)), len(groups))
    return with_graph(variant, graph) if groups else variant


def can_group(node: Node) -> Linear | None:
    """The linear that a node is, if its weight is read as it lies and it has few rows of fixed number."""
    if packet(node) is aten.addmm and not node.kwargs:
        bias, x, transposed = node.args
        if not _is_weight(bias) or tensor_value(bias).ndim != 1:
            return None
    elif packet(node) is aten.mm:
        bias, (x, transposed) = None, node.args
    else:
        return None
    if packet(transposed) not in (aten.t, aten.permute) or not _is_weight(transposed.args[0]):
        return None
    weight = transposed.args[0]
    sizes = (*tensor_value(x).shape, *tensor_value(x).stride(), *tensor_value(weight).shape)
    if tensor_value(weight).ndim != 2 or not all(isinstance(size, int) for size in sizes):
        return None
    values = [tensor_value(one) for one in (x, weight, bias) if one is not None]
    if tensor_value(x).dtype not in DTYPES or len({(value.dtype, value.device) for value in values}) > 1:
        return None
    if not 1 <= tensor_value(x).shape[0] <= MOST_ROWS:
        return None
    return Linear(node, x, weight, bias)


def should_group(group: Sequence[Linear]) -> bool:
    """Whether one launch for all members pays for the table of addresses that it takes."""
    return len(group) >= LEAST_MEMBERS


def _is_weight(node: object) -> bool:
    """A parameter, or a slice of its rows."""
    if isinstance(node, Node) and packet(node) is aten.slice and (node.args[1] if len(node.args) > 1 else 0) == 0:
        node = node.args[0]
    return isinstance(node, Node) and node.op == "placeholder" and WEIGHT in node.meta


def _groups(graph: Graph) -> tuple[list[list[Linear]], set[Node]]:
    """Linears by level and shape, lower levels first, and what must not move: no linear of these depends on that."""
    level: dict[Node, int] = {}
    fixed: set[Node] = set()
    groups: dict[tuple[int, Any], list[Linear]] = {}
    for node in graph.nodes:
        level[node] = max((level[parent] for parent in node.all_input_nodes), default=0)
        if _must_stay(node) or not fixed.isdisjoint(node.all_input_nodes):
            fixed.add(node)
        elif (linear := can_group(node)) is not None:
            level[node] += 1
            groups.setdefault((level[node], linear.shape), []).append(linear)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])], fixed


def _must_stay(node: Node) -> bool:
    """Whether the node reads or writes what others write, or draws random numbers: its place counts."""
    if CACHE in node.meta:
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op not in ("placeholder", "get_attr") and node.is_impure()
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _rewrite(graph: Graph, group: Sequence[Linear]) -> Node:
    """Put the grouped op where the first member stood; returns it."""
    anchor = group[0].node
    operands = [[linear.x for linear in group], [linear.weight for linear in group], [linear.bias for linear in group]]
    _hoist(graph, [node for nodes in operands for node in nodes if node is not None], anchor)
    with graph.inserting_before(anchor):
        node = emit(graph, torch.ops.smoothcache.grouped_linear.default, *operands)
    _replace_lanes(graph, node, [linear.node for linear in group])
    return node


def _replace_lanes(graph: Graph, stacked: Node, lanes: Sequence[Node]) -> None:
    """Let each lane be a part of the stack."""
    with graph.inserting_after(stacked):
        selects = [emit(graph, aten.select.int, stacked, 0, index) for index in reversed(range(len(lanes)))][::-1]
    for lane, select in zip(lanes, selects, strict=True):
        select.meta = {**lane.meta, **select.meta}
        lane.replace_all_uses_with(select)
        graph.erase_node(lane)


def _hoist(graph: Graph, nodes: Sequence[Node], anchor: Node) -> None:
    """Move the nodes, and all that they are computed from, before the anchor where they are behind it."""
    needed, pending = set(), list(nodes)
    while pending:
        node = pending.pop()
        if node not in needed and node.op != "placeholder":
            needed.add(node)
            pending += node.all_input_nodes
    after, node = [], anchor
    while needed and node.op != "output":
        if node in needed:
            after.append(node)
        node = node.next
    for node in after:
        anchor.prepend(node)


class _Batch:
    """Pointwise work on the members of a stack, done on the stack, until the members part."""

    def __init__(self, graph: Graph, stacked: Node, fixed: AbstractSet[Node]) -> None:
        self.graph = graph
        self.fixed = fixed
        self.pending = [stacked]

    def run(self) -> None:
        """First what needs stacks alone, then what meets a value of its own for each member."""
        for stacking in (False, True):
            done = []
            while self.pending:
                stacked = self.pending.pop()
                if not self._step(stacked, stacking):
                    done.append(stacked)
            self.pending = done

    def _step(self, stacked: Node, stacking: bool) -> bool:
        """Batch one op that follows the stack's members, if there is one; then both stacks are looked at again."""
        lanes = lanes_of(stacked)
        for first in list(lanes[0].users) if lanes else ():
            users = [_counterpart(first, lanes[0], lane) for lane in lanes]
            arguments = None if None in users else self._arguments(users, lanes, stacked, stacking)
            if arguments is None:
                continue
            position = {node: index for index, node in enumerate(self.graph.nodes)}
            anchor = min(users, key=position.__getitem__)
            _hoist(self.graph, [one for one in tree_leaves(arguments) if isinstance(one, Node)], anchor)
            with self.graph.inserting_before(anchor):
                own = [_stack(self.graph, one) if isinstance(one, list) else one for one in arguments]
                node = emit(self.graph, first.target, *own, **first.kwargs)
            _replace_lanes(self.graph, node, users)
            self.pending += [stacked, node]
            return True
        return False

    def _arguments(
        self, users: Sequence[Node], lanes: Sequence[Node], stacked: Node, stacking: bool
    ) -> list[object] | None:
        """The op's arguments for the whole stack; a list of nodes is still to be stacked. None if it cannot be done."""
        found: list[object] = []
        for column in map(list, zip(*(user.args for user in users), strict=True)):
            first = column[0]
            if column == list(lanes):
                found.append(stacked)
            elif not isinstance(first, Node):
                found.append(first)
            elif not self.fixed.isdisjoint(column):
                return None
            elif all(one is first for one in column):
                if tensor_value(first) is None or tensor_value(first).dim() > tensor_value(lanes[0]).dim():
                    return None
                found.append(first)
            elif packet(first) is aten.select and column == lanes_of(first.args[0]):
                found.append(first.args[0])
            elif stacking and len({_looks(one) for one in (*column, lanes[0])}) == 1:
                found.append(column)
            else:
                return None
        return found


def _stack(graph: Graph, nodes: Sequence[Node]) -> Node:
    """The nodes' values as one. Inductor is given variants after it has taken ``aten.stack`` apart, and refuses it."""
    return emit(graph, aten.cat.default, [emit(graph, aten.unsqueeze.default, node, 0) for node in nodes])


def lanes_of(stacked: Node) -> list[Node]:
    """The members of a stack in their order, one select each; nothing where some are not there."""
    members: dict[object, Node] = {}
    for user in stacked.users:
        if packet(user) is aten.select and user.args[1] == 0:
            members.setdefault(user.args[2], user)
    count = tensor_value(stacked).shape[0]
    return [members[index] for index in range(count)] if set(members) == set(range(count)) else []


def _counterpart(user: Node, lane: Node, other: Node) -> Node | None:
    """What does to the other member what ``user`` does to a member, with the same numbers; None if nothing does."""
    plain = packet(user) in POINTWISE and user.kwargs.keys() <= {"dtype", "approximate", "alpha"}
    if not plain or _looks(user)[0] != _looks(lane)[0]:
        return None
    wanted = user.target, user.kwargs, _pattern(user, lane)
    return next((one for one in other.users if (one.target, one.kwargs, _pattern(one, other)) == wanted), None)


def _pattern(user: Node, lane: Node) -> list[object]:
    """The arguments, with what may differ from member to member left open."""
    return ["lane" if arg is lane else "other" if isinstance(arg, Node) else (type(arg), arg) for arg in user.args]


def _looks(node: Node) -> tuple[object, ...]:
    value = tensor_value(node)
    return () if value is None else (tuple(value.shape), value.dtype, value.device)
