"""Error models: what a row, or a segment of one, is predicted to be off by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..schedules.coefficients import forecast_coefficients
from ..schedules.schedule import Schedule
from .effects import Effects, aims
from .measurements import ALL, Measurements
from .segments import Costs, reach, segment_costs

Array = NDArray[np.float64]
#: The share of a plan's squared error that is taken to add up over segments as if they were independent: samplers turn
#: effects on their way to the end, and what is predicted of one calibration is a little different for other seeds.
INDEPENDENT = 0.1
#: The same where a row that was searched for is compared with one that was not: the search has found rows whose errors
#: undo each other in the calibration's samples, which they do less in others.
CAUTIOUS = 0.3
#: Both, where measurements lie between the steps that were calibrated: in interpolated ones errors undo each other that
#: do not in measured ones.
INTERPOLATED = 0.5
#: How far a computed step is moved at a time, in search of a better row.
FARTHEST_MOVE = 6


def lag_costs(errors: Array, importance: Array) -> Costs:
    """Costs of segments of reads of order 0 from `Calibration.error`: the square of the segment's summed errors.

    Args:
        errors: [lags, steps], NaN where unknown, which costs infinitely much.
        importance: [steps], what an error counts for.
    """
    lags, steps = errors.shape

    def cost(computed: tuple[int, ...]) -> Array:
        ahead = np.arange(1, min(lags, steps - 1 - computed[0]) + 1)
        return (
            np.nan_to_num(
                np.cumsum(errors[ahead - 1, computed[0] + ahead] * importance[computed[0] + ahead]), nan=np.inf
            )
            ** 2
        )

    return segment_costs(steps, lags, 0, cost)


def product_costs(matrix: Array, importance: Array, lags: int, order: int, times: Sequence[float] | None) -> Costs:
    """Costs of segments from inner products of outputs: the squared norm of the segment's summed errors.

    Within a segment errors add up with their signs, as they are made of the same few outputs; those of different
    segments as independent ones.

    Args:
        matrix: [steps, steps], of `_products.group_matrix`.
        importance: [steps], what an error relative to the output's norm counts for.
    """
    steps = len(matrix)
    scale = importance / np.sqrt(matrix.diagonal())

    def cost(computed: tuple[int, ...]) -> Array:
        ahead = range(computed[0] + 1, min(computed[0] + lags, steps - 1) + 1)
        if not ahead:
            return np.zeros(0)
        read = forecasts(computed, lags, times)[: len(ahead)]
        parts = np.hstack([-read, np.eye(len(ahead))]) * scale[ahead.start : ahead.stop, None]
        summed = np.cumsum(parts, axis=0)
        places = [*computed, *ahead]
        products = matrix[np.ix_(places, places)]
        # What is not known (NaN) must not be asked for: a zero times it would be unknown, too.
        square = np.einsum("ki,ij,kj->k", summed, np.nan_to_num(products), summed)
        unknown = (summed != 0).astype(float) @ np.isnan(products) @ np.ones(len(places))
        return np.where(unknown > 0, np.inf, np.maximum(square, 0.0))

    return segment_costs(steps, lags, order, cost)


def forecasts(computed: tuple[int, ...], lags: int, times: Sequence[float] | None) -> Array:
    """Coefficients of the computed steps' outputs, newest first, 1, 2, ... steps after the newest: [lags, n]."""
    if times is None:
        return _even(tuple(computed[0] - step for step in computed), lags)
    ahead = range(computed[0] + 1, min(computed[0] + lags, len(times) - 1) + 1)
    return np.array([forecast_coefficients([times[step] for step in computed], times[at]) for at in ahead]).reshape(
        -1, len(computed)
    )


@functools.lru_cache(maxsize=4096)
def _even(ages: tuple[int, ...], lags: int) -> Array:
    return np.array([forecast_coefficients([-age for age in ages], ahead) for ahead in range(1, lags + 1)])


def every_nth_row(steps: int, count: int, keep_last: bool = False) -> list[bool]:
    """Every n-th step, for the least n that computes at most ``count``; the last too if it must be, and can."""
    interval = math.ceil(steps / count)
    row = [step % interval == 0 for step in range(steps)]
    if keep_last and not row[-1]:
        row[-1] = True
        return row if sum(row) <= count else []
    return row


