"""The skip path through a run of blocks: what a value would be if all branches were zero.

Residual adds hand on the stream, and so do views, casts, masks, and a cat of tensors that is cut apart again::

    x_2 = x_1 + gate * mlp(...)      is x_1
    both = cat(txt, img)             both[:, :77] is txt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from .facts import (
    GraphFacts,
    aten,
    is_product,
    is_view_or_cast,
    module_path,
    packet,
    same_sizes,
    tensor_value,
    through_views,
)
from .flops import concrete
from .sites import Site
from .sums import addends, summands


def without_branches(
    facts: GraphFacts, node: Node, region: set[Node], branches: Mapping[Node, set[Node]]
) -> tuple[Node | None, list[Node]]:
    """What the node would be with all branches at zero: a value from outside, or None.

    And the residual sums on the way, the last block's first.
    """
    passed: list[Node] = []
    step: Node | None = node
    while step is not None and step in region:
        if step in branches or (passed and step not in passed):
            passed.append(step)
        step = _unscaled(step, region) or _one_step(facts, step, branches)
    return step, passed


def _unscaled(node: Node, region: set[Node]) -> Node | None:
    """The stream that a node multiplies by a mask or a scale from outside."""
    factors = [factor for factor in node.args[:2] if factor in region] if is_product(node) else []
    return factors[0] if len(factors) == 1 and len(node.args) > 1 else None


def _one_step(facts: GraphFacts, node: Node, branches: Mapping[Node, set[Node]]) -> Node | None:
    """The value that a node hands on where branches are zero."""
    if node in branches:
        # A cast of the stream may be the branch's input, too.
        leaves = [leaf for leaf in summands(node) if through_views(leaf) not in branches[node]]
        if len(leaves) > 1:  # the stream, and what the block adds beside its branches
            leaves = [leaf for leaf in leaves if any(facts.descends(n, through_views(leaf)) for n in branches[node])]
        return leaves[0] if len(leaves) == 1 else None
    if is_view_or_cast(node):
        return node.args[0]
    if packet(node) is aten.add and is_in_a_block(node):  # positions, which each block adds to the stream
        return next(iter(addends(node)), None)
    if (part := _part(node)) is not None:
        base, dim, start, end = part
        return _piece_of_cat(facts, base, dim, start, end, branches)
    if packet(node) is aten.cat:
        return _whole_of_parts(node)
    return None


def _part(node: Node) -> tuple[Node, int, int, int] | None:
    """What a node is a slice of, along which dimension, from where and to where."""
    if packet(node) is aten.slice and len(node.args) < 5:
        base, dim, start, end = (*node.args, *(0, 0, None)[len(node.args) - 1 :])
        size = _size(base, dim)
        first, last = (_number(size if place is None else place) for place in (start or 0, end))
        return base, dim, first + (size if first < 0 else 0), min(size, last + (size if last < 0 else 0))
    if getattr(node.target, "__name__", "") == "getitem" and packet(node.args[0]) is aten.split_with_sizes:
        base, sizes, *dim = node.args[0].args
        numbers = [_number(size) for size in sizes]
        start = sum(numbers[: node.args[1]])
        return base, dim[0] if dim else 0, start, start + numbers[node.args[1]]
    return None


def _piece_of_cat(
    facts: GraphFacts, node: Node, dim: int, start: int, end: int, branches: Mapping[Node, set[Node]]
) -> Node | None:
    """The tensor that lies from ``start`` to ``end`` in what a stream was put together from."""
    while packet(node) is not aten.cat:
        before = _one_step(facts, node, branches) if node in branches or is_view_or_cast(node) else None
        if before is None or not same_sizes(tensor_value(before).shape, tensor_value(node).shape):
            return None
        node = before
    whole = _whole_of_parts(node)
    if whole is not None:
        return _piece_of_cat(facts, whole, dim, start, end, branches)
    pieces, *along = node.args
    if ((along[0] if along else 0) - dim) % tensor_value(node).ndim:
        return None
    offset = 0
    for piece in pieces:
        if (offset, offset + _size(piece, dim)) == (start, end):
            return piece
        offset += _size(piece, dim)
    return None


def _whole_of_parts(cat: Node) -> Node | None:
    """What was cut into the parts that a cat puts together again."""
    parts = [_part(node) for node in cat.args[0]]
    if not parts or any(part is None for part in parts):
        return None
    base, dim, at, _ = parts[0]
    for other, along, start, end in parts:
        if other is not base or along != dim or start != at:
            return None
        at = end
    whole = parts[0][2] == 0 and at == _size(base, dim)
    return base if whole and same_sizes(tensor_value(base).shape, tensor_value(cat).shape) else None


def _size(node: Node, dim: int) -> int:
    return concrete(tensor_value(node).shape[dim])


def _number(value: Any) -> int:
    return concrete(value.meta["val"] if isinstance(value, Node) else value)


def behind_casts(node: Node) -> Node:
    """What a sum in a wider dtype is rounded to, if nothing else uses it."""
    while len(node.users) == 1:
        (user,) = node.users
        rounded, whole = tensor_value(user), tensor_value(node)
        if not is_view_or_cast(user) or not same_sizes(rounded.shape, whole.shape):
            break
        if rounded.dtype.itemsize >= whole.dtype.itemsize:
            break
        node = user
    return node


def entry_like(leaving: Node, entry: Node | None) -> Node | None:
    """The entry, or what it is a view of, if it looks like the exit."""
    while entry is not None and not _alike(entry, leaving):
        entry = entry.args[0] if is_view_or_cast(entry) else None
    return entry


def only_entry_like(facts: GraphFacts, leaving: Node, held: Sequence[Site], region: set[Node]) -> Node | None:
    """Where norms stand in the stream itself: the one value with the exit's looks that a branch starts from."""
    found = {
        leaf
        for site in held
        for add in site.adds
        for leaf in summands(add)
        if leaf not in region and leaf in facts.activations and _alike(leaf, leaving)
    }
    return found.pop() if len(found) == 1 else None


def _alike(left: Node, right: Node) -> bool:
    ours, theirs = tensor_value(left), tensor_value(right)
    if ours is None or theirs is None:
        return False
    return ours.dtype == theirs.dtype and ours.ndim == theirs.ndim and same_sizes(ours.shape, theirs.shape)


def is_in_a_block(node: Node) -> bool:
    """Whether a module of a list made the node, and not the model that calls its blocks."""
    return any(part.isdigit() for part in module_path(node).split("."))
