"""Coefficients of forecasts that are fitted to what was measured, in place of a polynomial's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..schedules.coefficients import forecast_coefficients
from ..schedules.schedule import Schedule
from .measurements import Measurements
from .optimal import INDEPENDENT, predicted_error
from .products import group_matrix

Array = NDArray[np.float64]
#: How much a squared distance from a polynomial's coefficients counts, beside the mean square of what single reads err
#: by: what is tried, and what is taken where the error of a whole schedule cannot be predicted.
SHRINKAGES = (math.inf, 0.1, 0.01, 0.001)
SHRINKAGE = 0.01


def fitted(measured: Measurements, schedule: Schedule) -> Schedule:
    """As `Calibration.fit`.

    Each step's sum alone errs least without any shrinkage. Errors of steps add up on the way to the sample, and what is
    fitted to some samples fits others less. For one group, such as a stack, several shrinkages towards polynomials of
    all orders are tried, these polynomials among them, and what is predicted to err least as a whole is taken. Of
    several groups together effects say too little for that.
    """
    orders = range(1, schedule.highest_order + 1)
    if len(measured.groups) == 1:
        candidates = [_fitted_near(measured, schedule, order, much) for order in orders for much in SHRINKAGES]
        try:
            errors = [predicted_error(measured, candidate, INDEPENDENT) for candidate in candidates]
        except CalibrationError:  # effects were not measured as far back
            pass
        else:
            return candidates[int(np.argmin(errors))]
    return _fitted_near(measured, schedule, schedule.highest_order, SHRINKAGE)


def _fitted_near(measured: Measurements, schedule: Schedule, order: int, shrinkage: float) -> Schedule:
    """The schedule with coefficients near those of polynomials of at most this order."""
    found = {}
    for group, sites in measured.groups.items():
        if schedule.order_for(sites[0]):
            matrix = group_matrix([site.products for site in sites if site.products is not None])
            found[group] = [
                () if computed else _coefficients(matrix, schedule, step, history, order, shrinkage)
                for step, computed in enumerate(schedule.row_for(sites[0]))
                for history in [schedule.history_for(sites[0], step)]
            ]
    return dataclasses.replace(schedule, coefficients=found)


def _coefficients(
    matrix: Array, schedule: Schedule, step: int, computed: Sequence[int], order: int, shrinkage: float
) -> tuple[float, ...]:
    """Those of the outputs of the ``computed`` steps, newest first; none if not all of these were measured.

    Args:
        matrix: [steps, steps], inner products of outputs; NaN where they are not known.
    """
    products = matrix[np.ix_([step, *computed], [step, *computed])]
    if len(computed) < 2 or not np.isfinite(products).all():
        return ()
    times = range(schedule.steps) if schedule.times is None else schedule.times
    newest = computed[: order + 1]
    polynomial = np.zeros(len(computed))
    polynomial[: len(newest)] = forecast_coefficients([times[at] for at in newest], times[step])
    return tuple(map(float, least_squares(products, polynomial, shrinkage)))


def least_squares(products: Array, start: Array, shrinkage: float = SHRINKAGE) -> Array:
    """The ``w`` with the least ``|y - sum of w_i y_i|^2 + shrinkage * scale * |w - start|^2``.

    They need not add up to 1: outputs that grow or fade along the trajectory are scaled, too.

    Args:
        products: [n + 1, n + 1], inner products of ``y`` and the ``y_i``; ``scale`` is the mean of ``|y - y_i|^2``.
        start: [n].
    """
    if shrinkage == math.inf:
        return start
    distances = products[0, 0] - 2 * products[0, 1:] + products.diagonal()[1:]
    penalty = shrinkage * float(distances.mean())
    system = products[1:, 1:] + penalty * np.eye(len(start))
    solution = np.linalg.lstsq(system, products[1:, 0] + penalty * start, rcond=None)[0]
    return np.asarray(solution, np.float64)
