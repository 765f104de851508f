"""Find the residual branches of a Diffusion Transformer in its ATen graph: the sites that can be cached.

A site is recognised by what it does, not by what it is called. In

    attn = addmm(...)                  # ... of norm(x), through attention
    gated = mul(gate, attn)            # gate: computed from the timestep, not from x
    out = add(x, gated)

``x`` is an ancestor of the other operand, so the add is residual; between the two lie matmuls with parameters, so
the branch is worth caching; one of them mixes activations with activations, so it is attention; and ``attn``, what
is left of the operand after its gate, is the value to cache (the paper caches it before the gate, too).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from .branches import Branch, branches_of_sum, search
from .candidates import Candidate
from .facts import GraphFacts, frame_path, module_path, source_line, tensor_value
from .flops import concrete, count_flops
from .names import WEIGHT, common_module, drop_components, group_of, unique_names
from .sums import is_partial_sum, is_sum


@dataclass(frozen=True, eq=False)
class Site:
    """One skippable computation: one residual branch, or several that share their heavy work.

    Attributes:
        name: the place in the model, such as ``transformer_blocks.3.attn1``.
        kind: ``attn``, ``cross_attn``, ``ffn`` or ``attn_ffn``; ``stack`` for a run of blocks.
        outputs: the values to cache, one per branch, before gates; of a stack, what it hands on.
        adds: the residual adds that take them.
        gates: per branch, the shapes of the factors between output and add.
        region: all nodes that descend from the skip path and lead to an output.
        weights: the placeholders of the parameters of the branch's matmuls.
        containers: how many trailing components of the weights' common path name containers that are never
            called (``ff.net``), and so are left out of the name. Of a stack: how many lists of blocks its own list is
            inside of.
        flops: work that only this site needs, for the shapes the graph was captured with.
        cache_bytes: size of the outputs, in bytes.
        entries: of a stack (``stacks.py``), per output the value that it is cached as the difference to.
        holds: of a stack, its branches, which are not cached for themselves.
    """

    name: str
    kind: str
    outputs: tuple[Node, ...]
    adds: tuple[Node, ...]
    gates: tuple[tuple[tuple[int, ...], ...], ...]
    region: tuple[Node, ...]
    weights: tuple[Node, ...]
    containers: int
    flops: int
    cache_bytes: int
    entries: tuple[Node, ...] = ()
    holds: tuple[Site, ...] = ()

    @property
    def group(self) -> str:
        return group_of(self.name)


@dataclass(frozen=True, eq=False)
class Rejection:
    """A two-tensor add that belongs to no site, and why."""

    node: Node
    reason: str

    @property
    def module(self) -> str:
        return module_path(self.node)

    @property
    def source(self) -> str | None:
        return source_line(self.node)


def find_sites(graph: Graph) -> list[Site]:
    """The sites of a functional ATen graph, in graph order.

    Placeholders that hold parameters or buffers carry their qualified name in ``meta["smoothcache_weight"]``.
    Nothing is changed. Time is close to linear in the number of nodes (``bench/find_sites.py``).
    """
    return find_sites_and_rejections(graph)[0]


def find_sites_and_rejections(graph: Graph) -> tuple[list[Site], list[Rejection]]:
    """The sites, and every two-tensor add that was looked at and not taken."""
    facts = GraphFacts(graph)
    candidates: dict[Node, tuple[Candidate, ...]] = {}
    rejections: list[Rejection] = []
    for add in facts.nodes:
        if not is_sum(add) or is_partial_sum(add):
            continue
        result = search(facts, add, candidates)
        for part in result.absorbed:
            del candidates[part]
        if result.found:
            candidates[add] = result.found
        else:
            rejections.append(Rejection(add, result.reason))
    branches = [branch for found in candidates.values() for branch in branches_of_sum(facts, found)]
    return _finish(facts, [_merge(facts, group) for group in _shared_work(branches)]), rejections


def _shared_work(branches: list[Branch]) -> list[list[Branch]]:
    """Branches grouped so that those that share attention or matmuls with parameters are together: a union-find."""
    groups: list[list[Branch]] = []
    group_of_node: dict[Node, list[Branch]] = {}
    for branch in branches:
        joined = [branch]
        shared = {id(group): group for node in branch.candidate.work if (group := group_of_node.get(node))}
        for other in shared.values():
            groups.remove(other)
            joined = other + joined
        groups.append(joined)
        for member in joined:
            for node in member.candidate.work:
                group_of_node[node] = joined
    return groups


def _merge(facts: GraphFacts, branches: list[Branch]) -> Site:
    kinds = {branch.kind for branch in branches}
    if "attn_ffn" in kinds or ("ffn" in kinds and len(kinds) > 1):
        kind = "attn_ffn"
    elif len(kinds) > 1:
        kind = "attn"
    else:
        (kind,) = kinds
    outputs = tuple(dict.fromkeys(branch.output for branch in branches))
    region = sorted({node for branch in branches for node in branch.candidate.region}, key=facts.position.__getitem__)
    heavy = [node for node in region if any(node in branch.candidate.heavy for branch in branches)]
    weights = dict.fromkeys(weight for node in heavy for weight in facts.weight_nodes(node) if WEIGHT in weight.meta)
    path = common_module(weight.meta[WEIGHT] for weight in weights)
    containers = _uncalled_components(path, _called_modules(heavy))
    return Site(
        name=drop_components(path, containers),
        kind=kind,
        outputs=outputs,
        adds=tuple(dict.fromkeys(branch.candidate.add for branch in branches)),
        gates=tuple(branch.gates for branch in branches),
        region=tuple(region),
        weights=tuple(weights),
        containers=containers,
        flops=0,  # known once all sites are: see _finish
        cache_bytes=sum(output_bytes(output) for output in outputs),
    )


def _uncalled_components(path: str, called: set[str]) -> int:
    """How many trailing components name containers, which no module's call shows up for (``ff.net``)."""
    depth = len(path.split("."))
    for count in range(depth):
        if any(f".{drop_components(path, count)}".endswith(f".{module}") for module in called):
            return count
    return 0


def _called_modules(nodes: Iterable[Node]) -> set[str]:
    """Paths of all modules whose forward was running when one of the nodes was made."""
    paths = set()
    for node in nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            paths.add(frame_path(path))
    return paths - {""}


def _finish(facts: GraphFacts, sites: list[Site]) -> list[Site]:
    """The sites in graph order, with what depends on all of them: unique names, and the work that each saves."""
    sites.sort(key=lambda site: facts.position[site.outputs[0]])
    names = unique_names([site.name for site in sites], [site.kind for site in sites])
    outputs = {output for site in sites for output in site.outputs}
    return [
        replace(site, name=name, flops=count_flops(only_needed_by(site.outputs, outputs)))
        for site, name in zip(sites, names, strict=True)
    ]


def only_needed_by(outputs: Iterable[Node], stored: Collection[Node] = ()) -> set[Node]:
    """The nodes that are dead once every use of ``outputs`` is replaced, the outputs with them.

    What other sites store is computed whether or not this step goes on to use it.
    """
    dead = set(outputs)
    pending = list(dead)
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent.op != "call_function" or parent in dead or parent in stored:
                continue
            if all(user in dead for user in parent.users):
                dead.add(parent)
                pending.append(parent)
    return dead


def output_bytes(output: Node) -> int:
    return bytes_like(tensor_value(output))


def bytes_like(value: torch.Tensor) -> int:
    """Bytes of a tensor of this shape and dtype, for the sizes that the graph was captured with."""
    elements = 1
    for size in value.shape:
        elements *= concrete(size)
    return elements * value.element_size()
