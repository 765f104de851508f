"""What notebooks show of schedules, calibrations and predictions: tables, and strips with a coloured cell a step."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .tables import format_bytes

if TYPE_CHECKING:
    from .calibration import Calibration
    from .prediction import Prediction
    from .schedule import Schedule

COMPUTED, REUSED, UNKNOWN = "#0072B2", "#DDE3EA", "#FFFFFF"
_NAME = "text-align:left;padding:1px 8px 1px 0;font-family:monospace"
_NUMBER = "text-align:right;padding:1px 8px"


def schedule_html(schedule: Schedule) -> str:
    """A strip per selector: dark where it is computed, light where it is reused."""
    rows = [
        _row(
            _cell(selector, _NAME),
            _strip((COMPUTED if computed else REUSED, "computed" if computed else "reused") for computed in row),
            _cell(f"{sum(row)}/{len(row)}", _NUMBER),
        )
        for selector, row in schedule.compute.items()
    ]
    plural = "s" if schedule.variants != 1 else ""
    caption = (
        f"{schedule.steps} steps, {schedule.compute_fraction:.1%} of the branches' FLOPs computed, up to "
        f"{schedule.variants} variant{plural}; dark: computed, light: reused"
    )
    if schedule.highest_order:
        caption += f"; {str(schedule).splitlines()[-1]}"
    return _table(caption, rows)


def calibration_html(calibration: Calibration) -> str:
    """The table that is printed, and for each group a strip of its error at lag 1: the darker, the larger."""
    title, heading, *body, note = calibration.lines()
    errors = {group: calibration.error(group)[0].tolist() for group in calibration.groups}
    most = max((error for row in errors.values() for error in row if math.isfinite(error)), default=0.0)
    rows = [_row(*(_cell(text, _NAME) for text in heading), _cell("lag 1, by step", _NAME))]
    for cells, row in zip(body, errors.values(), strict=True):
        strip = _strip((_shade(error / most if most else 0.0), f"{error:.4f}") for error in row)
        rows.append(_row(*(_cell(text, _NAME if i < 2 else _NUMBER) for i, text in enumerate(cells)), strip))
    return _table(f"{title[0]} {note[0]}", rows)


def prediction_html(prediction: Prediction) -> str:
    """The figures, and a strip of what each step costs: the darker, the more."""
    low, high = prediction.speedup
    figures = {
        "variants": f"{prediction.variants}",
        "MAC ratio": f"{prediction.mac_ratio:.2f}",
        "predicted speed-up": f"{low:.2f} to {high:.2f}",
        "cache a stream": format_bytes(prediction.cache_bytes),
    }
    rows = [_row(_cell(name, _NAME), _cell(value, _NUMBER)) for name, value in figures.items()]
    strip = _strip((_shade(share), f"{share:.1%}") for share in prediction.step_shares)
    return _table("with this schedule", [*rows, _row(_cell("FLOPs by step", _NAME), strip)])


def _shade(share: float) -> str:
    """From the colour of nothing to that of all; white where it is not known."""
    if not math.isfinite(share):
        return UNKNOWN
    share = min(max(share, 0.0), 1.0)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (REUSED, COMPUTED)]
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(*ends, strict=True))


def _strip(cells: Iterable[tuple[str, str]]) -> str:
    """A cell of the table with a coloured box per step; what a box stands for shows when it is pointed at."""
    boxes = "".join(
        f'<span title="step {step}: {html.escape(text)}" style="display:inline-block;width:9px;height:13px;'
        f'margin-right:1px;background:{colour}"></span>'
        for step, (colour, text) in enumerate(cells)
    )
    return f'<td style="white-space:nowrap;line-height:0;text-align:left">{boxes}</td>'


def _cell(text: str, style: str) -> str:
    return f'<td style="{style}">{html.escape(text)}</td>'


def _row(*cells: str) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _table(caption: str, rows: Sequence[str]) -> str:
    side = "caption-side:bottom;text-align:left"
    return f'<table><caption style="{side}">{html.escape(caption)}</caption>{"".join(rows)}</table>'
