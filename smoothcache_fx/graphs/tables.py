"""Plain text tables and units, as the printable objects use them."""

from __future__ import annotations

import html
from collections.abc import Sequence


class Printable:
    """What is read by printing it: notebooks show the same text."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, the first row a heading; numbers, and - for none, to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(row[i][:1].isdigit() or row[i] == "-" for row in rows[1:]) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_bytes(count: int) -> str:
    """A size in bytes with a binary unit: ``1.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def format_flops(count: int) -> str:
    """FLOPs with a decimal unit: ``1.5 GFLOPs``."""
    value = float(count)
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOPs"
        value /= 1000
    return f"{value:.3g} TFLOPs"
