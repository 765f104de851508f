"""What reads from the caches do to the model's output, small enough to keep, and what a whole plan then does."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError

#: Numbers kept of each effect. The squared norm of a sum is then known to within sqrt(2 / 256), 9%.
DIMENSIONS = 256


class Effects:
    """Sketches of effects: at [t, i] that of reading, at step t, what all branches gave at step t - i.

    The effect is the change of the model's output when all branches are read from step t - i, its inputs the same. A
    sketch sums its elements, with random signs, into few numbers: norms and inner products stay what they are, on
    average over signs (Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002). So effects
    can be weighed as a forecast weighs outputs, and added up over steps: that is what the final sample is off by, up to
    how the sampler passes it on.

    Args:
        sketch: float32 [steps, reach + 1, dimensions], root mean square over the output's elements; NaN where unknown.
        weight: of the observations, in elements of the model's output.
    """

    def __init__(self, sketch: NDArray[np.float32], weight: float) -> None:
        self.sketch = np.asarray(sketch, np.float32)
        self.weight = float(weight)
        known = np.isfinite(self.sketch)
        if self.sketch.ndim != 3 or not 0 < self.weight < math.inf or (known.any(-1) != known.all(-1)).any():
            raise CalibrationError(
                f"impossible effects: expected a sketch [steps, reach + 1, dimensions] and a weight above 0, got shape "
                f"{list(self.sketch.shape)} and {weight!r}"
            )

    @property
    def reach(self) -> int:
        """How many steps back the reads go."""
        return self.sketch.shape[1] - 1

    def size(self, lag: int) -> NDArray[np.float64]:
        """Root mean square of the effect of reading from `lag` steps back, float64 [steps]."""
        return np.linalg.norm(self.sketch[:, lag].astype(np.float64), axis=-1)

    def merge(self, other: Effects) -> Effects:
        """Those of both, taken as independent."""
        if self.sketch.shape != other.sketch.shape:
            raise CalibrationError(
                f"cannot merge effects of shapes {list(self.sketch.shape)} and {list(other.sketch.shape)}: calibrate "
                "with the same steps, lags and order"
            )
        weight = self.weight + other.weight
        # Both may have been made with the same signs: other ones make the two independent.
        signs = np.random.default_rng(int(weight) % 2**32).choice([-1.0, 1.0], self.sketch.shape[-1])
        mine, theirs = math.sqrt(self.weight / weight), math.sqrt(other.weight / weight)
        return Effects(mine * self.sketch + theirs * signs * other.sketch, weight)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Effects):
            return NotImplemented
        return self.weight == other.weight and np.array_equal(self.sketch, other.sketch, equal_nan=True)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; the numbers as base64 of little-endian float32."""
        data = base64.b64encode(self.sketch.astype("<f4").tobytes()).decode("ascii")
        return {"shape": list(self.sketch.shape), "weight": self.weight, "float32": data}

    @classmethod
    def from_json(cls, data: object) -> Effects:
        """The effects that `to_json` described; CalibrationError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"shape", "weight", "float32"}:
            raise CalibrationError("effects are no object with shape, weight and float32")
        try:
            numbers = np.frombuffer(base64.b64decode(data["float32"], validate=True), "<f4")
            return cls(numbers.reshape([int(size) for size in data["shape"]]), float(data["weight"]))
        except (TypeError, ValueError, binascii.Error) as reason:
            if isinstance(reason, CalibrationError):
                raise
            raise CalibrationError(f"effects cannot be read: {reason}") from reason


def aims(effects: Effects, lead: float) -> NDArray[np.float64]:
    """The effect that a forecast aims at which is to be of ``lead`` steps later: float64 [steps, dimensions].

    What changes from a step to the next is read backwards one step later; after the last step it goes on likewise.
    """
    steps = len(effects.sketch)
    if not lead or steps == 1:
        return np.zeros((steps, effects.sketch.shape[-1]))
    following = np.minimum(np.arange(steps) + 1, steps - 1)
    return -lead * effects.sketch[following, 1].astype(np.float64)
