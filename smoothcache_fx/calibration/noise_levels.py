"""The noise level of each step, by a scheduler's own table. By its shape alone: diffusers is not imported here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def noise_levels_of(scheduler: Any) -> tuple[float, ...] | None:
    """Of each timestep the share of noise, ``sigma / (alpha + sigma)``, from 0 to 1; None without a table.

    It is the sigma of a rectified flow, and of any other path a function of its log-SNR that stays finite at both ends.

    Args:
        scheduler: after ``set_timesteps``.
    """
    timesteps = _array(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        sigma = _array(sigmas)[: len(timesteps)]
        levels = sigma if _is_flow(scheduler) else sigma / (1 + sigma)
    else:
        table = getattr(scheduler, "alphas_cumprod", None)
        places = timesteps.astype(np.int64)
        if table is None or (places != timesteps).any() or not ((places >= 0) & (places < len(table))).all():
            return None
        signal = np.sqrt(_array(table)[places])
        spread = np.sqrt(1 - signal**2)
        levels = spread / (signal + spread)
    return tuple(levels.tolist()) if np.isfinite(levels).all() else None


def timesteps_of(scheduler: Any) -> tuple[float, ...]:
    """A scheduler's timesteps, in sampling order."""
    return tuple(_array(scheduler.timesteps).tolist())


def _is_flow(scheduler: Any) -> bool:
    """Whether samples are ``(1 - sigma) data + sigma noise``, and not ``data + sigma noise`` up to scale."""
    config = getattr(scheduler, "config", {})
    of = config.get if hasattr(config, "get") else lambda name, default=None: getattr(config, name, default)
    if of("use_flow_sigmas") or of("prediction_type") == "flow_prediction":
        return True
    return not hasattr(scheduler, "alphas_cumprod") and of("sigma_data") is None


def _array(values: Any) -> Array:
    """Numbers, wherever they are."""
    values = values.cpu() if hasattr(values, "cpu") else values
    return np.asarray(values, np.float64).reshape(-1)
