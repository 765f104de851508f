"""A graph as a Graphviz drawing in which a whole model can be taken in: a box per site and per module."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

from ..passes.facts import module_path
from ..passes.guard import CACHE, DECISION, SITE, guard, restore
from ..passes.names import WEIGHT
from ..passes.sites import Site
from .html import COLOURS

#: A module whose path has at most this many components gets its own box.
DEPTH = 2
#: Seconds that Graphviz may take.
PATIENCE = 60

_BLUE, _ORANGE, _GREEN, _YELLOW = (COLOURS[i] for i in (0, 1, 2, 4))
_STYLES = {
    "branch": f'shape=box, style=filled, fillcolor="{_BLUE}", fontcolor=white',
    "guard": f'shape=diamond, style=filled, fillcolor="{_ORANGE}"',
    "cache": f'shape=cylinder, style=filled, fillcolor="{_GREEN}"',
    "add": "shape=circle, width=0.3, fixedsize=true",
    "kernel": f'shape=box, style=filled, fillcolor="{_YELLOW}"',
    "input": "shape=ellipse",
    "module": "shape=box, style=rounded",
    "output": "shape=ellipse",
}


def as_dot(title: str, gm: GraphModule, sites: Sequence[Site], names: Sequence[str]) -> str:
    """The drawing in Graphviz' language.

    Args:
        title: written above it.
        gm: the captured graph, or one that a pass made of it: its nodes are known by name.
        sites: those of the captured graph.
        names: what they are called at this place.
    """
    boxes = _boxes(gm, sites)
    members: dict[tuple[str, str], list[Node]] = {}
    for node, box in boxes.items():
        members.setdefault(box, []).append(node)
    identity = {box: f"n{index}" for index, box in enumerate(members)}
    clusters: dict[int | None, list[tuple[str, str]]] = {}
    owners = _owners(gm, sites)
    for box, nodes in members.items():
        owner = None if box[0] == "module" else next((owners[n.name] for n in nodes if n.name in owners), None)
        clusters.setdefault(owner, []).append(box)
    lines = ["digraph {", f"  label={_quoted(title)}; labelloc=t; rankdir=TB; node [fontname=Helvetica, fontsize=10];"]
    for owner, found in clusters.items():
        indent = "  "
        if owner is not None:
            lines.append(f"  subgraph cluster_{owner} {{ label={_quoted(names[owner])}; color={_quoted(_BLUE)};")
            indent = "    "
        for box in found:
            label = _label(box, members[box], names)
            lines.append(f"{indent}{identity[box]} [label={_quoted(label)}, {_STYLES[box[0]]}];")
        if owner is not None:
            lines.append("  }")
    edges = {
        (identity[boxes[source]], identity[boxes[node]])
        for node in boxes
        for source in node.all_input_nodes
        if source in boxes and boxes[source] != boxes[node]
    }
    lines += [f"  {source} -> {target};" for source, target in sorted(edges, key=_by_number)]
    return "\n".join([*lines, "}"]) + "\n"


def draw(dot: Path) -> Path | None:
    """An SVG beside the file, where Graphviz is installed; else None."""
    program = shutil.which("dot")
    if program is None:
        return None
    picture = dot.with_suffix(".svg")
    command = [program, "-Tsvg", str(dot), "-o", str(picture)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return None
    return picture if done.returncode == 0 else None


def _boxes(gm: GraphModule, sites: Sequence[Site]) -> dict[Node, tuple[str, str]]:
    """Which box each node is in, as kind and name; parameters and decisions are in none.

    What is the model's own and no module's is in two or three boxes: one alone would lie at both ends of all else.
    """
    branches = {node.name: str(index) for index, site in enumerate(sites) for node in _until_output(site)}
    # What lies between a branch's output and the add, views and gate, is drawn as part of the add.
    adds = {n.name: str(i) for i, s in enumerate(sites) for n in (*s.region, *s.adds) if n.name not in branches}
    boxes = {}
    ahead, place = set(adds) & {node.name for node in gm.graph.nodes}, "before all sites"
    for node in gm.graph.nodes:
        if node.name in ahead:
            ahead.remove(node.name)
            place = "between sites" if ahead else "after all sites"
        if WEIGHT in node.meta or DECISION in node.meta or node.op == "get_attr":
            continue
        if CACHE in node.meta:
            boxes[node] = ("cache", node.name)
        elif node.op in ("placeholder", "output"):
            boxes[node] = ("input" if node.op == "placeholder" else "output", node.name)
        elif node.target is torch.ops.aten.copy_.default and CACHE in node.args[0].meta:
            boxes[node] = ("cache", node.args[0].name)
        elif node.target in (guard, restore):
            boxes[node] = ("guard", node.name)
        elif str(node.target).startswith("smoothcache."):
            boxes[node] = ("kernel", f"{node.target}".split(".")[1] + f" {node.name}")
        elif node.name in branches:
            boxes[node] = ("branch", branches[node.name])
        elif node.name in adds:
            boxes[node] = ("add", adds[node.name])
        else:
            path = ".".join(module_path(node).split(".")[:DEPTH])
            boxes[node] = ("module", path or f"the model,\n{place}")
    return boxes


def _until_output(site: Site) -> list[Node]:
    """The nodes of a site's region that lead to what it caches."""
    behind: set[Node] = set()
    for node in site.region:
        if any(parent in behind or parent in site.outputs for parent in node.all_input_nodes):
            behind.add(node)
    return [node for node in site.region if node not in behind]


def _owners(gm: GraphModule, sites: Sequence[Site]) -> dict[str, int]:
    """The site that a node is drawn with, by the node's name."""
    owners = {node.name: i for i, site in enumerate(sites) for node in (*site.region, *site.adds)}
    for node in gm.graph.nodes:
        index = node.meta.get(SITE)
        if index is not None and DECISION not in node.meta:
            owners[node.name] = index
    return owners


def _label(box: tuple[str, str], nodes: Sequence[Node], names: Sequence[str]) -> str:
    kind, name = box
    if kind == "branch":
        return f"{names[int(name)]}\n{_count(nodes)}"
    if kind == "add":
        return "+"
    if kind == "module":
        return f"{name}\n{_count(nodes)}"
    return name.partition(" ")[0]


def _count(nodes: Sequence[Node]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _by_number(edge: tuple[str, str]) -> tuple[int, int]:
    source, target = edge
    return int(source[1:]), int(target[1:])
