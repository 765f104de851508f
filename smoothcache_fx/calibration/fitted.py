"""Coefficients of forecasts that are fitted to what was measured, in place of a polynomial's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..schedules.schedule import Schedule
from .effects import Effects, aims
from .measurements import ALL, Measurements
from .products import group_matrix
from .site_errors import SiteErrors

Array = NDArray[np.float64]
#: How much a squared distance from a polynomial's coefficients counts, beside the mean square of what single reads err
#: by, where each group is fitted to its own outputs.
SHRINKAGE = 0.01
#: The same where all reused steps are fitted together to interpolated measurements (`Calibration.transfer`), beside the
#: mean square of what moving a coefficient does: outputs between two calibrated steps lie on a line, and without it
#: have coefficients that make up for anything.
INTERPOLATED_SHRINKAGE = 1e-3
#: How far from the polynomial's they may be, over these, in sums of magnitudes; where they would be farther, they are
#: shrunk more. A step that counts for little would else be read far from anything that a branch gives, so as to make
#: good for others.
FARTHEST = 3.0
#: The share of a fitted plan's squared error by which steps add up as independent ones. With less, errors are made to
#: undo each other that do not in other samples: on the DiT of digits, stacks, every 8th step of DDIM, PSNR is 37.7 dB
#: with 0.1 and 40.7 with 0.5. Euler's samples hardly differ between 0.1 and 0.6.
FIT_INDEPENDENT = 0.5


def fitted(measured: Measurements, schedule: Schedule) -> Schedule:
    """As `Calibration.fit`."""
    if schedule.steps != measured.steps:
        raise CalibrationError(f"the schedule has {schedule.steps} steps, the calibration {measured.steps}")
    if not schedule.highest_order:
        raise CalibrationError("the schedule has order 0: there is one output to read, and nothing to fit")
    if any(site.products is None for site in measured.sites):
        raise CalibrationError("the calibration was made without order: calibrate(..., order=2) measures this")
    if schedule.lead and (measured.effects is None or len({schedule.row_for(site) for site in measured.sites}) > 1):
        raise CalibrationError(
            f"the schedule's forecasts aim {schedule.lead:g} of a step ahead: these are fitted where all groups share "
            "a row, and the calibration has effects. Leave out lead, or share rows and calibrate with order=1 or 2"
        )
    groups = {group: sites[0] for group, sites in measured.groups.items() if schedule.order_for(sites[0])}
    same = len({(schedule.row_for(site), schedule.order_for(site)) for site in measured.sites}) == 1
    if same and measured.effects is not None:
        importance = measured.sensitivity.get(ALL, np.ones(measured.steps))
        shrinkage = INTERPOLATED_SHRINKAGE if measured.interpolated else 0.0
        together = fitted_together(measured.effects, importance, schedule, measured.sites[0], shrinkage=shrinkage)
        coefficients = dict.fromkeys(groups, together)
    else:
        coefficients = {group: _fitted_alone(measured, schedule, group) for group in groups}
    return dataclasses.replace(schedule, coefficients=coefficients)


def fitted_together(
    effects: Effects,
    importance: Array,
    schedule: Schedule,
    site: SiteErrors,
    independent: float = FIT_INDEPENDENT,
    shrinkage: float = 0.0,
) -> list[tuple[float, ...]]:
    """The coefficients, the same for all groups, with which the plan as a whole moves the model's output least.

    Each reused step moves the output, and the sampler passes these moves on: their sum is what the sample is off by. So
    the steps are fitted together, and later ones make good for earlier ones. Effects are known of outputs that are read
    as they are; of a sum they follow where coefficients add up to 1.

    Args:
        importance: [steps], what an effect counts for.
        site: any of those that the schedule's row and order are for.
        independent: share of the squared error by which steps add up as independent ones.
        shrinkage: towards the polynomial's coefficients. Where some end up farther than `FARTHEST`, it is raised.

    Returns:
        Those of each step, newest first; none where a step is computed, only one output is there to be read, or not all
        of them were measured.
    """
    dimensions = effects.sketch.shape[-1]
    steps, starts, directions = [], [], []
    total = np.zeros(dimensions)
    aim = aims(effects, schedule.lead) * importance[:, None]
    for step, computed in enumerate(schedule.row_for(site)):
        history = () if computed else schedule.history_for(site, step)
        lags = [step - at for at in history]
        if not history or max(lags) > effects.reach or not np.isfinite(effects.sketch[step, lags]).all():
            continue
        reads = importance[step] * effects.sketch[step, lags].astype(np.float64)
        start = np.array(schedule.polynomial(step, history))
        off = start @ reads - aim[step]
        total += off
        if len(history) > 1:
            steps.append(step)
            starts.append(start)
            directions.append((off, reads[1:] - reads[0]))
    unknowns = [(index, column) for index, (_, reads) in enumerate(directions) for column in range(len(reads))]
    if not unknowns:
        return [()] * schedule.steps
    moves = np.concatenate([reads for _, reads in directions])
    owner = np.array([index for index, _ in unknowns])
    weight = np.where(owner[:, None] == owner, 1.0, 1.0 - independent)
    alone = np.array([directions[index][0] @ directions[index][1][column] for index, column in unknowns])
    slope = (1.0 - independent) * (moves @ total) + independent * alone
    system = weight * (moves @ moves.T)
    scale = float(system.trace()) / len(system)
    while True:
        found = -np.linalg.lstsq(system + shrinkage * scale * np.eye(len(system)), slope, rcond=None)[0]
        changes = [np.array([-found[owner == i].sum(), *found[owner == i]]) for i in range(len(steps))]
        if all(abs(d).sum() <= FARTHEST * abs(start).sum() for d, start in zip(changes, starts, strict=True)):
            break
        shrinkage = max(10 * shrinkage, 1e-6)
    coefficients: list[tuple[float, ...]] = [()] * schedule.steps
    for step, start, change in zip(steps, starts, changes, strict=True):
        coefficients[step] = tuple(map(float, start + change))
    return coefficients


def _fitted_alone(measured: Measurements, schedule: Schedule, group: str) -> list[tuple[float, ...]]:
    """For each step the sum of the group's kept outputs that was nearest to its output."""
    sites = measured.groups[group]
    matrix = group_matrix([site.products for site in sites if site.products is not None])
    return [
        () if computed else _nearest(matrix, schedule, step, schedule.history_for(sites[0], step))
        for step, computed in enumerate(schedule.row_for(sites[0]))
    ]


