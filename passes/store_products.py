"""Have the last product of a computed branch write its cache, where the branch is no more than a view of it.

Before::

    attn = view(addmm(bias, heads, weight), [2, 256, 1152])
    copy_ = copy_(cache_0, attn)
    gated = mul(gate, attn)

After::

    matmul_store(heads, weight, bias, view(cache_0, [-1, 1152]))
    gated = mul(gate, cache_0)

What it saves is said in ``passes/lowering.py``.
"""

from __future__ import annotations

import logging

import torch
from torch.fx import Graph, GraphModule, Node

from .. import kernels  # noqa: F401 - registers the ops
from .counting import count
from .facts import aten, packet, tensor_value
from .flops import concrete
from .guard import CACHE
from .rewriting import copy_graph, emit, placeholders, remove_dead_code, with_graph

log = logging.getLogger(__name__)

#: Views that keep the order of elements: of a contiguous tensor they give one.
FLAT_VIEWS = frozenset((aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.alias))


def store_products(variant: GraphModule) -> GraphModule:
    """A copy of a variant in which products write caches wherever nothing else is done to them."""
    graph, _ = copy_graph(variant)
    stored = 0
    for cache in placeholders(graph):
        if CACHE in cache.meta and (copy := _only_write(cache)) is not None:
            product = _product_of(copy.args[1])
            if product is not None and _may_lie_in(product, copy):
                _write_in_place(graph, product, copy)
                stored += 1
    remove_dead_code(graph)
    count(products_stored=stored)
    log.info("%d products write their caches", stored)
    return with_graph(variant, graph) if stored else variant


def _only_write(cache: Node) -> Node | None:
    """The write of a cache that nothing else reads or writes: what it held before may be needed otherwise."""
    users = list(cache.users)
    return users[0] if len(users) == 1 and packet(users[0]) is aten.copy_ and users[0].args[0] is cache else None


def _product_of(value: Node) -> Node | None:
    """The product that a value is a view of."""
    while packet(value) in FLAT_VIEWS:
        value = value.args[0]
    return value if packet(value) in (aten.mm, aten.addmm) and not value.kwargs else None


def _may_lie_in(product: Node, copy: Node) -> bool:
    """Whether the cache can hold what the product gives, element for element, and the caller does not get it."""
    cache, stored = copy.args
    values = [tensor_value(node) for node in (product, stored, cache)]
    if len({(value.dtype, value.device) for value in values}) > 1:
        return False
    if not all(map(_is_contiguous, values)) or not isinstance(values[0].shape[1], int):
        return False
    return not _is_returned(product)


def _is_contiguous(value: torch.Tensor) -> bool:
    """As the graph was captured: no guard is added for sizes that are symbolic."""
    expected = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if concrete(size) != 1:
            if concrete(stride) != expected:
                return False
            expected *= concrete(size)
    return True


def _is_returned(product: Node) -> bool:
    """Whether the graph's output is a view of the product: it must not be memory that a later step writes."""
    pending = [product]
    while pending:
        node = pending.pop()
        if any(user.op == "output" for user in node.users):
            return True
        pending += [user for user in node.users if _is_view(user)]
    return False


def _is_view(node: Node) -> bool:
    """Whether an op's result may be memory of its argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _write_in_place(graph: Graph, product: Node, copy: Node) -> None:
    cache, stored = copy.args
    bias, left, right = product.args if packet(product) is aten.addmm else (None, *product.args)
    columns = tensor_value(product).shape[1]
    with graph.inserting_before(product):
        flat = emit(graph, aten.view.default, cache, [-1, columns])
        write = graph.call_function(torch.ops.smoothcache.matmul_store.default, (left, right, bias, flat))
        write.meta = {"val": None}
        # Looked at anew behind the write: what reads it comes after it.
        flat = emit(graph, aten.view.default, cache, [-1, columns])
    flat.meta = {**product.meta, **flat.meta}
    graph.erase_node(copy)
    if stored is not product:
        stored.replace_all_uses_with(cache)
    product.replace_all_uses_with(flat)
