"""What may be a residual branch, and the rules that say why it is none.

A model that needs an exception gets a rule here, with its reason: users see it in ``explain``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch.fx import Node

from .facts import NONLINEAR, GraphFacts, is_opaque, is_product, packet, tensor_value
from .flops import depends_on_data


@dataclass(frozen=True, eq=False)
class Candidate:
    """What lies between a skip path and one summand of a residual add.

    Attributes:
        add: the residual add.
        skip: the skip path's value, through views.
        term: the summand.
        region: all nodes that descend from ``skip`` and lead to ``term``, in graph order.
        heavy: those of them that do heavy work with parameters: matmuls, convolutions, opaque ops.
        attention: those that mix activations with activations.
    """

    add: Node
    skip: Node
    term: Node
    region: list[Node]
    heavy: set[Node]
    attention: set[Node]

    @property
    def work(self) -> set[Node]:
        return self.heavy | self.attention

    @classmethod
    def between(cls, facts: GraphFacts, add: Node, skip: Node, term: Node) -> Candidate:
        region = facts.between(skip, term)
        heavy = {node for node in region if facts.bears_weight(node)}
        return cls(add, skip, term, region, heavy, {node for node in region if facts.mixes_activations(node)})


class Rule(NamedTuple):
    """Why a candidate is no branch."""

    applies: Callable[[GraphFacts, Candidate], bool]
    reason: str


def has_no_work(facts: GraphFacts, candidate: Candidate) -> bool:
    return not candidate.heavy


def is_linear(facts: GraphFacts, candidate: Candidate) -> bool:
    """Whether it only projects: a convolution for positions, a frame mixer, a LoRA beside its base."""
    if candidate.attention or any(is_opaque(node) for node in candidate.heavy):
        return False
    projected: set[Node] = set()
    for node in candidate.region:
        sides = [parent in projected for parent in node.all_input_nodes]
        if node in candidate.heavy or any(sides):
            projected.add(node)
        if any(sides) and (packet(node) in NONLINEAR or (is_product(node) and len(sides) > 1 and all(sides))):
            return False
    return True


def has_unknown_size(facts: GraphFacts, candidate: Candidate) -> bool:
    return depends_on_data(tensor_value(candidate.term))


def is_vector(facts: GraphFacts, candidate: Candidate) -> bool:
    return _before_attention(facts, candidate) and tensor_value(candidate.add).ndim < 3


def is_conditioning(facts: GraphFacts, candidate: Candidate) -> bool:
    return _before_attention(facts, candidate) and not facts.depends_on_tokens(candidate.skip)


def _before_attention(facts: GraphFacts, candidate: Candidate) -> bool:
    return not candidate.attention and not facts.has_seen_attention(candidate.skip)


#: In this order: the first that applies is the reported reason.
RULES = (
    Rule(has_no_work, "no matmul, convolution or opaque op with parameters lies between its operands"),
    Rule(is_linear, "a projection and no more: neither attention nor a feed-forward"),
    Rule(has_unknown_size, "its size depends on data, so no cache can be made for it before the model runs"),
    Rule(is_vector, "two-dimensional, and no attention before it: a conditioning vector and no sequence of tokens"),
    Rule(is_conditioning, "depends on vectors alone, as the timestep is one: conditioning and no tokens"),
)
