"""Facts about a graph that the passes share: order, ancestry, weights, which ops do heavy work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from .flops import SDPA, is_custom
from .mutation import arguments_by_name
from .names import WEIGHT

aten = torch.ops.aten
prims = torch.ops.prims

_SCALARS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def _ops(namespace: object, names: str) -> frozenset[object]:
    """The ops of these names that the installed torch has."""
    return frozenset(getattr(namespace, name) for name in names.split() if hasattr(namespace, name))


# Ops that hand on their first argument, element for element: a residual path is looked at through them.
VIEWS_AND_CASTS = _ops(
    aten,
    """view _unsafe_view reshape _reshape_alias view_copy permute permute_copy transpose t squeeze unsqueeze
    squeeze_copy unsqueeze_copy clone contiguous alias detach lift_fresh _to_copy to flatten unflatten""",
) | _ops(prims, "convert_element_type view_of squeeze transpose")

MATMULS = _ops(
    aten,
    """mm addmm bmm baddbmm matmul linear _int_mm _scaled_mm _weight_int8pack_mm _weight_int4pack_mm convolution
    _convolution mkldnn_convolution""",
)

NONLINEAR = _ops(
    aten,
    """gelu silu relu sigmoid tanh erf exp leaky_relu elu mish softplus hardswish hardtanh clamp_min relu6 prelu celu
    hardsigmoid log_sigmoid_forward threshold""",
)

# Checks of sizes that depend on data: they have no result, and are there for their effect.
ASSERTIONS = _ops(
    aten,
    """_assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size _assert_tensor_metadata
    _functional_assert_scalar _functional_assert_async""",
)

# Ops that take no more than shape, dtype and device of their arguments: no data flows through them.
FACTORIES = _ops(
    aten,
    """zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty
    new_empty_strided sym_size sym_stride sym_numel""",
)

_POINTWISE_PRODUCTS = frozenset({aten.mul, aten.div, prims.mul, prims.div})


def packet(node: Node) -> object:
    """The op of a call without its overload: ``aten.add`` for ``aten.add.Tensor``."""
    return getattr(node.target, "overloadpacket", node.target)


def is_view_or_cast(node: Node) -> bool:
    return node.op == "call_function" and packet(node) in VIEWS_AND_CASTS


def through_views(node: Node) -> Node:
    """The node that ``node`` is a view or cast of, or ``node`` itself."""
    while is_view_or_cast(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_product(node: Node) -> bool:
    return node.op == "call_function" and packet(node) in _POINTWISE_PRODUCTS


def tensor_value(node: Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether shapes or strides are the same for all inputs; symbols are compared as expressions, without a guard."""
    return [_expression(size) for size in left] == [_expression(size) for size in right]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def is_attention_op(node: Node) -> bool:
    """Whether the op is a fused attention: its first two tensors are queries and keys."""
    if node.op != "call_function":
        return False
    op = packet(node)
    if op in SDPA:
        return True
    # Custom kernels (flash-attn, sage, xformers) and flex_attention are known by what they are called.
    name = getattr(op, "__name__", str(op))
    return "attention" in name or "attn" in name


def is_whole_module(node: Node) -> bool:
    """Whether the op stands for a module that is kept whole (``smoothcache_fx/capture/whole.py``)."""
    return str(packet(node)) == "smoothcache.whole_module"


def is_opaque(node: Node) -> bool:
    """Whether the op is one that PyTorch cannot see into: a custom op, a kernel, a higher-order op."""
    if node.op != "call_function":
        return False
    return isinstance(node.target, torch._ops.HigherOrderOperator) or is_custom(packet(node))


