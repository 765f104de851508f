"""Graph surgery that the passes share: copies, new nodes with their values, what is unused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from .facts import ASSERTIONS, packet


def copy_graph(gm: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """A copy of the module's graph, and where each node went. Metadata is copied."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.set_codegen(gm.graph._codegen)
    return graph, mapping


def with_graph(gm: GraphModule, graph: Graph) -> GraphModule:
    """A module with this graph and ``gm``'s parameters, once a pass is done with the graph."""
    graph.lint()
    result = GraphModule(gm, graph)
    result.meta.update(gm.meta)
    return result


#: What says where in the model a node comes from.
_ORIGIN = ("nn_module_stack", "stack_trace", "original_aten")


def emit(graph: Graph, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
    """A call at the graph's insertion point, with its value worked out from those of its arguments.

    It is said to come from where ``like`` does.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta |= {key: like.meta[key] for key in _ORIGIN if like is not None and key in like.meta}
    given, named = tree_map(lambda one: one.meta["val"] if isinstance(one, Node) else one, (args, kwargs))
    fake = next(one for one in tree_leaves((given, named)) if isinstance(one, torch.Tensor))
    with fake.fake_mode:
        node.meta["val"] = target(*given, **named)
    return node


def placeholders(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def remove_dead_code(graph: Graph) -> None:
    """Remove unused nodes; random ops too, and assertions about it, which must not keep a reused branch alive."""
    live, pending = set(), [node for node in graph.nodes if node.op == "output" or _has_effect(node)]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    for node in reversed(list(graph.nodes)):
        if packet(node) in ASSERTIONS and live.isdisjoint(node.all_input_nodes):
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: _has_effect(node) or packet(node) in ASSERTIONS)


def _has_effect(node: Node) -> bool:
    is_aten = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    if is_aten and (torch.Tag.nondeterministic_seeded in node.target.tags or packet(node) in ASSERTIONS):
        return False
    return node.is_impure()
