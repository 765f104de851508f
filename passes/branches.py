"""Residual branches: which adds sum up a skip path and branches of it, and what each branch is."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from .facts import (
    NONLINEAR,
    GraphFacts,
    aten,
    is_opaque,
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

    @property
    def is_linear(self) -> bool:
        """Whether it is no more than one product with a parameter: a projection, or a convolution over neighbours."""
        return len(self.heavy) == 1 and not self.attention and not any(is_opaque(node) for node in self.heavy)


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


#: A block's branch may start from a sum inside of the block; from further back it would be a residual around blocks.
SUMS_IN_A_BLOCK = 2


def branches_of(facts: GraphFacts, add: Node, taken: dict[Node, list[Branch]]) -> tuple[list[Branch], str]:
    """The branches that a residual add sums up, or none and the reason.

    ``taken`` has the branches of earlier adds; those that prove to be parts of a larger branch are removed from it.
    """
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
        branch, reason = _branch_of(facts, add, skip, term, taken)
        if branch is None:
            reasons.append(reason)
        else:
            branches.append(branch)
    return branches, "; ".join(dict.fromkeys(reasons))


def _branch_of(
    facts: GraphFacts, add: Node, skip: Node, term: Node, taken: dict[Node, list[Branch]]
) -> tuple[Branch | None, str]:
    """The branch between the skip path and one summand, or None and the reason."""
    branch = _between(facts, add, skip, term)
    inner = [node for node in branch.region if node in taken]
    if inner:
        on_the_way, aside = _sort_out(inner, skip, taken)
        if any(not part.is_linear for node in aside for part in taken[node]):
            return None, f"spans the residual add {aside[0].name}, which is a site's"
        if on_the_way:
            # x + ffn(x + attn(x)): the branch is what comes after the inner sum.
            whole, branch = branch, _between(facts, add, on_the_way[-1], term)
            passed_by = any(
                not facts.descends(on_the_way[-1], node)
                for node in (whole.heavy | whole.attention) - branch.heavy - branch.attention
            )
            if len(on_the_way) > SUMS_IN_A_BLOCK or branch.is_linear or not branch.heavy or passed_by:
                return None, f"spans the residual add {on_the_way[-1].name}, which is a site's"
    if not branch.heavy:
        return None, "no matmul, convolution or opaque op with parameters lies between its operands"
    if depends_on_data(tensor_value(term)):
        return None, "its size depends on data, so no cache can be made for it before the model runs"
    if tensor_value(add).ndim < 3:
        return None, "two-dimensional: a conditioning vector and no sequence of tokens"
    if not facts.depends_on_tokens(branch.skip):
        return None, "depends on vectors alone, as the timestep is one: conditioning and no tokens"
    for node in inner:
        if node in branch.region:
            del taken[node]
    return branch, ""


def _between(facts: GraphFacts, add: Node, skip: Node, term: Node) -> Branch:
    region = facts.between(skip, term)
    heavy = {node for node in region if facts.bears_weight(node)}
    attention = {node for node in region if facts.mixes_activations(node)}
    return Branch(add, skip, term, region, heavy, attention)


def _sort_out(inner: list[Node], skip: Node, taken: dict[Node, list[Branch]]) -> tuple[list[Node], list[Node]]:
    """Residual adds inside of a region: those that continue its skip path, and those of other paths."""
    path, on_the_way, aside = {skip}, [], []
    for node in inner:
        if taken[node][0].skip in path:
            path.add(node)
            on_the_way.append(node)
        else:
            aside.append(node)
    return on_the_way, aside


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
