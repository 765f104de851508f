"""The schedules that ``choose`` samples with: of each order the optimal rows, even ones, and every n-th step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..calibration.calibration import Calibration
from ..calibration.optimal import even_row, every_nth_row
from ..errors import CalibrationError
from ..schedules.schedule import Schedule


class Candidate(NamedTuple):
    """A schedule to try: where its rows come from, itself, its predicted error, and what it caches as one."""

    rows: str
    schedule: Schedule
    predicted: float
    grain: str


def affordable_steps(calibration: Calibration, compute: float) -> int:
    """How many steps the best schedule for a budget computes."""
    schedule = calibration.schedule(compute=compute, solver="optimal", order=0)
    return sum(next(iter(schedule.compute.values())))


def candidates_for(
    calibration: Calibration, count: int, orders: Sequence[int | str], leads: Sequence[float] = (0.0,)
) -> list[Candidate]:
    """Schedules that compute at most ``count`` steps, the least predicted error first.

    Args:
        leads: how far ahead forecasts aim; each is tried.

    Raises:
        CalibrationError: no forecast of these orders can be made with so few steps.
    """
    found: dict[Schedule, Candidate] = {}
    for order in sorted(set(orders), key=str):
        try:
            optimal = calibration.schedule(compute=count / calibration.steps, solver="optimal", order=order)
        except CalibrationError:  # forecasts need more computed steps, as after guidance is switched off
            if order == max(orders, key=str) and not found:
                raise
            continue
        for rows, schedule in _with_other_rows(calibration, optimal, count, leads):
            predicted = calibration.predicted_error(schedule)
            if math.isfinite(predicted):
                found.setdefault(schedule, Candidate(rows, schedule, predicted, calibration.grain))
    return sorted(found.values(), key=lambda candidate: candidate.predicted)


def _with_other_rows(
    calibration: Calibration, optimal: Schedule, count: int, leads: Sequence[float]
) -> Iterator[tuple[str, Schedule]]:
    """The schedule, and others that differ in their row or lead only, and in coefficients that are fitted to them."""
    every_nth = every_nth_row(optimal.steps, count)
    every_nth[-1] |= sum(every_nth) < count  # the last step, too, if there is room for it
    planned = next(iter(optimal.compute.values()))
    rows = {"optimal": planned, "every n-th": every_nth}
    if count > 1:
        rows["even"] = even_row(optimal.steps, count)
    for lead in leads if optimal.highest_order else (0.0,):
        for name, row in rows.items():
            if row is planned and not lead:
                yield name, optimal
                continue
            compute = dict.fromkeys(optimal.compute, row)
            other = dataclasses.replace(optimal, compute=compute, coefficients=None, lead=lead)
            yield name, other if optimal.coefficients is None else calibration.fit(other)
