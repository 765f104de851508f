"""Stacks: runs of blocks that are cached as one, by what the whole run adds to each of its residual streams.

A run of blocks ``transformer_blocks.2-27`` gets its streams from outside (the entries) and hands them on (the exits)::

    img_2, txt_2 ──▶ block 2 ──▶ ... ──▶ block 27 ──▶ img_28, txt_28

With all of its branches at zero every exit would be an entry. What the run adds is the difference, and that is cached:
where the run is reused, ``img_28`` is ``img_2 + cache_img``, and nothing of the blocks is left.

A run holds as many blocks as nothing outside looks into: whatever its branches lead to and something outside uses must
be an exit. An output of an inner block ends a run, and so does a sum between two blocks that brings something from
outside into the stream, as a ControlNet does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch.fx import Graph, Node

from .facts import FACTORIES, GraphFacts, module_path, packet, same_sizes, source_line, tensor_value
from .flops import count_flops
from .names import STACK, BlockRange, block_of
from .sites import Site, only_needed_by, output_bytes
from .skip_path import behind_casts, entry_like, is_in_a_block, only_entry_like, without_branches
from .sums import addends, is_partial_sum, is_sum, summands

FIRST, LAST = "the first block", "the last block"


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of blocks that can be cached as one.

    Attributes:
        blocks: which.
        sites: the branches inside.
        entries: per stream, the value that the run gets.
        exits: per stream, the value that it hands on.
        region: the nodes that descend from its branches and lead to an exit.
        level: how many lists of blocks its own list is inside of.
        begins, ends: why it holds no earlier and no later block.
    """

    blocks: BlockRange
    sites: tuple[Site, ...]
    entries: tuple[Node, ...]
    exits: tuple[Node, ...]
    region: tuple[Node, ...]
    level: int = 0
    begins: str = FIRST
    ends: str = LAST


class Unstacked(NamedTuple):
    """A block that is in no stack, and why."""

    block: BlockRange
    reason: str


def find_stacks(
    graph: Graph, sites: Sequence[Site], ranges: Iterable[BlockRange] = (), longest: bool = True
) -> tuple[list[Stack], list[Unstacked]]:
    """The longest runs within each of the ``ranges``, then, if asked for, those of what is left.

    No two of them share a branch. Blocks are known by the names of their branches. Lists of blocks with more FLOPs go
    first; a list inside of a block is looked at where the list around it has no run.

    Returns:
        The stacks in graph order, and the blocks that are in none.
    """
    facts = GraphFacts(graph)
    branches = _Branches(facts, sites, _sums_of_branches(facts, sites))
    taken: set[Site] = set()
    found: list[Stack] = []
    missed: list[tuple[Unstacked, list[Site]]] = []
    for wanted in (*ranges, *((None,) if longest else ())):
        for level in range(_depth(sites)):
            for container in _containers(sites, level, wanted):
                blocks = _blocks_of([site for site in sites if site not in taken], level, container, wanted)
                for one in _runs(branches, taken, container, blocks):
                    if isinstance(one, Stack):
                        found.append(replace(one, level=level))
                        taken.update(one.sites)
                    else:
                        missed.append((one, blocks[one.block.first]))
    found.sort(key=lambda stack: facts.position[stack.exits[0]])
    return found, [one for one, members in missed if taken.isdisjoint(members)]


def as_site(stack: Stack, others: Iterable[Site]) -> Site:
    """The site of a stack; ``others`` are all sites that are cached beside it."""
    kept = {output for site in others if site not in stack.sites for output in site.outputs} | set(stack.exits)
    return Site(
        name=str(stack.blocks),
        kind=STACK,
        outputs=stack.exits,
        adds=(),
        gates=((),) * len(stack.exits),
        region=stack.region,
        weights=tuple(dict.fromkeys(weight for site in stack.sites for weight in site.weights)),
        containers=stack.level,
        flops=count_flops(only_needed_by(stack.exits, kept)),
        cache_bytes=sum(output_bytes(node) for node in stack.exits),
        entries=stack.entries,
        holds=stack.sites,
    )


@dataclass(frozen=True)
class _Branches:
    """All branches of a graph, and of each residual add what its branches consist of."""

    facts: GraphFacts
    sites: Sequence[Site]
    sums: Mapping[Node, set[Node]]


