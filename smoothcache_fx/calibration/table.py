"""What is printed of a calibration: a line for each group, with its errors by lag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .calibration import Calibration


def table_of(calibration: Calibration) -> list[list[str]]:
    """Cell by cell: a title, a heading, a line per group, and a note."""
    sites, lags = calibration.sites, calibration.lags
    counts = [int(n) for site in sites for n in site.count[0, 1:]] or [0]
    seen = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    title = (
        f"{calibration.steps} steps, {len(sites)} sites, {seen} observations of each site at each step, "
        f"history {calibration.history_bytes / 2**20:.1f} MiB"
    )
    table = [[title], ["group", "kind", "sites", "FLOPs", *(f"lag {lag}" for lag in range(1, lags + 1))]]
    total = sum(site.flops for site in sites) or 1.0
    for group, members in calibration.groups.items():
        share = sum(site.flops for site in members) / total
        kinds = "/".join(dict.fromkeys(site.kind for site in members))
        cells = map(_median, calibration.error(group), calibration.interval(group))
        table.append([group, kinds, str(len(members)), f"{share:.1%}", *cells])
    return [*table, ["(error: median over the steps, with the mean's 95% interval there)"]]


def aligned(table: Sequence[Sequence[str]]) -> str:
    """The table's columns below each other: the first two to the left, numbers to the right."""
    title, *rows, note = table
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<<" + ">" * (len(widths) - 2)
    lines = []
    for row in rows:
        cells = zip(row, aligns, widths, strict=True)
        lines.append("  ".join(f"{cell:{align}{width}}" for cell, align, width in cells))
    return "\n".join([*title, *lines, *note])


def _median(error: NDArray[np.float64], interval: NDArray[np.float64]) -> str:
    """The (upper) median of one lag's errors and the interval at that step."""
    known = np.flatnonzero(np.isfinite(error))
    if not known.size:
        return "-"
    step = known[np.argsort(error[known], kind="stable")[known.size // 2]]
    spread = "" if np.isnan(interval[step]) else f" ±{interval[step]:.4f}"
    return f"{error[step]:.4f}{spread}"
