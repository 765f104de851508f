"""What notebooks show of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graphs import html

if TYPE_CHECKING:
    from .schedule import Schedule


def schedule_html(schedule: Schedule) -> str:
    """A strip per selector: dark where it is computed, light where it is reused."""
    rows = [
        html.row(
            html.cell(selector, html.NAME),
            html.strip(
                (html.COMPUTED if computed else html.REUSED, "computed" if computed else "reused") for computed in row
            ),
            html.cell(f"{sum(row)}/{len(row)}", html.NUMBER),
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
    return html.table(caption, rows)
