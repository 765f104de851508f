"""Tables in HTML for notebooks, and strips with a coloured cell a step."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

#: Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COMPUTED, REUSED, UNKNOWN = "#0072B2", "#DDE3EA", "#FFFFFF"
NAME = "text-align:left;padding:1px 8px 1px 0;font-family:monospace"
NUMBER = "text-align:right;padding:1px 8px"


def shade(share: float) -> str:
    """From the colour of nothing to that of all; white where it is not known."""
    if not math.isfinite(share):
        return UNKNOWN
    share = min(max(share, 0.0), 1.0)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (REUSED, COMPUTED)]
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(*ends, strict=True))


def strip(cells: Iterable[tuple[str, str]]) -> str:
    """A cell of the table with a coloured box per step; what a box stands for shows when it is pointed at."""
    boxes = "".join(
        f'<span title="step {step}: {html.escape(text)}" style="display:inline-block;width:9px;height:13px;'
        f'margin-right:1px;background:{colour}"></span>'
        for step, (colour, text) in enumerate(cells)
    )
    return f'<td style="white-space:nowrap;line-height:0;text-align:left">{boxes}</td>'


def cell(text: str, style: str) -> str:
    return f'<td style="{style}">{html.escape(text)}</td>'


def row(*cells: str) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def table(caption: str, rows: Sequence[str]) -> str:
    side = "caption-side:bottom;text-align:left"
    return f'<table><caption style="{side}">{html.escape(caption)}</caption>{"".join(rows)}</table>'
