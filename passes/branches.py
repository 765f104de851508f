"""Residual branches: which adds sum up a skip path and branches of it, and what each branch is."""

from __future__ import annotations

from collections.abc import Mapping
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


def addends(node: Node) -> tuple[Node, ...]:
    """The tensors that a node sums up, or nothing.

    ``addcmul(x, gate, y)``, a sum and a product in one, has three: which of the factors is a branch and which a gate
    is told by what they are computed from.
    """
    if node.op != "call_function" or packet(node) not in (aten.add, aten.addcmul):
        return ()
    return node.args if all(isinstance(arg, Node) for arg in node.args) else ()


def is_sum(node: Node) -> bool:
    return bool(addends(node)) and tensor_value(node) is not None


def continues(add: Node) -> bool:
    """Whether the add is part of a longer sum, ``x + attn + ffn``, whose last add is the one to look at."""
    if len(add.users) != 1:
        return False
    (user,) = add.users
    if not is_sum(user) or (packet(user) is aten.addcmul and add in user.args[1:]):
        return False
    return tensor_value(user).shape == tensor_value(add).shape


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
    """The branches that a residual add sums up, or none and the reason; ``taken`` has the branches of earlier adds."""
    leaves = _leaves(add)
    bases = {leaf: through_views(leaf) for leaf in leaves}
    if not (leading := _leading(facts, bases)):
        bases = {leaf: _unscaled(facts, leaf, base, bases) for leaf, base in bases.items()}
        leading = _leading(facts, bases)
    if not leading:
        fixed = any(leaf not in facts.activations for leaf in leaves)
        return [], "adds a parameter or a constant" if fixed else "neither operand is computed from the other"
    # With several, a summand belongs to the nearest that a branch leads to it from: in x0 + x + branch(x) that is x,
    # in x + y + cross(y) with y = attn(x) there is one branch from y and one from x.
    reasons: list[str] = []
    found: dict[Node, Branch] = {}
    for skip_leaf in sorted(leading, key=lambda leaf: facts.position[bases[leaf]], reverse=True):
        skip = bases[skip_leaf]
        for term in _terms(facts, add, skip_leaf, skip):
            if term in found or not facts.descends(through_views(term), skip):
                continue
            branch, reason = _branch_of(facts, add, skip, term, taken)
            if branch is None:
                reasons.append(reason)
            else:
                found[term] = branch
    return list(found.values()), "" if found else "; ".join(dict.fromkeys(reasons))


def _leading(facts: GraphFacts, bases: Mapping[Node, Node]) -> list[Node]:
    """The summands from which another one is computed; ``bases`` has what each is a view of."""
    return [
        leaf
        for leaf, base in bases.items()
        if any(facts.descends(other, base) for other in bases.values() if other is not base)
    ]


def _unscaled(facts: GraphFacts, leaf: Node, base: Node, bases: Mapping[Node, Node]) -> Node:
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


def _branch_of(
    facts: GraphFacts, add: Node, skip: Node, term: Node, taken: dict[Node, list[Branch]]
) -> tuple[Branch | None, str]:
    """The branch between the skip path and one summand, or None and the reason."""
    branch = _between(facts, add, skip, term)
    inner = [node for node in branch.region if node in taken]
    if inner and not (part := _is_part(facts, inner, branch, taken)):
        # x + ffn(x + attn(x)): the branch is what comes after the inner sum.
        last = _end_of_path(inner, skip, taken)
        whole, branch = branch, _between(facts, add, last or skip, term)
        passed_by = any(
            not facts.descends(last, node)
            for node in (whole.heavy | whole.attention) - branch.heavy - branch.attention
            if last is not None
        )
        if last is None or len(inner) > SUMS_IN_A_BLOCK or not branch.heavy or _is_linear(branch) or passed_by:
            return None, f"spans the residual add {inner[-1].name}, which is a site's"
    if not branch.heavy:
        return None, "no matmul, convolution or opaque op with parameters lies between its operands"
    if _is_linear(branch):
        return None, "a projection and no more: neither attention nor a feed-forward"
    if depends_on_data(tensor_value(term)):
        return None, "its size depends on data, so no cache can be made for it before the model runs"
    if not branch.attention and not facts.has_seen_attention(branch.skip):
        if tensor_value(add).ndim < 3:
            return None, "two-dimensional, and no attention before it: a conditioning vector and no sequence of tokens"
        if not facts.depends_on_tokens(branch.skip):
            return None, "depends on vectors alone, as the timestep is one: conditioning and no tokens"
    if inner and part:
        del taken[inner[0]]
    return branch, ""


def _is_part(facts: GraphFacts, inner: list[Node], branch: Branch, taken: dict[Node, list[Branch]]) -> bool:
    """Whether the one residual add inside of a branch is a part of it: other work of the branch runs beside it.

    As in ``x + proj(cat(y + cross(y), mlp(x)))`` with ``y = attn(x)``. In a residual around blocks all lies in a row.
    """
    if len(inner) > 1 or taken[inner[0]][0].skip is branch.skip:
        return False
    (node,) = inner
    own = {work for part in taken[node] for work in part.region}
    return any(
        work not in own and not facts.descends(node, work) and not facts.descends(work, node)
        for work in branch.heavy | branch.attention
    )


