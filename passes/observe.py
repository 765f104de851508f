"""Add the sites' outputs to the graph's outputs, so that calibration sees them.

Before: ``return (sample,)``. After: ``return (sample, attn, ffn)``, the branch outputs before their gates.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from .guard import cached_values
from .rewriting import copy_graph, with_graph
from .sites import Site


def observe(gm: GraphModule, sites: Sequence[Site]) -> GraphModule:
    """A copy that returns, after its own outputs, what all sites would cache, in order. Nothing else changes."""
    graph, mapping = copy_graph(gm)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    seen = [value for site in sites for value in cached_values(graph, mapping, site)]
    output.args = ((*output.args[0], *seen),)
    return with_graph(gm, graph)
