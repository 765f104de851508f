"""Resolve a guarded graph's guards for one mask: the variant, in which only what the mask needs is left.

Before::

    attn = addmm(bias, heads, weight)            # and norm, modulation, QKV, rotary embedding before it
    guard = guard(attn, cache_0, compute_0)
    gated = mul(gate, guard)

After, where site 0 is computed, and where it is reused::

    attn = addmm(bias, heads, weight)            gated = mul(gate, cache_0)
    copy_ = copy_(cache_0, attn)
    gated = mul(gate, attn)

Of a stack that is reused ``restore`` becomes ``add(entry, cache_0)``; where it is computed, its output stays.

Dead code elimination then takes away exactly what only reused branches needed. A site with an order above 0 reads a
forecast from all of its caches, and stores into the first (``passes/forecast.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from .facts import aten, through_views
from .forecast import emit_difference, emit_forecast, holds_differences
from .guard import CACHE, SITE, guards, restore
from .rewriting import copy_graph, emit, placeholders, remove_dead_code, with_graph

#: Metadata key of a variant's input: its position among the guarded graph's placeholders.
INPUT = "smoothcache_input"


def specialize(
    guarded: GraphModule,
    compute: Collection[int],
    store: Collection[int] | None = None,
    orders: Sequence[int] = (),
) -> GraphModule:
    """The variant for one mask.

    Args:
        guarded: what ``insert_guards`` returned.
        compute: positions of the sites that are computed; all others read their caches.
        store: which of them write their caches; all by default. A site that no step reuses need not.
        orders: of each site's forecast, at most what the guarded graph was made for; all 0 by default.

    The variant's placeholders are the inputs and caches that it uses, in the guarded graph's order; each carries its
    position there in ``meta[INPUT]``. Symbolic sizes stay, used or not: other inputs' shapes need them.
    """
    graph, _ = copy_graph(guarded)
    for position, node in enumerate(placeholders(graph)):
        node.meta = {**node.meta, INPUT: position}
    for node in guards(graph):
        value, cache, _, *rest = node.args
        site = node.meta[SITE]
        history = [cache, *(rest[0] if rest else ())][: 1 + (orders[site] if orders else 0)]
        if site not in compute:
            with graph.inserting_before(node):
                read = cache if len(history) == 1 else emit_forecast(graph, history, rest[1])
            node.replace_all_uses_with(read)
        else:
            if store is None or site in store:
                with graph.inserting_before(node):
                    _store(graph, value, history, site)
            node.replace_all_uses_with(value)
        graph.erase_node(node)
    for node in [node for node in graph.nodes if node.target is restore]:
        output, entry, added, _ = node.args
        if node.meta[SITE] not in compute:
            with graph.inserting_before(node):
                output = emit(graph, aten.add.Tensor, entry, added, like=node)
        node.replace_all_uses_with(output)
        graph.erase_node(node)
    _keep_caches_inside(graph)
    remove_dead_code(graph)
    for node in placeholders(graph):
        symbolic = isinstance(node.meta.get("val"), torch.SymInt)
        if not node.users and not symbolic:
            graph.erase_node(node)
    return with_graph(guarded, graph)


def _store(graph: Graph, value: Node, history: Sequence[Node], site: int) -> None:
    """Write the value to the first cache; where the others hold differences, the new one to the second before."""
    writes = [(history[0], value)]
    if len(history) > 1 and holds_differences(*(cache.meta["val"] for cache in history[:2])):
        writes.insert(0, (history[1], emit_difference(graph, value, history[0], history[1].meta["val"].dtype)))
    for cache, source in writes:
        copy = graph.call_function(torch.ops.aten.copy_.default, (cache, source))
        copy.meta.update({"val": cache.meta["val"], SITE: site})


def _keep_caches_inside(graph: Graph) -> None:
    """Copy what would be returned from a cache: the caller must not hold memory that a later step writes."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    for node in output.all_input_nodes:
        if CACHE in through_views(node).meta and through_views(node).op == "placeholder":
            with graph.inserting_before(output):
                clone = graph.call_function(torch.ops.aten.clone.default, (node,))
            clone.meta.update({"val": node.meta["val"]})
            output.replace_input_with(node, clone)


def variant_inputs(variant: GraphModule) -> list[int]:
    """Positions, among the guarded graph's placeholders, of the variant's inputs."""
    return [node.meta[INPUT] for node in placeholders(variant.graph)]
