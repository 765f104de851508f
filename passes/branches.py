"""The branches that a residual add sums up.

A branch leads from a skip path to a summand beside it (``sums.py``), unless a rule says that it is none
(``candidates.py``). In these patterns ``f`` and ``g`` are attention or feed-forwards:

=============================================  =========================================================
add                                            branches
=============================================  =========================================================
``x + gate * f(x)``, ``addcmul(x, gate, f)``   ``f``, cached before its gate
``x + f(x) + g(x)``                            ``f`` and ``g``
``scale * x + f(x)``, ``x0 + x + f(x)``        ``f``, from ``x``
``x + proj(cat(attn(x), act(up(x))))``         the whole of it, ``attn_ffn``
``y + g(y)`` with ``y = x + f(x)``             ``g``; ``f`` is the inner add's
``x + g(x + f(x))``                            ``g``, from the inner add on, whose branch is ``f``
``x + attn(x) + cross(attn(x))``               ``attn``, and ``cross`` from the cached output of ``attn``
``x + proj(cat(y + g(y), f(x)))``              the whole of it: the inner add is a part of the branch
a residual around several blocks               none
=============================================  =========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from .candidates import RULES, Candidate, has_no_work, is_linear
from .facts import GraphFacts, aten, is_product, is_view_or_cast, packet, tensor_value, through_views
from .flops import concrete, depends_on_data
from .kinds import kind_of
from .sums import is_partial_sum, skip_candidates, summands, terms_beside

#: Shapes of the factors between a branch's output and its add.
Gates = tuple[tuple[int, ...], ...]

#: A block's branch may start from a sum inside of the block; from further back it would be a residual around blocks.
SUMS_IN_A_BLOCK = 2


@dataclass(frozen=True, eq=False)
class Branch:
    """A candidate that no rule rejects.

    Attributes:
        candidate: where it begins and ends, and what lies between.
        kind: ``attn``, ``cross_attn``, ``ffn`` or ``attn_ffn``.
        output: the value to cache, before gates.
        gates: shapes of the factors between ``output`` and the add.
    """

    candidate: Candidate
    kind: str
    output: Node
    gates: Gates


@dataclass(frozen=True)
class Search:
    """What an add was found to be.

    Attributes:
        found: its candidates; none if it is no residual add.
        absorbed: earlier adds that are parts of them.
        reason: why there are none.
    """

    found: tuple[Candidate, ...] = ()
    absorbed: frozenset[Node] = frozenset()
    reason: str = ""


def search(facts: GraphFacts, add: Node, earlier: Mapping[Node, tuple[Candidate, ...]]) -> Search:
    """The candidates that a residual add sums up; ``earlier`` has those of the adds before it."""
    leaves = summands(add)
    skips = skip_candidates(facts, leaves)
    if not skips:
        fixed = any(leaf not in facts.activations for leaf in leaves)
        reason = "adds a parameter or a constant" if fixed else "neither operand is computed from the other"
        return Search(reason=reason)
    reasons: list[str] = []
    found: dict[Node, Candidate] = {}
    absorbed: set[Node] = set()
    for leaf, skip in skips.items():
        for term in terms_beside(facts, add, leaf, skip):
            if term in found or not facts.descends(through_views(term), skip):
                continue
            left = {node: candidates for node, candidates in earlier.items() if node not in absorbed}
            candidate, parts, reason = _beside_inner_sums(facts, Candidate.between(facts, add, skip, term), left)
            reason = reason or next((rule.reason for rule in RULES if rule.applies(facts, candidate)), "")
            if reason:
                reasons.append(reason)
            else:
                found[term] = candidate
                absorbed.update(parts)
    reason = "" if found else "; ".join(dict.fromkeys(reasons))
    return Search(tuple(found.values()), frozenset(absorbed), reason)


def _beside_inner_sums(
    facts: GraphFacts, candidate: Candidate, earlier: Mapping[Node, tuple[Candidate, ...]]
) -> tuple[Candidate, list[Node], str]:
    """The candidate without what the residual adds inside of it have; those that are parts of it; why it is none."""
    inner = [node for node in candidate.region if node in earlier]
    if not inner:
        return candidate, [], ""
    if _is_part(facts, inner, candidate, earlier):
        return candidate, inner, ""
    # x + ffn(x + attn(x)): the branch is what comes after the inner sum.
    last = _end_of_path(inner, candidate.skip, earlier)
    if last is not None and len(inner) <= SUMS_IN_A_BLOCK:
        rest = Candidate.between(facts, candidate.add, last, candidate.term)
        passed_by = any(not facts.descends(last, node) for node in candidate.work - rest.work)
        if not (has_no_work(facts, rest) or is_linear(facts, rest) or passed_by):
            return rest, [], ""
    return candidate, [], f"spans the residual add {inner[-1].name}, which is a site's"


def _is_part(
    facts: GraphFacts, inner: list[Node], candidate: Candidate, earlier: Mapping[Node, tuple[Candidate, ...]]
) -> bool:
    """Whether the one residual add inside of a candidate is a part of it: other work of it runs beside the add.

    As in ``x + proj(cat(y + cross(y), mlp(x)))`` with ``y = attn(x)``. In a residual around blocks all lies in a row.
    """
    if len(inner) > 1 or earlier[inner[0]][0].skip is candidate.skip:
        return False
    (node,) = inner
    own = {work for part in earlier[node] for work in part.region}
    return any(
        work not in own and not facts.descends(node, work) and not facts.descends(work, node) for work in candidate.work
    )


def _end_of_path(inner: list[Node], skip: Node, earlier: Mapping[Node, tuple[Candidate, ...]]) -> Node | None:
    """The last of the residual adds inside of a region, if all of them continue its skip path."""
    path = {skip}
    for node in inner:
        if earlier[node][0].skip not in path:
            return None
        path.add(node)
    return inner[-1]


def branches_of_sum(facts: GraphFacts, candidates: tuple[Candidate, ...]) -> list[Branch]:
    """The branches of one residual add.

    One that is computed from another's output alone starts there: in ``x + attn(x) + cross(attn(x))`` the
    cross-attention starts from the attention's output, so reused attention feeds it from the cache.
    """
    branches = [Branch(candidate, kind_of(facts, candidate), *_output_and_gates(candidate)) for candidate in candidates]
    for index, branch in enumerate(branches):
        for other in branches:
            if other is not branch and (rest := _from_output(facts, branches[index], other.output)):
                branches[index] = replace(branches[index], candidate=rest, kind=kind_of(facts, rest))
    return branches


def _from_output(facts: GraphFacts, branch: Branch, output: Node) -> Candidate | None:
    """What is left of a branch behind another one's output, if nothing of it runs beside that."""
    region = branch.candidate.region
    if output not in region or output is branch.output:
        return None
    if not all(node is output or facts.descends(node, output) or facts.descends(output, node) for node in region):
        return None
    rest = Candidate.between(facts, branch.candidate.add, output, branch.candidate.term)
    return None if has_no_work(facts, rest) or is_linear(facts, rest) else rest


