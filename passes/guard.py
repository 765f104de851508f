"""Put a guard behind every site's output: the graph in which each branch is computed or read from its cache.

Before::

    attn = addmm(bias, heads, weight)
    gated = mul(gate, attn)
    out = add(x, gated)

After, with a buffer and a decision per site as new inputs::

    attn = addmm(bias, heads, weight)
    guard = guard(attn, cache_0, compute_0)
    gated = mul(gate, guard)
    out = add(x, gated)

A stack (``stacks.py``) is cached as what it adds to a stream, and put back by adding that::

    delta = sub(exit, entry)
    guard = guard(delta, cache_1, compute_1)
    exit_again = restore(exit, entry, guard, compute_1)      # exit itself where it is computed

The guarded graph runs as it stands: ``guarded(*inputs, *caches, *mask)`` computes everything, and per site hands on
and stores the fresh value or hands on the stored one. That is slow and exact, the reference for every variant that
``specialize`` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from .facts import aten
from .forecast import difference, forecast, holds_differences
from .rewriting import copy_graph, emit, with_graph
from .sites import Site

#: Keys in the metadata of guards and their placeholders: position of the site, position of the buffer.
SITE = "smoothcache_site"
CACHE = "smoothcache_cache"
DECISION = "smoothcache_decision"
#: Of a cache: its place among its output's caches. A store writes to the first, and of differences to the second.
SLOT = "smoothcache_slot"
#: Of the input with a coefficient per buffer, by which forecasts add up.
COEFFICIENTS = "smoothcache_coefficients"


def guard(
    value: torch.Tensor,
    cache: torch.Tensor,
    compute: bool,
    older: Sequence[torch.Tensor] = (),
    coefficients: torch.Tensor | None = None,
) -> torch.Tensor:
    """Store ``value`` in ``cache`` and return it, or return what ``cache`` holds.

    With ``older`` caches what is returned is the weighted sum of all, the forecast. They are slots of a ring: nothing
    moves from one to another, and the caller gives the slot that is to be written first. ``older`` of a narrower dtype
    hold differences (``passes/forecast.py``): the first of them takes the one to what ``cache`` held before.
    """
    if not compute:
        return forecast((cache, *older), coefficients) if older else cache
    if older and holds_differences(cache, older[0]):
        older[0].copy_(difference(value, cache, older[0].dtype))
    cache.copy_(value)
    return value


def restore(output: torch.Tensor, entry: torch.Tensor, added: torch.Tensor, compute: bool) -> torch.Tensor:
    """A stack's output: itself where it is computed, else what the stack got and what it ``added`` when it last was."""
    return output if compute else entry + added


def cache_value(output: Node) -> torch.Tensor:
    """A fake tensor of the site output's shape, dtype and device: what its buffer looks like.

    It is dense, its dimensions in memory in the output's order: then every view of the output is one of the buffer.
    """
    value = output.meta["val"]
    with value.fake_mode:
        return torch.empty_like(value)


def history_value(output: Node, history_dtype: torch.dtype | None) -> torch.Tensor:
    """``cache_value`` of a buffer that is not an output's first: in ``history_dtype`` where that is narrower."""
    value = cache_value(output)
    if history_dtype is None or not value.is_floating_point() or history_dtype.itemsize >= value.dtype.itemsize:
        return value
    with value.fake_mode:
        return torch.empty_like(value, dtype=history_dtype)


