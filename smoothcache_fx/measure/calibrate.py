"""``calibrate``: run the model as it is, and measure how much each site's output changes from step to step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..calibration.calibration import Calibration
from ..calibration.measurements import GRAINS
from ..calibration.products import Products
from ..calibration.segments import reach
from ..calibration.site_errors import SiteErrors
from ..checks import byte_count, function, one_of, scalar, whole_number
from ..errors import CalibrationError
from ..runtime.calls import StepClock
from ..runtime.clock import agreed
from ..schedules.schedule import HIGHEST_ORDER, Schedule
from .observe import observing
from .recorder import Recorder
from .sketches import EffectSums

log = logging.getLogger(__name__)


def calibrate(
    model_or_pipeline: Any,
    sample: Callable[[Any], Any],
    *,
    lags: int = 3,
    order: int | None = 1,
    schedule: Schedule | Callable[[Calibration], Schedule] | None = None,
    rounds: int = 5,
    steps: int | None = None,
    calls_per_step: int | None = None,
    history_device: torch.device | str | None = None,
    max_history_bytes: int | str | None = None,
    grain: str = "branch",
    progress: bool = True,
) -> Calibration:
    """Measure how much the sites' outputs change between steps, over whole sampling runs.

    The model runs uncached, and what ``sample`` gets from it is bit for bit what it gets without calibration.

    Args:
        model_or_pipeline: the transformer, in eval mode and not compiled, or a pipeline (see ``compile``), whose
            scheduler then gives the steps.
        sample: called with the model or pipeline, once unless ``schedule`` is a function; runs one or more whole
            trajectories with it. The paper uses ten samples, in one batch or one after the other. Where a trajectory of
            a bare model begins is seen from its timestep argument; for a model without one, give ``steps``.
        lags: how many steps back to compare with: the longest reuse that a schedule made of this can have.
        order: also measure what ``Calibration.schedule(compute=...)`` plans with, for forecasts up to this order, 0 to
            2. After each call the model is called once more for each of ``(order + 1) * (lags + 1) - 1`` steps back, 7
            by default, with all branches read in place of being computed: each takes what a cached call takes, without
            a compiler. The outputs of these steps and of the present one are kept, of every site. None measures the
            paper's errors alone, with ``lags`` steps' outputs and no further call; ``schedule(alpha=...)`` is the same
            with any order. Inner products of a branch's outputs are taken over 4096 random elements of each: a relative
            error of a forecast is known to within about 2% of itself from one call.
        schedule: follow this schedule, with its forecasts: the sampler gets what the compiled model would give it, and
            all is measured along that trajectory. All branches are computed nonetheless. Or a function that makes a
            schedule of a calibration: what it makes of the uncached trajectory is followed, what it makes of that one
            next, until it makes a schedule that was followed before.
        rounds: the most schedules of such a function to follow; ``sample`` runs at most once more than that.
        steps: denoising steps in a trajectory, if they cannot be seen from the timesteps.
        calls_per_step: calls of a bare model in one step; each has its own history. By default one; two calls in a
            row at one timestep are then an error.
        history_device: where the outputs of every site are kept (the model's device by default): 8 steps' by default,
            ``lags`` without ``order``. A step's take ``batch * tokens * width * bytes per element`` a branch, as the
            caches of a schedule do. ``"cpu"`` spares the device's memory and takes longer.
        max_history_bytes: what a model's kept outputs may take, a number or such as ``"8GiB"``. Where they would take
            more, errors are measured on the same random tokens of each output at every step, as many as fit: only with
            ``order=None``, since further calls need whole outputs. One whole step is kept before that is decided.
        grain: ``branch``, or ``stack`` to measure the longest runs of blocks as one (those that ``explain`` lists), and
            branches outside of them; schedules made of the calibration then cache them so.
        progress: show a progress bar (needs tqdm).

    Returns:
        The errors of Eq. 4 of the paper (arXiv 2411.10510): ``sum|y_t - y_{t-k}| / sum|y_t|`` with the fresh output
        in the denominator, per site, lag k and step t, averaged over trajectories and calls. Sites of one name in two
        denoisers of a pipeline are one.

    Raises:
        CalibrationError: no model call was made, trajectories differ in length, or an output is NaN or infinite.
        NoSitesError: the model has no residual branch.
        CompiledError: the model is compiled, in training mode, or an input requires gradients.

    Example:
        >>> def samples(model):
        ...     return [sample(model, seed) for seed in range(5)]
        >>> calibration = smoothcache.calibrate(model, samples, steps=50)
        >>> schedule = calibration.schedule(compute=0.5)
    """
    function(sample, "sample", "the model or pipeline that runs it")
    lags = whole_number(lags, "lags", 1, CalibrationError)
    rounds = whole_number(rounds, "rounds", 1, CalibrationError)
    steps = None if steps is None else whole_number(steps, "steps", 1, CalibrationError)
    order = scalar(order)
    if isinstance(order, bool) or (order is not None and order not in range(HIGHEST_ORDER + 1)):
        raise CalibrationError(f"order is {order!r}, expected 0, 1 or 2, or None for the paper's rule alone")
    device = None if history_device is None else _device(history_device)
    one_of(grain, "grain", GRAINS, CalibrationError)
    if callable(schedule):
        along = functools.partial(
            calibrate,
            model_or_pipeline,
            sample,
            lags=lags,
            order=order,
            steps=steps,
            calls_per_step=calls_per_step,
            history_device=history_device,
            max_history_bytes=max_history_bytes,
            grain=grain,
            progress=progress,
        )
        return _settled(along, schedule, rounds)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise CalibrationError(
            f"schedule is a {type(schedule).__name__}, expected a Schedule to follow, a function that makes one of a "
            "calibration, or None"
        )
    limit = None if max_history_bytes is None else byte_count(max_history_bytes, "max_history_bytes")
    farthest = 0 if order is None else reach(lags, order)
    metadata = {"model": type(model_or_pipeline).__name__}

    def recorder(model: torch.nn.Module, clock: StepClock) -> Recorder:
        return Recorder(model, clock, lags, device, farthest, schedule, grain, limit)

    with observing(model_or_pipeline, recorder, steps, calls_per_step, progress) as observed:
        sample(model_or_pipeline)
        total = observed.steps()
    if schedule is not None and schedule.steps != total:
        raise CalibrationError(f"the sampler takes {total} steps, the schedule to be followed has {schedule.steps}")
    recorder_bytes = sum(recorder.history_bytes for recorder in observed.recorders)
    log.info("calibration kept %.1f MiB of outputs", recorder_bytes / 2**20)
    timesteps = agreed(observed.sequences(), total)
    calibration = _gather(observed.recorders, total, metadata, timesteps, grain)
    return calibration if timesteps is None else replace(calibration, noise_levels=observed.noise_levels())


def _device(wanted: torch.device | str) -> torch.device:
    try:
        return torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise CalibrationError(
            f"history_device is {wanted!r}, expected a device such as 'cpu' or 'cuda:0', or None for the model's own"
        ) from error


def _settled(along: Callable[..., Calibration], plan: Callable[[Calibration], Schedule], rounds: int) -> Calibration:
    """Calibrate along what ``plan`` makes of the last calibration, until that is nothing new."""
    calibration = along(schedule=None)
    followed: list[Schedule] = []
    while (following := plan(calibration)) not in followed:
        if not isinstance(following, Schedule):
            raise CalibrationError(f"schedule made a {type(following).__name__} of a calibration, expected a Schedule")
        if len(followed) == rounds:
            log.warning("the schedule still changes after %d rounds; allow more, or take it as it is", rounds)
            break
        followed.append(following)
        calibration = along(schedule=following)
    return calibration


def _gather(
    recorders: Sequence[Recorder],
    steps: int,
    metadata: dict[str, Any],
    timesteps: Sequence[float] | None,
    grain: str,
) -> Calibration:
    """All observations per site; denoisers of one pipeline may have sites of one name, seen at different steps."""
    infos = {name: info for recorder in recorders for name, info in recorder.recorded.sites.items()}
    lags, farthest = recorders[0].lags, recorders[0].reach
    sites = []
    for name, info in infos.items():
        errors = SiteErrors.empty(name, info.group, info.kind, info.flops, lags=lags, steps=steps)
        if farthest:
            errors.products = Products.empty(steps, farthest)
        for recorder in recorders:
            for lag, step, value in recorder.recorded.observations.get(name, ()):
                errors.add(lag, step, value)
            for lag, step, value in recorder.recorded.products.get(name, ()):
                errors.products.add(step, lag, value)
        sites.append(errors)
    effects = EffectSums.together([recorder.effects for recorder in recorders], steps, farthest) if farthest else None
    history_bytes = sum(recorder.history_bytes for recorder in recorders)
    share = min(recorder.token_share for recorder in recorders)
    metadata = metadata if share == 1 else {**metadata, "token_share": share}
    return Calibration(steps, lags, sites, history_bytes, metadata, effects, timesteps=timesteps, grain=grain)
