"""Compute once what a graph computes several times from the same inputs.

Before, as each of diffusers' DiT blocks embeds the timestep for itself::

    sin_0 = sin(mul(t, frequencies));  sin_1 = sin(mul(t, frequencies))

After::

    sin_0 = sin(mul(t, frequencies))
"""

from __future__ import annotations

import logging
import operator

import torch
from torch.fx import GraphModule, Node

from .counting import count
from .guard import CACHE
from .rewriting import copy_graph, with_graph

log = logging.getLogger(__name__)


def merge_equal(variant: GraphModule) -> GraphModule:
    """A copy of a variant in which calls of one op with equal arguments are one call, where ``can_merge`` says so."""
    graph, _ = copy_graph(variant)
    returned = set(graph.output_node().all_input_nodes)
    seen: dict[object, Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node in returned or not can_merge(node):
            continue
        try:
            first = seen.setdefault(_key(node), node)
        except TypeError:  # an argument that cannot be compared
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    count(calls_merged=merged)
    log.info("merged %d calls with equal ones", merged)
    return with_graph(variant, graph) if merged else variant


def can_merge(node: Node) -> bool:
    """Whether two calls of the op give the same: no random numbers, nothing written, no memory left as it is.

    What reads a cache is left alone, too: the cache may be written between two reads.
    """
    if node.op != "call_function" or any(CACHE in parent.meta for parent in node.all_input_nodes):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    if node.target.namespace not in ("aten", "prims") or node.target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and "empty" not in node.target.__name__


def _key(node: Node) -> object:
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: object) -> object:
    """The arguments as something to look up; 1, 1.0 and True are different."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple(sorted((name, _frozen(one)) for name, one in value.items()))
    hash(value)
    return type(value), value
