"""What notebooks show of a calibration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..graphs import html

if TYPE_CHECKING:
    from .calibration import Calibration


def calibration_html(calibration: Calibration) -> str:
    """The table that is printed, and for each group a strip of its error at lag 1: the darker, the larger."""
    title, heading, *body, note = calibration.lines()
    errors = {group: calibration.error(group)[0].tolist() for group in calibration.groups}
    most = max((error for row in errors.values() for error in row if math.isfinite(error)), default=0.0)
    rows = [html.row(*(html.cell(text, html.NAME) for text in heading), html.cell("lag 1, by step", html.NAME))]
    for cells, row in zip(body, errors.values(), strict=True):
        strip = html.strip((html.shade(error / most if most else 0.0), f"{error:.4f}") for error in row)
        rows.append(
            html.row(*(html.cell(text, html.NAME if i < 2 else html.NUMBER) for i, text in enumerate(cells)), strip)
        )
    return html.table(f"{title[0]} {note[0]}", rows)
