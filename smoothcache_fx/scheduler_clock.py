"""The clock of a pipeline: its scheduler says where a trajectory begins and where a step ends."""

from __future__ import annotations

import copyreg
import functools
import logging
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .clock import Call
from .errors import StepError
from .streams import Streams

log = logging.getLogger(__name__)

# Which clocks follow a scheduler. Not an attribute of the scheduler: a copy of it is followed by nobody.
_followers = WeakIdKeyDictionary()


def watch(scheduler: Any, clock: SchedulerClock) -> None:
    """Tell ``clock`` of each ``set_timesteps`` and ``step`` of this scheduler from now on.

    The instance gets a subclass of its class: pipelines deep-copy their scheduler (LTX2 has one for audio), and a
    function put on the instance would go with the copy and move the clock twice a step. Copies, pickles and saved
    configs are of the scheduler's own class.
    """
    if not _followers.get(scheduler):
        scheduler.__class__ = _watched_class(type(scheduler))
    _followers.setdefault(scheduler, []).append(clock)


def unwatch(scheduler: Any, clock: SchedulerClock) -> None:
    """Undo ``watch``; the last clock to leave gives the scheduler its class back."""
    followers = _followers.get(scheduler, [])
    if clock in followers:
        followers.remove(clock)
        if not followers:
            del _followers[scheduler]
            scheduler.__class__ = type(scheduler).__mro__[1]


