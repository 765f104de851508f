"""The kind of a branch: attention, cross-attention, feed-forward, or attention and feed-forward in one."""

from __future__ import annotations

from torch.fx import Node

from .candidates import Candidate
from .facts import NONLINEAR, GraphFacts, aten, packet


def kind_of(facts: GraphFacts, candidate: Candidate) -> str:
    if not candidate.attention:
        return "ffn"
    if _holds_feed_forward(facts, candidate):
        return "attn_ffn"
    attends_to_itself = any(
        all(side is candidate.skip or facts.descends(side, candidate.skip) for side in facts.mixes_activations(node))
        for node in candidate.attention
    )
    return "attn" if attends_to_itself else "cross_attn"


def _holds_feed_forward(facts: GraphFacts, candidate: Candidate) -> bool:
    """Whether a feed-forward passes by the attention and joins it: in a sum, or in a cat before a shared projection::

        norm(x) ──▶ q, k, v ──▶ attention ─────────────▶ cat or + ──▶ out
            └─────▶ up ──▶ nonlinearity ──▶ (down) ─────────┘

    In a cat ``up`` and a nonlinearity are enough; in a sum ``down`` must follow. A gate on attention's output joins it
    in a product, a recurrence adds gated keys and values to its state, and what joins before the last attention makes
    its queries or keys: all that is attention.
    """
    after_attention, up, activated, down = (set[Node]() for _ in range(4))
    for node in candidate.region:
        parents = set(node.all_input_nodes)
        if node in candidate.attention or parents & after_attention:
            after_attention.add(node)
            is_cat = packet(node) in (aten.cat, aten.stack)
            joined = activated | down if is_cat else down
            joins = (is_cat or packet(node) in (aten.add, aten.addcmul)) and parents & joined
            if joins and not any(facts.descends(later, node) for later in candidate.attention):
                return True
        elif parents & down or (parents & activated and node in candidate.heavy):
            down.add(node)
        elif parents & activated or (parents & up and packet(node) in NONLINEAR):
            activated.add(node)
        elif parents & up or node in candidate.heavy:
            up.add(node)
    return False
