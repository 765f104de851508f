"""Which sites a schedule's selectors select, and which selector wins."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from ..errors import ScheduleError
from ..passes.names import STACK, BlockRange

KINDS = ("attn", "cross_attn", "ffn", "attn_ffn")
"""The kinds of branch, as selectors and as `site.kind`."""

_RANGE = re.compile(r"(?:(.+)\.)?(\d+)-(\d+)", re.ASCII)


class SiteLike(Protocol):
    """What a selector looks at: `blocks.3.attn1`, its group `blocks.*.attn1`, its kind, one of `KINDS`."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def kind(self) -> str: ...


@lru_cache(maxsize=4096)
def block_range(name: str) -> BlockRange | None:
    """The blocks that a selector or the name of a stack stands for; None if it is something else."""
    found = _RANGE.fullmatch(name.partition("#")[0])
    return None if found is None else BlockRange(found[1] or "", int(found[2]), int(found[3]))


def selects_stacks(selector: str) -> bool:
    """Whether the selector stands for stacks, and not for branches."""
    return selector == STACK or block_range(selector) is not None


@lru_cache(maxsize=4096)
def _pattern(glob: str) -> re.Pattern[str]:
    """`*` matches any run of characters, dots too; `?` one character; all else itself.

    A leading `*.` also matches nothing, so that `*.attn` selects a model's own module `attn` beside
    `blocks.3.attn` (the bare word `attn` is a kind).
    """
    prefix, rest = (r"(?:.*\.)?", glob[2:]) if glob.startswith("*.") else ("", glob)
    translated = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in rest)
    return re.compile(prefix + "".join(translated), re.DOTALL)


def specificity(selector: str, site: SiteLike) -> tuple[int, int] | None:
    """How closely `selector` names `site`, None if it does not select it; the greatest wins.

    An exact name goes before a group or glob, that before a kind; among globs the one with the most literal
    characters wins. A site's own group beats groups of other depths that match its name as globs, because its
    literals are all of the name but the indices. Stacks are selected by a range that holds their blocks, or as
    `stack`; nothing else selects them, and neither selects a branch.
    """
    if site.kind == STACK or selects_stacks(selector):
        return _specificity_of_stack(selector, site)
    if selector == site.name:
        return 2, 0
    if selector in KINDS:
        return (0, 0) if selector == site.kind else None
    if selector == site.group or _pattern(selector).fullmatch(site.name):
        return 1, len(selector) - selector.count("*") - selector.count("?")
    return None


def _specificity_of_stack(selector: str, site: SiteLike) -> tuple[int, int] | None:
    if site.kind != STACK:
        return None
    wanted, own = block_range(selector), block_range(site.name)
    if wanted is None or own is None:
        return (0, 0) if selector == STACK else None
    return (1, 0) if wanted.holds(own) else None


def check_overlaps(selectors: Iterable[str]) -> None:
    """Raise `ScheduleError` if two selectors claim the same blocks, as far as their names show it."""
    selectors = list(selectors)
    ranges = {key: found for key in selectors if (found := block_range(key)) is not None}
    for key, found in ranges.items():
        if found.first > found.last:
            raise ScheduleError(f"the selector {key!r} runs backwards; expected the first block before the last")
    for (key, one), (other_key, other) in itertools.combinations(ranges.items(), 2):
        if one.overlaps(other):
            shared = BlockRange(one.container, max(one.first, other.first), min(one.last, other.last))
            raise ScheduleError(
                f"the selectors {key!r} and {other_key!r} overlap: both select blocks {shared.first} to {shared.last} "
                f"of {shared.container!r}; give each block to one of them"
            )
    for key in selectors:
        for of, found in ranges.items():
            index = key.removeprefix(f"{found.container}.").partition(".")[0]
            inside = key.startswith(f"{found.container}.") and index.isdecimal() and not key.isdecimal()
            if inside and found.first <= int(index) <= found.last and block_range(key) is None:
                raise ScheduleError(
                    f"the selectors {key!r} and {of!r} overlap: block {index} is cached as part of the stack, and its "
                    "branches cannot have rows beside it; end the range before it, or drop the row"
                )
