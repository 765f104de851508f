"""Names and groups of sites, from the qualified names of the parameters that they use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: Key in a placeholder's metadata that marks it as a parameter or buffer; the value is its qualified name.
WEIGHT = "smoothcache_weight"

#: The kind of a run of blocks that is cached as one, beside the kinds of branches.
STACK = "stack"


class BlockRange(NamedTuple):
    """The blocks ``container.first`` to ``container.last``, both included: ``transformer_blocks.2-27``."""

    container: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.container}.{self.first}-{self.last}".lstrip(".")

    @property
    def indices(self) -> range:
        return range(self.first, self.last + 1)

    def overlaps(self, other: BlockRange) -> bool:
        return self.container == other.container and self.first <= other.last and other.first <= self.last

    def holds(self, other: BlockRange) -> bool:
        return self.container == other.container and self.first <= other.first and other.last <= self.last


def block_of(name: str, level: int = 0) -> tuple[str, int] | None:
    """The list of blocks and the index in it: ``blocks``, 3 of ``blocks.3.attn``; lists inside at higher levels."""
    parts = name.partition("#")[0].split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    if level >= len(places):
        return None
    return ".".join(parts[: places[level]]), int(parts[places[level]])


def common_module(parameter_names: Iterable[str]) -> str:
    """The deepest module path that holds all the parameters: ``blocks.0.attn`` for its ``qkv`` and ``proj``."""
    paths = [name.split(".")[:-1] for name in parameter_names]
    if not paths:
        return ""
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def drop_components(path: str, count: int) -> str:
    """The path without its last ``count`` components."""
    return ".".join(path.split(".")[: -count or None])


def unique_names(paths: Sequence[str], kinds: Sequence[str], call: int = 0) -> list[str]:
    """Site names from module paths, in graph order.

    Where sites of different kinds share a path, the kind is appended. Where the same site occurs again, because
    its weights are used twice, the occurrence is: ``block.attn``, ``block.attn#2``. ``call`` counts earlier calls
    of the whole graph with the same weights within one call of the model.
    """
    kinds_of: dict[str, set[str]] = {}
    for path, kind in zip(paths, kinds, strict=True):
        kinds_of.setdefault(path, set()).add(kind)
    bases = [
        path if path and len(kinds_of[path]) == 1 else f"{path}.{kind}".lstrip(".")
        for path, kind in zip(paths, kinds, strict=True)
    ]
    total, seen = Counter(bases), Counter[str]()
    names = []
    for base in bases:
        seen[base] += 1
        occurrence = call * total[base] + seen[base]
        names.append(base if occurrence == 1 else f"{base}#{occurrence}")
    return names


def group_of(name: str) -> str:
    """The name with indices wildcarded: ``transformer_blocks.3.attn1`` -> ``transformer_blocks.*.attn1``."""
    path = name.partition("#")[0]
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