@functools.cache
def _watched_class(base: type) -> type:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        for clock in _followers.get(self, ()):
            clock.began(self)
        return result

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, *args, **kwargs)
        for clock in _followers.get(self, ()):
            clock.stepped(self)
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = base.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__:
            function = base.__new__  # pickle checks that the other one gets the object's own class
        return function, tuple(base if argument is watched else argument for argument in arguments), *rest

    members = {"set_timesteps": set_timesteps, "step": step, "__reduce_ex__": __reduce_ex__}
    members.update(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    watched = type(base.__name__, (base,), members)
    return watched


class SchedulerClock:
    """Where in its run the scheduler of one or more pipelines is. All denoisers of these pipelines share it.

    Attributes:
        steps: of the schedule; None accepts any number (calibration).
        trajectory: changes whenever nothing cached before may be used.
        trajectories, steps_begun: how many there were with a model call.
        lengths: numbers of timesteps of the trajectories that had a model call.
        unfinished: how many of them ended early.
        following: cleared while the denoisers run uncached; another number of steps is no error then.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self.trajectory = 0
        self.trajectories = 0
        self.steps_begun = 0
        self.lengths: set[int] = set()
        self.unfinished = 0
        self.following = True
        self.pipelines: list[weakref.ref[Any]] = []
        self.denoisers: list[DenoiserClock] = []
        self._watched: list[weakref.ref[Any]] = []
        self._current: weakref.ref[Any] | None = None
        self._length = 0
        self._index: int | None = None
        self._trusts_step_index = False
        #: Identifies the step, also where several have one index.
        self._step_serial = 0
        self._called_in_step = self._called_in_trajectory = False
        #: Whether a pipeline has ever ended a step by ``scheduler.step``; if not, the timesteps are read.
        self._seen_step = False
        self._last_timesteps: tuple[float, ...] | None = None
        self._told: set[str] = set()

    def attach(self, pipeline: Any) -> None:
        self.pipelines.append(weakref.ref(pipeline))
        self._watch(pipeline.scheduler)

    def detach(self) -> None:
        """Give all schedulers their class back."""
        for reference in self._watched:
            if (scheduler := reference()) is not None:
                unwatch(scheduler, self)
        self._watched.clear()
        self.pipelines.clear()

    def follows(self, pipeline: Any) -> bool:
        return any(reference() is pipeline for reference in self.pipelines)

    def forget(self) -> None:
        """Nothing that is cached may be used from here on; the step stays where it is."""
        self.trajectory += 1

    def began(self, scheduler: Any) -> None:
        """``set_timesteps`` was called. Raises ``StepError`` for another number of steps than the schedule's."""
        self.finish()
        self._length = len(scheduler.timesteps)
        self._index = None
        # A scheduler that does not reset it would say where the last run ended.
        self._trusts_step_index = getattr(scheduler, "step_index", None) is None
        self._current = weakref.ref(scheduler)
        if self.following:
            self._check_length(scheduler)

    def finish(self) -> None:
        """The trajectory, if one is running, is over."""
        if self._called_in_trajectory:
            last = self._length if self._seen_step else self._length - 1
            self.unfinished += self._index != last
        self._called_in_trajectory = self._called_in_step = False
        self._last_timesteps = None
        self._current = None
        self._step_serial += 1
        self.trajectory += 1
        for denoiser in self.denoisers:
            denoiser.streams.forget()

    def stepped(self, scheduler: Any) -> None:
        """``step`` was called."""
        if self._current is None or self._current() is not scheduler:
            self.finish()  # two runs take turns: where either is cannot be told
            return
        self._seen_step = True
        index = getattr(scheduler, "step_index", None) if self._trusts_step_index else None
        self._index = int(index) if index is not None else (self._index or 0) + 1
        self._next_step()

    def enter(self, call: Call) -> tuple[int, int] | None:
        """The step that a model call belongs to: its index and an identity; None where that cannot be told.

        Raises ``StepError`` for a call that comes after the scheduler's last step.
        """
        self._look()
        if self._current is None or self._interrupted():
            self._tell(
                "%s is called outside of a run of the pipeline's scheduler (set_timesteps, then step): these calls "
                "are computed in full. For a sampling loop of your own use smoothcache.compile on the model itself",
                call.model,
            )
            return None
        if self._index is None:
            self._index = self._start(self._current(), call)
        if not self._seen_step:
            self._follow_timesteps(call)
        if self._index >= self._length:
            raise StepError(
                f"{call.model} is called after the last of the scheduler's {self._length} steps. If another pipeline "
                "that shares it is running, call smoothcache.compile(that_pipeline, schedule) too; if not, call the "
                "scheduler's set_timesteps before a run, or use `with smoothcache.disabled(pipeline)`"
            )
        self._count()
        return self._index, self._step_serial

    def _count(self) -> None:
        if not self._called_in_trajectory:
            self._called_in_trajectory = True
            self.trajectories += 1
            self.lengths.add(self._length)
        if not self._called_in_step:
            self._called_in_step = True
            self.steps_begun += 1

    def _next_step(self) -> None:
        self._called_in_step = False
        self._step_serial += 1

    def _start(self, scheduler: Any, call: Call) -> int:
        """The index of a run's first step: not 0 where a pipeline begins with an image (strength below 1)."""
        index = getattr(scheduler, "step_index", None) if self._trusts_step_index else None
        if index is None and hasattr(scheduler, "begin_index"):
            index = scheduler.begin_index
        elif index is None:
            # DDIM and its like keep no index: one wait for the device per run.
            timesteps, timestep = torch.as_tensor(scheduler.timesteps).tolist(), call.timestep(wait=True)
            index = timesteps.index(timestep) if timestep in timesteps else 0
        return int(index or 0)

    def _follow_timesteps(self, call: Call) -> None:
        timesteps = call.timesteps()
        if self._last_timesteps is not None and timesteps != self._last_timesteps:
            self._tell(
                "the pipeline does not call scheduler.step: a step of %s ends where its timestep changes", call.model
            )
            self._index += 1
            self._next_step()
        self._last_timesteps = timesteps

    def _interrupted(self) -> bool:
        """Whether a callback has ended the run: diffusers clears the mark when the next begins."""
        alive = [pipeline for reference in self.pipelines if (pipeline := reference()) is not None]
        return bool(alive) and all(getattr(pipeline, "_interrupt", False) for pipeline in alive)

    def _look(self) -> None:
        """Has someone given a pipeline another scheduler? Its run began before it was watched."""
        for reference in self.pipelines:
            pipeline = reference()
            if pipeline is None or any(watched() is pipeline.scheduler for watched in self._watched):
                continue
            running = self._current is not None and self._called_in_trajectory and self._index != self._length
            shared = running and any(
                (other := r()) is not None and other.scheduler is self._current() for r in self.pipelines
            )
            log.info("the pipeline has another scheduler: %s", type(pipeline.scheduler).__name__)
            self._drop_unused()
            self._watch(pipeline.scheduler)
            self.finish()
            if getattr(pipeline.scheduler, "num_inference_steps", None) is not None and not shared:
                self.began(pipeline.scheduler)
                self._trusts_step_index = True  # it says how far the run is that began unseen

    def _watch(self, scheduler: Any) -> None:
        if not any(watched() is scheduler for watched in self._watched):
            watch(scheduler, self)
            self._watched.append(weakref.ref(scheduler))

    def _drop_unused(self) -> None:
        used = [pipeline.scheduler for reference in self.pipelines if (pipeline := reference()) is not None]
        for reference in list(self._watched):
            scheduler = reference()
            if not any(scheduler is other for other in used):
                self._watched.remove(reference)
                if scheduler is not None:
                    unwatch(scheduler, self)

    def _check_length(self, scheduler: Any) -> None:
        if self.steps is None or self._length == self.steps:
            return
        self.finish()
        raise StepError(
            f"{type(scheduler).__name__} was set to {self._length} timesteps, but the schedule has {self.steps} steps: "
            f"run the pipeline with as many inference steps as give {self.steps} timesteps, or compile it with a "
            f"schedule of {self._length} steps (solvers of second order take more than one timestep per inference "
            "step); `with smoothcache.disabled(pipeline)` runs it uncached"
        )

    def _tell(self, message: str, model: str) -> None:
        if message not in self._told:
            log.warning(message, model)
            self._told.add(message)


class DenoiserClock:
    """The clock of one denoiser: the scheduler's step, and which of this model's calls in the step a call is.

    Attributes: as of ``clock.Clock``; ``stream`` is a name and an ordinal.
    """

    def __init__(self, shared: SchedulerClock) -> None:
        self.shared = shared
        shared.denoisers.append(self)
        self.step = -1
        self.stream: Hashable = None
        self.trajectory = -1
        self.serial = 0
        self.streams = Streams()
        self._step_serial = -1

    @property
    def trajectories(self) -> int:
        return self.shared.trajectories

    @property
    def steps_begun(self) -> int:
        return self.shared.steps_begun

    def begin(self) -> None:
        self.shared.forget()

    def abandon(self) -> None:
        self.shared.forget()

    def enter(self, call: Call, *, wait: bool = False) -> None:
        """Move to a call. ``wait`` is for the clock of bare models: here the scheduler tells all."""
        self.serial += 1
        place = self.shared.enter(call)
        if place is None:
            self.shared.forget()
            self.trajectory, self.step, self.stream = self.shared.trajectory, 0, None
            return
        step, step_serial = place
        if self.trajectory != self.shared.trajectory:
            self.streams.forget()
        if step_serial != self._step_serial:
            self.streams.next_step()
        self.trajectory, self.step, self._step_serial = self.shared.trajectory, step, step_serial
        self.stream = self.streams.key(call)
