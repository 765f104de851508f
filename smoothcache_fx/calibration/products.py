"""Inner products of a site's outputs over neighbouring steps, from which the error of any forecast follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError


class Products:
    """Means over observations of the products of a site's outputs: at [t, i] that of y_t and y_{t-i}, per element.

    They say what any forecast errs by: with d = y_t - sum of w_i y_{t-i} the mean of d^2 is a quadratic form in the
    weights, whose entries are these. Exact up to which elements are looked at: `calibrate` takes a random subset.

    Args:
        count: int64 [steps, reach + 1], observations; 0 where t < i.
        mean: float64 [steps, reach + 1]; NaN where there are none.

    Raises:
        CalibrationError: if they do not fit each other.
    """

    def __init__(self, count: NDArray[np.int64], mean: NDArray[np.float64]) -> None:
        self.count = np.asarray(count, np.int64)
        self.mean = np.asarray(mean, np.float64)
        shape = self.count.shape
        if len(shape) != 2 or self.mean.shape != shape:
            raise CalibrationError(
                f"products have count and mean of shapes {list(shape)} and {list(self.mean.shape)}, expected "
                "[steps, reach + 1] each"
            )
        early = np.arange(shape[0])[:, None] < np.arange(shape[1])
        seen = self.count > 0
        if (self.count < 0).any() or (seen & early).any() or not (np.isfinite(self.mean) == seen).all():
            raise CalibrationError(
                "impossible products: expected no count below 0 and none before the first step, and a finite mean "
                "where there is a count, NaN elsewhere"
            )

    @classmethod
    def empty(cls, steps: int, reach: int) -> Products:
        """Without observations."""
        shape = (steps, reach + 1)
        return cls(np.zeros(shape, np.int64), np.full(shape, np.nan))

    @property
    def reach(self) -> int:
        """How many steps back the products go."""
        return self.count.shape[1] - 1

    def add(self, step: int, lag: int, value: float) -> None:
        """Add one observation of the mean of y_step times y_{step - lag}."""
        count = int(self.count[step, lag]) + 1
        before = float(self.mean[step, lag]) if count > 1 else 0.0
        self.count[step, lag] = count
        self.mean[step, lag] = before + (value - before) / count

    def merge(self, other: Products) -> Products:
        """The observations of both."""
        if self.count.shape != other.count.shape:
            raise CalibrationError(
                f"cannot merge products over {self.reach} steps back with those over {other.reach}: calibrate with the "
                "same steps, lags and order"
            )
        count = self.count + other.count
        parts = [np.where(part.count > 0, part.mean * part.count, 0.0) for part in (self, other)]
        mean = np.where(count > 0, sum(parts) / np.maximum(count, 1), np.nan)
        return Products(count, mean)

    def matrix(self) -> NDArray[np.float64]:
        """float64 [steps, steps], symmetric; NaN where steps lie too far apart or were not seen."""
        steps = len(self.mean)
        full = np.full((steps, steps), np.nan)
        for lag in range(min(self.reach, steps - 1) + 1):
            at = np.arange(lag, steps)
            full[at, at - lag] = full[at - lag, at] = self.mean[lag:, lag]
        return full

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Products):
            return NotImplemented
        return np.array_equal(self.count, other.count) and np.array_equal(self.mean, other.mean, equal_nan=True)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; a mean that is not known is null."""
        mean = [[None if math.isnan(value) else value for value in row] for row in self.mean.tolist()]
        return {"count": self.count.tolist(), "mean": mean}

    @classmethod
    def from_json(cls, data: object, array: Any) -> Products:
        """The products that `to_json` described; ``array`` reads a nested list of numbers, and checks it."""
        if not isinstance(data, Mapping) or set(data) != {"count", "mean"}:
            raise CalibrationError("'products' must be an object with 'count' and 'mean'")
        return cls(array(data["count"], "count of products", whole=True), array(data["mean"], "mean of products"))


def group_matrix(sites: Sequence[Products]) -> NDArray[np.float64]:
    """The mean of the sites' matrices, each divided by its own mean square over all steps: [steps, steps].

    A site of many large values counts no more than another; a step at which a site's output is small counts less.
    """
    matrices = []
    for products in sites:
        matrix = products.matrix()
        scale = np.nanmean(matrix.diagonal())
        matrices.append(matrix / scale if scale > 0 else matrix)
    return np.mean(matrices, axis=0)