class _Refusal(NamedTuple):
    """Why blocks are no stack; and, where all runs that reach a node are none, that node."""

    reason: str
    at: Node | None = None


def _depth(sites: Sequence[Site]) -> int:
    return max((sum(part.isdigit() for part in site.name.split(".")) for site in sites), default=0)


def _block_of(site: Site, level: int) -> tuple[str, int] | None:
    """The block that a branch is in, by its name, or, where its weights lie elsewhere, by the module that adds it."""
    return block_of(site.name if block_of(site.name) is not None else module_path(site.adds[0]), level)


def _containers(sites: Sequence[Site], level: int, wanted: BlockRange | None) -> list[str]:
    """The lists of blocks, those with the most FLOPs first."""
    flops: Counter[str] = Counter()
    for site in sites:
        if (found := _block_of(site, level)) is not None and (wanted is None or found[0] == wanted.container):
            flops[found[0]] += site.flops
    return [container for container, _ in flops.most_common()]


def _blocks_of(sites: Sequence[Site], level: int, container: str, wanted: BlockRange | None) -> dict[int, list[Site]]:
    """The branches of each block of a list, in order."""
    blocks: dict[int, list[Site]] = {}
    for site in sites:
        found = _block_of(site, level)
        if found is not None and found[0] == container and (wanted is None or found[1] in wanted.indices):
            blocks.setdefault(found[1], []).append(site)
    return {index: blocks[index] for index in sorted(blocks)}


def _runs(
    branches: _Branches, taken: set[Site], container: str, blocks: Mapping[int, list[Site]]
) -> Iterator[Stack | Unstacked]:
    """The longest runs of a list of blocks, from its first block on, and the blocks between them."""
    position = branches.facts.position
    indices, begins = list(blocks), FIRST
    while indices:
        reason, count = LAST, len(indices)
        while count:
            members = [site for index in indices[:count] for site in blocks[index]]
            run = BlockRange(container, indices[0], indices[count - 1])
            stack = _stack_of(branches, members, run)
            if isinstance(stack, Stack) and taken.isdisjoint(stack.sites):
                yield replace(stack, begins=begins, ends=reason)
                break
            refusal = _Refusal("it would hold blocks of another stack") if isinstance(stack, Stack) else stack
            reason = refusal.reason
            count -= 1
            while count and refusal.at is not None and _reaches(blocks[indices[count - 1]], position, refusal.at):
                count -= 1
        else:
            yield Unstacked(BlockRange(container, indices[0], indices[0]), reason)
            count = 1
        begins, indices = reason, indices[count:]


def _reaches(block: Sequence[Site], position: Mapping[Node, int], node: Node) -> bool:
    return any(position[add] > position[node] for site in block for add in site.adds)


def _stack_of(branches: _Branches, members: Sequence[Site], blocks: BlockRange) -> Stack | _Refusal:
    """These blocks as a stack, or why they are none."""
    facts, sums = branches.facts, branches.sums
    region = _region(facts, members, sums)
    held = [site for site in branches.sites if any(output in region for output in site.outputs)]
    own = {node for site in held for node in site.region}
    own |= {part for add in sums if add in region for part in (add, *_partial_sums(add))}
    for node in facts.nodes:
        if node not in region or node in own or is_in_a_block(node):
            continue
        if any(_comes_from_outside(facts, part, node, region) for part in addends(node)):
            return _Refusal(f"{_where(node)} adds what is computed outside of the blocks", node)
    ends = {part for site in members for add in site.adds for part in (add, *_partial_sums(add))}
    pairs = _streams(facts, region, sums, held, ends)
    if isinstance(pairs, str):
        return _Refusal(pairs)
    if any(output not in region for site in held for output in site.outputs):
        return _Refusal("one of its branches shares work with a branch outside")
    if not pairs:
        return _Refusal("nothing uses what it computes")
    nodes = region | own
    return Stack(blocks, tuple(held), tuple(pairs.values()), tuple(pairs), tuple(n for n in facts.nodes if n in nodes))


