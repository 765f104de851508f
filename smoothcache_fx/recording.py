"""``calibrate``: run the model as it is, and measure how much each site's output changes from step to step."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from .backend import Session
from .build import GraphBuilder
from .calibration import Calibration
from .clock import Call, Clock, TimestepReader
from .compiler import check_compilable
from .errors import CalibrationError
from .forward import ForwardPlace, check_inference, no_sites_error
from .inner import inner_compiler
from .kernels import relative_l1
from .passes import observe
from .pipelines import denoisers, follow_cache_context, is_pipeline
from .program import Binding, SiteInfo
from .schedule import Schedule
from .scheduler_clock import DenoiserClock, SchedulerClock
from .site_errors import SiteErrors
from .traced import Traced

log = logging.getLogger(__name__)

#: One call's outputs per site, and the step that they are of.
_Kept = tuple[int, list[list[torch.Tensor]]]


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

    def __init__(
        self,
        root: torch.nn.Module,
        clock: Clock | DenoiserClock,
        lags: int,
        history_device: torch.device | None,
    ) -> None:
        super().__init__(Schedule(steps=1), inner_compiler("eager", None, None, None), clock, root)
        self.lags = lags
        self.history_device = history_device
        self.sites: dict[str, SiteInfo] = {}
        self.observations: dict[str, list[tuple[int, int, float]]] = {}
        self.history_bytes = 0
        self._history: dict[tuple[int, Hashable], tuple[int, deque[_Kept]]] = {}
        self._kept: dict[tuple[int, Hashable], int] = {}

    def dispatcher(self, builder: GraphBuilder) -> ObservedProgram:
        return ObservedProgram(builder, self)

    def record(self, binding: Binding, values: list[list[torch.Tensor]]) -> None:
        """Compare one call's outputs, per site, with those of the steps before in the same trajectory and stream."""
        if not values:
            return
        place = id(binding), self.clock.stream
        trajectory, history = self._history.get(place, (-1, deque()))
        step = self.clock.step
        if trajectory != self.clock.trajectory:
            history = deque(maxlen=self.lags)
        while history and not 0 < step - history[-1][0] <= self.lags:
            history.pop()  # a stream may be absent for some steps
        self._history[place] = self.clock.trajectory, history
        sums = [
            functools.reduce(
                torch.add,
                (relative_l1(fresh, [earlier[i][j] for _, earlier in history]) for j, fresh in enumerate(outputs)),
            )
            for i, outputs in enumerate(values)
        ]
        lags = [step - earlier for earlier, _ in history]
        # One wait for the device per call, however many sites there are.
        for site, (size, *distances) in zip(binding.sites, torch.stack(sums).tolist(), strict=True):
            self._note(site, size, zip(lags, distances, strict=True))
        kept = [[output.to(self.history_device or output.device) for output in outputs] for outputs in values]
        history.appendleft((step, kept))
        self._kept[place] = sum(t.numel() * t.element_size() for _, step in history for out in step for t in out)
        self.history_bytes = max(self.history_bytes, sum(self._kept.values()))

    def set_aside(self) -> dict[str, Any]:
        names = ("sites", "observations", "_history", "_kept")
        kept = super().set_aside() | {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, {})
        return kept

    def forget(self) -> None:
        """Free the kept outputs: Dynamo holds on to the recorder for as long as to what it compiled."""
        self._history.clear()

    def _note(self, site: SiteInfo, size: float, distances: Iterable[tuple[int, float]]) -> None:
        step = self.clock.step
        if not math.isfinite(size):
            raise CalibrationError(
                f"the output of {site.name} has NaN or infinite values at step {step} of trajectory "
                f"{self.clock.trajectory}: no schedule can be made of this. Check the weights, the inputs, and "
                "whether the dtype's range is enough"
            )
        self.sites.setdefault(site.name, site)
        seen = self.observations.setdefault(site.name, [])
        for lag, distance in distances:
            # A branch that is all zeros, then and now, has not changed.
            seen.append((lag, step, distance / size if size else (0.0 if distance == 0.0 else math.inf)))


def gather(recorders: Sequence[Recorder], steps: int, metadata: dict[str, str]) -> Calibration:
    """All observations per site; denoisers of one pipeline may have sites of one name, seen at different steps."""
    infos = {name: info for recorder in recorders for name, info in recorder.sites.items()}
    lags = recorders[0].lags
    sites = []
    for name, info in infos.items():
        errors = SiteErrors.empty(name, info.group, info.kind, info.flops, lags=lags, steps=steps)
        for recorder in recorders:
            for lag, step, value in recorder.observations.get(name, ()):
                errors.add(lag, step, value)
        sites.append(errors)
    return Calibration(steps, lags, sites, sum(recorder.history_bytes for recorder in recorders), metadata)


