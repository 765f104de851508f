"""Observe a model or pipeline while it samples: what stands in ``forward``, and how many steps were taken."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..calibration.noise_levels import noise_levels_of
from ..capture.ways import Traced
from ..checks import flag, whole_number
from ..compiled.compiler import check_compilable
from ..compiled.forward import ForwardPlace, check_inference, no_sites_error
from ..errors import CalibrationError, SmoothCacheError
from ..runtime.calls import Call, ModelCall, StepClock, TimestepReader
from ..runtime.clock import Clock
from ..runtime.copies import copied
from ..runtime.pipelines import denoisers, follow_cache_context, is_pipeline
from ..runtime.scheduler_clock import DenoiserClock, SchedulerClock
from ..runtime.scheduler_run import Run
from .recorder import Recorder

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Recorder)


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

    # The sampler may call the model through its own torch.compile.
    @torch.compiler.disable(reason="smoothcache_fx is calibrating this model")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_inference(self.model, args, kwargs)
        clock = self.recorder.clock
        moment = clock.enter(Call(type(self.model).__name__, self._timestep, args, kwargs), wait=True)
        self.recorder.current.call = ModelCall(moment)
        if clock.trajectories > len(self.lengths):
            self.lengths.append(0)
        # The call may write to its own inputs.
        again = copied((args, kwargs)) if self.recorder.calls_again else None
        with torch.no_grad():
            output = self._compiled(*args, **kwargs)
            if again is not None:
                with _buffers_kept(self.model):
                    output = self.recorder.call_again(lambda: self._compiled(*again[0], **again[1]), output)
        self.recorder.current.call.end()
        if not self.recorder.recorded.sites:
            raise no_sites_error(self.model, self.recorder)
        self.lengths[-1] += 1
        self.progress.update()
        return output


@contextlib.contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Calls inside leave the model's buffers as they are."""

    def version(buffer: torch.Tensor) -> int | None:
        return None if buffer.is_inference() else buffer._version

    kept = [(buffer, version(buffer), buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, before, value in kept:
        if before is None or version(buffer) != before:
            buffer.copy_(value)


@dataclass
class Observed(Generic[R]):
    """A model or pipeline whose denoisers are observed: a recorder each, and of the trajectories so far the number of
    steps, the sequences of timesteps, and a pipeline's levels of noise."""

    recorders: list[R]
    steps: Callable[[], int]
    sequences: Callable[[], set[tuple[float | None, ...]]]
    noise_levels: Callable[[], tuple[float, ...] | None] = lambda: None


@contextlib.contextmanager
def observing(
    model_or_pipeline: Any,
    recorder: Callable[[torch.nn.Module, StepClock], R],
    steps: int | None,
    calls_per_step: int | None,
    progress: bool,
) -> Iterator[Observed[R]]:
    """Observe while the ``with`` lasts. The model is then as it was; what was kept of outputs is freed."""
    if calls_per_step is not None:
        calls_per_step = whole_number(calls_per_step, "calls_per_step", 1, CalibrationError)
    with _progress_bar(flag(progress, "progress")) as bar, contextlib.ExitStack() as restore:
        if not is_pipeline(model_or_pipeline):
            _check_observable(model_or_pipeline)
            clock = Clock(steps, calls_per_step)
            only = recorder(model_or_pipeline, clock)
            forward = _observe(only, model_or_pipeline, bar, restore)
            yield Observed(
                [only], lambda: _whole_steps(forward.lengths, calls_per_step or 1, steps), clock.all_sequences
            )
            return
        models = denoisers(model_or_pipeline).values()
        if calls_per_step not in (None, 1):
            raise CalibrationError("calls_per_step is for bare models: a pipeline's scheduler ends a step")
        shared = _ObservedSchedulers(steps)
        recorders = []
        for model in models:
            _check_observable(model)
            own_clock = DenoiserClock(shared)
            recorders.append(recorder(model, own_clock))
            _observe(recorders[-1], model, bar, restore)
            restore.callback(follow_cache_context(model, own_clock))
        restore.callback(shared.detach)
        shared.attach(model_or_pipeline)
        yield Observed(recorders, lambda: _steps_of(shared), lambda: shared.sequences, lambda: shared.noise_levels)


class _ObservedSchedulers(SchedulerClock):
    #: Of the last run's steps.
    noise_levels: tuple[float, ...] | None = None

    def _count(self, run: Run) -> None:
        if not run.called_in_trajectory:
            self.noise_levels = noise_levels_of(run.scheduler())
        super()._count(run)

    def wrong_length(self, scheduler: Any, length: int) -> SmoothCacheError:
        return CalibrationError(
            f"{type(scheduler).__name__} was set to {length} timesteps, expected {self.steps}: give steps={length}, or "
            "leave it out (a pipeline's scheduler gives them), and measure sensitivities with the sampler that was "
            "calibrated with (solvers of second order take more than one timestep per inference step)"
        )


def _check_observable(model: Any) -> None:
    check_compilable(model)
    offloaded = any("_hf_hook" in module.__dict__ for module in model.modules())
    if not offloaded and any(weight.is_meta for weight in model.parameters()):
        raise CalibrationError(
            f"weights of {type(model).__name__} are on the meta device, so that there is nothing to measure: load them "
            "first (smoothcache.explain needs none)"
        )


def _observe(
    recorder: Recorder, model: torch.nn.Module, progress: Any, restore: contextlib.ExitStack
) -> _ObservedForward:
    """Put the observer in the model's forward, and what takes it off again on ``restore``."""
    place = ForwardPlace(model)
    observed = _ObservedForward(model, place.forward, recorder, progress)
    place.put(observed)
    restore.callback(recorder.close)
    restore.callback(_take_off, observed, place)
    return observed


def _take_off(observed: _ObservedForward, place: ForwardPlace) -> None:
    now = ForwardPlace(place.model)
    if now.forward is observed:
        now.put(place.forward)


def _steps_of(shared: SchedulerClock) -> int:
    """Steps of each of the pipeline's runs."""
    shared.finish()
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
