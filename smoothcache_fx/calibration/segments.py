"""Exact plans: which steps to compute, by dynamic programming, and how groups share a budget of FLOPs.

A plan is a sequence of *segments*: a computed step and the reused ones that follow it. What a segment costs depends on
its length and on the computed steps before it that its forecasts look back to, and a plan costs the sum of its
segments. For such costs the plans found here are the best there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError

Costs = NDArray[np.float64]
"""[steps, lags + 1, *gaps]: at [a, k, d, e] the cost of reusing k steps after computing step a, where the computed
steps before a are a - d and a - d - e. There is an axis of gaps, [lags + 2], for each order; 0 stands for none."""


def reach(lags: int, order: int) -> int:
    """How many steps back a forecast can look: ``lags`` reused steps, and ``order`` gaps of at most one more."""
    return lags + order * (lags + 1)


def histories(step: int, lags: int, order: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All computed steps that a forecast after computing ``step`` can look back to: gaps, and steps newest first.

    Fewer than ``order + 1`` only where the oldest is step 0: there are no others then.
    """

    def extend(gaps: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        if len(steps) == order + 1 or steps[-1] == 0:
            yield (*gaps, *[0] * (order - len(gaps))), steps
        else:
            for gap in range(1, min(lags + 1, steps[-1]) + 1):
                yield from extend((*gaps, gap), (*steps, steps[-1] - gap))

    yield from extend((), (step,))


def segment_costs(
    steps: int, lags: int, order: int, cost: Callable[[tuple[int, ...]], Sequence[float] | NDArray[np.float64]]
) -> Costs:
    """The costs of all segments.

    Args:
        cost: given the computed steps that forecasts look back to, newest first, the cost of reusing 1, 2, ... steps
            after the newest, up to ``lags`` or the end of the trajectory.
    """
    costs = np.full((steps, lags + 1, *(lags + 2,) * order), np.inf)
    for step in range(steps):
        longest = min(lags, steps - 1 - step)
        for gaps, computed in histories(step, lags, order):
            reused: Any = (step, slice(1, longest + 1), *gaps)
            costs[reused] = cost(computed)[:longest]
            costs[(step, 0, *gaps)] = 0.0
    return costs


def best_rows(costs: Costs, keep_last: bool = False) -> tuple[NDArray[np.float64], list[list[bool]]]:
    """For each number of computed steps the least cost there is, and a row that has it.

    Args:
        costs: of all segments, infinite where there is none.
        keep_last: compute the last step.

    Returns:
        float64 [steps + 1], infinite where no row computes that many steps (always at 0); and a row of ``steps``
        decisions each, True for compute, empty where there is none.
    """
    steps, lags, gaps = costs.shape[0], costs.shape[1] - 1, costs.shape[2:]
    order = len(gaps)
    # At [a][d, e, n]: the least cost of all before a, with n steps computed up to and including a, and what the best
    # predecessor had: for order 0 its segment's length, else its last gap, which the history no longer shows.
    best = np.full((steps, *gaps, steps + 1), np.inf)
    origin = np.zeros(best.shape, np.int64)
    best[(0, *[0] * order, 1)] = 0.0
    total = np.full(steps + 1, np.inf)
    ends: list[tuple[int, ...]] = [()] * (steps + 1)
    for step in range(steps):
        for reused in range(min(lags, steps - 1 - step) + 1):
            after = best[step] + costs[step, reused][..., None]
            following = step + reused + 1
            if following == steps:
                if reused and keep_last:
                    continue
                flat = after.reshape(-1, steps + 1)
                places = flat.argmin(axis=0)
                for n in np.flatnonzero(flat.min(axis=0) < total).tolist():
                    total[n] = flat[places[n], n]
                    ends[n] = (step, *map(int, np.unravel_index(places[n], gaps))) if order else (step,)
            elif order == 0:
                better = after[:-1] < best[following, 1:]
                best[following, 1:][better] = after[:-1][better]
                origin[following, 1:][better] = reused
            else:
                # This gap and history are reached from here only.
                best[following, reused + 1, ..., 1:] = after.min(axis=order - 1)[..., :-1]
                origin[following, reused + 1, ..., 1:] = after.argmin(axis=order - 1)[..., :-1]
    return total, [_trace(origin, end, n, steps) if end else [] for n, end in enumerate(ends)]


def _trace(origin: NDArray[np.int64], end: tuple[int, ...], count: int, steps: int) -> list[bool]:
    """The row whose last computed step, and the gaps before it, are ``end``."""
    row = [False] * steps
    step, *gaps = end
    row[step] = True
    for n in range(count, 1, -1):
        before = int(origin[(step, *gaps, n)])
        if gaps:
            step, gaps = step - gaps[0], [*gaps[1:], before]
        else:
            step -= before + 1
        row[step] = True
    return row


def share(
    curves: Mapping[str, NDArray[np.float64]], flops: Mapping[str, float] | None, budget: float
) -> dict[str, int]:
    """How many steps each group computes, so that the sum of costs is the least that the budget allows.

    Exact: groups are added one by one, and of all ways to spend something only those are kept that no other way beats
    in both cost and FLOPs.

    Args:
        curves: group -> cost by number of computed steps, [steps + 1], infinite where that many cannot be.
        flops: group -> FLOPs of one step; None weighs all the same.
        budget: the largest share of all FLOPs to compute, as `Schedule.compute_fraction` counts it.

    Raises:
        CalibrationError: if the budget allows nothing; says what is the least.
    """
    units = _units([1.0 if flops is None else flops[group] for group in curves])
    steps = len(next(iter(curves.values()))) - 1
    whole = steps * sum(units)
    counts = [np.flatnonzero(np.isfinite(curve)) for curve in curves.values()]
    rest = [int(least[0]) * unit for least, unit in zip(counts, units, strict=True)]
    limit = _limit(budget, whole)
    if sum(rest) > limit:
        least = float(Fraction(sum(rest), whole))
        raise CalibrationError(
            f"no schedule computes {budget:.4g} of the FLOPs or less: the least is {least:.4g}; ask for "
            f"compute={math.ceil(least * 1000) / 1000} or more, or calibrate with more lags"
        )
    number = np.int64 if whole < 2**62 else object
    spent, cost = np.zeros(1, number), np.zeros(1)
    choices: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for index, curve in enumerate(curves.values()):
        options = counts[index]
        price = np.array([int(count) * units[index] for count in options], number)
        spent = (spent[:, None] + price).ravel()
        cost = (cost[:, None] + curve[options]).ravel()
        within = np.flatnonzero(spent <= limit - sum(rest[index + 1 :]))
        order = within[np.lexsort((cost[within], spent[within].astype(number)))] if number is np.int64 else None
        if order is None:
            order = np.array(sorted(within.tolist(), key=lambda i: (spent[i], cost[i])), np.int64)
        lowest = np.minimum.accumulate(cost[order])
        front = order[np.flatnonzero(np.r_[True, lowest[1:] < lowest[:-1]])]
        choices.append((front // len(options), options[front % len(options)]))
        spent, cost = spent[front], cost[front]
    place = len(cost) - 1  # the costs fall along the front
    found: list[int] = []
    for before, taken in reversed(choices):
        found.append(int(taken[place]))
        place = int(before[place])
    return dict(zip(curves, reversed(found), strict=True))


def _units(flops: Sequence[float]) -> list[int]:
    """FLOPs as whole numbers in the largest unit that they have in common; 1 each if all are 0."""
    exact = [Fraction(value) for value in flops]
    scale = math.lcm(*(value.denominator for value in exact))
    whole = [int(value * scale) for value in exact]
    unit = math.gcd(*whole)
    return [value // unit for value in whole] if unit else [1] * len(whole)


def _limit(budget: float, whole: int) -> int:
    """The most of ``whole`` whose share, rounded to a float, is at most the budget: 24 of 50 are 0.48."""
    most = math.floor((Fraction(budget) + Fraction(math.ulp(budget))) * whole)
    while Fraction(most, whole) > 0 and float(Fraction(most, whole)) > budget:
        most -= 1
    return min(most, whole)
