"""What a calibration has measured, as the solvers take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .effects import Effects
from .site_errors import SiteErrors

#: Stands for all groups together, where sensitivities are by group.
ALL = "*"

#: What is measured, and then cached, as one: each branch, or the longest runs of blocks.
GRAINS = ("branch", "stack")

#: In place of an order: forecasts with fitted coefficients.
FIT = "fit"


class Measurements(Protocol):
    """The part of a `Calibration` that rows and predicted errors follow from; its attributes are those."""

    steps: int
    lags: int
    sites: list[SiteErrors]
    history_bytes: int
    metadata: dict[str, Any]
    grain: str
    effects: Effects | None
    sensitivity: dict[str, NDArray[np.float64]]
    timesteps: Sequence[float] | None
    noise_levels: Sequence[float] | None
    interpolated: bool

    @property
    def groups(self) -> Mapping[str, Sequence[SiteErrors]]: ...

    def error(self, group: str) -> NDArray[np.float64]: ...


def group_flops(measured: Measurements) -> dict[str, float] | None:
    """FLOPs of each group; None where they are not known."""
    flops = {group: sum(site.flops for site in sites) for group, sites in measured.groups.items()}
    return flops if any(flops.values()) else None