def _output_and_gates(candidate: Candidate) -> tuple[Node, Gates]:
    """From the add back through gates, layer scales, views and casts to the value to cache."""
    node, inside, gates = candidate.term, set(candidate.region), []
    for user in node.users:
        if packet(user) is aten.addcmul and node in user.args[1:] and (user is candidate.add or is_partial_sum(user)):
            gates += [_shape(factor) for factor in user.args[1:] if factor is not node]
    while True:
        if is_view_or_cast(node) and node.args[0] in inside and not depends_on_data(tensor_value(node.args[0])):
            node = node.args[0]
        elif is_product(node) and (factors := _product_of_branch_and_gate(node, inside)):
            node, gate = factors
            if isinstance(gate, Node) and tensor_value(gate) is not None:
                gates.append(_shape(gate))
        else:
            return node, tuple(gates)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(concrete(size) for size in tensor_value(node).shape)


def _product_of_branch_and_gate(node: Node, inside: set[Node]) -> tuple[Node, object] | None:
    left, right = node.args[:2]
    left_inside = isinstance(left, Node) and left in inside
    right_inside = isinstance(right, Node) and right in inside
    if left_inside and not right_inside and not node.kwargs:
        return left, right
    if right_inside and not left_inside and packet(node) is not aten.div:
        return right, left
    return None
