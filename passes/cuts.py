"""What graph breaks cost: work of blocks that lies in no site, since no graph holds the whole of its branch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.fx import Graph, Node

from .facts import GraphFacts
from .flops import estimate_sizes, node_flops
from .names import WEIGHT
from .sites import Site, only_needed_by


def work_outside(graph: Graph, sites: Sequence[Site]) -> list[tuple[int, tuple[Node, ...]]]:
    """FLOPs of the nodes that are computed even where all sites are reused, each with its weights' placeholders.

    A product of activations has those of the last node before it that has any.
    """
    facts = GraphFacts(graph)
    saved = only_needed_by([output for site in sites for output in site.outputs])
    estimates = estimate_sizes(graph)
    found: list[tuple[int, tuple[Node, ...]]] = []
    nearest: tuple[Node, ...] = ()
    for node in facts.nodes:
        flops = node_flops(node, estimates)
        if not flops:
            continue
        nearest = tuple(weight for weight in facts.weight_nodes(node) if WEIGHT in weight.meta) or nearest
        if node not in saved:
            found.append((flops, nearest))
    return found


def container_of(name: str) -> str:
    """The list of blocks that a name is in: ``blocks`` for ``blocks.3.attn`` and ``blocks.2-9``; '' for none."""
    parts = re.split(r"\.\d+(?:-\d+)?(?:\.|$)", name, maxsplit=1)
    return parts[0] if len(parts) > 1 else ""
