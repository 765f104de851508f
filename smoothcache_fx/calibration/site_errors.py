"""SiteErrors: the errors seen at one site, gathered one observation at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import is_number, scalar
from ..errors import CalibrationError
from .products import Products
from .statistics import Moments, combine


@dataclass(eq=False)
class SiteErrors:
    """The errors seen at one site: at [k - 1, t] those of using step t - k's output at step t.

    One observation is `sum|y_t - y_{t-k}| / sum|y_t|` (Eq. 4 of arXiv 2411.10510), with y the branch's output
    in one trajectory; `y_t` is the fresh one.

    Attributes:
        name: of the site, and its `group` and `kind`.
        flops: floating-point operations of one call of the site.
        count: int64 [lags, steps], observations; 0 where t < k.
        mean: float64 [lags, steps], their mean; NaN where there are none.
        m2: float64 [lags, steps], the sum of their squared deviations from the mean; 0 where there are none.
        products: of the outputs of neighbouring steps, if they were measured.
    """

    name: str
    group: str
    kind: str
    flops: float
    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    products: Products | None = None

    def __post_init__(self) -> None:
        for field in ("name", "group", "kind"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise CalibrationError(f"a site's {field} is {getattr(self, field)!r}, expected a string")
        flops = scalar(self.flops)
        if not is_number(flops) or not 0 <= flops < math.inf:
            raise CalibrationError(
                f"flops of site {self.name!r} is {self.flops!r}, expected a finite number of at least 0"
            )
        self.flops = float(flops)
        self.count = np.asarray(self.count, np.int64)
        self.mean = np.asarray(self.mean, np.float64)
        self.m2 = np.asarray(self.m2, np.float64)
        shapes = [list(values.shape) for values in self.moments]
        if len(shapes[0]) != 2 or shapes[1:] != shapes[:-1]:
            raise CalibrationError(
                f"site {self.name!r} has count, mean and m2 of shapes {shapes}, expected [lags, steps] each"
            )
        seen = self.count > 0
        early = np.arange(shapes[0][1]) <= np.arange(shapes[0][0])[:, None]
        good = np.where(seen, (0 <= self.mean) & (self.mean < np.inf), np.isnan(self.mean))
        good &= np.where(seen, (0 <= self.m2) & (self.m2 < np.inf), self.m2 == 0)
        if (self.count < 0).any() or (seen & early).any() or not good.all():
            raise CalibrationError(
                f"site {self.name!r} has impossible errors: expected no count below 0 and none where the "
                f"step is less than the lag, and finite mean and m2 of at least 0 where there is a count "
                f"(NaN and 0 elsewhere)"
            )

    @classmethod
    def empty(cls, name: str, group: str, kind: str, flops: float, *, lags: int, steps: int) -> SiteErrors:
        """A site without observations."""
        shape = (lags, steps)
        return cls(name, group, kind, flops, np.zeros(shape, np.int64), np.full(shape, np.nan), np.zeros(shape))

    @property
    def moments(self) -> Moments:
        """`count`, `mean` and `m2`."""
        return self.count, self.mean, self.m2

    def add(self, lag: int, step: int, value: float) -> None:
        """Add one observation of using step `step - lag`'s output at `step` (Welford's update).

        Raises:
            CalibrationError: if the value is not finite, or there is no such lag and step.
        """
        lags, steps = self.count.shape
        if not 1 <= lag <= lags or not lag <= step < steps:
            raise CalibrationError(
                f"site {self.name!r}: lag {lag} at step {step}, expected a lag from 1 to {lags} and a step "
                f"from the lag to {steps - 1}"
            )
        value = float(value)
        if not 0 <= value < math.inf:
            raise CalibrationError(
                f"site {self.name!r} at step {step}: the relative change since step {step - lag} is {value}, "
                f"expected a finite number of at least 0. The branch's output holds NaN or infinity, or is "
                f"all zeros: check the model's weights, inputs and dtype"
            )
        place = (lag - 1, step)
        count = int(self.count[place]) + 1
        before = float(self.mean[place]) if count > 1 else 0.0
        after = before + (value - before) / count
        if count == 1:
            before = value
        self.count[place] = count
        self.mean[place] = after
        self.m2[place] += (value - before) * (value - after)

    def merge(self, other: SiteErrors) -> SiteErrors:
        """The site with the observations of both.

        `flops` becomes the mean over the observations, as the two runs may have had different batch sizes.
        """
        for field in ("name", "group", "kind"):
            if getattr(self, field) != getattr(other, field):
                raise CalibrationError(
                    f"cannot merge the errors of site {self.name!r} with those of {other.name!r}: their "
                    f"{field}s are {getattr(self, field)!r} and {getattr(other, field)!r}"
                )
        if self.count.shape != other.count.shape:
            raise CalibrationError(
                f"cannot merge the errors of site {self.name!r}: their shapes [lags, steps] are "
                f"{list(self.count.shape)} and {list(other.count.shape)}"
            )
        theirs, total = int(other.count.sum()), int(self.count.sum() + other.count.sum())
        flops = self.flops + (other.flops - self.flops) * (theirs / total if total else 0.5)
        both = self.products is not None and other.products is not None
        products = self.products.merge(other.products) if both else None
        return SiteErrors(self.name, self.group, self.kind, flops, *combine([self.moments, other.moments]), products)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SiteErrors):
            return NotImplemented
        mine = (self.name, self.group, self.kind, self.flops, self.products)
        return mine == (other.name, other.group, other.kind, other.flops, other.products) and all(
            np.array_equal(here, there, equal_nan=True) for here, there in zip(self.moments, other.moments, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, of JSON's own types; a mean that is not known is null."""
        mean = [[None if math.isnan(value) else value for value in row] for row in self.mean.tolist()]
        return {
            "name": self.name,
            "group": self.group,
            "kind": self.kind,
            "flops": self.flops,
            "count": self.count.tolist(),
            "mean": mean,
            "m2": self.m2.tolist(),
            "products": None if self.products is None else self.products.to_json(),
        }

    @classmethod
    def from_json(cls, data: object) -> SiteErrors:
        """The site that `to_json` described; CalibrationError for anything else."""
        fields = ("name", "group", "kind", "flops", "count", "mean", "m2")
        if not isinstance(data, Mapping) or set(data) - {"products"} != set(fields):
            found = sorted(data) if isinstance(data, Mapping) else f"a {type(data).__name__}"
            raise CalibrationError(f"a site is {found}, expected an object with {', '.join(fields)}")
        name = data["name"]
        count = _array(data["count"], f"count of site {name!r}", whole=True)
        mean = _array(data["mean"], f"mean of site {name!r}")
        m2 = _array(data["m2"], f"m2 of site {name!r}")
        products = data.get("products")
        products = None if products is None else Products.from_json(products, _array)
        return cls(name, data["group"], data["kind"], data["flops"], count, mean, m2, products)


def _array(rows: object, what: str, whole: bool = False) -> NDArray[Any]:
    """A nested JSON list of numbers as a two-dimensional array; null is NaN."""
    types = (int,) if whole else (int, float, type(None))
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise CalibrationError(f"{what} is no list of lists")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise CalibrationError(f"{what} has rows of {lengths} entries, expected rows of one length")
    for value in (value for row in rows for value in row):
        if type(value) not in types or (type(value) is int and abs(value) >= 2**63):
            raise CalibrationError(f"{what} has {value!r}, expected a {'whole ' if whole else ''}number")
    return np.array(rows, dtype=np.int64 if whole else np.float64)
