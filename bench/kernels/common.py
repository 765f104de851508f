"""What the kernels' benches share: shapes of known models, verification, timing against the device's copy bandwidth.

Every run is captured as a CUDA graph and replayed, as compiled steps are, so that the host's part does not show. The
L2 cache is flushed before each replay. What is timed has been verified against the plain reference before.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from smoothcache_fx.graphs.tables import format_table

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS, EAGER, INDUCTOR = "smoothcache", "eager", "inductor"
#: The plain expression rounds to the dtype after each operation: its error, relative to the result's norm.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}
GIB = 2**30
Results = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """A residual stream ``[batch, tokens, width]`` of a model."""

    model: str
    batch: int
    tokens: int
    width: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.width

    def __str__(self) -> str:
        return f"{self.model} {self.batch}x{self.tokens}x{self.width}"


SHAPES = [
    *(Shape("DiT-XL/2", batch, 256, 1152) for batch in (2, 8, 32, 64)),
    Shape("Flux 1024px", 1, 4096 + 512, 3072),
    Shape("Wan-like video", 1, 32760, 5120),
]
#: For --check: a few elements, of a width that no power of two divides, and of more than one block.
SMALL = [Shape("small", 2, 5, 123), Shape("small", 2, 16, 144)]


@dataclass
class Case:
    """One kernel on one shape.

    Attributes:
        bytes: what must be read and written at least, each tensor once.
        kernel: calls the op.
        reference: calls the plain reference.
        expression: what a model says, with ``arguments``: run eagerly, and as Inductor compiles it.
        written: buffers that all of them write, besides what they return.
        tolerance: of the op's result against the reference's, relative; 0 means the same bits.
        roundings: how often the expression rounds one element to the dtype, where the op does so once.
    """

    bytes: int
    kernel: Callable[[], Results]
    reference: Callable[[], Results]
    expression: Callable[..., Results]
    arguments: tuple[Any, ...]
    written: Sequence[Tensor] = ()
    tolerance: float = 0.0
    roundings: int = 1
    compiled: Callable[..., Results] = field(init=False)

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.expression, fullgraph=True, dynamic=False)

    @property
    def runs(self) -> dict[str, Callable[[], Results]]:
        return {
            OURS: self.kernel,
            EAGER: lambda: self.expression(*self.arguments),
            INDUCTOR: lambda: self.compiled(*self.arguments),
        }

    def verify(self, dtype: torch.dtype) -> None:
        """Raise where a run's results are not the reference's."""
        expected = self._results(self.reference)
        for name, run in self.runs.items():
            allowed = self.tolerance if name == OURS else max(self.tolerance, ROUNDING[dtype] * self.roundings**0.5)
            for actual, wanted in zip(self._results(run), expected, strict=True):
                error = float((actual.double() - wanted.double()).norm() / wanted.double().norm())
                if actual.dtype != wanted.dtype or not error <= allowed:
                    raise RuntimeError(
                        f"{name} is wrong: {actual.dtype}, relative error {error:.3g} over {allowed:.3g}"
                    )

    def _results(self, run: Callable[[], Results]) -> list[Tensor]:
        for buffer in self.written:
            buffer.fill_(float("nan"))
        returned = run()
        returned = [returned] if isinstance(returned, Tensor) else returned
        return [one.clone() for one in (*returned, *self.written)]


def time_on_gpu(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one replay: median, 20th and 80th percentile."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    median, low, high = do_bench(graph.replay, warmup=25, rep=200, quantiles=[0.5, 0.2, 0.8])
    return {"median": median / 1e3, "p20": low / 1e3, "p80": high / 1e3}


def time_copy(count: int) -> dict[str, float]:
    """Seconds of a copy that moves ``count`` bytes: reads half of them, and writes half."""
    source = torch.empty(max(1, count // 2), dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return time_on_gpu(lambda: target.copy_(source))


def measure(shape: Shape, case: Case, peak: float) -> dict[str, Any]:
    """Figures of one verified case; ``peak`` is the bandwidth of a large copy, in bytes per second."""
    seconds = {name: time_on_gpu(run) for name, run in case.runs.items()}
    copy = time_copy(case.bytes)
    return {
        "model": shape.model,
        "shape": list(shape.size),
        "bytes": case.bytes,
        "seconds": seconds,
        "copy_seconds": copy,
        "share_of_copy": {name: copy["median"] / one["median"] for name, one in seconds.items()},
        "share_of_large_copy": {name: case.bytes / one["median"] / peak for name, one in seconds.items()},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    heading = ["shape", "bytes", *(f"{name}, us" for name in (OURS, EAGER, INDUCTOR, "copy")), "20-80%", "of copy"]
    heading += ["of large copy", "inductor's of copy"]
    cells = [heading]
    for row in rows:
        ours = row["seconds"][OURS]
        times = [*(row["seconds"][name]["median"] for name in (OURS, EAGER, INDUCTOR)), row["copy_seconds"]["median"]]
        cells.append(
            [
                f"{row['model']} {'x'.join(map(str, row['shape']))}",
                f"{row['bytes'] / 1e6:.1f} MB",
                *(f"{one * 1e6:.1f}" for one in times),
                f"{ours['p20'] * 1e6:.1f}-{ours['p80'] * 1e6:.1f}",
                f"{row['share_of_copy'][OURS]:.1%}",
                f"{row['share_of_large_copy'][OURS]:.1%}",
                f"{row['share_of_copy'][INDUCTOR]:.1%}",
            ]
        )
    return format_table(cells)


def main(op: str, description: str, build: Callable[[Shape, torch.dtype, str], Case]) -> None:
    """The command line of one kernel's bench; ``build`` makes its case for a shape, dtype and device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--check", action="store_true", help="only verify, on small shapes; needs no GPU")
    parser.add_argument("--write", action="store_true", help=f"write bench/results/kernels_{op}.json")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    if arguments.check:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for shape in SMALL:
            torch._dynamo.reset()
            build(shape, dtype, device).verify(dtype)
            print(f"{op}: {shape} in {arguments.dtype} is right on {device}")
        return
    if not torch.cuda.is_available():
        sys.exit(f"{op}: a CUDA GPU is needed to measure this, and there is none. --check verifies on small shapes")

    for shape in SHAPES:  # compiled and verified first: what is timed is timed at one go
        build(shape, dtype, "cuda").verify(dtype)
        torch.cuda.empty_cache()
    rows = []
    with _beside("turns").turn():
        large = time_copy(2 * GIB)
        peak = 2 * GIB / large["median"]
        print(f"{torch.cuda.get_device_name()}: a copy of 1 GiB moves {peak / 1e9:.0f} GB/s")
        for shape in SHAPES:
            torch._dynamo.reset()
            case = build(shape, dtype, "cuda")
            case.verify(dtype)
            rows.append(measure(shape, case, peak))
            del case
            torch.cuda.empty_cache()
    print(table(rows))
    if arguments.write:
        result = {"arguments": vars(arguments), "large_copy_bytes_per_second": peak, "rows": rows}
        print(f"written to {_beside('common').write_result(f'kernels_{op}', result)}")


def _beside(name: str) -> ModuleType:
    """A module of ``bench/``; this file hides the ``common`` there."""
    folder = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location(f"bench_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(folder))  # for what it imports itself
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module
