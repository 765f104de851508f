"""Imports of what only the demo needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """The module; raises ImportError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the demo needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            'pip install "smoothcache_fx[demo]"'
        ) from error
