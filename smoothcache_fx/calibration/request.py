"""What `Calibration.schedule` is asked for, and the schedule that meets it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import flag, number_of, one_of, whole_number
from ..errors import CalibrationError
from ..schedules.clusters import joined, variants_of
from ..schedules.schedule import Schedule
from .fitted import fitted
from .greedy import alpha_for, scan
from .measurements import ALL, FIT, Measurements, group_flops
from .optimal import independence, predicted_error
from .planner import highest_order, optimal_rows, orders_predicted, warn_if_behind
from .quality import LEADS, QUALITIES


@dataclass(frozen=True)
class ScheduleRequest:
    """A budget, an alpha or a quality, and how it is to be met; fields as the arguments of `Calibration.schedule`."""

    measured: Measurements
    alpha: float | None = None
    compute: float | None = None
    quality: str | None = None
    solver: str | None = None
    order: int | str | None = None
    rows: str | None = None
    max_variants: int | None = None
    times: Sequence[float] | None = None
    keep_last: bool | None = None
    target: str = "uncached"

    def __post_init__(self) -> None:
        one_of(self.target, "target", tuple(LEADS), CalibrationError)
        if self.solver not in (None, "greedy", "optimal"):
            raise CalibrationError(f"solver is {self.solver!r}, expected 'greedy' or 'optimal'")
        if sum(given is not None for given in (self.alpha, self.compute, self.quality)) != 1:
            raise CalibrationError(
                f"alpha is {self.alpha}, compute is {self.compute} and quality is {self.quality}; give exactly one of "
                "them"
            )
        if self.quality is not None:
            self._check_quality()
        if self.keep_last is not None:
            flag(self.keep_last, "keep_last")
        if self.alpha is not None:
            number_of(self.alpha, "alpha", "a number of at least 0, such as 0.18", CalibrationError, lambda a: a >= 0)
        if self.max_variants is not None:
            whole_number(self.max_variants, "max_variants", 2, CalibrationError)
        if self.solver == "optimal" and self.alpha is not None:
            raise CalibrationError("solver='optimal' takes compute= (a share of the FLOPs), not alpha=")
        if isinstance(self.order, str) and self.order != FIT:
            raise CalibrationError(
                f"order is {self.order!r}, expected 0, 1, 2 or 'fit', or None for the best of 0 to 2"
            )

    def _check_quality(self) -> None:
        one_of(self.quality, "quality", tuple(QUALITIES), CalibrationError)
        if self.solver == "greedy" or self.rows not in (None, "joint"):
            raise CalibrationError(
                "a quality is a predicted error, which is known of one row for all groups: leave out solver and rows"
            )
        if QUALITIES[str(self.quality)] and ALL not in self.measured.sensitivity:
            raise CalibrationError(
                f"quality={self.quality!r} needs to know how errors reach the final sample: "
                "smoothcache.measure_sensitivity(model, sample, calibration) measures it"
            )

    def schedule(self) -> Schedule:
        """The schedule; tells where every n-th step is predicted to be better."""
        if self.quality is not None:
            return self._of_quality(QUALITIES[self.quality])
        found = self._best_fit() if isinstance(self.order, str) else self._aimed(self._of_order(self.order))
        warn_if_behind(self.measured, found)
        return found

    def _aimed(self, schedule: Schedule) -> Schedule:
        """The schedule with forecasts that aim at the target, if it has any."""
        return dataclasses.replace(schedule, lead=LEADS[self.target]) if schedule.highest_order else schedule

    def _of_order(self, order: int | None) -> Schedule:
        """The schedule of one order, or of the best one."""
        measured = self.measured
        found: Mapping[str, Sequence[bool]]
        flops = group_flops(measured)
        if self.compute is not None and self.solver != "greedy":
            budget = share_of_flops(self.compute)
            found, order = optimal_rows(
                measured, budget, order, self.rows, self.times, bool(self.keep_last), self.max_variants
            )
            if self.rows == "site":
                flops = flops and {site.name: site.flops for site in measured.sites}
        else:
            found = self._greedy_rows(self.keep_last is None or bool(self.keep_last))
            order = 0 if order is None else order
        return Schedule(measured.steps, found, order=order, flops=flops, times=self.times, timesteps=measured.timesteps)

    def _of_quality(self, most: float) -> Schedule:
        """The one that computes the fewest steps of those that are predicted to err by at most this."""
        measured = self.measured
        highest = orders_predicted(measured)[-1]
        order = self.order
        if order is None:  # the same for all qualities, so that they have caches and variants in common
            order = FIT if highest else 0
        every = dict.fromkeys(measured.groups, (True,) * measured.steps)
        found = Schedule(
            measured.steps,
            every,
            order=highest if isinstance(order, str) else order,
            flops=group_flops(measured),
            timesteps=measured.timesteps,
        )
        if not most:
            return found
        fewest, enough = math.ceil(measured.steps / (measured.lags + 1)), measured.steps
        while fewest < enough:
            count = (fewest + enough) // 2
            request = dataclasses.replace(self, quality=None, compute=count / measured.steps, order=order)
            try:
                planned = request.schedule()
            except CalibrationError:  # so few steps cannot be computed
                fewest = count + 1
                continue
            if predicted_error(measured, planned, independence(measured, cautious=True)) > most:
                fewest = count + 1
            else:
                found, enough = planned, count
        return found

    def _best_fit(self) -> Schedule:
        """Fitted to the rows of each order, which suit other coefficients; the one of least predicted error."""
        measured, highest = self.measured, highest_order(self.measured)
        fits: list[Schedule] = []
        for order in range(highest + 1):
            try:
                planned = self._of_order(order)
            except CalibrationError:  # forecasts need more computed steps, as after guidance is switched off
                if not fits:
                    raise
            else:
                fits.append(fitted(measured, self._aimed(dataclasses.replace(planned, order=highest))))
        joint = all(len({fit.row_for(site) for site in measured.sites}) == 1 for fit in fits)
        if not joint or measured.effects is None:
            return fits[-1]
        independent = independence(measured, cautious=True)
        return min(fits, key=lambda fit: predicted_error(measured, fit, independent))

    def _greedy_rows(self, keep_last: bool) -> dict[str, list[bool]]:
        """The paper's rule for each group, or for groups that share a row, whose errors are the largest of theirs."""
        if self.rows not in (None, "group", "joint"):
            hint = "; rows of sites need solver='optimal'" if self.rows == "site" else ""
            raise CalibrationError(f"rows is {self.rows!r}, expected 'joint' or 'group' with the greedy solver{hint}")
        of_each = {group: self.measured.error(group) for group in self.measured.groups}
        clusters = [tuple(of_each)] if self.rows == "joint" else [(group,) for group in of_each]
        flops = group_flops(self.measured)
        while True:
            errors = {
                " + ".join(cluster): np.maximum.reduce([of_each[group] for group in cluster]) for cluster in clusters
            }
            threshold = self.alpha
            if self.compute is not None:
                weights = flops and {" + ".join(c): sum(flops[group] for group in c) for c in clusters}
                threshold = alpha_for(errors, share_of_flops(self.compute), weights, keep_last)
            found = [scan(error, threshold, keep_last) for error in errors.values()]
            if self.max_variants is None or variants_of(found) <= self.max_variants:
                return {group: row for cluster, row in zip(clusters, found, strict=True) for group in cluster}
            clusters = joined(clusters, found)


def share_of_flops(compute: object) -> float:
    """A budget, checked."""
    expected = "a share of FLOPs, above 0 and up to 1"
    return number_of(compute, "compute", expected, CalibrationError, lambda share: 0 < share <= 1)
