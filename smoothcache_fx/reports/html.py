"""What notebooks show of a prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graphs import html
from ..graphs.tables import format_bytes

if TYPE_CHECKING:
    from .prediction import Prediction


def prediction_html(prediction: Prediction) -> str:
    """The figures, and a strip of what each step costs: the darker, the more."""
    low, high = prediction.speedup
    figures = {
        "variants": f"{prediction.variants}",
        "MAC ratio": f"{prediction.mac_ratio:.2f}",
        "predicted speed-up": f"{low:.2f} to {high:.2f}",
        "cache a stream": format_bytes(prediction.cache_bytes),
    }
    rows = [html.row(html.cell(name, html.NAME), html.cell(value, html.NUMBER)) for name, value in figures.items()]
    strip = html.strip((html.shade(share), f"{share:.1%}") for share in prediction.step_shares)
    return html.table("with this schedule", [*rows, html.row(html.cell("FLOPs by step", html.NAME), strip)])
