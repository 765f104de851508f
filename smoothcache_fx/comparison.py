"""``compare``: the same samples uncached and cached, how fast and how far apart, for one or more schedules."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .compiler import compile, remove
from .errors import SmoothCacheError
from .pipelines import denoisers, is_pipeline
from .plots import plot_frontier
from .report import report
from .schedule import Schedule
from .tables import Printable, format_table
from .timing import synchronize

#: Gets what ``sample`` returned uncached, and cached.
Metric = Callable[[Any, Any], float]
UNCACHED = "uncached"
#: Relative L2 distance of two samples of one configuration that rounding may explain.
SAME = 1e-3


@dataclass(frozen=True)
class ComparedSchedule:
    """One schedule's figures, against the uncached sample of the same seeds.

    Attributes:
        name: as given.
        seconds: of ``sample``, the median of the timed rounds, compiling not counted.
        speedup: over the uncached model, compiled by the same compiler.
        mac_ratio: the speed-up if time were arithmetic.
        psnr: peak signal to noise ratio of the final sample in dB; the peak is the uncached sample's range.
        cosine: cosine similarity of the final samples, all elements as one vector.
        relative_l2: norm of the difference over norm of the uncached sample.
        trajectory: the same of the model's output, for each call of the model.
        metrics: the caller's own.
    """

    name: str
    seconds: float
    speedup: float
    mac_ratio: float
    psnr: float
    cosine: float
    relative_l2: float
    trajectory: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison(Printable):
    """What ``compare`` measured; ``print`` it.

    Attributes:
        model: name of the class.
        seconds: of the uncached ``sample``, compiled by the same compiler.
        rows: a row per schedule, in the order given.
    """

    model: str
    seconds: float
    rows: tuple[ComparedSchedule, ...]

    def __str__(self) -> str:
        own = list(self.rows[0].metrics) if self.rows else []
        table = [("schedule", "seconds", "speed-up", "MAC ratio", "PSNR dB", "cosine", "relative L2", *own)]
        table.append((UNCACHED, f"{self.seconds:.3f}", "1.00", "1.00", *["-"] * (3 + len(own))))
        for row in self.rows:
            table.append(
                (
                    row.name,
                    f"{row.seconds:.3f}",
                    f"{row.speedup:.2f}",
                    f"{row.mac_ratio:.2f}",
                    f"{row.psnr:.1f}",
                    f"{row.cosine:.5f}",
                    f"{row.relative_l2:.4f}",
                    *(f"{value:.4g}" for value in row.metrics.values()),
                )
            )
        return f"{self.model}, against the uncached sample of the same seeds\n{format_table(table)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists and numbers, for JSON; an infinite PSNR is None."""
        rows = []
        for row in self.rows:
            fields = {**vars(row), "trajectory": list(row.trajectory), "metrics": dict(row.metrics)}
            rows.append(fields | {"psnr": row.psnr if math.isfinite(row.psnr) else None})
        return {"model": self.model, "seconds": self.seconds, "rows": rows}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the frontier: PSNR over speed-up, and over MAC ratio. Needs matplotlib (the extra ``plot``)."""
        plot_frontier([(row.name, row.speedup, row.mac_ratio, row.psnr) for row in self.rows], path)


def compare(
    model_or_pipeline: Any,
    schedules: Schedule | Mapping[str, Schedule],
    sample: Callable[[Any], Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    rounds: int = 1,
    calls_per_step: int | None = None,
    **options: Any,
) -> Comparison:
    """Sample with the same seeds uncached and with each schedule, and say how fast and how far apart they are.

    The uncached model is compiled, too, as a schedule that computes everything. Afterwards the model is as it was.

    Args:
        model_or_pipeline: in eval mode and not compiled, as for ``compile``.
        schedules: one, or several by name; of the same number of steps.
        sample: called with the model or pipeline; runs whole trajectories from fixed seeds and returns what comes
            out: a tensor or array, images, or any structure of them. It must return the same each time.
        metrics: your own, by name: functions of what ``sample`` returned uncached and cached, which return a number.
        rounds: timed calls of ``sample`` per schedule, after one that compiles.
        calls_per_step, options: as for ``compile``.

    Raises:
        CompiledError: it is compiled already.
        SmoothCacheError: ``sample`` returned nothing that can be compared, or something else the second time.
        Whatever ``compile`` and the compiled model raise for a schedule that does not fit.
    """
    named = {"schedule": schedules} if isinstance(schedules, Schedule) else schedules
    right = isinstance(named, Mapping) and all(isinstance(schedule, Schedule) for schedule in named.values())
    if not right or not named:
        raise TypeError(f"expected a Schedule, or several by name, got {schedules!r}")
    if len({schedule.steps for schedule in named.values()}) > 1:
        steps = ", ".join(f"{name}: {schedule.steps}" for name, schedule in named.items())
        raise ValueError(f"the schedules have different numbers of steps ({steps}): compare those of one sampler")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")

    def run(schedule: Schedule) -> _Run:
        compile(model_or_pipeline, schedule, calls_per_step=calls_per_step, **options)
        try:
            return _run(model_or_pipeline, sample, rounds)
        finally:
            remove(model_or_pipeline)

    plain = run(Schedule.uniform(next(iter(named.values())).steps, 1))
    rows = []
    for name, schedule in named.items():
        cached = run(schedule)
        rows.append(
            ComparedSchedule(
                name=name,
                seconds=cached.seconds,
                speedup=plain.seconds / cached.seconds,
                mac_ratio=cached.mac_ratio,
                psnr=psnr(plain.result, cached.result),
                cosine=float(torch.nn.functional.cosine_similarity(plain.result, cached.result, dim=0)),
                relative_l2=relative_l2(plain.result, cached.result),
                trajectory=tuple(map(relative_l2, plain.outputs, cached.outputs)),
                metrics={key: float(metric(plain.value, cached.value)) for key, metric in (metrics or {}).items()},
            )
        )
    return Comparison(type(model_or_pipeline).__name__, plain.seconds, tuple(rows))


def psnr(reference: torch.Tensor, result: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB; the peak is the reference's range. Infinite where they are equal."""
    error = float((result - reference).square().mean())
    peak = float(reference.max() - reference.min())
    if error == 0.0:
        return math.inf
    return 20 * math.log10(peak) - 10 * math.log10(error) if peak > 0 else -math.inf


