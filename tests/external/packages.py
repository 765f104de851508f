"""Import a model file of a package, without what the rest of the package asks for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch


def load(module: str, *, bare: Sequence[str] = (), without: Sequence[str] = ()) -> ModuleType:
    """The module, or the test is skipped with the reason why it cannot be imported.

    Args:
        module: full name.
        bare: packages whose ``__init__`` is left out, outer ones first: those import training and data code.
        without: packages that are imported on the way and not used by the model (audio features, image files).
    """
    try:
        with _config_kept(), _stood_in_for(without):
            for package in bare:
                _enter(package)
            return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported ({error}): pip install smoothcache_fx[external], see setup.py")


class _AnyName(type):
    """Classes whose every attribute is another such class: enough for default arguments and base classes."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unused(f"{cls.__qualname__}.{name}")


def _unused(what: str) -> type:
    def refuse(_: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{what} is used after all: install its package for this test")

    return _AnyName(what, (), {"__init__": refuse})


class Unused(ModuleType):
    """Stands for a module that is imported and not used."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unused(f"{self.__name__}.{name}")


class UnusedPackages(Loader, MetaPathFinder):
    """Finds the packages and all that could be in them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Unused(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stood_in_for(packages: Sequence[str]) -> Iterator[None]:
    """Those that are not installed can be imported inside; outside nothing is left of it."""
    finder = UnusedPackages([name for name in packages if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, Unused)]:
            del sys.modules[name]


@contextlib.contextmanager
def _config_kept() -> Iterator[None]:
    """stable-audio-tools and k-diffusion set Dynamo's configuration for the whole process when imported."""
    with torch._dynamo.config.patch(
        suppress_errors=torch._dynamo.config.suppress_errors,
        recompile_limit=torch._dynamo.config.recompile_limit,
    ):
        yield


def _enter(package: str) -> None:
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = importlib.util.module_from_spec(spec)
