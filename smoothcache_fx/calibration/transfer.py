"""Measurements for other steps than they were made at: they are taken as functions of the noise level."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import numbers_of, whole_number
from ..errors import CalibrationError
from .effects import Effects
from .measurements import ALL, Measurements
from .noise_levels import noise_levels_of, timesteps_of
from .products import Products
from .segments import reach
from .site_errors import SiteErrors

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

#: Reuse over more of the new steps is not planned: the solver's work grows with its third power.
MOST_LAGS = 12
#: Distances are known up to rounding.
ROUNDING = 1e-6
#: How many calibrated steps beyond the first and the last a new step may lie without a word: samplers of one model
#: space their timesteps from either end.
BEYOND = 1.5


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps that measurements are wanted at.

    Attributes:
        at: their positions among the calibrated steps, fractions of indices, rising; beyond the ends, too.
        timesteps, noise_levels: as a `Calibration` has them, where they are known.
    """

    at: Array
    timesteps: tuple[float, ...] | None = None
    noise_levels: tuple[float, ...] | None = None


def steps_of(measured: Measurements, steps: int | None, timesteps: object, scheduler: Any) -> Steps:
    """The steps that the arguments of `Calibration.transfer` describe.

    Raises:
        CalibrationError: they do not fit each other or the calibration.
    """
    if steps is not None:
        steps = whole_number(steps, "steps", 1, CalibrationError)
    if scheduler is not None and timesteps is not None:
        raise CalibrationError("give timesteps or a scheduler that has them, not both")
    if scheduler is None and timesteps is None:
        if steps is None:
            raise CalibrationError("give steps, timesteps or a scheduler: one of them says which steps are wanted")
        return Steps(even_positions(measured.steps, steps))
    if scheduler is not None:
        scheduler = _set_to(scheduler, steps)
        levels, own = noise_levels_of(scheduler), timesteps_of(scheduler)
        if levels is not None and measured.noise_levels is not None:
            return Steps(positions(measured.noise_levels, levels), own, levels)
    else:
        levels, own = None, numbers_of(timesteps, "timesteps", steps, CalibrationError)
    if measured.timesteps is None:
        raise CalibrationError(
            "the calibration knows no timesteps of its steps, so that others cannot be found among them: the model was "
            "given none, or trajectories had different ones. Give steps alone, which are then spaced as the calibrated "
            "ones, or calibrate with a sampler whose timesteps are the same each time"
        )
    return Steps(positions(measured.timesteps, own), own, levels)


def _set_to(scheduler: Any, steps: int | None) -> Any:
    """The scheduler as it is, or a copy with another number of inference steps."""
    if not hasattr(scheduler, "timesteps") or not callable(getattr(scheduler, "set_timesteps", None)):
        raise CalibrationError(
            f"scheduler is a {type(scheduler).__name__}, expected an object with timesteps and set_timesteps, such as "
            "those of diffusers"
        )
    if steps is not None:
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(steps)
    elif getattr(scheduler, "num_inference_steps", None) is None:
        raise CalibrationError(f"{type(scheduler).__name__} has no timesteps yet: call set_timesteps, or give steps")
    return scheduler


def transferred(measured: Measurements, wanted: Steps) -> dict[str, Any]:
    """The fields of a calibration at these steps that differ from those of the one that was measured."""
    at = wanted.at
    lags = lags_for(at, measured.lags)
    effects = measured.effects
    if effects is not None:
        farthest = reach(lags, _order_of(effects.reach, measured.lags))
        sketch = resampled(effects.sketch.astype(np.float64), at, farthest)
        effects = Effects(sketch.astype(np.float32), effects.weight)
    sensitivity = {key: sensitivity_at(values, at) for key, values in measured.sensitivity.items()}
    uneven = np.ptp(np.gradient(at)) > ROUNDING if len(at) > 1 else False
    if ALL not in sensitivity and uneven:
        sensitivity[ALL] = sensitivity_at(np.ones(measured.steps), at)
    return {
        "steps": len(at),
        "lags": lags,
        "sites": [_site_at(site, at, lags) for site in measured.sites],
        "effects": effects,
        "sensitivity": sensitivity,
        "timesteps": wanted.timesteps,
        "noise_levels": wanted.noise_levels,
        "interpolated": measured.interpolated or bool((np.abs(at - np.rint(at)) > ROUNDING).any()),
    }


