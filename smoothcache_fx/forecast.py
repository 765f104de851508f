"""Weights of a forecast: a polynomial through past values, at another time."""

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
