"""Compute only the rows of a modulation that something reads.

Before, where both branches of a block are reused and only their gates are needed::

    modulation = addmm(bias, c, t(weight))               # [batch, 6 * width]
    pieces = split(modulation, width, -1)
    gate_1 = getitem(pieces, 2);  gate_2 = getitem(pieces, 5)

After::

    gate_1 = addmm(slice(bias, 0, 2 * width, 3 * width), c, t(slice(weight, 0, 2 * width, 3 * width)))
    gate_2 = addmm(slice(bias, 0, 5 * width, 6 * width), c, t(slice(weight, 0, 5 * width, 6 * width)))

Slices of a weight's rows are views: nothing is copied when the variant runs.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from .counting import count
from .facts import aten, packet, tensor_value
from .flops import count_flops
from .names import WEIGHT
from .rewriting import copy_graph, emit, remove_dead_code, with_graph

log = logging.getLogger(__name__)

#: Share of a product's columns that must be dead for it to be worth several smaller ones.
WORTH_NARROWING = 1 / 8


@dataclass(frozen=True)
class Piece:
    """A slice of a product's columns that something reads: ``node`` is ``[..., start:end]``."""

    node: Node
    start: int
    end: int


@dataclass(frozen=True)
class Product:
    """``views(addmm(bias, rows, t(weight)))`` of which only pieces are read."""

    node: Node
    weight: Node
    views: tuple[Node, ...]
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        return tensor_value(self.node).shape[-1]

    @property
    def runs(self) -> list[list[Piece]]:
        """The pieces, those that adjoin together."""
        runs: list[list[Piece]] = []
        for piece in sorted(self.pieces, key=lambda piece: piece.start):
            if runs and piece.start <= max(before.end for before in runs[-1]):
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return runs


def narrow(variant: GraphModule) -> GraphModule:
    """A copy of a variant in which products with weights have the columns that are read, and no others."""
    graph, _ = copy_graph(variant)
    rewritten = 0
    for node in list(graph.nodes):
        product = can_narrow(node)
        if product is not None and should_narrow(product):
            _rewrite(graph, product)
            rewritten += 1
    if not rewritten:
        return variant
    remove_dead_code(graph)
    narrowed = with_graph(variant, graph)
    count(products_narrowed=rewritten)
    if log.isEnabledFor(logging.INFO):
        saved = count_flops(variant.graph) - count_flops(narrowed.graph)
        log.info("narrowed %d products, %.3g FLOPs saved", rewritten, saved)
    return narrowed


def can_narrow(node: Node) -> Product | None:
    """The product that a node is, if each of its columns is the product of one row of a weight, and read by slices."""
    if packet(node) is aten.addmm and not node.kwargs:
        bias, _, transposed = node.args
        if not _is_weight(bias) or tensor_value(bias).ndim != 1:
            return None
    elif packet(node) is aten.mm:
        _, transposed = node.args
    else:
        return None
    if packet(transposed) not in (aten.t, aten.permute) or not _is_weight(transposed.args[0]):
        return None
    columns = tensor_value(node).shape[-1]
    if not isinstance(columns, int):
        return None
    views: list[Node] = []
    last = node
    while len(last.users) == 1 and _keeps_columns(next(iter(last.users)), columns):
        last = next(iter(last.users))
        views.append(last)
    pieces: list[Piece] = []
    for user in last.users:
        found = _pieces(user, last, columns)
        if found is None:
            return None
        pieces += found
    return Product(node, transposed.args[0], tuple(views), tuple(pieces)) if pieces else None


def should_narrow(product: Product) -> bool:
    """Whether enough columns are dead."""
    read = sum(max(piece.end for piece in run) - run[0].start for run in product.runs)
    return product.columns - read >= WORTH_NARROWING * product.columns


def _is_weight(node: object) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and WEIGHT in node.meta


def _keeps_columns(node: Node, columns: int) -> bool:
    """Whether the node is a view whose last dimension still is the product's columns, all of them."""
    value = tensor_value(node)
    if packet(node) not in (aten.view, aten._unsafe_view, aten.unsqueeze, aten._to_copy) or value is None:
        return False
    return isinstance(value.shape[-1], int) and value.shape[-1] == columns


def _pieces(user: Node, whole: Node, columns: int) -> list[Piece] | None:
    """The pieces that a split or slice takes of the last dimension, or None if it is neither."""
    last = tensor_value(whole).ndim - 1
    if packet(user) is aten.slice:
        _, dim, start, end, *step = [*user.args, *(0, 0, columns)[len(user.args) - 1 :]]
        if dim not in (-1, last) or step not in ([], [1]) or not all(isinstance(x, int) for x in (start, end)):
            return None
        start, end = (min(max(x + columns if x < 0 else x, 0), columns) for x in (start, end))
        return [Piece(user, start, end)] if start < end else None
    if packet(user) not in (aten.split, aten.split_with_sizes) or user.kwargs:
        return None
    _, sizes, dim = (*user.args, 0)[:3]
    if dim not in (-1, last):
        return None
    if isinstance(sizes, int):
        sizes = [min(sizes, columns - start) for start in range(0, columns, sizes)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    if any(part.target is not operator.getitem for part in user.users):
        return None
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Piece(part, starts[part.args[1]], starts[part.args[1]] + sizes[part.args[1]]) for part in user.users]


def _rewrite(graph: Graph, product: Product) -> None:
    node = product.node
    for run in product.runs:
        start, end = run[0].start, max(piece.end for piece in run)
        with graph.inserting_before(node):
            rows = emit(graph, aten.slice.Tensor, product.weight, 0, start, end, like=node)
            columns = emit(graph, aten.permute.default, rows, [1, 0], like=node)
            if packet(node) is aten.addmm:
                bias = emit(graph, aten.slice.Tensor, node.args[0], 0, start, end, like=node)
                arguments: tuple[Any, ...] = (bias, node.args[1], columns)
            else:
                arguments = (node.args[0], columns)
            value = emit(graph, node.target, *arguments, like=node)
        for view in product.views:
            with graph.inserting_before(view):
                rest = list(view.args[1:])
                if packet(view) in (aten.view, aten._unsafe_view):
                    rest[0] = [*rest[0][:-1], end - start]
                value = emit(graph, view.target, value, *rest, like=view, **view.kwargs)
        for piece in run:
            part = value
            if (piece.start, piece.end) != (start, end):
                with graph.inserting_before(piece.node):
                    dim = tensor_value(value).ndim - 1
                    bounds = (piece.start - start, piece.end - start)
                    part = emit(graph, aten.slice.Tensor, value, dim, *bounds, like=piece.node)
            piece.node.replace_all_uses_with(part)