def even_row(steps: int, count: int) -> list[bool]:
    """``count`` computed steps, 2 or more, as evenly spaced as can be; the first and the last are among them."""
    computed = {round(index * (steps - 1) / (count - 1)) for index in range(count)}
    return [step in computed for step in range(steps)]


class JointPlan:
    """Rows that all groups share, by what reads do to the model's output.

    The final sample is off by the sum of the effects of all reused steps, each passed on by the sampler: a vector, to
    which steps add with their signs. Its square is no sum over segments, so the dynamic program minimises the part
    within segments, and moves of computed steps then the whole.

    Args:
        importance: [steps], what an effect counts for.
        forecast: the coefficients, at a step, of the outputs of computed steps, newest first; by default those of the
            polynomial through ``times``.
        lead: how far past their step forecasts aim (`Schedule`); they err by what they are off from there.
    """

    def __init__(
        self,
        effects: Effects,
        importance: Array,
        lags: int,
        order: int,
        times: Sequence[float] | None,
        forecast: Callable[[int, tuple[int, ...]], Array] | None = None,
        lead: float = 0.0,
    ) -> None:
        self._forecast = forecast
        self.steps, self.lags, self.order, self.times = len(importance), lags, order, times
        self._effects = effects.sketch.astype(np.float64) * importance[:, None, None]
        self._aims = aims(effects, lead) * importance[:, None]
        self._segments: dict[tuple[int, ...], Array] = {}

    def sums(self, computed: tuple[int, ...]) -> Array:
        """Summed effects of reusing 1, 2, ... steps after the newest of these computed ones: [lags, dimensions]."""
        found = self._segments.get(computed)
        if found is None:
            ahead = np.arange(computed[0] + 1, min(computed[0] + self.lags, self.steps - 1) + 1)
            if self._forecast is None:
                read = forecasts(computed, self.lags, self.times)[: len(ahead)]
            else:
                read = np.array([self._forecast(int(step), computed) for step in ahead]).reshape(-1, len(computed))
            old = self._effects[ahead[:, None], ahead[:, None] - np.array(computed)]
            off = np.einsum("kn,knd->kd", read, old) - self._aims[ahead]
            found = self._segments[computed] = np.cumsum(off, axis=0)
        return found

    def costs(self) -> Costs:
        """Costs of segments, each by itself."""
        return segment_costs(self.steps, self.lags, self.order, self._cost)

    def _cost(self, computed: tuple[int, ...]) -> Array:
        return np.nan_to_num((self.sums(computed) ** 2).sum(-1), nan=np.inf)

    def error(self, row: Sequence[bool], independent: float = INDEPENDENT) -> float:
        """The squared error that is predicted of a row; infinite where it reuses for longer than was measured.

        Args:
            independent: share of it, in [0, 1], by which errors of different segments add up as independent ones.
        """
        return self._error([step for step, computed in enumerate(row) if computed], independent)

    def _error(self, computed: list[int], independent: float = INDEPENDENT) -> float:
        together, alone = np.zeros(self._effects.shape[-1]), 0.0
        ends = [*computed[1:], self.steps]
        for index, (step, end) in enumerate(zip(computed, ends, strict=True)):
            reused = end - step - 1
            if reused > self.lags:
                return np.inf
            if reused:
                segment = self.sums(tuple(computed[index::-1][: self.order + 1]))[reused - 1]
                together += segment
                alone += float(segment @ segment)
        error = (1 - independent) * float(together @ together) + independent * alone
        return float(np.nan_to_num(error, nan=np.inf))

    def improve(self, row: Sequence[bool], keep_last: bool, independent: float = INDEPENDENT) -> list[bool]:
        """Move one computed step at a time, each time the one that lowers the error most, until none does."""
        computed = [step for step, decision in enumerate(row) if decision]
        least = self._error(computed, independent)
        while True:
            best = None
            for step in computed:
                if step == 0 or (keep_last and step == self.steps - 1):
                    continue
                for other in range(max(1, step - FARTHEST_MOVE), min(self.steps - 1, step + FARTHEST_MOVE) + 1):
                    if other in computed:
                        continue
                    moved = sorted({*computed, other} - {step})
                    error = self._error(moved, independent)
                    if error < least:
                        least, best = error, moved
            if best is None:
                return [step in computed for step in range(self.steps)]
            computed = best


