"""Weights of a forecast: a polynomial through past values, or through the last and differences, at another time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def weights(times: Sequence[float], at: float) -> tuple[float, ...]:
    """Lagrange's weights: the polynomial through values at ``times`` is the sum of weight times value, at ``at``.

    Args:
        times: distinct, at least one; the degree is one less than how many there are.
    """
    return tuple(
        math.prod((at - other) / (time - other) for j, other in enumerate(times) if j != i)
        for i, time in enumerate(times)
    )


def of_differences(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of the newest value and of successive differences that give the same sum as these of the values.

    With ``d_i = v_{i-1} - v_i`` the sum of ``w_i v_i`` is ``v_0 - (w_1 + w_2 + ...) d_1 - (w_2 + ...) d_2 - ...``,
    since the weights add up to 1.

    Args:
        weights: what ``weights`` returned, newest value first.
    """
    return (1.0, *(-math.fsum(weights[i:]) for i in range(1, len(weights))))
