"""What a schedule costs and saves, counted on the graphs of its variants before any is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from ..capture.budget import row_of
from ..capture.program import Program
from ..capture.session import plan_sites
from ..graphs.tables import format_bytes
from ..passes.flops import count_flops
from ..passes.names import STACK
from ..passes.narrow import narrow
from ..passes.traffic import count_bytes
from ..plots import plot_costs
from ..runtime.variant import Mask
from ..schedules.schedule import Schedule
from .html import prediction_html


@dataclass(frozen=True)
class Prediction:
    """What a schedule costs and saves, for the inputs that were given.

    Attributes:
        variants: graphs to compile.
        mac_ratio: FLOPs of the uncached trajectory over those of the scheduled one.
        byte_ratio: the same of the bytes that must be moved: weights, inputs and outputs of matmuls, caches.
        cache_bytes: memory for one stream: outputs of the sites that are ever reused, with what forecasts look back to.
        step_shares: FLOPs of each step over those of an uncached one.
        stacks: the runs of blocks that are cached as one, because the schedule says so or ``max_cache_bytes`` does.
    """

    variants: int
    mac_ratio: float
    byte_ratio: float
    cache_bytes: int
    step_shares: tuple[float, ...]
    stacks: tuple[str, ...] = ()

    @property
    def speedup(self) -> tuple[float, float]:
        """The range in which the speed-up lies, if each step takes the time of its arithmetic or of its traffic.

        The roofline model: from all steps limited by memory to all limited by arithmetic, or the other way round.
        What an inner compiler and the host add is not in it.
        """
        return min(self.mac_ratio, self.byte_ratio), max(self.mac_ratio, self.byte_ratio)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the cost of each step. Needs matplotlib (the extra ``plot``)."""
        plot_costs(self.step_shares, path, label="FLOPs over an\nuncached step's", title="Arithmetic of each step")

    def _repr_html_(self) -> str:
        return prediction_html(self)

    def __str__(self) -> str:
        low, high = self.speedup
        variants = f"{self.variants} variant{'s' if self.variants != 1 else ''}"
        return (
            f"with this schedule: {variants}, MAC ratio {self.mac_ratio:.2f}, predicted speed-up {low:.2f} to "
            f"{high:.2f}, {format_bytes(self.cache_bytes)} of cache a stream"
            + (f"; cached as one: {', '.join(self.stacks)}" if self.stacks else "")
        )


def predict(programs: Sequence[Program], schedule: Schedule) -> Prediction:
    """The prediction for a model that was captured as these programs. Raises ``ScheduleError`` as ``row_for`` does."""
    flops, moved = [0] * schedule.steps, [0] * schedule.steps
    variants = uncached_flops = uncached_bytes = cache_bytes = 0
    for program in programs:
        builder = program.builder
        costs: dict[Mask, tuple[int, int]] = {}
        for binding in program.bindings:
            plan = plan_sites(schedule, binding.sites)
            cache_bytes += binding.stream_bytes
            for step in range(schedule.steps):
                mask = plan.mask(plan.compute[step])
                if mask not in costs:
                    # Of what a compiler that optimizes gets, whichever one this model was captured with.
                    graph = narrow(builder.graph(mask)).graph
                    costs[mask] = count_flops(graph), count_bytes(graph)
                flops[step] += costs[mask][0]
                moved[step] += costs[mask][1]
        variants += len(costs)
        uncached_flops += builder.flops * len(program.bindings)
        uncached_bytes += count_bytes(builder.captured.graph) * len(program.bindings)
    return Prediction(
        variants=variants,
        mac_ratio=uncached_flops * schedule.steps / max(1, sum(flops)),
        byte_ratio=uncached_bytes * schedule.steps / max(1, sum(moved)),
        cache_bytes=cache_bytes,
        step_shares=tuple(cost / max(1, uncached_flops) for cost in flops),
        stacks=tuple(
            site.name
            for program in programs
            for binding in program.bindings
            for site in binding.sites
            if site.kind == STACK and not all(row_of(schedule, site))
        ),
    )


def predictions_together(predictions: Sequence[Prediction], flops: Sequence[int]) -> Prediction:
    """One prediction for models that are called equally often, weighted by the FLOPs of their uncached calls."""
    weights = [count / sum(flops) for count in flops]
    shares = zip(*(one.step_shares for one in predictions), strict=True)
    return Prediction(
        variants=sum(one.variants for one in predictions),
        mac_ratio=1 / sum(weight / one.mac_ratio for weight, one in zip(weights, predictions, strict=True)),
        byte_ratio=1 / sum(weight / one.byte_ratio for weight, one in zip(weights, predictions, strict=True)),
        cache_bytes=sum(one.cache_bytes for one in predictions),
        step_shares=tuple(sum(w * share for w, share in zip(weights, step, strict=True)) for step in shares),
        stacks=tuple(name for one in predictions for name in one.stacks),
    )