@dataclass(frozen=True)
class _Run:
    """What one configuration gave: its result, also as one vector, the model's outputs, and its figures."""

    value: Any
    result: torch.Tensor
    outputs: list[torch.Tensor]
    seconds: float
    mac_ratio: float


def _run(model_or_pipeline: Any, sample: Callable[[Any], Any], rounds: int) -> _Run:
    with _outputs_of(model_or_pipeline) as outputs:
        value = sample(model_or_pipeline)
    result = as_vector(value)
    seconds = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        again = sample(model_or_pipeline)
        synchronize()
        seconds.append(time.perf_counter() - start)
    again = as_vector(again)
    if again.shape != result.shape or relative_l2(result, again) > SAME:
        raise SmoothCacheError(
            "sample(model) returned something else when it was called again, so that nothing can be said of a "
            "schedule: make its noise from a fixed seed inside of it, such as torch.Generator().manual_seed(0)"
        )
    return _Run(value, result, outputs, statistics.median(seconds), report(model_or_pipeline).mac_ratio)


@contextlib.contextmanager
def _outputs_of(model_or_pipeline: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the first tensor of each output of the model, or a pipeline's denoisers, on the CPU."""
    models = denoisers(model_or_pipeline).values() if is_pipeline(model_or_pipeline) else [model_or_pipeline]
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if tensors:
            found.append(tensors[0].detach().to("cpu", torch.float32, copy=True))

    hooks = [model.register_forward_hook(keep) for model in models]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def relative_l2(reference: torch.Tensor, result: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(result.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))


def as_vector(value: Any) -> torch.Tensor:
    """All numbers of a result, one after the other, as float64 on the CPU."""
    parts = []
    for leaf in pytree.tree_leaves(value):
        if not isinstance(leaf, torch.Tensor) and hasattr(leaf, "__array_interface__"):
            leaf = torch.from_numpy(np.array(leaf))
        if isinstance(leaf, torch.Tensor):
            parts.append(leaf.detach().to("cpu", torch.float64).flatten())
    if not parts or not any(part.numel() for part in parts):
        raise SmoothCacheError(
            f"sample(model) must return the samples: tensors, arrays or images; got {type(value).__name__}"
        )
    return torch.cat(parts)