def insert_guards(
    gm: GraphModule, sites: Sequence[Site], order: int = 0, history_dtype: torch.dtype | None = None
) -> GraphModule:
    """The guarded graph: inputs as before, then the caches, then one decision (bool) per site.

    Each site output has ``order + 1`` caches. With an order above 0 there is one more input after the
    caches: ``coefficients``, float32 [number of caches], with which a forecast weighs each. Where ``history_dtype`` has
    fewer bytes than an output's dtype, all of its caches but the first have that dtype, and hold differences.
    """
    graph, mapping = copy_graph(gm)
    first_call = next(node for node in graph.nodes if node.op != "placeholder")
    caches: list[Node] = []
    decisions = []
    coefficients = None
    with graph.inserting_before(first_call):
        for index, site in enumerate(sites):
            for output in site.outputs:
                for slot in range(order + 1):
                    cache = graph.placeholder(f"cache_{len(caches)}")
                    value = history_value(output, history_dtype if slot else None)
                    cache.meta.update({"val": value, SITE: index, CACHE: len(caches), SLOT: slot})
                    caches.append(cache)
        if order and caches:
            coefficients = graph.placeholder("coefficients")
            value = caches[0].meta["val"]
            with value.fake_mode:
                coefficients.meta.update({"val": value.new_empty(len(caches), dtype=torch.float32), COEFFICIENTS: True})
        for index, _ in enumerate(sites):
            decision = graph.placeholder(f"compute_{index}")
            decision.meta.update({"val": True, SITE: index, DECISION: True})
            decisions.append(decision)
    histories = iter([caches[i : i + order + 1] for i in range(0, len(caches), order + 1)])
    for index, site in enumerate(sites):
        values = cached_values(graph, mapping, site)
        for position, (output, value) in enumerate(zip(site.outputs, values, strict=True)):
            node = _insert_guard(graph, value, next(histories), coefficients, decisions[index])
            if site.entries:
                node = _insert_restore(graph, mapping[output], mapping[site.entries[position]], node, decisions[index])
            mapping[output] = node  # what a stack behind it gets
    return with_graph(gm, graph)


def cached_values(graph: Graph, mapping: Mapping[Node, Node], site: Site) -> list[Node]:
    """What a site caches, in a copy of its graph: its outputs, or, for a stack, what it adds to each of its entries."""
    if not site.entries:
        return [mapping[output] for output in site.outputs]
    found = []
    for output, entry in zip(site.outputs, site.entries, strict=True):
        with graph.inserting_after(mapping[output]):
            found.append(emit(graph, aten.sub.Tensor, mapping[output], mapping[entry], like=mapping[output]))
    return found


def _insert_restore(graph: Graph, output: Node, entry: Node, added: Node, decision: Node) -> Node:
    with graph.inserting_after(added):
        node = graph.call_function(restore, (output, entry, added, decision))
    node.meta = {**output.meta, SITE: decision.meta[SITE]}
    (delta,) = [user for user in output.users if user is added.args[0]]
    output.replace_all_uses_with(node, delete_user_cb=lambda user: user not in (node, delta))
    return node


def _insert_guard(graph: Graph, value: Node, caches: Sequence[Node], coefficients: Node | None, decision: Node) -> Node:
    cache, *older = caches
    arguments: tuple[object, ...] = (value, cache, decision)
    after = value
    if older:
        start = cache.meta[CACHE]
        with graph.inserting_after(value):
            after = emit(graph, aten.slice.Tensor, coefficients, 0, start, start + len(caches))
        arguments += (older, after)
    with graph.inserting_after(after):
        node = graph.call_function(guard, arguments)
    value.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    for key in ("nn_module_stack", "stack_trace", "val", "tensor_meta"):
        if key in value.meta:
            node.meta[key] = value.meta[key]
    node.meta[SITE] = decision.meta[SITE]
    return node


def guards(graph: Graph) -> list[Node]:
    """The guards of a guarded graph, in the order of their caches."""
    found = [node for node in graph.nodes if node.target is guard]
    return sorted(found, key=lambda node: node.args[1].meta[CACHE])


def run_guarded(
    guarded: GraphModule,
    inputs: Sequence[object],
    caches: Sequence[torch.Tensor],
    mask: Sequence[bool],
    coefficients: torch.Tensor | None = None,
) -> object:
    """Run the guarded graph eagerly; ``mask[i]``: whether site i is computed. ``coefficients`` if it has an order."""
    return guarded(*inputs, *caches, *(() if coefficients is None else (coefficients,)), *mask)
