"""``calibrate``: run the model as it is, and measure how much each site's output changes from step to step."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _torch
from .backend import Session
from .build import GraphBuilder
from .calibration import Calibration
from .clock import Clock, TimestepReader
from .compiler import check_compilable, check_inference, no_sites_error
from .errors import CalibrationError
from .inner import inner_compiler
from .kernels import relative_l1
from .passes import observe
from .program import Binding, SiteInfo
from .schedule import Schedule
from .site_errors import SiteErrors

log = logging.getLogger(__name__)


class ObservedProgram:
    """The dispatcher of a captured graph that also returns its sites' outputs, which it hands to the recorder."""

    _boxed_call = True

    def __init__(self, builder: GraphBuilder, recorder: Recorder) -> None:
        self.graph = observe(builder.captured, builder.sites)
        self.outputs_per_site = [len(site.outputs) for site in builder.sites]
        self.recorder = recorder
        self.binding: Binding | None = None

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        outputs = self.graph(*inputs)
        inputs.clear()
        own = len(outputs) - sum(self.outputs_per_site)
        rest = iter(outputs[own:])
        values = [[next(rest) for _ in range(count)] for count in self.outputs_per_site]
        self.recorder.record(self.binding, values)
        return outputs[:own]


class Recorder(Session):
    """The session of a calibration: keeps the last outputs of each site and notes how far each new one lies from them.

    Attributes:
        observations: per site, ``(lag, step, relative L1 error)`` in the order they were seen.
        history_bytes: memory of the outputs kept at the same time, at most.
    """

    def __init__(self, root: torch.nn.Module, clock: Clock, lags: int, history_device: torch.device | None) -> None:
        super().__init__(Schedule(steps=1), inner_compiler("eager", None, None, None), clock, root)
        self.lags = lags
        self.history_device = history_device
        self.sites: dict[str, SiteInfo] = {}
        self.observations: dict[str, list[tuple[int, int, float]]] = {}
        self.history_bytes = 0
        self._history: dict[tuple[int, int], tuple[int, deque[list[list[torch.Tensor]]]]] = {}
        self._kept: dict[tuple[int, int], int] = {}

    def dispatcher(self, builder: GraphBuilder) -> ObservedProgram:
        return ObservedProgram(builder, self)

    def record(self, binding: Binding, values: list[list[torch.Tensor]]) -> None:
        """Compare one call's outputs, per site, with those of the steps before in the same trajectory and stream."""
        if not values:
            return
        place = id(binding), self.clock.stream
        trajectory, history = self._history.get(place, (-1, deque()))
        if trajectory != self.clock.trajectory:
            history = deque(maxlen=self.lags)
        self._history[place] = self.clock.trajectory, history
        sums = [
            functools.reduce(
                torch.add,
                (relative_l1(fresh, [earlier[i][j] for earlier in history]) for j, fresh in enumerate(outputs)),
            )
            for i, outputs in enumerate(values)
        ]
        # One wait for the device per call, however many sites there are.
        for site, (size, *distances) in zip(binding.sites, torch.stack(sums).tolist(), strict=True):
            self._note(site, size, distances)
        kept = [[output.to(self.history_device or output.device) for output in outputs] for outputs in values]
        history.appendleft(kept)
        self._kept[place] = sum(t.numel() * t.element_size() for step in history for out in step for t in out)
        self.history_bytes = max(self.history_bytes, sum(self._kept.values()))

    def forget(self) -> None:
        """Free the kept outputs: Dynamo holds on to the recorder for as long as to what it compiled."""
        self._history.clear()

    def _note(self, site: SiteInfo, size: float, distances: list[float]) -> None:
        step = self.clock.step
        if not math.isfinite(size):
            raise CalibrationError(
                f"the output of {site.name} has NaN or infinite values at step {step} of trajectory "
                f"{self.clock.trajectory}: no schedule can be made of this. Check the weights, the inputs, and "
                "whether the dtype's range is enough"
            )
        self.sites.setdefault(site.name, site)
        seen = self.observations.setdefault(site.name, [])
        for lag, distance in enumerate(distances, start=1):
            # A branch that is all zeros, then and now, has not changed.
            seen.append((lag, step, distance / size if size else (0.0 if distance == 0.0 else math.inf)))

    def calibration(self, steps: int) -> Calibration:
        """All observations, gathered per site."""
        sites = []
        for name, info in self.sites.items():
            errors = SiteErrors.empty(name, info.group, info.kind, info.flops, lags=self.lags, steps=steps)
            for lag, step, value in self.observations[name]:
                errors.add(lag, step, value)
            sites.append(errors)
        return Calibration(steps, self.lags, sites, self.history_bytes, {"model": type(self._root).__name__})


