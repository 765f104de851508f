"""Means with their spread, gathered one observation at a time, and the 95% interval of such a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Moments = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Observations, their mean (NaN where there are none) and their summed squared deviations from it."""


def combine(moments: Sequence[Moments]) -> Moments:
    """The moments of all observations together, elementwise over arrays of one shape.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979).
    """
    count = np.asarray(np.sum([n for n, _, _ in moments], axis=0, dtype=np.int64))
    reference = moments[0][1]
    for _, mean, _ in moments[1:]:
        reference = np.where(np.isnan(reference), mean, reference)
    # Relative to one of the means, so that a mean that is the only one, or equal to all others, stays exact.
    shift = np.sum([np.where(n > 0, n * (mean - reference), 0.0) for n, mean, _ in moments], axis=0)
    mean = reference + shift / np.maximum(count, 1)
    within = np.sum([m2 for _, _, m2 in moments], axis=0)
    between = np.sum([np.where(n > 0, n * (part - mean) ** 2, 0.0) for n, part, _ in moments], axis=0)
    return count, mean, within + between


def half_width(count: NDArray[np.int64], m2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the 95% interval of the mean (Student's t); NaN where there are fewer than two observations."""
    degrees, place = np.unique(np.maximum(count - 1, 0), return_inverse=True)
    quantiles = np.array([t_quantile(int(df)) if df else np.nan for df in degrees])
    variance = m2 / np.maximum(count - 1, 1)
    return quantiles[place].reshape(count.shape) * np.sqrt(variance / np.maximum(count, 1))


@lru_cache(maxsize=4096)
def t_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t for a whole number of degrees of freedom, to ten digits or better.

    Up to 200 degrees by bisection on the finite series for P(|t| < x) (Abramowitz and Stegun 26.7.3, 26.7.4),
    beyond by the asymptotic expansion about the normal quantile (26.7.5).
    """
    if degrees > 200:
        z = 1.959963984540054
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return z + math.fsum(term / degrees**power for power, term in enumerate(terms, start=1))
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _central(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _central(angle: float, degrees: int) -> float:
    """P(|t| < x) for `angle` = atan(x / sqrt(degrees)), by the finite trigonometric series in cos(angle)."""
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
