"""Residual sums: which nodes add tensors up, and which of the summands the others are computed from."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from .facts import GraphFacts, aten, is_product, packet, tensor_value, through_views


def addends(node: Node) -> tuple[Node, ...]:
    """The tensors that a node sums up, or nothing.

    ``addcmul(x, gate, y)``, a sum and a product in one, has three: which of the factors is a branch and which a gate
    follows from what they are computed from.
    """
    if node.op != "call_function" or packet(node) not in (aten.add, aten.addcmul):
        return ()
    return node.args if all(isinstance(arg, Node) for arg in node.args) else ()


def is_sum(node: Node) -> bool:
    return bool(addends(node)) and tensor_value(node) is not None


def is_partial_sum(add: Node) -> bool:
    """Whether the add is part of a longer sum, ``x + attn + ffn``, whose last add is the one to look at."""
    if len(add.users) != 1:
        return False
    (user,) = add.users
    if not is_sum(user) or (packet(user) is aten.addcmul and add in user.args[1:]):
        return False
    return tensor_value(user).shape == tensor_value(add).shape


def summands(node: Node) -> list[Node]:
    """The summands of a sum of sums."""
    return [
        leaf
        for operand in addends(node)
        for leaf in (summands(operand) if is_sum(operand) and is_partial_sum(operand) else [operand])
    ]


def skip_candidates(facts: GraphFacts, leaves: list[Node]) -> dict[Node, Node]:
    """Summand -> the skip path's value, for the summands from which another one is computed; the nearest first.

    With several, a summand belongs to the nearest that a branch leads to it from: in ``x0 + x + branch(x)`` that is
    ``x``; in ``x + y + cross(y)`` with ``y = attn(x)`` there is one branch from ``y`` and one from ``x``.
    """
    bases = {leaf: through_views(leaf) for leaf in leaves}
    found = _with_descendants(facts, bases)
    if not found:
        bases = {leaf: _without_scale(facts, leaf, base, bases) for leaf, base in bases.items()}
        found = _with_descendants(facts, bases)
    return {leaf: bases[leaf] for leaf in sorted(found, key=lambda leaf: facts.position[bases[leaf]], reverse=True)}


def _with_descendants(facts: GraphFacts, bases: Mapping[Node, Node]) -> list[Node]:
    """The summands from which another one is computed; ``bases`` has what each is a view of."""
    return [
        leaf
        for leaf, base in bases.items()
        if any(facts.descends(other, base) for other in bases.values() if other is not base)
    ]


def _without_scale(facts: GraphFacts, leaf: Node, base: Node, bases: Mapping[Node, Node]) -> Node:
    """What a summand is a multiple of, if another summand is computed from that: ``x`` of ``scale * x + branch(x)``."""
    others = [other for summand, other in bases.items() if summand is not leaf]
    pending = [base]
    while pending:
        node = pending.pop()
        if node is not base and any(facts.descends(other, node) for other in others):
            return node
        if is_product(node):
            factors = [through_views(factor) for factor in node.args[:2] if isinstance(factor, Node)]
            pending += [
                factor
                for factor in factors
                if factor in facts.activations and not any(facts.descends(other, factor) for other in factors)
            ]
    return base


def terms_beside(facts: GraphFacts, add: Node, leaf: Node, skip: Node) -> list[Node]:
    """The summands beside the skip path's own.

    A sum whose two sides share heavy work stays one term: a LoRA beside its base.
    """
    terms = []
    for operand in addends(add):
        if operand is leaf:
            continue
        nested = is_sum(operand) and is_partial_sum(operand)
        if nested and (leaf in summands(operand) or not _sides_share_work(facts, operand, skip)):
            terms.extend(terms_beside(facts, operand, leaf, skip))
        else:
            terms.append(operand)
    return terms


def _sides_share_work(facts: GraphFacts, add: Node, skip: Node) -> bool:
    left, *others = (
        {node for node in facts.between(skip, side) if facts.bears_weight(node) or facts.mixes_activations(node)}
        for side in addends(add)
    )
    return any(left & other for other in others)