def _streams(
    facts: GraphFacts, region: set[Node], sums: Mapping[Node, set[Node]], held: Sequence[Site], ends: set[Node]
) -> dict[Node, Node] | str:
    """The entry of each exit, or why something outside looks into the region.

    Args:
        sums: residual add -> what its branches consist of.
        held: the branches of the region.
        ends: the residual adds of the run's own blocks.
    """
    leaks = [node for node in facts.nodes if node in region and any(_reads(user, region) for user in node.users)]
    pairs: dict[Node, Node] = {}
    for leak in leaks:
        entry, steps = without_branches(facts, leak, region, sums)
        leaving = behind_casts(leak)
        entry = entry_like(leaving, entry) or only_entry_like(facts, leaving, held, region)
        if entry is None:
            return f"{_user(leak, region)} uses {_where(leak)}, which is no residual stream"
        if steps and steps[0] not in ends:
            return f"{_user(leak, region)} uses {_where(leak)}, a stream of blocks in another list"
        pairs[leaving] = entry
    for leak in leaks:
        own = behind_casts(leak)
        same = [other for other, entry in pairs.items() if other is not own and entry is pairs[own]]
        if any(facts.descends(other, leak) for other in same):
            return f"{_user(leak, region)} uses the output of an inner block, {_where(leak)}"
    return pairs


def _sums_of_branches(facts: GraphFacts, sites: Sequence[Site]) -> dict[Node, set[Node]]:
    """Residual add -> what its branches consist of.

    Of ``x + branch + control``, where the model adds ``control`` outside of the block, it is the sum without that.
    """
    found: dict[Node, set[Node]] = {}
    for site in sites:
        for add in site.adds:
            found.setdefault(add, set()).update(site.region)
    return {_without_control(facts, add, branch): branch for add, branch in found.items()}


def _without_control(facts: GraphFacts, add: Node, branch: set[Node]) -> Node:
    while not is_in_a_block(add):
        parts = addends(add)
        nested = [part for part in parts if is_sum(part) and is_partial_sum(part)]
        others = [part for part in parts if part not in nested]
        if len(nested) != 1 or any(
            part in branch or not _comes_from_outside(facts, part, add, branch) for part in others
        ):
            break
        if not branch.intersection(summands(nested[0])):
            break
        add = nested[0]
    return add


def _partial_sums(add: Node) -> Iterator[Node]:
    for part in addends(add):
        if is_sum(part) and is_partial_sum(part):
            yield part
            yield from _partial_sums(part)


def _reads(user: Node, region: set[Node]) -> bool:
    """Whether a node outside reads a value; what takes its shape alone does not."""
    return user not in region and packet(user) not in FACTORIES


def _region(facts: GraphFacts, members: Sequence[Site], sums: Iterable[Node]) -> set[Node]:
    """The nodes that descend from a branch's output, or are one, and lead to a residual add of these sites."""
    outputs = {output for site in members for output in site.outputs}
    wanted = {node for site in members for node in (*site.adds, *(p for add in site.adds for p in _partial_sums(add)))}
    adds = {add for add in sums if add in wanted}
    output_bits = leading = 0
    for output in outputs:
        output_bits |= 1 << facts.position[output]
    for add in adds:
        leading |= facts.ancestors[add] | 1 << facts.position[add]
    first, last = min(map(facts.position.__getitem__, outputs)), max(map(facts.position.__getitem__, adds))
    return {
        node
        for position, node in enumerate(facts.nodes[first : last + 1], first)
        if leading >> position & 1 and (node in outputs or facts.ancestors[node] & output_bits)
    }


def _comes_from_outside(facts: GraphFacts, part: Node, total: Node, region: set[Node]) -> bool:
    """Whether a summand brings tokens along, as wide as the stream: no shift, which is one for all tokens."""
    if part in region or part not in facts.activations or not facts.depends_on_tokens(part):
        return False
    ours, whole = tensor_value(part), tensor_value(total)
    return whole is not None and ours is not None and ours.ndim > 2 and same_sizes(ours.shape, whole.shape)


def _where(node: Node) -> str:
    return source_line(node) or node.name


def _user(node: Node, region: set[Node]) -> str:
    user = next(user for user in node.users if _reads(user, region))
    if user.op == "output":
        return "the model's output"
    return module_path(user) or _where(user)