class _ObservedForward:
    """What stands in the module's ``forward`` while it is calibrated."""

    def __init__(self, model: torch.nn.Module, original: Callable[..., Any], recorder: Recorder, progress: Any) -> None:
        functools.update_wrapper(self, original, updated=())
        self.model = model
        self.recorder = recorder
        self.progress = progress
        self.lengths: list[int] = []
        self._timestep = TimestepReader(original)
        self._compiled = Traced(original, recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_inference(self.model, args, kwargs)
        clock = self.recorder.clock
        clock.enter(Call(type(self.model).__name__, self._timestep, args, kwargs), wait=True)
        if clock.trajectories > len(self.lengths):
            self.lengths.append(0)
        with torch.no_grad():
            output = self._compiled(*args, **kwargs)
        if not self.recorder.sites:
            raise no_sites_error(self.model, self.recorder)
        self.lengths[-1] += 1
        self.progress.update()
        return output


def calibrate(
    model_or_pipeline: Any,
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
        model_or_pipeline: the transformer, in eval mode and not compiled, or a pipeline (see ``compile``), whose
            scheduler then tells the steps.
        sample: called once with the model or pipeline; runs one or more whole trajectories with it. The paper uses ten
            samples, in one batch or one after the other. Where a trajectory of a bare model begins is seen from its
            timestep argument; for a model without one, give ``steps``.
        lags: how many steps back to compare with: the longest reuse that a schedule made of this can have.
        steps: denoising steps in a trajectory, if they cannot be seen from the timesteps.
        calls_per_step: calls of a bare model in one step; each has a history of its own.
        history_device: where the last ``lags`` outputs of every site are kept (the model's device by default). They
            take ``lags`` times the cache of the schedule: ``batch * tokens * width * bytes per element`` a branch.
            ``"cpu"`` spares the device's memory and takes longer.
        progress: show a progress bar (needs tqdm).

    Returns:
        The errors of Eq. 4 of the paper (arXiv 2411.10510): ``sum|y_t - y_{t-k}| / sum|y_t|`` with the fresh output
        in the denominator, per site, lag k and step t, averaged over trajectories and calls. Sites of one name in two
        denoisers of a pipeline are one.

    Raises:
        CalibrationError: no model call was made, trajectories differ in length, or an output is NaN or infinite.
        NoSitesError: the model has no residual branch.
        CompiledError: the model is compiled, in training mode, or an input requires gradients.
    """
    for name, value in (("lags", lags), ("calls_per_step", calls_per_step), ("steps", steps or 1)):
        if not isinstance(value, int) or value < 1:
            raise CalibrationError(f"{name} must be a positive whole number, got {value!r}")
    device = None if history_device is None else torch.device(history_device)
    metadata = {"model": type(model_or_pipeline).__name__}
    with _progress_bar(progress) as bar, contextlib.ExitStack() as restore:
        if not is_pipeline(model_or_pipeline):
            check_compilable(model_or_pipeline)
            recorder = Recorder(model_or_pipeline, Clock(steps, calls_per_step), lags, device)
            forward = _observe(recorder, model_or_pipeline, bar, restore)
            sample(model_or_pipeline)
            recorders = [recorder]
            total = _whole_steps(forward.lengths, calls_per_step, steps)
        else:
            models = denoisers(model_or_pipeline).values()
            if calls_per_step != 1:
                raise CalibrationError("calls_per_step is for bare models: a pipeline's scheduler ends a step")
            shared = SchedulerClock(steps)
            recorders = []
            for model in models:
                check_compilable(model)
                recorders.append(Recorder(model, DenoiserClock(shared), lags, device))
                _observe(recorders[-1], model, bar, restore)
                restore.callback(follow_cache_context(model, recorders[-1].clock))
            restore.callback(shared.detach)
            shared.attach(model_or_pipeline)
            sample(model_or_pipeline)
            shared.finish()
            total = _steps_of(shared)
    recorder_bytes = sum(recorder.history_bytes for recorder in recorders)
    log.info("calibration kept %.1f MiB of outputs", recorder_bytes / 2**20)
    return gather(recorders, total, metadata)


def _observe(
    recorder: Recorder, model: torch.nn.Module, progress: Any, restore: contextlib.ExitStack
) -> _ObservedForward:
    """Put the observer in the model's forward, and what takes it off again on ``restore``."""
    place = ForwardPlace(model)
    observed = _ObservedForward(model, place.forward, recorder, progress)
    place.put(observed)
    restore.callback(recorder.forget)
    restore.callback(_take_off, observed, place)
    return observed


def _take_off(observed: _ObservedForward, place: ForwardPlace) -> None:
    now = ForwardPlace(place.model)
    if now.forward is observed:
        now.put(place.forward)


def _steps_of(shared: SchedulerClock) -> int:
    """Steps of each of the pipeline's runs."""
    if not shared.trajectories:
        raise CalibrationError(
            "sample did not run the pipeline's denoisers between its scheduler's set_timesteps and last step: it must "
            "run the whole pipeline that it is given. For a sampling loop of your own give calibrate the model itself"
        )
    if len(shared.lengths) > 1 or shared.unfinished:
        raise CalibrationError(
            f"the runs had {', '.join(map(str, sorted(shared.lengths)))} timesteps, {shared.unfinished} ended early: "
            "sample must run the pipeline to the end, with the same number of steps each time"
        )
    (steps,) = shared.lengths
    return steps


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
