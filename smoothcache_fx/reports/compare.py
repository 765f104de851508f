"""``compare``: the same samples uncached and cached, how fast and how far apart, for one or more schedules."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..checks import function, instance, whole_number
from ..compiled.compiler import compile, remove
from ..compiled.forward import ForwardPlace, compiled_forwards
from ..errors import SmoothCacheError
from ..graphs.tables import Printable, format_table
from ..plots import plot_frontier
from ..runtime.pipelines import denoisers, is_pipeline
from ..runtime.scheduler_clock import DenoiserClock
from ..schedules.schedule import Schedule
from .report import report
from .timing import synchronize

#: Gets what ``sample`` returned uncached, and cached.
Metric = Callable[[Any, Any], float]
UNCACHED = "uncached"
#: Speed-ups of rounds that differ by more are unreliable.
WIDE = 0.1
#: Relative L2 distance of two samples of one configuration that rounding may explain.
SAME = 1e-3


@dataclass(frozen=True)
class ComparedSchedule:
    """One schedule's figures, against the uncached sample of the same seeds.

    Attributes:
        name: as given.
        seconds: of ``sample``, the median of the timed rounds, compiling not counted.
        speedup: over the uncached model, compiled by the same compiler: the median of the rounds' own.
        spread: the largest of the rounds' speed-ups over the smallest, less 1; NaN of a single round.
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
    spread: float
    mac_ratio: float
    psnr: float
    cosine: float
    relative_l2: float
    trajectory: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def reliable(self) -> bool:
        """Whether the rounds agree so far that the speed-up says something."""
        return self.spread <= WIDE


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
        table = [("schedule", "seconds", "speed-up", "spread", "MAC ratio", "PSNR dB", "cosine", "relative L2", *own)]
        table.append((UNCACHED, f"{self.seconds:.3f}", "1.00", "-", "1.00", *["-"] * (3 + len(own))))
        for row in self.rows:
            table.append(
                (
                    row.name,
                    f"{row.seconds:.3f}",
                    f"{row.speedup:.2f}",
                    "-" if math.isnan(row.spread) else f"{row.spread:.0%}",
                    f"{row.mac_ratio:.2f}",
                    f"{row.psnr:.1f}",
                    f"{row.cosine:.5f}",
                    f"{row.relative_l2:.4f}",
                    *(f"{value:.4g}" for value in row.metrics.values()),
                )
            )
        lines = [f"{self.model}, against the uncached sample of the same seeds", format_table(table)]
        if wide := [row.name for row in self.rows if not row.reliable]:
            lines.append(
                f"unreliable speed-ups: {', '.join(wide)} (a single round, or rounds more than {WIDE:.0%} apart): "
                "measure on a quiet machine, with more rounds or a longer sample"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists and numbers, for JSON; an infinite PSNR and an unknown spread are None."""
        rows = []
        for row in self.rows:
            fields = {**vars(row), "trajectory": list(row.trajectory), "metrics": dict(row.metrics)}
            finite = {name: fields[name] if math.isfinite(fields[name]) else None for name in ("psnr", "spread")}
            rows.append({**fields, **finite, "reliable": row.reliable})
        return {"model": self.model, "seconds": self.seconds, "rows": rows}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw PSNR over speed-up, and over MAC ratio, with the Pareto front. Needs matplotlib (the extra ``plot``)."""
        plot_frontier([(row.name, row.speedup, row.mac_ratio, row.psnr) for row in self.rows], path)


def compare(
    model_or_pipeline: Any,
    schedules: Schedule | Mapping[str, Schedule],
    sample: Callable[[Any], Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    rounds: int = 3,
    calls_per_step: int | None = None,
    **options: Any,
) -> Comparison:
    """Sample with the same seeds uncached and with each schedule, and say how fast and how far apart they are.

    The uncached model is compiled, too, as a schedule that computes everything. In each round all take their turn, so
    that a slow spell of the machine hits all of them; the caches of all schedules are kept meanwhile. Afterwards the
    model is as it was.

    Args:
        model_or_pipeline: in eval mode and not compiled, as for ``compile``.
        schedules: one, or several by name; of the same number of steps.
        sample: called with the model or pipeline; runs whole trajectories from fixed seeds and returns what comes
            out: a tensor or array, images, or any structure of them. It must return the same each time.
        metrics: your own, by name: functions of what ``sample`` returned uncached and cached, which return a number.
        rounds: timed calls of ``sample`` per schedule, after one that compiles; of one alone the spread is not known.
        calls_per_step, options: as for ``compile``.

    Raises:
        CompiledError: it is compiled already.
        SmoothCacheError: ``sample`` returned nothing that can be compared, or something else the second time.
        Whatever ``compile`` and the compiled model raise for a schedule that does not fit.

    Example:
        >>> every_third = smoothcache.Schedule.uniform(50, 3)
        >>> comparison = smoothcache.compare(model, {"every second": schedule, "every third": every_third}, sample)
        >>> print(comparison)
    """
    named = {"schedule": schedules} if isinstance(schedules, Schedule) else schedules
    right = isinstance(named, Mapping) and all(isinstance(schedule, Schedule) for schedule in named.values())
    if not right or not named:
        raise TypeError(f"expected a Schedule, or several by name, got {schedules!r}")
    if len({schedule.steps for schedule in named.values()}) > 1:
        steps = ", ".join(f"{name}: {schedule.steps}" for name, schedule in named.items())
        raise ValueError(f"the schedules have different numbers of steps ({steps}): compare those of one sampler")
    rounds = whole_number(rounds, "rounds", 1, SmoothCacheError)
    function(sample, "sample", "the model or pipeline that runs it")
    if metrics is not None:
        instance(metrics, "metrics", Mapping, "functions of the uncached and the cached samples, by name")
        for name, metric in metrics.items():
            function(metric, f"metrics[{name!r}]", "the uncached and the cached samples")

    everything = Schedule.uniform(next(iter(named.values())).steps, 1)
    turns: list[_Turn] = []
    try:
        for schedule in (everything, *named.values()):
            turns.append(_Turn(model_or_pipeline, schedule, calls_per_step, options))
            turns[-1].warm_up(sample)
        for number in range(rounds):
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn.measure(sample)
    finally:
        for turn in reversed(turns):
            turn.end()
    plain, *others = turns
    rows = []
    for name, cached in zip(named, others, strict=True):
        ratios = [before / after for before, after in zip(plain.seconds, cached.seconds, strict=True)]
        rows.append(
            ComparedSchedule(
                name=name,
                seconds=statistics.median(cached.seconds),
                speedup=statistics.median(ratios),
                spread=spread_of(ratios),
                mac_ratio=cached.mac_ratio,
                psnr=psnr(plain.result, cached.result),
                cosine=float(torch.nn.functional.cosine_similarity(plain.result, cached.result, dim=0)),
                relative_l2=relative_l2(plain.result, cached.result),
                trajectory=tuple(map(relative_l2, plain.outputs, cached.outputs)),
                metrics={key: float(metric(plain.value, cached.value)) for key, metric in (metrics or {}).items()},
            )
        )
    return Comparison(type(model_or_pipeline).__name__, statistics.median(plain.seconds), tuple(rows))


def spread_of(ratios: Sequence[float]) -> float:
    """The largest over the smallest, less 1; NaN of a single one."""
    return max(ratios) / min(ratios) - 1 if len(ratios) > 1 else math.nan


def psnr(reference: torch.Tensor, result: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB; the peak is the reference's range. Infinite where they are equal."""
    error = float((result - reference).square().mean())
    peak = float(reference.max() - reference.min())
    if error == 0.0:
        return math.inf
    return 20 * math.log10(peak) - 10 * math.log10(error) if peak > 0 else -math.inf


class _Turn:
    """The model or pipeline compiled for one schedule, which stands in its place only while it is its turn.

    Attributes:
        value, result, outputs: what ``sample`` returned, that as one vector, and the model's outputs.
        seconds: of each timed call of ``sample``.
        mac_ratio: as `Report`.
    """

    def __init__(
        self, model_or_pipeline: Any, schedule: Schedule, calls_per_step: int | None, options: Mapping[str, Any]
    ) -> None:
        self.sampled = model_or_pipeline
        self.seconds: list[float] = []
        compile(model_or_pipeline, schedule, calls_per_step=calls_per_step, **options)
        self._forwards = list(compiled_forwards(model_or_pipeline).values())
        self._take_off()

    def warm_up(self, sample: Callable[[Any], Any]) -> None:
        """The first call, which compiles."""
        with self._on(), _outputs_of(self.sampled) as self.outputs:
            self.value = sample(self.sampled)
        self.result = as_vector(self.value)

    def measure(self, sample: Callable[[Any], Any]) -> None:
        """A timed call. SmoothCacheError if it returns something else than the first."""
        with self._on():
            synchronize()
            start = perf_counter()
            again = sample(self.sampled)
            synchronize()
            self.seconds.append(perf_counter() - start)
            self.mac_ratio = report(self.sampled).mac_ratio
        again = as_vector(again)
        if again.shape != self.result.shape or relative_l2(self.result, again) > SAME:
            raise SmoothCacheError(
                "sample(model) returned something else when it was called again, so that nothing can be said of a "
                "schedule: make its noise from a fixed seed inside of it, such as torch.Generator().manual_seed(0)"
            )

    def end(self) -> None:
        self._put_on()
        remove(self.sampled)

    @contextlib.contextmanager
    def _on(self) -> Iterator[None]:
        self._put_on()
        try:
            yield
        finally:
            self._take_off()

    def _put_on(self) -> None:
        for forward in self._forwards:
            forward.install(ForwardPlace(forward.model))
        self._follow(True)

    def _take_off(self) -> None:
        self._follow(False)
        for forward in self._forwards:
            forward.take_off()

    def _follow(self, following: bool) -> None:
        """Whether a pipeline's scheduler is followed; while others have their turn, any number of steps will do."""
        for forward in self._forwards:
            if isinstance(clock := forward.session.clock, DenoiserClock):
                clock.shared.following = following


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
