"""SmoothCache for any Diffusion Transformer, as a compiler pass. ``import smoothcache_fx as smoothcache``."""

from . import importers
from ._version import __version__
from .calibration.calibration import Calibration
from .compiled.compiler import compile, disabled, remove, reset, set_schedule
from .errors import CalibrationError, CompiledError, NoSitesError, ScheduleError, SmoothCacheError, StepError
from .measure.calibrate import calibrate
from .measure.choose import Choice, choose
from .measure.sensitivity import measure_sensitivity
from .reports.compare import Comparison, compare
from .reports.explain import dump, explain
from .reports.explanation import Explanation
from .reports.prediction import Prediction
from .reports.report import Report, report
from .reports.timing import timed
from .schedules.schedule import Schedule

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
    "set_schedule",
    "timed",
]
