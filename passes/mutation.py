"""What a graph writes to, as the ops' schemas say."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


def arguments_by_name(node: Node) -> dict[str, Any]:
    """What a call of an op is given, by the names of its schema, defaults included; empty for anything else."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def arguments_written(node: Node) -> list[Node]:
    """The arguments that an op writes to."""
    given = arguments_by_name(node)
    schema = getattr(node.target, "_schema", None)
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] if schema else ()
    return [value for value in pytree.tree_leaves([given[name] for name in written]) if isinstance(value, Node)]


def written(node: Node) -> set[Node]:
    """The nodes whose values, seen through first arguments, an op writes to."""
    return {_base(value) for value in arguments_written(node)}


def read_and_written(gm: GraphModule) -> list[int]:
    """Positions of the inputs that a graph reads before it writes them: caches from which a difference is taken.

    What it reads behind the write it has put there itself, and a second run does again.
    """
    holders = gm.graph.find_nodes(op="placeholder")
    read: set[Node] = set()
    changed: set[Node] = set()
    for node in gm.graph.nodes:
        own = written(node)
        if not _is_view(node):
            read |= {_base(value) for value in node.all_input_nodes if node.op == "call_function"} - own - changed
        changed |= own
    return [i for i, holder in enumerate(holders) if holder in read & changed]


def _is_view(node: Node) -> bool:
    """Whether an op only looks at its input in another shape."""
    schema = getattr(node.target, "_schema", None)
    aliases = [value.alias_info for value in schema.returns if value.alias_info] if schema else []
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _base(node: Node) -> Node:
    """What a value is made of, first argument by first argument: at least all that it may be a view of."""
    while node.op != "placeholder" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