def start_from_each_other(facts: GraphFacts, branches: list[Branch]) -> None:
    """Of one sum's branches, let one that is computed from another's output alone start there.

    In ``x + attn(x) + cross(attn(x))`` the cross-attention starts from the attention's output; reused attention then
    feeds it from the cache.
    """
    for branch in branches:
        for other in branches:
            output = other.output
            if other is branch or output not in branch.region or output is branch.output:
                continue
            if all(
                node is output or facts.descends(node, output) or facts.descends(output, node) for node in branch.region
            ):
                part = _between(facts, branch.add, output, branch.term)
                if part.heavy and not _is_linear(part):
                    branch.skip, branch.region = output, part.region
                    branch.heavy, branch.attention = part.heavy, part.attention
                    branch.kind = kind_of(facts, branch)


def _between(facts: GraphFacts, add: Node, skip: Node, term: Node) -> Branch:
    region = facts.between(skip, term)
    heavy = {node for node in region if facts.bears_weight(node)}
    attention = {node for node in region if facts.mixes_activations(node)}
    return Branch(add, skip, term, region, heavy, attention)


def _is_linear(branch: Branch) -> bool:
    """Whether the branch only projects: a convolution for positions, a frame mixer, a LoRA beside its base."""
    if branch.attention or any(is_opaque(node) for node in branch.heavy):
        return False
    projected: set[Node] = set()
    for node in branch.region:
        sides = [parent in projected for parent in node.all_input_nodes]
        if node in branch.heavy or any(sides):
            projected.add(node)
        if any(sides) and (packet(node) in NONLINEAR or (is_product(node) and len(sides) > 1 and all(sides))):
            return False
    return True


def _end_of_path(inner: list[Node], skip: Node, taken: dict[Node, list[Branch]]) -> Node | None:
    """The last of the residual adds inside of a region, if all of them continue its skip path."""
    path = {skip}
    for node in inner:
        if taken[node][0].skip not in path:
            return None
        path.add(node)
    return inner[-1]


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
    left, *others = (
        {node for node in facts.between(skip, side) if facts.bears_weight(node) or facts.mixes_activations(node)}
        for side in addends(add)
    )
    return any(left & other for other in others)


def kind_of(facts: GraphFacts, branch: Branch) -> str:
    if not branch.attention:
        return "ffn"
    reads_itself = any(
        all(side is branch.skip or facts.descends(side, branch.skip) for side in facts.mixes_activations(node))
        for node in branch.attention
    )
    if _holds_feed_forward(facts, branch):
        return "attn_ffn"
    return "attn" if reads_itself else "cross_attn"


def _holds_feed_forward(facts: GraphFacts, branch: Branch) -> bool:
    """Whether a feed-forward passes by the attention and joins it: in a sum, or in a cat before a shared projection.

    In a cat a matmul and a nonlinearity are enough, in a sum another matmul must follow. A gate on attention's output
    joins it in a product, a recurrence adds gated keys and values to its state, and what joins before the last
    attention makes its queries or keys: all that is attention.
    """
    after_attention: set[Node] = set()
    up: set[Node] = set()
    activated: set[Node] = set()
    down: set[Node] = set()
    for node in branch.region:
        parents = set(node.all_input_nodes)
        if node in branch.attention or parents & after_attention:
            after_attention.add(node)
            joined = activated | down if packet(node) in (aten.cat, aten.stack) else down
            joins = packet(node) in (aten.cat, aten.stack, aten.add, aten.addcmul) and parents & joined
            if joins and not any(facts.descends(later, node) for later in branch.attention):
                return True
            continue
        if parents & down or (parents & activated and node in branch.heavy):
            down.add(node)
        elif parents & activated or (parents & up and packet(node) in NONLINEAR):
            activated.add(node)
        elif parents & up or node in branch.heavy:
            up.add(node)
    return False


def walk_back_to_output(facts: GraphFacts, branch: Branch) -> None:
    """From the add back through gates, layer scales, views and casts to the value to cache."""
    node, inside = branch.term, set(branch.region)
    for user in node.users:
        if packet(user) is aten.addcmul and node in user.args[1:] and (user is branch.add or continues(user)):
            branch.gates.extend(_shape(factor) for factor in user.args[1:] if factor is not node)
    while True:
        if is_view_or_cast(node) and node.args[0] in inside and not depends_on_data(tensor_value(node.args[0])):
            node = node.args[0]
        elif is_product(node) and (factors := _product_of_branch_and_gate(node, inside)):
            node, gate = factors
            if isinstance(gate, Node) and tensor_value(gate) is not None:
                branch.gates.append(_shape(gate))
        else:
            branch.output = node
            return


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(concrete(size) for size in tensor_value(node).shape)


def _product_of_branch_and_gate(node: Node, inside: set[Node]) -> tuple[Node, object] | None:
    left, right = node.args[:2]
    left_inside = isinstance(left, Node) and left in inside
    right_inside = isinstance(right, Node) and right in inside
    if left_inside and not right_inside and not node.kwargs:
        return left, right
    if right_inside and not left_inside and packet(node) not in (aten.div,):
        return right, left
    return None
