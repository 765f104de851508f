"""The clock of a pipeline: its scheduler says where a trajectory begins and where a step ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from ..calibration.noise_levels import timesteps_of
from ..errors import SmoothCacheError, StepError
from .calls import Call, Moment
from .clock import first_difference
from .scheduler_run import Run
from .scheduler_watch import unwatch, watch
from .streams import Streams

log = logging.getLogger(__name__)

#: The lane of calls that cannot be attributed to a run.
UNKNOWN = -1


class SchedulerClock:
    """Where in their runs the schedulers of one or more pipelines are. All denoisers of these pipelines share it.

    A call belongs to the run that its thread has begun. Where that cannot be told it is computed in full: two runs of
    one thread that take turns, a thread that has begun none while there are several, a call after the last step.

    Attributes:
        steps: of the schedule; None accepts any number (calibration).
        timesteps: those that the schedule was made for, or None; a difference is warned about once.
        trajectories, steps_begun: how many there were with a model call.
        lengths: numbers of timesteps of the trajectories that had a model call.
        unfinished: how many of them ended early.
        following: cleared while the denoisers run uncached; another number of steps is no error then.
        choose: called with a scheduler that has been set, before its run begins; it may `follow` another schedule.
    """

    def __init__(self, steps: int | None, timesteps: Sequence[float] | None = None) -> None:
        self.steps = steps
        self.timesteps = None if timesteps is None else tuple(timesteps)
        self.trajectories = 0
        self.steps_begun = 0
        self.lengths: set[int] = set()
        #: Timesteps of the trajectories; two of them if they differ.
        self.sequences: set[tuple[float, ...]] = set()
        self.unfinished = 0
        self.following = True
        self.choose: Callable[[Any], None] | None = None
        self.pipelines: list[weakref.ref[Any]] = []
        self.denoisers: list[DenoiserClock] = []
        self.lock = threading.RLock()
        self._ids = itertools.count()
        self._watched: list[weakref.ref[Any]] = []
        #: Runs that have begun and not ended; of each thread the last one is its own.
        self._runs: list[Run] = []
        #: Whether a pipeline has ever ended a step by ``scheduler.step``; if not, the timesteps are read.
        self._seen_step = False
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

    def new_trajectory(self) -> int:
        return next(self._ids)

    def forget(self) -> None:
        """Nothing that is cached may be used from here on; the steps stay where they are."""
        with self.lock:
            for run in self._runs:
                run.trajectory = self.new_trajectory()

    def abandon(self) -> None:
        """A call of this thread failed."""
        with self.lock:
            if (run := self._own_run()) is not None:
                run.trajectory = self.new_trajectory()

    def began(self, scheduler: Any) -> None:
        """``set_timesteps`` was called. Raises ``StepError`` for another number of steps than the schedule's."""
        with self.lock:
            for run in self._runs_of(scheduler):
                self._end(run)
            thread = threading.get_ident()
            for run in list(self._runs):
                if run.ended or not _alive(run.thread):
                    self._end(run)
            doubtful = any(run.thread == thread for run in self._runs)
            taken = {run.lane for run in self._runs if run.thread != thread}
            lane = next(lane for lane in itertools.count() if lane not in taken)
            if self.following and self.choose is not None:
                self.choose(scheduler)
            self._runs.append(Run(scheduler, lane, self.new_trajectory(), doubtful=doubtful))
            if self.following:
                self._check_length(scheduler)

    def follow(self, steps: int, timesteps: Sequence[float] | None) -> None:
        """Another schedule is followed from the next run on. Runs that have begun, or have another length, end.

        Raises:
            StepError: another thread's run has not ended, and would go on by a schedule of other steps.
        """
        with self.lock:
            thread = threading.get_ident()
            begun = [run for run in self._runs if run.called_in_trajectory and not run.ended]
            others = [run for run in begun if run.thread != thread and _alive(run.thread)]
            if others:
                raise StepError(
                    f"the schedule cannot be changed while another thread's run is at step {others[0].index} of "
                    f"{others[0].length}: all runs that go on at the same time follow one schedule. Let it end first, "
                    "or give each thread a pipeline with denoisers of its own"
                )
            for run in list(self._runs):
                if run in begun or run.length != steps:
                    self._end(run)
            self.steps, self.timesteps = steps, None if timesteps is None else tuple(timesteps)
            self.trajectories = self.steps_begun = 0

    def finish(self) -> None:
        """The trajectories, if any is running, are over."""
        for run in list(self._runs):
            self._end(run)

    def _end(self, run: Run) -> None:
        self._runs.remove(run)
        if run.called_in_trajectory:
            self.unfinished += run.index != (run.length if self._seen_step else run.length - 1)

    def stepped(self, scheduler: Any) -> None:
        """``step`` was called."""
        with self.lock:
            runs = self._runs_of(scheduler)
            if not runs:
                # Not begun under our eyes: whose calls were the thread's own run's?
                if (own := self._own_run()) is not None:
                    own.mixed = True
                return
            run = runs[-1]
            own = self._own_run(run.thread)
            self._seen_step = True
            run.stepped()
            if own is not run:
                run.mixed = own.mixed = True

    def enter(self, call: Call) -> Run | None:
        """The run that a model call belongs to, at the call's step; None where that cannot be told."""
        self._look()
        run = self._own_run() or self._only_run()
        if run is None or self._interrupted():
            self._tell(
                "%s is called outside of a run of the pipeline's scheduler (set_timesteps, then step): these calls "
                "are computed in full. For a sampling loop of your own use smoothcache.compile on the model itself",
                call.model,
            )
            return None
        if run.mixed:
            self._tell(
                "%s: the runs of two schedulers take turns in one thread. Their calls cannot be told apart and are "
                "computed in full. Let one end before the other begins, or give each its own thread",
                call.model,
            )
            return None
        if run.index is None:
            run.begin(call)
            self._compare(run, call.model)
        if not self._seen_step:
            self._follow_timesteps(run, call)
        if run.index >= run.length:
            self._tell(
                f"%s is called after the last of the scheduler's {run.length} steps: these calls are computed in full. "
                "If another pipeline that shares it is running, call smoothcache.compile(that_pipeline, schedule) too",
                call.model,
            )
            return None
        self._count(run)
        return run

    def _own_run(self, thread: int | None = None) -> Run | None:
        """The last run that a thread (this one) has begun and not ended, or else the last one that has ended."""
        thread = threading.get_ident() if thread is None else thread
        own = [run for run in self._runs if run.thread == thread]
        return next((run for run in reversed(own) if not run.ended), own[-1] if own else None)

    def _only_run(self) -> Run | None:
        """The run of another thread, if it is the only one that has not ended."""
        runs = [run for run in self._runs if not run.ended]
        return runs[0] if len(runs) == 1 else None

    def _runs_of(self, scheduler: Any) -> list[Run]:
        return [run for run in self._runs if run.scheduler() is scheduler]

    def _count(self, run: Run) -> None:
        if not run.called_in_trajectory:
            run.called_in_trajectory = True
            self.trajectories += 1
            self.lengths.add(run.length)
            if len(self.sequences) < 2:
                self.sequences.add(timesteps_of(run.scheduler()))
        if not run.called_in_step:
            run.called_in_step = True
            self.steps_begun += 1

    def _follow_timesteps(self, run: Run, call: Call) -> None:
        timesteps = call.timesteps()
        if timesteps is None:
            return
        seen = run.timesteps
        if seen and timesteps != seen[-1]:
            self._tell(
                "the pipeline does not call scheduler.step: a step of %s ends where its timestep changes", call.model
            )
            run.next_step()
            if timesteps == seen[0] or max(seen[-1]) != max(seen[0]) == max(timesteps):
                # Another section of a long video begins, with timesteps that were set once for all of them.
                run.index, run.trajectory = run.start, self.new_trajectory()
                run.called_in_trajectory = False
                seen.clear()
            else:
                run.index += 1
        if not seen or timesteps != seen[-1]:
            seen.append(timesteps)

    def _interrupted(self) -> bool:
        """Whether a callback has ended the run: diffusers clears the mark when the next begins."""
        alive = [pipeline for reference in self.pipelines if (pipeline := reference()) is not None]
        return bool(alive) and all(getattr(pipeline, "_interrupt", False) for pipeline in alive)

    def _look(self) -> None:
        """Adopt a scheduler that replaced the pipeline's after ``compile``; its run may already have begun."""
        for reference in self.pipelines:
            pipeline = reference()
            if pipeline is None or any(watched() is pipeline.scheduler for watched in self._watched):
                continue
            own = self._own_run()
            running = own is not None and own.called_in_trajectory and own.index != own.length
            shared = running and any(
                (other := r()) is not None and other.scheduler is own.scheduler() for r in self.pipelines
            )
            log.info("the pipeline has another scheduler: %s", type(pipeline.scheduler).__name__)
            self._drop_unused()
            self._watch(pipeline.scheduler)
            if own in self._runs:
                self._end(own)
            if getattr(pipeline.scheduler, "num_inference_steps", None) is not None and not shared:
                self.began(pipeline.scheduler)
                self._own_run().trusts_step_index = True  # it says how far the run is that began unseen

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
                    for run in self._runs_of(scheduler):
                        self._end(run)

    def _check_length(self, scheduler: Any) -> None:
        length = self._runs[-1].length
        if self.steps is None or length == self.steps:
            return
        self._end(self._runs[-1])
        raise self.wrong_length(scheduler, length)

    def wrong_length(self, scheduler: Any, length: int) -> SmoothCacheError:
        """The error for a scheduler that was set to another number of timesteps."""
        return StepError(
            f"{type(scheduler).__name__} was set to {length} timesteps, but the schedule has {self.steps} steps: "
            f"run the pipeline with as many inference steps as give {self.steps} timesteps, or compile it with a "
            f"schedule of {length} steps (solvers of second order take more than one timestep per inference "
            "step); `with smoothcache.disabled(pipeline)` runs it uncached"
        )

    def _compare(self, run: Run, model: str) -> None:
        """Say where the scheduler's timesteps are not those that the schedule was made for."""
        if self.timesteps is None:
            return
        own = timesteps_of(run.scheduler())
        step = first_difference(own, self.timesteps)
        if step is not None:
            self._tell(
                f"%s: the schedule was made for other timesteps. Step {step} of {self.steps} is at {own[step]:g}, "
                f"where that of the schedule was at {self.timesteps[step]:g}. Its errors may be larger",
                model,
            )

    def _tell(self, message: str, model: str) -> None:
        if message not in self._told:
            log.warning(message, model)
            self._told.add(message)


