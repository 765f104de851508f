"""The clock of a bare model: it counts calls, and checks the count against the timesteps."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import StepError
from .calls import Call, Moment

log = logging.getLogger(__name__)

#: Timesteps count as equal within this share of the range that a trajectory has covered.
SAME_TIMESTEP = 1e-3

#: How many unfinished trajectories are remembered, each by the timestep at which it stopped.
MOST_INTERRUPTED = 8


class Clock:
    """Counts the calls of a bare model: ``calls_per_step`` calls to a step, ``steps`` steps to a trajectory.

    Without ``steps`` (calibration) a trajectory is as long as it turns out to be. Without ``calls_per_step`` each call
    is a step, and two calls in a row at one timestep are an error.

    ``begin()`` starts a trajectory at the next call. Where the timestep can be read, the count is checked against
    it: a trajectory runs from one end of the noise levels to the other.

    - After ``steps`` steps the next trajectory begins. If its first two timesteps go on where the last one ended, it is
      an error: the sampler takes more steps.
    - Before that, a timestep back at its start means that the sampler has begun anew, and the trajectory before it was
      cut short. Its sampler may also go on later: from where the new trajectory passes it on, all is computed (one
      step only if both have the timesteps of the last whole trajectory).
    - A timestep that goes back, but not to the start: two samplers take turns. From there on all is computed.
    - A call from another thread while a trajectory is under way, unless it begins one, is an error.

    Attributes:
        timesteps: those that the schedule was made for, in sampling order, or None. Without them those of the last
            whole trajectory are what the next one is compared with. A difference is warned about once.
    """

    def __init__(
        self, steps: int | None, calls_per_step: int | None = None, timesteps: Sequence[float] | None = None
    ) -> None:
        self.steps = steps
        self.calls_per_step = calls_per_step
        self.timesteps = None if timesteps is None else tuple(timesteps)
        self.latest = Moment(-1, 0, -1)
        self.steps_begun = 0
        self.trajectories = 0
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._trajectory = -1
        self._calls = 0
        self._begin_next = True
        self._explicit = False
        self._thread = 0
        self._first: float | None = None
        self._last: float | None = None
        self._last_every: Any = None
        #: Timesteps of the steps of this trajectory.
        self._seen: list[float | None] = []
        #: Whether two samplers take turns.
        self._lost = False
        #: Where trajectories stopped that did not end, and whether they had the steps of the last whole one.
        self._interrupted: list[tuple[float, bool]] = []
        #: Of the trajectories so far; two of them if they differ.
        self._sequences: set[tuple[float | None, ...]] = set()
        #: Whether this trajectory was said to have other timesteps than expected.
        self._compared = False
        #: Whether it has begun where the one before it ended, and the direction of that one.
        self._gapless, self._direction = False, 0.0
        #: Timesteps of the last whole trajectory.
        self._learned: tuple[float, ...] | None = None
        self._told: set[str] = set()

    def for_schedule(self, steps: int, timesteps: Sequence[float] | None) -> Clock:
        """A new clock for another schedule, whose trajectories come after this one's."""
        other = Clock(steps, self.calls_per_step, timesteps)
        other._ids = self._ids
        return other

    def all_sequences(self) -> set[tuple[float | None, ...]]:
        """Timesteps of the trajectories so far; two of them if they differ."""
        if not self._seen or len(self._sequences) > 1:
            return self._sequences
        return self._sequences | {tuple(self._seen)}

    def enter(self, call: Call, *, wait: bool = False) -> Moment:
        every = call.all_timesteps(wait=wait) if self.calls_per_step is None else None
        return self.tick(call.timestep(wait=wait), call.model, every)

    def begin(self) -> None:
        """The next call is the first of a trajectory. From now on this begins each, and no count does."""
        with self._lock:
            self._begin_next = self._explicit = True
            self._interrupted.clear()

    def abandon(self) -> None:
        """The call failed, so the trajectory is over: the next call begins another."""
        self._begin_next = True

    def tick(self, timestep: float | None = None, model: str = "the model", every: Any = None) -> Moment:
        """Move to the next call. ``every`` are the timesteps of all samples or frames; the first frame's may stay 0."""
        with self._lock:
            if self._begin_next or self._begins(timestep, model):
                self._start(timestep)
            else:
                self._check_continues(timestep, model, every)
            self._last_every = every
            moment = self._advance(timestep, model)
        self.latest = moment
        return moment

    def _begins(self, timestep: float | None, model: str) -> bool:
        """Whether the call is the first of a trajectory, though it was not announced."""
        restarted = self._restarted(timestep)
        if self._lost:
            return restarted is True
        complete = self.steps is not None and self._calls == self.steps * (self.calls_per_step or 1)
        if complete:
            if self._explicit and not restarted:
                self._misfit(self._goes_on)
            # A sampler of more steps, or one that begins where the last ended: inversion, then sampling. The next call
            # tells.
            self._gapless = restarted is False and timestep != self._last and not self._goes_back(timestep)
            return True
        if restarted and self.steps is not None:
            self._note_interrupted(model)
            self._explicit = False  # whoever called begin() has not gone on to do so
        return restarted is True

    @property
    def _goes_on(self) -> str:
        return (
            f"it goes on after {self.steps} steps (if it does not, but begins the next trajectory where the last one "
            "ended, call smoothcache.reset(model) between them)"
        )

    def _note_interrupted(self, model: str) -> None:
        """A trajectory was cut short: by whom, the next calls will show."""
        steps, rest = divmod(self._calls, self.calls_per_step or 1)
        done = f"{steps} steps" + (f" and {rest} of {self.calls_per_step} calls" if rest else "")
        self._tell(
            f"{model}: the sampler began anew after {done}, but the schedule has {self.steps} steps. Use a schedule "
            "made for the number of steps that the sampler takes; if a run may end early, call "
            "smoothcache.reset(model) before each"
        )
        self._interrupted = [*self._interrupted, (self._last, self._as_learned(self._seen))][-MOST_INTERRUPTED:]

    def _as_learned(self, timesteps: Sequence[float | None]) -> bool:
        """Whether these are the first timesteps of a whole trajectory, as the last one had them."""
        learned = self._learned
        return learned is not None and all(map(_same, timesteps, learned, itertools.repeat(learned)))

    def _start(self, timestep: float | None) -> None:
        self._sequences = self.all_sequences()
        self._compared = False
        self._trajectory = next(self._ids)
        self.trajectories += 1
        self._calls = 0
        if self._gapless:
            self._direction = self._last - self._first
        self._first = timestep
        self._last = None
        self._seen = []
        self._begin_next = self._lost = False
        self._thread = threading.get_ident()

    def _check_continues(self, timestep: float | None, model: str, every: Any) -> None:
        """Raise where the call cannot be the next of this trajectory; note where it may not be."""
        if threading.get_ident() != self._thread:
            self._begin_next = True
            raise StepError(
                f"a second thread called {model} during another thread's trajectory, after {self._calls} of its calls. "
                "Let each trajectory end before the next begins, or give each thread a pipeline with a scheduler of "
                "its own"
            )
        if timestep is None or self._explicit:
            return
        if self.calls_per_step is None and timestep == self._last and every == self._last_every:
            self._begin_next = True
            raise StepError(
                f"{model} was called twice in a row at timestep {timestep:g}. If a step has several calls, as with "
                "guidance, say how many: calls_per_step=2. If each call is a step, say calls_per_step=1. If "
                "the sampler began anew, call smoothcache.reset(model) first"
            )
        if self.steps is None or self._lost:
            return
        if self._gapless and timestep != self._last:
            self._gapless = False
            if (timestep - self._last) * self._direction > 0:
                self._misfit(self._goes_on)
            self._trajectory = next(self._ids)  # the turn may be another sampler's first call
        if self._goes_back(timestep):
            self._lost = True
            self._tell(
                f"{model}: the timestep goes back from {self._last:g} to {timestep:g} within a trajectory, as if two "
                "samplers took turns. All is computed until the next trajectory begins. If this is one sampler, call "
                "smoothcache.reset(model) before each run"
            )
        travelled = timestep - self._first
        passed = [(last, usual) for last, usual in self._interrupted if (timestep - last) * travelled >= 0]
        if passed and self._as_learned([*self._seen, timestep]):
            # What took other steps is not going on here, and what took the same ones does so only at its next step.
            passed = [(last, usual) for last, usual in passed if usual]
            self._interrupted = [each for each in self._interrupted if each not in passed or each[0] == timestep]
        if passed:
            self._trajectory = next(self._ids)

    def _advance(self, timestep: float | None, model: str) -> Moment:
        step, stream = divmod(self._calls, self.calls_per_step or 1)
        if stream == 0:
            self.steps_begun += 1
            if not self._lost:
                self._seen.append(timestep)
                self._compare(step, timestep, model)
        self._calls += 1
        self._last = timestep
        if self._lost:
            step, self._trajectory = 0, next(self._ids)
        return Moment(step, stream, self._trajectory)

    def _compare(self, step: int, timestep: float | None, model: str) -> None:
        """Say where a step is at another timestep than the one it is expected at."""
        if self.steps is None or timestep is None:
            return
        expected = self.timesteps or self._learned
        if expected is not None and not self._compared and first_difference(self._seen, expected) is not None:
            self._compared = True
            of = "the schedule was made for" if self.timesteps else "the last whole trajectory had"
            self._tell(
                f"{model}: step {step} of {self.steps} is at timestep {timestep:g}, where {of} {expected[step]:g}. If "
                f"the sampler takes another number of steps than {self.steps}, use a schedule made for it"
            )
        if step == self.steps - 1 and None not in self._seen:
            self._learned = tuple(self._seen)
            self._interrupted.clear()

    def _goes_back(self, timestep: float | None) -> bool:
        if timestep is None or self._first is None or self._last is None:
            return False
        travelled = self._last - self._first
        return (timestep - self._last) * travelled < 0.0 and abs(timestep - self._last) > SAME_TIMESTEP * abs(travelled)

    def _restarted(self, timestep: float | None) -> bool | None:
        """Whether the timestep is back at (or before) the trajectory's first, or None where that cannot be told."""
        if timestep is None or self._first is None or self._last is None:
            return None
        travelled = self._last - self._first
        if travelled == 0.0:
            return None
        return (timestep - self._first) * travelled <= 0.0

    def _tell(self, message: str) -> None:
        if message not in self._told:
            log.warning(message)
            self._told.add(message)

    def _misfit(self, what: str) -> None:
        self._begin_next = True
        raise StepError(
            f"the sampler does not run the schedule's {self.steps} steps: {what}. Use a schedule made for the number "
            "of steps that the sampler takes, pass calls_per_step if it calls the model more than once a step, and "
            "call smoothcache.reset(model) before each trajectory if runs may end early."
        )


def first_difference(timesteps: Sequence[float | None], expected: Sequence[float]) -> int | None:
    """The first step that is at another timestep than expected, or None.

    Models are given the scheduler's timesteps or those over 1000: what counts is the share of the first.
    """
    scale = expected[0] / timesteps[0] if timesteps[0] and expected[0] else 1.0
    most = max(map(abs, expected))
    for step, (timestep, other) in enumerate(zip(timesteps, expected, strict=False)):
        if timestep is not None and abs(timestep * scale - other) > SAME_TIMESTEP * most:
            return step
    return None


def agreed(sequences: Collection[tuple[float | None, ...]], steps: int) -> tuple[float, ...] | None:
    """The timesteps of all trajectories, if all have the same and all are known."""
    if len(sequences) != 1:
        return None
    (timesteps,) = sequences
    return timesteps if len(timesteps) == steps and None not in timesteps else None


def _same(timestep: float | None, expected: float, whole: Sequence[float]) -> bool:
    """Whether a timestep is the expected one, on the scale of all that are expected; True where it is not known."""
    return timestep is None or abs(timestep - expected) <= SAME_TIMESTEP * abs(whole[-1] - whole[0])