@dataclass
class GraphFacts:
    """What one walk over a graph finds.

    ``ancestors[node]`` is a bit set over node positions, so that "is a an ancestor of b" is one shift. Python's
    integers make it quadratic in the number of nodes over 64, which for ten thousand nodes is milliseconds.
    """

    graph: Graph
    position: dict[Node, int] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    ancestors: dict[Node, int] = field(default_factory=dict)
    activations: set[Node] = field(default_factory=set)
    _tokens: int = 0
    _attention: int = 0

    def __post_init__(self) -> None:
        for position, node in enumerate(self.graph.nodes):
            self.nodes.append(node)
            self.position[node] = position
            self.ancestors[node] = 0
            # A size read off an activation is no data flow: what only shares its shape does not descend from it.
            if isinstance(node.meta.get("val"), _SCALARS) or packet(node) in FACTORIES:
                continue
            bits = 0
            is_activation = node.op == "placeholder" and WEIGHT not in node.meta
            for parent in node.all_input_nodes:
                bits |= self.ancestors[parent] | (1 << self.position[parent])
                is_activation = is_activation or parent in self.activations
            self.ancestors[node] = bits
            if is_activation:
                self.activations.add(node)
                value = tensor_value(node)
                if node.op == "placeholder" and value is not None and value.ndim > 1:
                    self._tokens |= 1 << position
                if self.mixes_activations(node):
                    self._attention |= 1 << position

    def descends(self, node: Node, ancestor: Node) -> bool:
        """Whether ``node`` is computed from ``ancestor`` (a node does not descend from itself)."""
        return bool(self.ancestors[node] >> self.position[ancestor] & 1)

    def depends_on_tokens(self, node: Node) -> bool:
        """Whether the node is computed from an input of at least two dimensions: latents or text, no timestep."""
        return bool((self.ancestors[node] | 1 << self.position[node]) & self._tokens)

    def has_seen_attention(self, node: Node) -> bool:
        """Whether the node is computed from what an attention op made."""
        return bool(self.ancestors[node] & self._attention)

    def between(self, start: Node, end: Node) -> list[Node]:
        """The nodes that descend from ``start`` and lead to ``end``, ``end`` with them, in graph order."""
        found, pending = set(), [end]
        while pending:
            node = pending.pop()
            if node in found or not self.descends(node, start):
                continue
            found.add(node)
            pending.extend(node.all_input_nodes)
        return sorted(found, key=self.position.__getitem__)

    def weight_nodes(self, node: Node) -> list[Node]:
        """The weight placeholders (or lifted constants) that the node takes, through views and casts."""
        found, seen = [], set()
        pending = [parent for parent in node.all_input_nodes if parent not in self.activations]
        while pending:
            parent = pending.pop()
            if parent in seen:
                continue
            seen.add(parent)
            if WEIGHT in parent.meta or parent.op == "get_attr":
                found.append(parent)
            pending.extend(parent.all_input_nodes)
        return found

    def bears_weight(self, node: Node) -> bool:
        """Whether the node is a matmul, convolution or opaque op that mixes an activation with a parameter."""
        if node not in self.activations or node.op != "call_function":
            return False
        if packet(node) not in MATMULS and not is_opaque(node):
            return False
        return bool(self.weight_nodes(node))

    def mixes_activations(self, node: Node) -> tuple[Node, Node] | None:
        """Queries and keys of an attention op (or of a matmul of two activations), else None."""
        if is_whole_module(node):
            given = arguments_by_name(node)
            inputs, keys = given["inputs"], given["keys"]
            return (inputs[0], inputs[keys]) if keys >= 0 else None
        if is_attention_op(node):
            tensors = [a for a in node.args if isinstance(a, Node) and a in self.activations]
            return (tensors[0], tensors[1]) if len(tensors) > 1 else None
        if packet(node) in (aten.bmm, aten.baddbmm, aten.matmul, aten.mm):
            left, right = node.args[-2:] if packet(node) is aten.baddbmm else node.args[:2]
            if left in self.activations and right in self.activations:
                return left, right
        return None


def source_line(node: Node) -> str | None:
    """``file.py:12 code`` of the model's line that made the node, innermost frame, or None."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip().strip("^~ ")]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not places:
        return None
    head = lines[places[-1]].split(",")
    path = head[0].removeprefix("File ").strip('"').rsplit("/", 1)[-1]
    number = head[1].strip().removeprefix("line ") if len(head) > 1 else "?"
    code = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
    return f"{path}:{number} {code}".strip()


def module_path(node: Node) -> str:
    """The path of the module that made the node, relative to the captured frame's, or ''."""
    stack = node.meta.get("nn_module_stack")
    return frame_path(list(stack.values())[-1][0]) if stack else ""


def frame_path(expression: str) -> str:
    """A dotted path for Dynamo's expression of a module: ``L['self']._modules['blocks'].0@1`` -> ``blocks.0``."""
    parts = re.findall(r"\w+", expression.split("@")[0])
    inside = parts[2:] if parts[:1] in (["L"], ["G"]) else parts[1:]
    return ".".join(part for part in inside if part not in ("__dict__", "_modules"))
