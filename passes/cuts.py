"""What graph breaks cost: work of branches that a break cuts in two, so that no graph holds the whole of one."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node

from .branches import addends, is_sum
from .facts import GraphFacts, through_views
from .flops import count_flops
from .sites import Site, only_needed_by


def cut_flops(graph: Graph, sites: Sequence[Site], *, ends_at_break: bool) -> int:
    """FLOPs in a captured graph that belong to a branch whose other part lies in another graph.

    First parts: what leads to the graph's outputs alone and to no residual add, in a graph that ended at a break.
    Last parts: what is added to an input of the graph and does not descend from it.
    """
    facts = GraphFacts(graph)
    adds = {add for site in sites for add in site.adds}
    inside = {node for site in sites for node in site.region}
    cut: set[Node] = set()
    if ends_at_break:
        after = set(adds)
        for node in reversed(facts.nodes):
            if any(user in after for user in node.users):
                after.add(node)
        cut.update(node for node in facts.nodes if node.op == "call_function" and node not in after)
    for node in facts.nodes:
        if is_sum(node) and node not in adds:
            for skip, term in (addends(node), addends(node)[::-1]):
                is_input = through_views(skip).op == "placeholder" and skip in facts.activations
                if is_input and not facts.descends(term, through_views(skip)):
                    cut.update(only_needed_by([term], stored=adds))
    return count_flops(cut - inside - adds)
