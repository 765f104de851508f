"""Bytes that a graph must move, from the shapes in its metadata: what its time is made of where arithmetic is free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .facts import packet, through_views
from .flops import concrete, estimate_sizes, node_flops
from .guard import CACHE


def count_bytes(graph: Graph) -> int:
    """Bytes read and written by matmuls, convolutions and attention, by caches, and by the graph's own outputs.

    Pointwise work counts as fused into what comes before and after it: of a chain of it only the tensor that the
    next matmul reads is written. Weights count each time they are read. A lower bound, as FLOPs are one of arithmetic.
    """
    estimates = estimate_sizes(graph)
    heavy = {node for node in graph.nodes if node_flops(node, estimates)}
    total = 0
    written: set[Node] = set()
    for node in heavy:
        total += _bytes(node, estimates) + sum(_bytes(value, estimates) for value in node.all_input_nodes)
        written.update(through_views(value) for value in node.all_input_nodes)
    caches = [node for node in graph.nodes if CACHE in node.meta]
    for cache in caches:
        stored = sum(packet(user) is torch.ops.aten.copy_ for user in cache.users)
        total += (stored + (len(cache.users) > stored)) * _bytes(cache, estimates)
    (output,) = graph.find_nodes(op="output")
    made = (written | set(output.all_input_nodes)) - heavy
    return total + sum(_bytes(node, estimates) for node in made if node.op == "call_function")


def _bytes(node: Node, estimates: Mapping[Any, int]) -> int:
    total = 0
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor):
            total += math.prod(concrete(size, estimates) for size in value.shape) * value.element_size()
    return total
