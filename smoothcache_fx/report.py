"""``report``: what a compiled model has done so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .backend import Program, breaks_of
from .compiler import compiled_forward
from .tables import format_bytes, format_table


@dataclass
class GroupReport:
    """Calls of a group's sites, summed over sites, streams and steps."""

    group: str
    kind: str
    sites: int = 0
    computed: int = 0
    reused: int = 0


@dataclass
class Report:
    """Counts since ``compile``.

    Attributes:
        trajectories, steps, calls: begun trajectories, steps and model calls.
        groups: computed and reused site calls.
        variants: number of variants compiled, over all graphs.
        compile_seconds: time that the inner compiler took for each.
        graphs: graphs that the model was captured as; more than one means graph breaks or recompiles.
        breaks: lines of the model that broke the graph, with the reason, and how many graphs ended there.
        cut_share: FLOPs of branches that breaks cut in two, so that they cannot be cached, over those of the model.
        uncompiled_calls: calls that Dynamo ran uncompiled, and so uncached.
        forced: site calls that were computed although the schedule said reuse, by reason.
        cache_bytes: cache buffers of all streams.
        mac_ratio: FLOPs of the same calls uncached over FLOPs of those that were run, counted on the variants'
            graphs: the speed-up if time were arithmetic.
    """

    trajectories: int
    steps: int
    calls: int
    groups: list[GroupReport]
    variants: int
    compile_seconds: list[float]
    graphs: int
    breaks: Counter[str] = field(default_factory=Counter)
    cut_share: float = 0.0
    uncompiled_calls: int = 0
    forced: Counter[str] = field(default_factory=Counter)
    cache_bytes: int = 0
    mac_ratio: float = 1.0

    def __str__(self) -> str:
        rows = [("group", "kind", "sites", "computed", "reused", "reused %")]
        for group in self.groups:
            share = group.reused / max(1, group.computed + group.reused)
            rows.append(
                (
                    group.group,
                    group.kind,
                    str(group.sites),
                    str(group.computed),
                    str(group.reused),
                    f"{share:.0%}",
                )
            )
        seconds = ", ".join(f"{value:.1f}" for value in self.compile_seconds) or "none"
        lines = [
            f"{self.calls} calls, {self.steps} steps, {self.trajectories} trajectories",
            format_table(rows),
            f"MAC ratio {self.mac_ratio:.2f}, caches {format_bytes(self.cache_bytes)}",
            f"{self.graphs} graph{'s' if self.graphs != 1 else ''}, {self.variants} variants, compiled in {seconds} s",
        ]
        lines.extend(describe_breaks(self.breaks, self.cut_share))
        if self.uncompiled_calls:
            lines.append(f"{self.uncompiled_calls} calls ran uncompiled and uncached: Dynamo hit its recompile limit")
        if self.forced:
            lines.append("computed beyond the schedule:")
            lines.extend(f"  {count} site calls: {reason}" for reason, count in self.forced.items())
        return "\n".join(lines)


def describe_breaks(breaks: Mapping[str, int], cut_share: float) -> Iterator[str]:
    """Lines about graph breaks; none where there are none."""
    if breaks:
        cut = f"{cut_share:.1%} of the FLOPs lie in branches that this cuts in two, and are computed at every step"
        yield f"graph breaks ({cut}):"
        for place, count in breaks.items():
            yield f"  {place}" + (f" ({count} graphs)" if count > 1 else "")


def report(model: torch.nn.Module) -> Report:
    """What the compiled model has computed and reused since it was compiled; ``print`` it.

    Raises:
        CompiledError: the model is not compiled.
    """
    forward = compiled_forward(model)
    session = forward.session
    groups: dict[str, GroupReport] = {}
    forced: Counter[str] = Counter()
    done = uncached = cache_bytes = 0
    seconds = []
    for program in session.programs:
        seconds.extend(variant.seconds for variant in program.dispatcher.variants.values())
        for binding in program.bindings:
            forced.update(binding.forced)
            cache_bytes += binding.cache_bytes
            done += sum(flops * count for (_, flops), count in binding.calls.items())
            uncached += program.builder.flops * sum(binding.calls.values())
        _count_sites(program, groups)
    clock = session.clock
    breaks, cut_share = breaks_of(session)
    return Report(
        trajectories=clock.trajectory + 1,
        steps=forward.calls // clock.calls_per_step,
        calls=forward.calls,
        groups=list(groups.values()),
        variants=len(seconds),
        compile_seconds=seconds,
        graphs=len(session.programs),
        breaks=breaks,
        cut_share=cut_share,
        uncompiled_calls=forward.uncompiled_calls,
        forced=forced,
        cache_bytes=cache_bytes,
        mac_ratio=uncached / done if done else 1.0,
    )


def _count_sites(program: Program, groups: dict[str, GroupReport]) -> None:
    for binding in program.bindings:
        calls = sum(binding.calls.values())
        for index, site in enumerate(binding.sites):
            entry = groups.setdefault(site.group, GroupReport(site.group, site.kind))
            computed = sum(count for (mask, _), count in binding.calls.items() if mask.compute >> index & 1)
            entry.sites += 1
            entry.computed += computed
            entry.reused += calls - computed
