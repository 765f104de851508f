"""Residual branches: which adds sum up a skip path and branches of it, and what each branch is."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from .facts import (
    NONLINEAR,
    GraphFacts,
    aten,
    is_product,
    is_view_or_cast,
    packet,
    tensor_value,
    through_views,
)
from .flops import concrete, depends_on_data


@dataclass(eq=False)
class Branch:
    """One residual branch: ``add`` adds ``term`` to what ``skip`` is a view of."""

    add: Node
    skip: Node
    term: Node
    region: list[Node]
    heavy: set[Node]
    attention: set[Node]
    kind: str = ""
    output: Node | None = None
    gates: list[tuple[int, ...]] = field(default_factory=list)


def addends(node: Node) -> tuple[Node, Node] | None:
    """The two tensors of a plain sum, or None."""
    if node.op != "call_function":
        return None
    if packet(node) is aten.add and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2:
        left, right = node.args
        if isinstance(left, Node) and isinstance(right, Node):
            return left, right
    return None


def is_sum(node: Node) -> bool:
    return addends(node) is not None and tensor_value(node) is not None


def continues(add: Node) -> bool:
    """Whether the add is part of a longer sum, ``x + attn + ffn``, whose last add is the one to look at."""
    if len(add.users) != 1:
        return False
    (user,) = add.users
    return is_sum(user) and tensor_value(user).shape == tensor_value(add).shape


def _leaves(node: Node) -> list[Node]:
    """The summands of a sum of sums."""
    return [
        leaf
        for operand in addends(node)
        for leaf in (_leaves(operand) if is_sum(operand) and continues(operand) else [operand])
    ]


def branches_of(facts: GraphFacts, add: Node, site_adds: set[Node]) -> tuple[list[Branch], str]:
    """The branches that a residual add sums up, or none and the reason."""
    leaves = _leaves(add)
    if any(leaf not in facts.activations for leaf in leaves) and len(leaves) == 2:
        return [], "adds a parameter or a constant"
    bases = {leaf: through_views(leaf) for leaf in leaves}
    leading = [
        leaf
        for leaf in leaves
        if any(facts.descends(bases[other], bases[leaf]) for other in leaves if other is not leaf)
    ]
    if not leading:
        return [], "neither operand is computed from the other"
    # With several, as in a long skip connection's x0 + x + branch(x), the nearest one is the skip path.
    skip_leaf = max(leading, key=lambda leaf: facts.position[bases[leaf]])
    skip = bases[skip_leaf]
    terms = [term for term in _terms(facts, add, skip_leaf, skip) if facts.descends(through_views(term), skip)]
    branches, reasons = [], []
    for term in terms:
        region = facts.between(skip, term)
        inner = next((node for node in region if node in site_adds), None)
        branch = Branch(
            add,
            skip,
            term,
            region,
            heavy={node for node in region if facts.bears_weight(node)},
            attention={node for node in region if facts.mixes_activations(node)},
        )
        if inner is not None:
            reasons.append(f"spans the residual add {inner.name}, which is a site's")
        elif not branch.heavy:
            reasons.append("no matmul, convolution or opaque op with parameters lies between its operands")
        elif depends_on_data(tensor_value(term)):
            reasons.append("its size depends on data, so no cache can be made for it before the model runs")
        elif tensor_value(add).ndim < 3:
            reasons.append("two-dimensional: a conditioning vector and no sequence of tokens")
        else:
            branches.append(branch)
    return branches, "; ".join(dict.fromkeys(reasons))


def _terms(facts: GraphFacts, add: Node, skip_leaf: Node, skip: Node) -> list[Node]:
    """The summands beside the skip path; a sum whose two sides share heavy work stays one (a LoRA beside its base)."""
    terms = []
    for operand in addends(add):
        if operand is skip_leaf:
            continue
        nested = is_sum(operand) and continues(operand)
        if nested and (skip_leaf in _leaves(operand) or not _sides_share_work(facts, operand, skip)):
            terms.extend(_terms(facts, operand, skip_leaf, skip))
        else:
            terms.append(operand)
    return terms


def _sides_share_work(facts: GraphFacts, add: Node, skip: Node) -> bool:
    left, right = (
        {node for node in facts.between(skip, side) if facts.bears_weight(node) or facts.mixes_activations(node)}
        for side in addends(add)
    )
    return bool(left & right)


def kind_of(facts: GraphFacts, branch: Branch) -> str:
    if not branch.attention:
        return "ffn"
    reads_itself = any(
        all(side is branch.skip or facts.descends(side, branch.skip) for side in facts.mixes_activations(node))
        for node in branch.attention
    )
    if _holds_feed_forward(branch):
        return "attn_ffn"
    return "attn" if reads_itself else "cross_attn"


def _holds_feed_forward(branch: Branch) -> bool:
    """Whether a path with a matmul and a nonlinearity passes by the attention and joins it in a cat or a sum.

    A gate on attention's output joins it in a product and is attention; a convolution on the values (as in linear
    attention) has no nonlinearity.
    """
    after_attention, after_heavy, feed_forward = set(), set(), set()
    for node in branch.region:
        parents = node.all_input_nodes
        if node in branch.attention or any(parent in after_attention for parent in parents):
            after_attention.add(node)
            joins = packet(node) in (aten.cat, aten.add, aten.stack)
            if joins and any(parent in feed_forward for parent in parents):
                return True
            continue
        if node in branch.heavy or any(parent in after_heavy for parent in parents):
            after_heavy.add(node)
        if any(parent in feed_forward for parent in parents) or (packet(node) in NONLINEAR and node in after_heavy):
            feed_forward.add(node)
    return False


def walk_back_to_output(facts: GraphFacts, branch: Branch) -> None:
    """From the add back through gates, layer scales, views and casts to the value to cache."""
    node, inside = branch.term, set(branch.region)
    while True:
        if is_view_or_cast(node) and node.args[0] in inside and not depends_on_data(tensor_value(node.args[0])):
            node = node.args[0]
        elif is_product(node) and (factors := _product_of_branch_and_gate(node, inside)):
            node, gate = factors
            if isinstance(gate, Node) and (value := tensor_value(gate)) is not None:
                branch.gates.append(tuple(concrete(size) for size in value.shape))
        else:
            branch.output = node
            return


def _product_of_branch_and_gate(node: Node, inside: set[Node]) -> tuple[Node, object] | None:
    left, right = node.args[:2]
    left_inside = isinstance(left, Node) and left in inside
    right_inside = isinstance(right, Node) and right in inside
    if left_inside and not right_inside and not node.kwargs:
        return left, right
    if right_inside and not left_inside and packet(node) not in (aten.div,):
        return right, left
    return None
