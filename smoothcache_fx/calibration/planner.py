"""The rows that are best for a budget: one row for all groups, or rows of their own for groups or sites."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..checks import whole_number
from ..errors import CalibrationError
from ..schedules.clusters import Cluster, clustered, joined, variants_of
from ..schedules.rows import times_of
from ..schedules.schedule import HIGHEST_ORDER, Schedule
from .measurements import Measurements
from .optimal import (
    JointPlan,
    LagPlan,
    even_row,
    every_nth_row,
    independence,
    joint_plan,
    lag_costs,
    product_costs,
    too_high,
)
from .products import group_matrix
from .segments import Costs, best_rows, reach, share
from .site_errors import SiteErrors
from .statistics import combine

log = logging.getLogger(__name__)

#: Predictions are not exact, and the best of many are too good: rows other than every n-th, and forecasts, which take
#: memory, must be predicted to lower the error to this share.
WORTHWHILE = 0.8
#: A schedule is said to be behind every n-th step if that is predicted to err by less than this share of its error.
BEHIND = 0.9


def optimal_rows(
    measured: Measurements,
    budget: float,
    order: int | None,
    rows: str | None,
    times: Sequence[float] | None,
    keep_last: bool,
    max_variants: int | None = None,
) -> tuple[dict[str, list[bool]], int]:
    """The rows of the schedule of least predicted error that computes at most a share ``budget`` of the FLOPs.

    Returns:
        A row for each group (or site), and the order of the reads.

    Raises:
        CalibrationError: as `Calibration.schedule`.
    """
    if order is not None:
        order = whole_number(order, "order", 0, CalibrationError)
        if order > HIGHEST_ORDER:
            raise CalibrationError(f"order is {order}, expected 0, 1 or {HIGHEST_ORDER}, or None for the best of them")
    times = None if times is None else times_of(times, measured.steps)
    if rows is None:
        rows = "joint" if measured.effects is not None or order in (None, 0) else "group"
    if rows == "joint":
        row, order = _joint_row(measured, budget, order, times, keep_last)
        return dict.fromkeys(measured.groups, row), order
    if rows not in ("group", "site"):
        raise CalibrationError(f"rows is {rows!r}, expected 'joint', 'group' or 'site'")
    parts = measured.groups if rows == "group" else {site.name: (site,) for site in measured.sites}
    flops = {key: sum(site.flops for site in sites) for key, sites in parts.items()}
    clusters = clustered(flops) if rows == "group" else [(key,) for key in parts]
    best: tuple[float, dict[str, list[bool]], int] | None = None
    for candidate in orders_predicted(measured, order, products=True):
        costs = {key: _costs(measured, sites, candidate, times) for key, sites in parts.items()}
        try:
            total, found = _separate_rows(flops, clusters, costs, budget, keep_last, max_variants)
        except CalibrationError:
            if best is None:
                raise
            continue
        if best is None or total < WORTHWHILE**2 * best[0]:
            best = total, found, candidate
    assert best is not None
    return best[1], best[2]


def orders_predicted(measured: Measurements, order: int | None = None, products: bool = False) -> Sequence[int]:
    """The orders to choose from: the one that is asked for, or all that the calibration can predict."""
    if order is not None:
        return (order,)
    if products:
        reaches = [0 if site.products is None else site.products.reach for site in measured.sites]
    else:
        reaches = [0 if measured.effects is None else measured.effects.reach]
    return [0, *(k for k in range(1, HIGHEST_ORDER + 1) if reach(measured.lags, k) <= min(reaches))]


def highest_order(measured: Measurements) -> int:
    """The highest order of forecasts that the calibration can predict; raises ``CalibrationError`` if that is none."""
    order = orders_predicted(measured, products=measured.effects is None)[-1]
    if not order:
        raise too_high(measured, 1)
    return order


def _separate_rows(
    flops: Mapping[str, float],
    clusters: Sequence[Cluster],
    costs: Mapping[str, Costs],
    budget: float,
    keep_last: bool,
    max_variants: int | None,
) -> tuple[float, dict[str, list[bool]]]:
    """The summed cost and the rows of clusters that share a budget; they are joined until variants are few enough."""

    def solve(clusters: Sequence[Cluster]) -> tuple[float, list[list[bool]]]:
        solved = [
            best_rows(functools.reduce(np.add, (costs[key] for key in cluster)), keep_last) for cluster in clusters
        ]
        weights = {str(i): sum(flops[key] for key in cluster) for i, cluster in enumerate(clusters)}
        counts = share(
            {str(i): curve for i, (curve, _) in enumerate(solved)}, weights if any(weights.values()) else None, budget
        )
        chosen = list(zip(solved, counts.values(), strict=True))
        return sum(float(curve[n]) for (curve, _), n in chosen), [found[n] for (_, found), n in chosen]

    total, rows = solve(clusters)
    while max_variants is not None and variants_of(rows) > max_variants:
        clusters = joined(clusters, rows)
        total, rows = solve(clusters)
    return total, {key: row for cluster, row in zip(clusters, rows, strict=True) for key in cluster}


def _joint_row(
    measured: Measurements, budget: float, order: int | None, times: Sequence[float] | None, keep_last: bool
) -> tuple[list[bool], int]:
    """One row for all groups, and its order: every n-th step in reads of order 0, unless another is clearly better."""
    best: tuple[float, list[bool], int] | None = None
    for candidate in orders_predicted(measured, order):
        plan: JointPlan | LagPlan
        if measured.effects is None and candidate == 0:
            plan = LagPlan(measured, measured.groups)
        else:
            plan = joint_plan(measured, candidate, times)
        costs, found = best_rows(plan.costs(), keep_last)
        try:
            count = share({"": costs}, None, budget)[""]
        except CalibrationError:
            if best is None:
                raise
            continue  # forecasts need more computed steps, as after guidance is switched off
        regular = every_nth_row(measured.steps, count, keep_last)
        independent = independence(measured, cautious=order is None)
        # Errors of even gaps undo each other, which the program cannot see: improving them may lead to a better end.
        starts = [found[count], regular] + ([even_row(measured.steps, count)] if count > 1 else [])
        found_from = [plan.improve(start, keep_last, independent) for start in starts if start]
        improved = min(found_from, key=lambda row: plan.error(row, independent))
        if order is not None:
            return improved, order
        for row in (regular, improved):
            error = plan.error(row, independent) if row else math.inf
            if best is None or error < WORTHWHILE**2 * best[0]:
                best = error, row, candidate
    assert best is not None
    return best[1], best[2]


def _costs(measured: Measurements, sites: Sequence[SiteErrors], order: int, times: Sequence[float] | None) -> Costs:
    """The costs of segments of a group, or of a site."""
    ones = np.ones(measured.steps)
    importance = measured.sensitivity.get(sites[0].group, ones)
    products = [site.products for site in sites if site.products is not None]
    if len(products) == len(sites):
        if reach(measured.lags, order) > products[0].reach:
            raise too_high(measured, order)
        # What a group's error does is shared by its sites as if each did it by itself.
        return product_costs(group_matrix(products), importance, measured.lags, order, times)
    if order:
        raise too_high(measured, order)
    return lag_costs(combine([site.moments for site in sites])[1], importance)


def warn_if_behind(measured: Measurements, schedule: Schedule) -> None:
    """Tell where every n-th step, at the cost of a schedule to within half a step, is predicted to err less.

    What a schedule with several rows errs by is not known. It is taken to err as the best of its rows would if all
    groups had it, so that a warning may be missing but is seldom wrong. Nothing is predicted without effects.
    """
    computed = schedule.compute_fraction * schedule.steps
    count = max(1, round(computed))
    if count in (1, schedule.steps) or measured.effects is None:
        return
    if schedule.highest_order not in orders_predicted(measured):
        return
    regular = every_nth_row(schedule.steps, count)
    plan = joint_plan(measured, schedule.highest_order, schedule.times)
    other, error = (
        math.sqrt(min(plan.error(row, independent=0.0) for row in rows))
        for rows in ([regular], [list(map(bool, row)) for row in set(schedule.compute.values())])
    )
    if other < BEHIND * error:
        log.warning(
            "computing every n-th step is predicted to err less than this schedule: %.3g, not %.3g, at %d steps of %d, "
            "where this one computes %.1f. calibration.schedule(compute=%.2f) gives the best rows for as much",
            other,
            error,
            sum(regular),
            schedule.steps,
            computed,
            count / schedule.steps,
        )