def _nearest(matrix: Array, schedule: Schedule, step: int, history: Sequence[int]) -> tuple[float, ...]:
    """Those of the outputs of the ``history`` of steps, newest first; none if not all of these were measured.

    Args:
        matrix: [steps, steps], inner products of outputs; NaN where they are not known.
    """
    products = matrix[np.ix_([step, *history], [step, *history])]
    if len(history) < 2 or not np.isfinite(products).all():
        return ()
    return tuple(map(float, least_squares(products, np.array(schedule.polynomial(step, history)), SHRINKAGE)))


def least_squares(products: Array, start: Array, shrinkage: float = SHRINKAGE) -> Array:
    """The ``w`` with the least ``|y - sum of w_i y_i|^2 + shrinkage * scale * |w - start|^2``.

    They need not add up to 1: outputs that grow or fade along the trajectory are scaled, too.

    Args:
        products: [n + 1, n + 1], inner products of ``y`` and the ``y_i``; ``scale`` is the mean of ``|y - y_i|^2``.
        start: [n].
    """
    distances = products[0, 0] - 2 * products[0, 1:] + products.diagonal()[1:]
    penalty = shrinkage * float(distances.mean())
    system = products[1:, 1:] + penalty * np.eye(len(start))
    solution = np.linalg.lstsq(system, products[1:, 0] + penalty * start, rcond=None)[0]
    return np.asarray(solution, np.float64)
