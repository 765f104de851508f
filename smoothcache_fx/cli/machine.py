"""What this machine has of what the package needs, and a small model compiled, cached and checked on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._version import __version__
from ..capture import _inductor
from ..compiled.compiler import compile
from ..demo.model import DiT, randomize
from ..reports.report import report
from ..schedules.schedule import Schedule

#: What is used where it is installed, and what for.
OPTIONAL = {
    "diffusers": "pipelines",
    "matplotlib": "plots: the extra `plot`",
    "tqdm": "progress bars",
    "accelerate": "offloading of pipelines",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what, found: such as ``torch`` and ``2.13.0``.
        missing: whether something that is needed is not there.
        absent: whether something that is not needed is not there.
        advice: what to do about it, or what is not possible without it.
    """

    what: str
    found: str
    missing: bool = False
    advice: str = ""
    absent: bool = False

    def __str__(self) -> str:
        mark = "missing" if self.missing else "-" if self.absent else "ok"
        return f"{mark:8s}{self.what}: {self.found}" + (f" ({self.advice})" if self.advice else "")


def examine(*, self_test: bool = True) -> Iterator[Finding]:
    """The findings, one by one, the self-test last."""
    yield Finding("smoothcache_fx", __version__)
    yield Finding("Python", platform.python_version())
    yield Finding("torch", torch.__version__)
    yield Finding("numpy", version("numpy") or "not installed", missing=version("numpy") is None)
    yield _triton()
    yield from _devices()
    yield _compiler()
    yield _cache_directory()
    dot = shutil.which("dot")
    yield _optional("Graphviz", dot, "dumped graphs have no SVG")
    for package, purpose in OPTIONAL.items():
        yield _optional(package, version(package), f"only for {purpose}")
    if self_test:
        yield run_self_test()


def _optional(what: str, found: str | None, advice: str) -> Finding:
    return Finding(what, found) if found else Finding(what, "not installed", advice=advice, absent=True)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> Finding:
    found = version("triton")
    if found is not None:
        return Finding("triton", found)
    if torch.cuda.is_available():
        return Finding("triton", "not installed", missing=True, advice="Inductor needs it on a GPU: pip install triton")
    return _optional("triton", None, "only needed on a GPU")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        advice = "torch sees no GPU: look at its driver" if built else "this torch is built for CPUs"
        yield Finding("GPU", "none", advice=advice, absent=True)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield Finding(f"GPU {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory:.0f} GiB")


def _compiler() -> Finding:
    found = _inductor.cpp_compiler()
    if found is None:
        advice = "Inductor needs one: install g++ or clang++, or give backend='aot_eager'"
        return Finding("C++ compiler", "none", missing=True, advice=advice)
    return Finding("C++ compiler", found)


def _cache_directory() -> Finding:
    path = _inductor.cache_directory()
    if os.access(path, os.W_OK):
        return Finding("Inductor's cache", path)
    return Finding("Inductor's cache", path, missing=True, advice="not writable: set TORCHINDUCTOR_CACHE_DIR")


def run_self_test() -> Finding:
    """Compile a one-block DiT with Inductor, and compare a computed and a cached step with what they must give."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = randomize(DiT(image_size=8, patch_size=2, channels=1, width=32, depth=1, heads=2, num_classes=3)).to(device)
    x, label = torch.randn(2, 1, 8, 8, device=device), torch.zeros(2, dtype=torch.long, device=device)
    times = [torch.full((2,), value, device=device) for value in (1.0, 0.5)]
    start = time.perf_counter()
    try:
        with torch.no_grad():
            expected = [model(x, t, label) for t in times]
            compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}))
            found = [model(x, t, label) for t in times]
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the machine is what is asked for
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(
            "self-test", f"{type(error).__name__}: {lines[0]}", missing=True, advice="Inductor does not work"
        )
    seconds = time.perf_counter() - start
    if not torch.allclose(found[0], expected[0], rtol=1e-3, atol=1e-3):
        return Finding("self-test", "a computed step is not what the model gives", missing=True, advice="please report")
    reused = sum(group.reused for group in report(model).groups)
    if reused != 2 or torch.allclose(found[1], expected[1], rtol=1e-5, atol=1e-5):
        return Finding("self-test", f"{reused} of 2 branches were reused", missing=True, advice="please report")
    return Finding("self-test", f"compiled and cached on {device} in {seconds:.0f} s")
