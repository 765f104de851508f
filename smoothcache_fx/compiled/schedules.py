"""Which schedule a run follows: the only one, that of a set for its number of steps, or one that is made for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.noise_levels import noise_levels_of, timesteps_of
from ..calibration.quality import QUALITIES
from ..checks import one_of
from ..errors import ScheduleError, StepError
from ..schedules.schedule import Schedule

log = logging.getLogger(__name__)

#: What `Calibration.schedule` is asked for where nothing else is said.
DEFAULT_QUALITY = "medium"

Schedules = Schedule | Mapping[int, Schedule] | Calibration
"""What `compile` and `set_schedule` take: one schedule, some by their number of steps, or what makes them."""


class ScheduleSet:
    """The schedules of a pipeline's runs.

    Attributes:
        given: by number of steps; empty where a calibration makes them.
        calibration, quality: what makes them, and what it is asked for.
    """

    def __init__(self, schedules: Mapping[int, Schedule] | Calibration, quality: str | None) -> None:
        self.calibration = schedules if isinstance(schedules, Calibration) else None
        self.given: Mapping[int, Schedule] = MappingProxyType({})
        self.quality = quality
        if isinstance(schedules, Calibration):
            self.quality = checked_quality(quality)
        else:
            self.given = MappingProxyType(_by_steps(schedules))
        self._made: dict[Any, Schedule] = {}

    def schedule_for(self, scheduler: Any) -> Schedule:
        """The schedule for a scheduler that has its timesteps.

        Raises:
            StepError: the set has none of its length.
            CalibrationError: the calibration can make none for these timesteps.
        """
        if self.calibration is None:
            steps = len(scheduler.timesteps)
            if steps not in self.given:
                raise StepError(
                    f"{type(scheduler).__name__} was set to {steps} timesteps, and there are schedules for "
                    f"{', '.join(map(str, sorted(self.given)))}: run the pipeline with as many inference steps as give "
                    "one of these, or add a schedule (smoothcache.set_schedule); `with smoothcache.disabled(pipeline)` "
                    "runs it uncached"
                )
            return self.given[steps]
        key = timesteps_of(scheduler), noise_levels_of(scheduler)
        if key not in self._made:
            self._made[key] = self.calibration.schedule(quality=self.quality, scheduler=scheduler)
            made = self._made[key]
            log.info("made for %d steps: %.0f%% of the arithmetic", made.steps, 100 * made.compute_fraction)
        return self._made[key]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScheduleSet):
            return NotImplemented
        same = self.calibration is other.calibration and self.quality == other.quality
        return same and dict(self.given) == dict(other.given)

    __hash__ = None


def only_schedule(schedules: Any, quality: str | None) -> Schedule:
    """The schedule that is given, or the one that a calibration makes for its own steps: for a bare model.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(schedules, Calibration):
        return schedules.schedule(quality=checked_quality(quality))
    if isinstance(schedules, Mapping):
        raise TypeError(
            "a set of schedules is for pipelines, whose scheduler says how many steps a run has. Give a bare model one "
            "schedule, and smoothcache.set_schedule(model, another) before a run of another length"
        )
    _refuse_quality(quality)
    if not isinstance(schedules, Schedule):
        raise _no_schedule(schedules)
    return schedules


def schedules_of(schedules: Any, quality: str | None) -> Schedule | ScheduleSet:
    """A schedule, or a set of them: for a pipeline. Raises as `only_schedule`."""
    if isinstance(schedules, Calibration):
        return ScheduleSet(schedules, quality)
    _refuse_quality(quality)
    if isinstance(schedules, Mapping):
        return ScheduleSet(schedules, None)
    return only_schedule(schedules, None)


def checked_quality(quality: str | None) -> str:
    return str(one_of(DEFAULT_QUALITY if quality is None else quality, "quality", tuple(QUALITIES)))


def _refuse_quality(quality: str | None) -> None:
    if quality is not None:
        raise ScheduleError(
            f"quality is {quality!r}, but a schedule's quality is what it is: give a Calibration, which makes the "
            "schedule for a quality"
        )


def _by_steps(schedules: Mapping[Any, Any]) -> dict[int, Schedule]:
    if not schedules:
        raise ScheduleError("a set without schedules; expected some by their number of steps, {20: schedule, ...}")
    for steps, schedule in schedules.items():
        if not isinstance(schedule, Schedule):
            raise _no_schedule(schedule)
        if steps != schedule.steps:
            raise ScheduleError(
                f"the schedule for {steps!r} steps has {schedule.steps}; give each under its own number"
            )
    return dict(schedules)


def _no_schedule(given: object) -> TypeError:
    return TypeError(
        f"schedule must be a smoothcache Schedule, got {type(given).__name__}; make one with Schedule(...), "
        "Schedule.uniform(...) or calibration.schedule(...)"
    )
