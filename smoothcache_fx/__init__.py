"""SmoothCache for any Diffusion Transformer, as a compiler pass. ``import smoothcache_fx as smoothcache``."""

from .compiler import compile, disabled, remove, reset
from .errors import (
    CalibrationError,
    CompiledError,
    NoSitesError,
    ScheduleError,
    SmoothCacheError,
    StepError,
)
from .schedule import Schedule

__all__ = [
    "CalibrationError",
    "CompiledError",
    "NoSitesError",
    "Schedule",
    "ScheduleError",
    "SmoothCacheError",
    "StepError",
    "compile",
    "disabled",
    "remove",
    "reset",
]