def positions(calibrated: Sequence[float], wanted: Sequence[float]) -> Array:
    """Where noise levels lie among those of the calibrated steps: fractions of step indices.

    Args:
        calibrated: rising or falling along the trajectory; solvers of second order have each level twice.
        wanted: in the same unit.
    """
    levels, first = np.unique(np.asarray(calibrated, np.float64), return_index=True)
    # Step 0 stays step 0, and the last one the last, where its level is there twice.
    steps = np.where(first == 0, 0, np.array([np.flatnonzero(np.asarray(calibrated) == x).max() for x in levels]))
    if len(levels) < 2 or not (np.all(np.diff(steps) > 0) or np.all(np.diff(steps) < 0)):
        raise CalibrationError(
            "the noise levels of the calibrated steps neither rise nor fall along the trajectory, so that no other "
            "steps can be found among them; calibrate with the sampler that is to be used"
        )
    spacing = (levels[-1] - levels[0]) / (len(levels) - 1)
    new = np.asarray(wanted, np.float64)
    if len(new) > 1 and np.ptp(np.clip(new, levels[0], levels[-1])) < 0.5 * spacing:
        raise CalibrationError(
            f"the new steps, from {new[0]:g} to {new[-1]:g}, have no noise levels in common with the calibrated "
            f"ones, from {calibrated[0]:g} to {calibrated[-1]:g}: both must be of one model, in the same unit"
        )
    outside = max(levels[0] - new.min(), new.max() - levels[-1]) / spacing
    if outside > BEYOND:
        log.warning(
            "the new steps reach %.1f steps beyond the noise levels that were calibrated; there the nearest calibrated "
            "step stands in for them",
            outside,
        )
    at = _interpolated(new, levels, steps.astype(np.float64))
    if (np.diff(at) < -ROUNDING).any():
        raise CalibrationError(
            f"the new steps go back along the trajectory, which runs from {calibrated[0]:g} to {calibrated[-1]:g}: "
            "give them in sampling order"
        )
    return at


def _interpolated(wanted: Array, levels: Array, steps: Array) -> Array:
    """Along straight lines, beyond the ends too: what lies there is still a distance away from what lies within."""
    cell = np.clip(np.searchsorted(levels, wanted) - 1, 0, len(levels) - 2)
    share = (wanted - levels[cell]) / (levels[cell + 1] - levels[cell])
    return steps[cell] + share * (steps[cell + 1] - steps[cell])


def even_positions(calibrated: int, wanted: int) -> Array:
    """Those of another number of steps that are spaced as the calibrated ones are, from the same first one."""
    return np.arange(wanted, dtype=np.float64) * (calibrated / wanted)


def lags_for(at: Array, lags: int) -> int:
    """How many of the new steps the calibrated lags reach over, at half of them or more.

    Raises:
        CalibrationError: not even one.
    """
    found = 0
    for lag in range(1, min(len(at) - 1, MOST_LAGS) + 1):
        if np.median(at[lag:] - at[:-lag]) > lags + ROUNDING:
            break
        found = lag
    if not found:
        needed = math.ceil(float(np.median(np.diff(at)))) if len(at) > 1 else 1
        raise CalibrationError(
            f"{len(at)} steps are too few for this calibration: from one to the next lie {needed} of its steps, and "
            f"it has measured reuse over {lags}. calibrate(..., lags={2 * needed}) measures enough, or calibrate with "
            "about as many steps as are to be used"
        )
    return found