class _ObservedForward:
    """What stands in the module's ``forward`` while it is calibrated."""

    def __init__(self, model: torch.nn.Module, recorder: Recorder, progress: Any) -> None:
        self.model = model
        self.recorder = recorder
        self.progress = progress
        self.lengths: list[int] = []
        original = model.forward
        self._timestep = TimestepReader(original)
        self._compiled = _torch.dynamo_compile(original, recorder)
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_inference(self.model, args, kwargs)
        clock = self.recorder.clock
        clock.tick(self._timestep.read(args, kwargs, wait=True))
        if clock.trajectory == len(self.lengths):
            self.lengths.append(0)
        with torch.no_grad():
            output = self._compiled(*args, **kwargs)
        if not self.recorder.sites:
            raise no_sites_error(self.model, self.recorder.programs)
        self.lengths[-1] += 1
        self.progress.update()
        return output


def calibrate(
    model_or_pipeline: torch.nn.Module,
    sample: Callable[[Any], Any],
    *,
    lags: int = 3,
    steps: int | None = None,
    calls_per_step: int = 1,
    history_device: torch.device | str | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure how much the sites' outputs change between steps, over whole sampling runs.

    The model runs uncached, and what ``sample`` gets from it is bit for bit what it gets without calibration.

    Args:
        model_or_pipeline: the transformer, in eval mode and not compiled.
        sample: called once with the model; runs one or more whole trajectories with it. The paper uses ten samples,
            in one batch or one after the other. Where a trajectory begins is seen from the model's timestep argument;
            for a model without one, give ``steps``.
        lags: how many steps back to compare with: the longest reuse that a schedule made of this can have.
        steps: denoising steps in a trajectory, if they cannot be seen from the timesteps.
        calls_per_step: calls of the model in one step; each has a history of its own.
        history_device: where the last ``lags`` outputs of every site are kept (the model's device by default). They
            take ``lags`` times the cache of the schedule: ``batch * tokens * width * bytes per element`` a branch.
            ``"cpu"`` spares the device's memory and takes longer.
        progress: show a progress bar (needs tqdm).

    Returns:
        The errors of Eq. 4 of the paper (arXiv 2411.10510): ``sum|y_t - y_{t-k}| / sum|y_t|`` with the fresh output
        in the denominator, per site, lag k and step t, averaged over trajectories and calls.

    Raises:
        CalibrationError: no model call was made, trajectories differ in length, or an output is NaN or infinite.
        NoSitesError: the model has no residual branch.
        CompiledError: the model is compiled, in training mode, or an input requires gradients.
    """
    model = model_or_pipeline
    check_compilable(model)
    for name, value in (("lags", lags), ("calls_per_step", calls_per_step), ("steps", steps or 1)):
        if not isinstance(value, int) or value < 1:
            raise CalibrationError(f"{name} must be a positive whole number, got {value!r}")
    device = None if history_device is None else torch.device(history_device)
    recorder = Recorder(model, Clock(steps, calls_per_step), lags, device)
    replaced = model.__dict__.get("forward")
    with _progress_bar(progress) as bar:
        forward = model.forward = _ObservedForward(model, recorder, bar)
        try:
            sample(model)
        finally:
            if replaced is None:
                del model.__dict__["forward"]
            else:
                model.forward = replaced
            recorder.forget()
    log.info("calibration kept %.1f MiB of outputs", recorder.history_bytes / 2**20)
    return recorder.calibration(_whole_steps(forward.lengths, calls_per_step, steps))


def _whole_steps(lengths: list[int], calls_per_step: int, steps: int | None) -> int:
    """Steps of each trajectory, given how many calls each took."""
    if not lengths:
        raise CalibrationError(
            "sample did not call the model: it must run whole trajectories with the model it is given"
        )
    expected = steps * calls_per_step if steps else lengths[0]
    if set(lengths) != {expected} or expected % calls_per_step:
        wanted = f"{expected} each" if steps else f"one multiple of calls_per_step ({calls_per_step}) for all"
        raise CalibrationError(
            f"the trajectories took {', '.join(map(str, lengths))} calls of the model, expected {wanted}: sample must "
            "run whole trajectories of the same number of steps"
        )
    return lengths[0] // calls_per_step


def _progress_bar(show: bool) -> Any:
    if show:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            log.info("no progress bar: tqdm is not installed")
        else:
            return tqdm(desc="calibrating", unit=" calls")
    return _NoProgress()


class _NoProgress(contextlib.AbstractContextManager[Any]):
    """Stands where a progress bar would."""

    def __exit__(self, *details: object) -> None:
        pass

    def update(self) -> None:
        pass
