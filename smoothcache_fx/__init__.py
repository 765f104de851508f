"""SmoothCache for any Diffusion Transformer, as a compiler pass. ``import smoothcache_fx as smoothcache``."""

from . import importers
from ._version import __version__
from .calibration import Calibration
from .choice import Choice, choose
from .comparison import Comparison, compare
from .compiler import compile, disabled, remove, reset
from .errors import (
    CalibrationError,
    CompiledError,
    NoSitesError,
    ScheduleError,
    SmoothCacheError,
    StepError,
)
from .explain import Explanation, dump, explain
from .prediction import Prediction
from .recording import calibrate
from .report import Report, report
from .schedule import Schedule
from .sensitivity import measure_sensitivity
from .timing import timed

__all__ = [
    "Calibration",
    "CalibrationError",
    "Choice",
    "Comparison",
    "CompiledError",
    "Explanation",
    "NoSitesError",
    "Prediction",
    "Report",
    "Schedule",
    "ScheduleError",
    "SmoothCacheError",
    "StepError",
    "__version__",
    "calibrate",
    "choose",
    "compare",
    "compile",
    "disabled",
    "dump",
    "explain",
    "importers",
    "measure_sensitivity",
    "remove",
    "report",
    "reset",
    "timed",
]
