"""All cases of the zoo, by the name of the class: the lists ``CASES`` of this package's modules."""

from __future__ import annotations

import importlib
import pkgutil

from . import __path__
from .case import ZooCase

_MODULES = [
    importlib.import_module(f"{__package__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ("case", "catalog", "check", "guess")
]
CASES: dict[str, ZooCase] = {case.name: case for module in _MODULES for case in getattr(module, "CASES", ())}
#: Classes that cannot be built or run here, with the reason.
NOT_RUN: dict[str, str] = {
    name: reason for module in _MODULES for name, reason in getattr(module, "NOT_RUN", {}).items()
}