def _alive(thread: int) -> bool:
    return any(other.ident == thread for other in threading.enumerate())


class DenoiserClock:
    """The clock of one denoiser: the scheduler's step, and which of this model's calls in the step a call is.

    A stream is a name, an ordinal and, of runs beside the first, the run's lane.
    """

    def __init__(self, shared: SchedulerClock) -> None:
        self.shared = shared
        shared.denoisers.append(self)
        self.latest = Moment(-1, None, -1)
        self._names = threading.local()

    @property
    def trajectories(self) -> int:
        return self.shared.trajectories

    @property
    def steps_begun(self) -> int:
        return self.shared.steps_begun

    @contextlib.contextmanager
    def naming(self, name: Hashable) -> Iterator[None]:
        """Calls of this thread inside of the ``with`` are of the stream of this name."""
        before = getattr(self._names, "name", None)
        self._names.name = name
        try:
            yield
        finally:
            self._names.name = before

    def begin(self) -> None:
        self.shared.forget()

    def abandon(self) -> None:
        self.shared.abandon()

    def enter(self, call: Call, *, wait: bool = False) -> Moment:
        """Where a call is. ``wait`` is for the clock of bare models: here the scheduler gives the step."""
        with self.shared.lock:
            self.latest = self._moment(call)
        return self.latest

    def _moment(self, call: Call) -> Moment:
        run = self.shared.enter(call)
        if run is None:
            return self._unknown()
        trajectory, step, streams = run.streams.get(self, (-1, -1, None))
        if trajectory != run.trajectory:
            streams = Streams()
        elif step != run.step_serial:
            streams.next_step()
        run.streams[self] = run.trajectory, run.step_serial, streams
        fits = run.fits(call) if run.doubtful else True
        stream = streams.key(call, getattr(self._names, "name", None), certain=run.doubtful)
        if stream is None or not fits:
            self.shared._tell(
                "%s: an earlier run of this thread's has not ended, and the call may be one of it: it is computed in "
                "full. To end that run, call its scheduler's set_timesteps or delete it",
                call.model,
            )
            return self._unknown()
        return Moment(run.index, (*stream, run.lane) if run.lane else stream, run.trajectory, run.lane)

    def _unknown(self) -> Moment:
        """A call that belongs to no known trajectory is its own."""
        return Moment(0, None, self.shared.new_trajectory(), UNKNOWN)
