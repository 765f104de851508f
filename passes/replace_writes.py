"""In-place ops that AOTAutograd cannot make functional, as ones that it can.

Before, ``Tensor.fill_diagonal_`` (it writes through ``as_strided``, which AOTAutograd refuses on a view)::

    %mask = call_method[fill_diagonal_](%view, 0)

After::

    %diagonal = call_method[diagonal](%view)
    %fill_ = call_method[fill_](%diagonal, 0)

Perturbed attention guidance masks that way.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node


def replace_writes(graph: Graph) -> int:
    """Replace what can be replaced in a graph of Dynamo's, in place; returns how many ops that were."""
    found = [node for node in graph.nodes if _fills_a_diagonal(node)]
    for node in found:
        written, value = node.args[:2]
        with graph.inserting_before(node):
            diagonal = graph.call_method("diagonal", (written,))
            filled = graph.call_method("fill_", (diagonal, value))
        diagonal.meta, filled.meta = _places(node), _places(node)
        node.replace_all_uses_with(written)
        graph.erase_node(node)
    return len(found)


def _places(node: Node) -> dict[str, object]:
    """What of a node's meta says where it comes from, and holds for what replaces it."""
    return {key: value for key, value in node.meta.items() if key != "example_value"}


def _fills_a_diagonal(node: Node) -> bool:
    """Of a matrix, and no further than its diagonal goes: with ``wrap`` it begins anew below."""
    if node.op not in ("call_method", "call_function"):
        return False
    if node.target not in ("fill_diagonal_", torch.Tensor.fill_diagonal_) or len(node.args) != 2 or node.kwargs:
        return False
    written = node.args[0].meta.get("example_value") if isinstance(node.args[0], Node) else None
    return isinstance(written, torch.Tensor) and written.ndim == 2
