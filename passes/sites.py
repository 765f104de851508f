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
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from .facts import (
    NONLINEAR,
    WEIGHT,
    GraphFacts,
    aten,
    frame_path,
    is_product,
    is_view_or_cast,
    module_path,
    packet,
    source_line,
    tensor_value,
    through_views,
)
from .flops import concrete, count_flops
from .names import common_module, drop_components, group_of, unique_names


@dataclass(frozen=True, eq=False)
class Site:
    """One skippable computation: one residual branch, or several that share their heavy work.

    Attributes:
        name: the place in the model, such as ``transformer_blocks.3.attn1``.
        kind: ``attn``, ``cross_attn``, ``ffn`` or ``attn_ffn``.
        outputs: the values to cache, one per branch, before gates.
        adds: the residual adds that take them.
        gates: per branch, the shapes of the factors between output and add.
        region: all nodes that descend from the skip path and lead to an output.
        weights: the placeholders of the parameters of the branch's matmuls.
        containers: how many trailing components of the weights' common path name containers that are never
            called (``ff.net``), and so are left out of the name.
        flops: work that only this site needs, for the shapes the graph was captured with.
        cache_bytes: size of the outputs, in bytes.
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

    @property
    def group(self) -> str:
        return group_of(self.name)


@dataclass(frozen=True, eq=False)
class Rejection:
    """A two-tensor add that is no site's residual add, and why."""

    node: Node
    reason: str

    @property
    def module(self) -> str:
        return module_path(self.node)

    @property
    def source(self) -> str | None:
        return source_line(self.node)


@dataclass(eq=False)
class _Branch:
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


def find_sites(graph: Graph) -> list[Site]:
    """The sites of a functional ATen graph, in graph order.

    Placeholders that hold parameters or buffers carry their qualified name in ``meta["smoothcache_weight"]``.
    Nothing is changed. Time is close to linear in the number of nodes (``bench/find_sites.py``).
    """
    return analyze(graph)[0]


def analyze(graph: Graph) -> tuple[list[Site], list[Rejection]]:
    """The sites, and every two-tensor add that was looked at and not taken."""
    facts = GraphFacts(graph)
    branches: list[_Branch] = []
    rejections: list[Rejection] = []
    site_adds: set[Node] = set()
    for add in facts.nodes:
        if not _is_candidate(add) or _continues(add):
            continue
        found, reason = _branches_of(facts, add, site_adds)
        branches.extend(found)
        if found:
            site_adds.add(add)
        else:
            rejections.append(Rejection(add, reason))
    for branch in branches:
        branch.kind = _kind(facts, branch)
        _walk_back_to_output(facts, branch)
    return _finish(facts, [_merge(facts, group) for group in _shared_work(branches)]), rejections


def _addends(node: Node) -> tuple[Node, Node] | None:
    """The two tensors of a plain sum, or None."""
    if node.op != "call_function":
        return None
    if packet(node) is aten.add and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2:
        left, right = node.args
        if isinstance(left, Node) and isinstance(right, Node):
            return left, right
    return None


def _is_candidate(node: Node) -> bool:
    return _addends(node) is not None and tensor_value(node) is not None


def _continues(add: Node) -> bool:
    """Whether the add is part of a longer sum, ``x + attn + ffn``, whose last add is the one to look at."""
    if len(add.users) != 1:
        return False
    (user,) = add.users
    return _is_candidate(user) and tensor_value(user).shape == tensor_value(add).shape


def _leaves(node: Node) -> list[Node]:
    """The summands of a sum of sums."""
    return [
        leaf
        for operand in _addends(node)
        for leaf in (_leaves(operand) if _is_candidate(operand) and _continues(operand) else [operand])
    ]


def _branches_of(facts: GraphFacts, add: Node, site_adds: set[Node]) -> tuple[list[_Branch], str]:
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
        branch = _Branch(
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
        elif tensor_value(add).ndim < 3:
            reasons.append("two-dimensional: a conditioning vector and no sequence of tokens")
        else:
            branches.append(branch)
    return branches, "; ".join(dict.fromkeys(reasons))


def _terms(facts: GraphFacts, add: Node, skip_leaf: Node, skip: Node) -> list[Node]:
    """The summands beside the skip path; a sum whose two sides share heavy work stays one (a LoRA beside its base)."""
    terms = []
    for operand in _addends(add):
        if operand is skip_leaf:
            continue
        is_sum = _is_candidate(operand) and _continues(operand)
        if is_sum and (skip_leaf in _leaves(operand) or not _sides_share_work(facts, operand, skip)):
            terms.extend(_terms(facts, operand, skip_leaf, skip))
        else:
            terms.append(operand)
    return terms


def _sides_share_work(facts: GraphFacts, add: Node, skip: Node) -> bool:
    left, right = (
        {node for node in facts.between(skip, side) if facts.bears_weight(node) or facts.mixes_activations(node)}
        for side in _addends(add)
    )
    return bool(left & right)


def _kind(facts: GraphFacts, branch: _Branch) -> str:
    if not branch.attention:
        return "ffn"
    reads_itself = any(
        all(side is branch.skip or facts.descends(side, branch.skip) for side in facts.mixes_activations(node))
        for node in branch.attention
    )
    if _holds_feed_forward(branch):
        return "attn_ffn"
    return "attn" if reads_itself else "cross_attn"


def _holds_feed_forward(branch: _Branch) -> bool:
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


def _walk_back_to_output(facts: GraphFacts, branch: _Branch) -> None:
    """From the add back through gates, layer scales, views and casts to the value to cache."""
    node, inside = branch.term, set(branch.region)
    while True:
        if is_view_or_cast(node) and node.args[0] in inside:
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


def _shared_work(branches: list[_Branch]) -> list[list[_Branch]]:
    """Branches grouped so that those that share attention or matmuls with parameters are together."""
    groups: list[list[_Branch]] = []
    group_of_node: dict[Node, list[_Branch]] = {}
    for branch in branches:
        work = branch.heavy | branch.attention
        joined = [branch]
        for other in {id(group_of_node[node]): group_of_node[node] for node in work if node in group_of_node}.values():
            groups.remove(other)
            joined = other + joined
        groups.append(joined)
        for member in joined:
            for node in member.heavy | member.attention:
                group_of_node[node] = joined
    return groups


def _merge(facts: GraphFacts, branches: list[_Branch]) -> Site:
    kinds = {branch.kind for branch in branches}
    if "attn_ffn" in kinds or ("ffn" in kinds and len(kinds) > 1):
        kind = "attn_ffn"
    elif len(kinds) > 1:
        kind = "attn"
    else:
        (kind,) = kinds
    outputs = tuple(dict.fromkeys(branch.output for branch in branches))
    region = sorted({node for branch in branches for node in branch.region}, key=facts.position.__getitem__)
    heavy = [node for node in region if any(node in branch.heavy for branch in branches)]
    weights = dict.fromkeys(weight for node in heavy for weight in facts.weight_nodes(node) if WEIGHT in weight.meta)
    path = common_module(weight.meta[WEIGHT] for weight in weights)
    containers = _uncalled_components(path, _called_modules(heavy))
    return Site(
        name=drop_components(path, containers),
        kind=kind,
        outputs=outputs,
        adds=tuple(dict.fromkeys(branch.add for branch in branches)),
        gates=tuple(tuple(branch.gates) for branch in branches),
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
    value = tensor_value(output)
    elements = 1
    for size in value.shape:
        elements *= concrete(size)
    return elements * value.element_size()
