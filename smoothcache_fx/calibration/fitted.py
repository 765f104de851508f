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
SHRINKAGE = 0.01


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
    products = matrix[np.ix_([step, *computed], [step, *computed])]
    if len(computed) < 2 or not np.isfinite(products).all():
        return ()
    times = range(schedule.steps) if schedule.times is None else schedule.times
    polynomial = np.array(forecast_coefficients([times[at] for at in computed], times[step]))
    return tuple(map(float, least_squares(products, polynomial)))


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
    return np.linalg.lstsq(system, products[1:, 0] + penalty * start, rcond=None)[0]


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
