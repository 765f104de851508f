"""Kernels compiled ahead of time, for GPUs that are not there: what a launch would compile, and facts read from it.

A launch is recorded with meta tensors, so of any size; then its kernel is compiled as the launch would do it, with the
same specialisation of arguments, and PTX and ``ptxas`` tell how memory is accessed and how many registers spill.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")
nvidia = pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton has no compiler for NVIDIA's GPUs here")

#: Ampere, Hopper, Blackwell.
CAPABILITIES = (80, 90, 100)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
#: A pointer or a whole number that 16 divides; the attribute that stands for it in Triton's IR.
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass
class Launch:
    """What a launch gave its kernel."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass
class Recorder:
    """Stands where a kernel does, and keeps its launches."""

    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.launches.append(Launch(grid, arguments, keywords))

        return launch


def record(module: ModuleType, kernel: str, run: Callable[[], object]) -> Recorder:
    """The launches of ``module``'s kernel of this name while ``run`` runs. No other launch of the module is made."""
    recorders = {name: Recorder(getattr(module, name)) for name in dir(module) if name.endswith("_kernel")}
    with pytest.MonkeyPatch.context() as patch:
        for name, recorder in recorders.items():
            patch.setattr(module, name, recorder)
        if hasattr(module, "address_table"):
            empty = partial(torch.empty, dtype=torch.int64)
            patch.setattr(module, "address_table", lambda tensors, device: empty(len(tensors), device=device))
        run()
    return recorders[kernel]


@dataclass(frozen=True)
class Artefact:
    """A compiled kernel."""

    ttir: str
    ptx: str
    capability: int

    @property
    def accesses(self) -> list[tuple[str, int]]:
        """``("ld" or "st", bits)`` of each access to global memory, in order."""
        found = re.findall(r"^\s*(?:@%p\d+ )?(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+) ", self.ptx, re.MULTILINE)
        return [(kind, int(count or 1) * int(bits)) for kind, count, bits in found]

    @property
    def uses_shared_memory(self) -> bool:
        return ".shared" in self.ptx

    def spilled_bytes(self) -> tuple[int, int]:
        """Bytes of spill stores and spill loads, as ``ptxas -v`` reports them."""
        report = _ptxas(self.ptx, self.capability)
        ((stores, loads),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        return int(stores), int(loads)


def compile_launch(recorder: Recorder, capability: int, *, aligned: bool = True) -> Artefact:
    """Compile the recorder's only launch, with pointers that 16 divides, or not."""
    (launch,) = recorder.launches
    names = recorder.kernel.arg_names
    options = {name: value for name, value in launch.keywords.items() if name not in names}
    values = dict(zip(names, launch.arguments, strict=False))
    values.update((name, value) for name, value in launch.keywords.items() if name in names)
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(recorder.kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif parameter.do_not_specialize:
            signature[name] = _whole(value)
        else:
            signature[name] = _specialize(value, (position,), constants, attributes, aligned)
    source = triton.compiler.ASTSource(recorder.kernel, signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    return Artefact(compiled.asm["ttir"], compiled.asm["ptx"], capability)


def _specialize(value: Any, path: tuple[int, ...], constants: dict, attributes: dict, aligned: bool) -> Any:
    """The argument's type as Triton's launcher names it; what it takes as constant or divisible is noted."""
    if isinstance(value, tuple):
        return tuple(_specialize(one, (*path, i), constants, attributes, aligned) for i, one in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        if aligned:
            attributes[path] = DIVISIBLE
        return POINTERS[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0:
            attributes[path] = DIVISIBLE
        return _whole(value)
    assert isinstance(value, float), f"no kernel here takes {value!r}"
    return "fp32"


def _whole(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _ptxas(ptx: str, capability: int) -> str:
    """What the ``ptxas`` that comes with Triton says about this code."""
    tool = nvidia.get_ptxas(capability).path
    (target,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={target}", source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


class Hopper:
    """A driver for a GPU that is not there, for Triton's launcher: it compiles, and nothing is run."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
