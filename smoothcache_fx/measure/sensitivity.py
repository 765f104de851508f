"""How errors at a step reach the end: from trajectories in which a single step is read in place of being computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..calibration.calibration import Calibration
from ..calibration.measurements import ALL
from ..checks import flag, function, instance, whole_number
from ..errors import CalibrationError
from ..reports.compare import as_vector, relative_l2
from ..runtime.calls import StepClock
from .observe import observing
from .recorder import Recorder


class Prober(Recorder):
    """A recorder that lets reads stand at one step: ``probe``, the step and a group, or None for all of them."""

    probe: tuple[int, str | None] | None = None
    calls_again = True

    def __init__(self, root: torch.nn.Module, clock: StepClock, grain: str) -> None:
        super().__init__(root, clock, lags=1, history_device=None, grain=grain)

    def call_again(self, forward: Callable[[], Any], output: Any) -> Any:
        """The output, or at the probed step that of a call whose sites are read from the step before."""
        if self.probe is None or self.moment.step != self.probe[0] or 1 not in self.lags_kept():
            return output
        group = self.probe[1]
        return self.replay(forward, lambda site, kept: ((1, 1.0),) if group in (None, site.group) else ())


def measure_sensitivity(
    model_or_pipeline: Any,
    sample: Callable[[Any], Any],
    calibration: Calibration,
    *,
    probes: int = 8,
    groups: bool = False,
    calls_per_step: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Add to a calibration how far errors at each step move the final sample.

    ``sample`` is run once as it is, and once for each of a few steps, at which all branches give what they gave one
    step before. The distance of the final sample from the first run's, relative to that one's norm, over the error
    that was made is the step's sensitivity. Between the probed steps it is interpolated, in logarithms; the first and
    the last step that can be reused are among them.

    Args:
        model_or_pipeline, calls_per_step: as for ``calibrate``.
        sample: called with the model or pipeline ``probes + 1`` times; runs whole trajectories from the same seeds each
            time, and returns the samples: a tensor, an array, images, or any structure of them. One trajectory will do.
        calibration: of this model and sampler.
        probes: steps to probe, spread evenly.
        groups: also probe each group by itself, ``probes`` more runs for each: for schedules with rows of their own.
        progress: show a progress bar (needs tqdm).

    Returns:
        A copy of the calibration with sensitivities: the final sample's relative L2 error per root mean square of the
        model's output (all groups together), or per relative error of the group's outputs.

    Raises:
        CalibrationError: the trajectories have other steps than the calibration's, the samples cannot be compared or
            come out different without a cause, or the calibration was made without ``order``.

    Example:
        >>> calibration = smoothcache.calibrate(model, sample, steps=50)
        >>> calibration = smoothcache.measure_sensitivity(model, sample, calibration)
        >>> schedule = calibration.schedule(compute=0.5)  # plans with both
    """
    function(sample, "sample", "the model or pipeline that runs it")
    instance(calibration, "calibration", Calibration, "calibrate makes one, and Calibration.load reads it")
    groups = flag(groups, "groups")
    if calibration.effects is None:
        raise CalibrationError(
            "the calibration was made without order: calibrate(..., order=1) measures what this needs"
        )
    probes = whole_number(probes, "probes", 1, CalibrationError)
    steps = calibration.steps
    probed = sorted({round(step) for step in np.linspace(1, steps - 1, min(probes, steps - 1))})
    targets: list[str | None] = [None, *calibration.groups] if groups else [None]
    found: dict[str, NDArray[np.float64]] = {}

    def run(probe: tuple[int, str | None] | None) -> torch.Tensor:
        for recorder in observed.recorders:
            recorder.probe = probe
        return as_vector(sample(model_or_pipeline))

    prober = functools.partial(Prober, grain=calibration.grain)
    with observing(model_or_pipeline, prober, steps, calls_per_step, progress) as observed:
        plain = run(None)
        if observed.steps() != steps:
            raise CalibrationError(f"the sampler takes {observed.steps()} steps, the calibration has {steps}")
        for group in targets:
            distances = [relative_l2(plain, run((step, group))) for step in probed]
            errors = calibration.effects.size(1) if group is None else calibration.error(group)[0]
            values = np.array(distances) / errors[probed]
            usable = np.isfinite(values) & (values > 0)
            if not usable.any():
                raise CalibrationError("no probe changed the final sample: sample must return what the model makes")
            at = np.array(probed)[usable]
            found[ALL if group is None else group] = np.exp(np.interp(range(steps), at, np.log(values[usable])))
    return dataclasses.replace(calibration, sensitivity=found)