class LagPlan:
    """Rows that groups share, by their errors alone: what there is without effects, for reads of order 0."""

    def __init__(self, measured: Measurements, groups: Iterable[str]) -> None:
        ones = np.ones(measured.steps)
        self._costs = functools.reduce(
            np.add,
            (lag_costs(measured.error(group), measured.sensitivity.get(group, ones)) for group in groups),
        )

    def costs(self) -> Costs:
        """Costs of segments, each by itself."""
        return self._costs

    def error(self, row: Sequence[bool], independent: float = 1.0) -> float:
        """The sum of the row's segments; infinite where it reuses for longer than was measured."""
        computed = [step for step, decision in enumerate(row) if decision]
        reused = [end - step - 1 for step, end in pairwise([*computed, len(row)])]
        if max(reused) >= self._costs.shape[1]:
            return math.inf
        return float(self._costs[computed, reused].sum())

    def improve(self, row: Sequence[bool], keep_last: bool, independent: float = 1.0) -> list[bool]:
        """The row: of such costs the program finds the best there is."""
        return list(row)


def require_effects(measured: Measurements, order: int) -> Effects:
    """What was measured of effects. Raises ``CalibrationError`` where it does not reach as far as the order needs."""
    if measured.effects is None or reach(measured.lags, order) > measured.effects.reach:
        raise too_high(measured, order)
    return measured.effects


def joint_plan(
    measured: Measurements,
    order: int,
    times: Sequence[float] | None,
    forecast: Callable[[int, tuple[int, ...]], Array] | None = None,
    lead: float = 0.0,
) -> JointPlan:
    """The error model for rows that all groups share; CalibrationError if the calibration lacks what it needs."""
    importance = measured.sensitivity.get(ALL, np.ones(measured.steps))
    return JointPlan(require_effects(measured, order), importance, measured.lags, order, times, forecast, lead)


def predicted_error(measured: Measurements, schedule: Schedule, independent: float = 0.0) -> float:
    """As `Calibration.predicted_error`; ``independent`` as for `JointPlan.error`."""
    sites = measured.sites
    rows, orders = {schedule.row_for(site) for site in sites}, {schedule.order_for(site) for site in sites}
    if schedule.steps != measured.steps or len(rows) > 1 or len(orders) > 1:
        raise CalibrationError(
            f"errors are predicted of schedules of {measured.steps} steps that have one row and one order for all "
            f"groups; this one has {schedule.steps} steps, {len(rows)} rows and {len(orders)} orders"
        )
    forecast = _mean_forecast(measured, schedule)
    plan = joint_plan(measured, orders.pop(), schedule.times, forecast, schedule.lead)
    return math.sqrt(plan.error(rows.pop(), independent))


def _mean_forecast(measured: Measurements, schedule: Schedule) -> Callable[[int, tuple[int, ...]], Array] | None:
    """Fitted coefficients, the mean over groups by their FLOPs: effects are known of all groups together alone.

    None for those of the polynomial through the schedule's times, at each step itself.
    """
    if schedule.coefficients is None:
        return (lambda step, computed: np.array(schedule.polynomial(step, computed))) if schedule.lead else None
    sites = [members[0] for members in measured.groups.values()]
    flops = [sum(site.flops for site in members) for members in measured.groups.values()]
    weights = flops if any(flops) else [1.0] * len(flops)
    return lambda step, computed: np.average(
        [schedule.forecast(site, step, computed) for site in sites], axis=0, weights=weights
    )


def independence(measured: Measurements, *, cautious: bool = False) -> float:
    """The share of a plan's squared error that adds up as independent ones, in what was measured."""
    if measured.interpolated:
        return INTERPOLATED
    return CAUTIOUS if cautious else INDEPENDENT


def too_high(measured: Measurements, order: int) -> CalibrationError:
    return CalibrationError(
        f"this calibration has no data for forecasts of order {order}: calibrate(..., lags={measured.lags}, "
        f"order={order}) measures it"
    )
