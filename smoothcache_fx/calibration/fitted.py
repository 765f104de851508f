"""Coefficients of forecasts that are fitted to what was measured, in place of a polynomial's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..schedules.coefficients import forecast_coefficients
from ..schedules.schedule import Schedule
from .measurements import Measurements
from .products import group_matrix

Array = NDArray[np.float64]
#: How much a squared distance from the polynomial's coefficients counts, beside the mean square of what single reads
#: err by.
SHRINKAGE = 1e-4


def fitted(measured: Measurements, schedule: Schedule) -> Schedule:
    """As `Calibration.fit`."""
    found = {}
    for group, sites in measured.groups.items():
        if schedule.order_for(sites[0]):
            matrix = group_matrix([site.products for site in sites if site.products is not None])
            row = schedule.row_for(sites[0])
            found[group] = [
                () if computed else _coefficients(matrix, schedule, step, schedule.history_for(sites[0], step))
                for step, computed in enumerate(row)
            ]
    return _with_coefficients(schedule, found)


def _coefficients(matrix: Array, schedule: Schedule, step: int, computed: Sequence[int]) -> tuple[float, ...]:
    """Those of the outputs of the ``computed`` steps, newest first; none if not all of these were measured.

    Args:
        matrix: [steps, steps], inner products of outputs; NaN where they are not known.
    """
    places = [step, *computed]
    errors = np.hstack([-np.ones((len(computed), 1)), np.eye(len(computed))])
    gram = errors @ matrix[np.ix_(places, places)] @ errors.T
    if len(computed) < 2 or not np.isfinite(gram).all():
        return ()
    times = range(schedule.steps) if schedule.times is None else schedule.times
    polynomial = np.array(forecast_coefficients([times[at] for at in computed], times[step]))
    return tuple(map(float, least_squares(gram, polynomial)))


def least_squares(gram: Array, start: Array, shrinkage: float = SHRINKAGE) -> Array:
    """The weights ``w`` that add up to 1 and have the least ``w' gram w + shrinkage * scale * |w - start|^2``.

    Args:
        gram: [n, n], inner products of what reads of single steps err by; ``scale`` is the mean of its diagonal.
        start: [n], adding up to 1.
    """
    count = len(gram)
    penalty = shrinkage * float(np.trace(gram)) / count
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = gram + penalty * np.eye(count)
    system[count, count] = 0.0
    solution = np.linalg.lstsq(system, np.append(penalty * start, 1.0), rcond=None)[0]
    return solution[:count]


def _with_coefficients(schedule: Schedule, coefficients: Mapping[str, Sequence[Sequence[float]]]) -> Schedule:
    return Schedule(
        schedule.steps,
        schedule.compute,
        order=schedule.order,
        flops=schedule.flops,
        times=schedule.times,
        history_dtype=schedule.history_dtype,
        timesteps=schedule.timesteps,
        coefficients=coefficients,
    )
