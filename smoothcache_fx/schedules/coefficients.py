"""Coefficients of a forecast: a polynomial through past values, or the last and differences, at another time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def forecast_coefficients(times: Sequence[float], at: float) -> tuple[float, ...]:
    """Lagrange's: the polynomial through values at ``times`` is, at ``at``, the sum of coefficient times value.

    Args:
        times: distinct, at least one; the degree is one less than how many there are.
    """
    return tuple(
        math.prod((at - other) / (time - other) for j, other in enumerate(times) if j != i)
        for i, time in enumerate(times)
    )


def difference_coefficients(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of the newest value and of successive differences that give the same sum as these of the values.

    With ``d_i = v_{i-1} - v_i`` the sum of ``w_i v_i`` is ``(w_0 + w_1 + ...) v_0 - (w_1 + w_2 + ...) d_1 - (w_2 +
    ...) d_2 - ...``. Those of a polynomial add up to 1.

    Args:
        coefficients: of the values, newest first.
    """
    return (math.fsum(coefficients), *(-math.fsum(coefficients[i:]) for i in range(1, len(coefficients))))


def ahead_of(times: Sequence[float], step: int, lead: float) -> float:
    """The time that lies ``lead`` steps past a step; past the last one as far as past the one before it."""
    if not lead or len(times) == 1:
        return times[step]
    before = min(step, len(times) - 2)
    return times[step] + lead * (times[before + 1] - times[before])