def resampled(values: Array, at: Array, lags: int, smooth: bool = True) -> Array:
    """What a table of steps and lags has at other steps, whose lags are distances.

    Along lags a polynomial of degree 3 (or 1) goes through the nearest of them, so that forecasts from dense steps do
    not look exact; from step to step it is linear, at the same distance.

    Args:
        values: [steps, reach + 1, ...], at [t, i] of step t and step t - i; NaN where unknown.
        at: [new steps], positions among the steps; for those beyond the ends the first or the last step stands in.
        lags: of the result.

    Returns:
        [new steps, lags + 1, ...].
    """
    result = np.full((len(at), lags + 1, *values.shape[2:]), np.nan)
    for step, position in enumerate(at):
        inside = min(max(position, 0.0), len(values) - 1.0)
        before = int(inside)
        share = inside - before
        rows = [(before, 1 - share)] + ([(before + 1, share)] if share > ROUNDING else [])
        for lag in range(min(lags, step) + 1):
            distance = position - at[step - lag]
            parts = [(weight, _at_lag(values[row], row, distance, 3 if smooth else 1)) for row, weight in rows]
            known = [(weight, part) for weight, part in parts if part is not None]
            if known:
                total = sum(weight for weight, _ in known)
                result[step, lag] = sum(weight / total * part for weight, part in known)
    return result


def _at_lag(row: Array, step: int, distance: float, degree: int) -> Array | None:
    """A row of lags at a distance; None where it was not measured as far."""
    nearest = round(distance)
    if abs(distance - nearest) < ROUNDING:
        exact = nearest <= min(step, len(row) - 1) and np.isfinite(row[nearest]).all()
        return row[nearest] if exact else None
    below = math.floor(distance)
    last = min(step, len(row) - 1)
    if below + 1 > last or not np.isfinite(row[below : below + 2]).all():
        return None
    first = max(0, min(below - (degree - 1) // 2, last - degree))
    lags = [lag for lag in range(first, min(first + degree, last) + 1) if np.isfinite(row[lag]).all()]
    weights = [math.prod((distance - other) / (lag - other) for other in lags if other != lag) for lag in lags]
    return np.tensordot(weights, row[lags], axes=1)


def _site_at(site: SiteErrors, at: Array, lags: int) -> SiteErrors:
    """A site's errors at new steps, each known as well as the least known one of the calibrated steps."""
    at_zero = np.zeros((1, site.count.shape[1]))
    mean, spread = (
        resampled(np.vstack([at_zero, table]).T, at, lags, smooth=False)[:, 1:].T
        for table in (site.mean, np.where(site.count > 0, site.m2 / np.maximum(site.count, 1), np.nan))
    )
    seen = np.isfinite(mean)
    count = seen * _fewest(site.count)
    products = None
    if site.products is not None:
        farthest = reach(lags, _order_of(site.products.reach, len(site.count)))
        table = resampled(site.products.mean, at, farthest)
        products = Products(np.isfinite(table) * _fewest(site.products.count), table)
    return dataclasses.replace(site, count=count, mean=mean, m2=np.where(seen, spread, 0.0) * count, products=products)


def _fewest(count: NDArray[np.int64]) -> int:
    return int(count[count > 0].min(initial=np.iinfo(np.int64).max)) if (count > 0).any() else 1


def _order_of(farthest: int, lags: int) -> int:
    """The highest order whose forecasts were measured."""
    return next(order for order in (2, 1, 0) if not order or reach(lags, order) <= farthest)


def sensitivity_at(sensitivity: Array, at: Array) -> Array:
    """What errors at new steps count for: a sampler passes them on in proportion to the way that a step goes."""
    width = np.gradient(at) if len(at) > 1 else np.ones(1)
    steps = np.arange(len(sensitivity))
    return np.exp(np.interp(at, steps, np.log(sensitivity))) * np.maximum(width, ROUNDING)
