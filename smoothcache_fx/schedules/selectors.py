"""Which sites a schedule's selectors select, and which selector wins."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Protocol

KINDS = ("attn", "cross_attn", "ffn", "attn_ffn")
"""The kinds of site, as selectors and as `site.kind`."""


class SiteLike(Protocol):
    """What a selector looks at: `blocks.3.attn1`, its group `blocks.*.attn1`, its kind, one of `KINDS`."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def kind(self) -> str: ...


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
    literals are all of the name but the indices.
    """
    if selector == site.name:
        return 2, 0
    if selector in KINDS:
        return (0, 0) if selector == site.kind else None
    if selector == site.group or _pattern(selector).fullmatch(site.name):
        return 1, len(selector) - selector.count("*") - selector.count("?")
    return None
