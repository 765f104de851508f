"""How long a run takes by how many steps are computed, so that a budget may be one of time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..calibration.calibration import Calibration
from ..calibration.measurements import FIT
from ..calibration.planner import highest_order
from ..errors import CalibrationError
from ..reports.compare import Comparison
from ..schedules.schedule import Schedule

log = logging.getLogger(__name__)

#: A time that was asked for is met within this share of it.
MET = 0.03

Forecasts = tuple[str, int]
"""What decides how long a step takes: the grain, and the order of forecasts."""


@dataclass(frozen=True)
class TimeBudget:
    """What a run may take: seconds, or as a share of the uncached run's under the same compiler.

    Args:
        compare: ``smoothcache.compare`` of schedules by name.
    """

    seconds: float | None
    speedup: float | None
    compare: Callable[[Mapping[str, Schedule]], Comparison]

    def limit(self, uncached: float) -> float:
        """In seconds, given what an uncached run takes."""
        return self.seconds if self.seconds is not None else uncached / (self.speedup or 1.0)

    def steps(self, calibrations: Sequence[Calibration], orders: Sequence[int | str]) -> dict[Forecasts, int]:
        """How many steps can be computed, by what is cached as one and the order.

        For each two schedules are timed: every second step, and as few as were calibrated for. Between them a run's
        time is a line in the number of computed steps.

        Raises:
            CalibrationError: nothing is fast enough; says what the fastest takes.
        """
        kinds = [(one, order) for one in calibrations for order in dict.fromkeys(degree(one, o) for o in orders)]
        timed = {f"{one.grain}, {order}, {n}": _every(one, order, n) for one, order in kinds for n in (2, one.lags + 1)}
        comparison = self.compare(timed)
        seconds = {row.name: row.seconds for row in comparison.rows}
        limit = self.limit(comparison.seconds)
        found: dict[Forecasts, int] = {}
        fastest = math.inf
        for one, order in kinds:
            names = [f"{one.grain}, {order}, {n}" for n in (2, one.lags + 1)]
            (many, slow), (few, fast) = ((_computed(timed[name]), seconds[name]) for name in names)
            if many == few:  # of lag 1 there is but one: the uncached run is the other end
                many, slow = one.steps, comparison.seconds
            each = max((slow - fast) / (many - few), 1e-9)
            count = few + math.floor((limit - fast) / each + 1e-9)
            log.info("%s, order %d: %.3g s and %.3g for each computed step", one.grain, order, fast - few * each, each)
            fastest = min(fastest, fast)
            if count >= few:
                found[one.grain, order] = min(count, one.steps)
        if not found:
            raise CalibrationError(
                f"no schedule takes {limit:.3g} s or less: an uncached run takes {comparison.seconds:.3g} and the "
                f"fastest one that was timed {fastest:.3g}, {comparison.seconds / fastest:.2f} times faster. Ask for "
                "that, calibrate with more lags, or allow stacks (grains=('branch', 'stack'))"
            )
        return found

    def measured(self, schedule: Schedule) -> tuple[float, float]:
        """Seconds of a run with a schedule, and how many times faster than an uncached one that is."""
        (row,) = (comparison := self.compare({"chosen": schedule})).rows
        return row.seconds, comparison.seconds / row.seconds

    def missed_by(self, seconds: float, speedup: float) -> float:
        """By what share of it a run takes too long; negative where it takes less."""
        limit = self.limit(seconds * speedup)
        return seconds / limit - 1


def degree(calibration: Calibration, order: int | str) -> int:
    """The order of forecasts, of fitted ones too."""
    return highest_order(calibration) if order == FIT else int(order)


def _every(calibration: Calibration, order: int, interval: int) -> Schedule:
    row = [step % interval == 0 for step in range(calibration.steps)]
    return Schedule(calibration.steps, dict.fromkeys(calibration.groups, row), order=order)


def _computed(schedule: Schedule) -> int:
    return sum(next(iter(schedule.compute.values())))
