"""The exceptions that smoothcache_fx raises on its own account."""

from __future__ import annotations


class SmoothCacheError(ValueError):
    """Base of all errors of this package; catch it to catch them all."""


class ScheduleError(SmoothCacheError):
    """A schedule is malformed, its file cannot be read, or it does not fit the model it was given for.

    Raised by `Schedule`, `Schedule.load` and `Schedule.row_for`, and by `compile` when a selector of the
    schedule selects no site of the model.
    """


class CalibrationError(SmoothCacheError):
    """Calibration data cannot be measured, read, merged or solved for a schedule.

    Raised by `calibrate` (no whole trajectory was run; a branch's output holds NaN or infinity), by
    `Calibration.load` and `Calibration.merge`, and by `Calibration.schedule` (an unreachable FLOP budget).
    """


class NoSitesError(SmoothCacheError):
    """No residual branch was found in the model, so there is nothing to cache; says what was looked at."""


class StepError(SmoothCacheError):
    """The sampler and the schedule disagree about steps.

    Raised when a sampler runs another number of steps than the schedule has, before the first model call
    where that can be known, or when a call comes at a step that the schedule does not have.
    """


class CompiledError(SmoothCacheError):
    """A model cannot be compiled, or called, in the state it is in.

    Raised when PyTorch cannot capture a model (the message names the line of the model), when a model that is
    already compiled is compiled again, when `remove`, `reset`, `disabled` or `report` is given a model that is not
    compiled, and when a compiled model is called for training (`model.training`, or inputs that require gradients).
    """
