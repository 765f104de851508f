"""``report``: what a compiled model has done so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from ..capture.program import Program
from ..capture.session import breaks_of, share_outside
from ..compiled.forward import CompiledForward, compiled_forwards
from ..errors import CompiledError
from ..graphs.tables import Printable, format_bytes, format_table
from ..passes.names import group_of
from ..plots import plot_costs
from ..runtime.binding import Binding
from .timing import KindTime, by_kind, by_step


@dataclass
class GroupReport:
    """Calls of a group's sites, summed over sites, streams and steps.

    Attributes:
        sites: of the model; each counts once, however many graphs it is in.
        planned: reuses that the schedule asked for; more than ``reused`` where the cache did not hold what it wanted.
    """

    group: str
    kind: str
    sites: int = 0
    computed: int = 0
    reused: int = 0
    planned: int = 0


@dataclass
class Report(Printable):
    """Counts since ``compile``.

    Attributes:
        trajectories, steps, calls: begun trajectories, steps and model calls.
        groups: computed and reused site calls.
        variants: number of variants compiled, over all graphs.
        compile_seconds: time that the inner compiler took for each.
        graphs: graphs that the model was captured as; more than one means graph breaks or recompiles.
        breaks: lines of the model that broke the graph, with the reason, and how many graphs ended there.
        lost_share: FLOPs of blocks that lie in no site, over those of the model, where the graph broke.
        whole: modules that are one op in the graph and run uncompiled, since the graph would break inside of them.
        uncompiled_calls: calls that ran uncached, since Dynamo ran them uncompiled or their graphs had no sites.
        forced: site calls that were computed although the schedule said reuse, by reason.
        failures: what the inner compiler failed on and what was done instead, with the number of variants.
        cache_bytes: cache buffers of all streams.
        mac_ratio: FLOPs of the same calls uncached over FLOPs of those that were run, counted on the variants'
            graphs: the speed-up if time were arithmetic. Uncompiled calls count as computed in full.
        times: what ``timed`` measured, per kind of step; empty without it.
        step_seconds: the same per step: median seconds of a call, by the step's index.
    """

    trajectories: int
    steps: int
    calls: int
    groups: list[GroupReport]
    variants: int
    compile_seconds: list[float]
    graphs: int
    breaks: Counter[str] = field(default_factory=Counter)
    lost_share: float = 0.0
    whole: tuple[str, ...] = ()
    uncompiled_calls: int = 0
    forced: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    cache_bytes: int = 0
    mac_ratio: float = 1.0
    times: list[KindTime] = field(default_factory=list)
    step_seconds: dict[int, float] = field(default_factory=dict)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw what a call takes at each step. Needs matplotlib (the extra ``plot``).

        Raises:
            CompiledError: nothing was timed.
        """
        if not self.step_seconds:
            raise CompiledError("nothing was timed: sample inside of `with smoothcache.timed(model):` first")
        steps = range(max(self.step_seconds) + 1)
        milliseconds = [1e3 * self.step_seconds.get(step, float("nan")) for step in steps]
        plot_costs(milliseconds, path, label="milliseconds a call", title="Time of a call at each step")

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists and numbers, for JSON."""
        return {
            **asdict(self),
            "breaks": dict(self.breaks),
            "forced": dict(self.forced),
            "failures": dict(self.failures),
        }

    def __str__(self) -> str:
        rows = [("group", "kind", "sites", "computed", "planned reuses", "reused", "reused %")]
        for group in self.groups:
            share = group.reused / max(1, group.computed + group.reused)
            rows.append(
                (
                    group.group,
                    group.kind,
                    str(group.sites),
                    str(group.computed),
                    str(group.planned),
                    str(group.reused),
                    f"{share:.0%}",
                )
            )
        seconds, plural = sum(self.compile_seconds), "" if self.graphs == 1 else "s"
        lines = [
            f"{self.calls} calls, {self.steps} steps, {self.trajectories} trajectories",
            format_table(rows),
            f"MAC ratio {self.mac_ratio:.2f}, caches {format_bytes(self.cache_bytes)}",
            f"{self.graphs} graph{plural}, {self.variants} variants, compiled in {seconds:.1f} s",
        ]
        lines.extend(self._timings())
        lines.extend(describe_breaks(self.breaks, self.lost_share, self.whole))
        if self.uncompiled_calls:
            lines.append(f"{self.uncompiled_calls} of the calls ran uncached: uncompiled, or in graphs without a site")
        for what, count in self.failures.items():
            lines.append(f"{count} variant{'s' if count > 1 else ''}: {what}")
        if self.forced:
            lines.append("computed beyond the schedule:")
            lines.extend(f"  {count} site calls: {reason}" for reason, count in self.forced.items())
        return "\n".join(lines)

    def _timings(self) -> Iterator[str]:
        if self.times:
            rows: list[tuple[str, ...]] = [("step", "calls", "ms a call", "20th percentile", "80th")]
            rows += [(t.kind, str(t.calls), *(f"{1e3 * s:.3f}" for s in (t.median, t.p20, t.p80))) for t in self.times]
            yield format_table(rows)
            medians = {time.kind: time.median for time in self.times}
            if medians.keys() >= {"computed", "cached"}:
                yield f"a cached step takes {medians['cached'] / medians['computed']:.1%} of a computed one"


def describe_breaks(breaks: Mapping[str, int], lost_share: float, whole: Sequence[str]) -> Iterator[str]:
    """Lines about graph breaks and what was done against them; none where there are none."""
    if whole:
        groups = Counter(map(group_of, whole))
        listed = ", ".join(f"{group} ({count})" if count > 1 else group for group, count in groups.items())
        yield f"run uncompiled, as one op each, since the graph would break inside: {listed}"
    if breaks:
        lost = f"{lost_share:.1%} of the FLOPs are work of blocks that lies in no site, and is done at every step"
        yield f"graph breaks ({lost}):"
        for place, count in breaks.items():
            yield f"  {place}" + (f" ({count} graphs)" if count > 1 else "")


def report(model_or_pipeline: Any) -> Report:
    """What the compiled model, or a pipeline's denoisers, have computed and reused since ``compile``; ``print`` it.

    Where a pipeline has two denoisers the groups' names begin with the component's: ``transformer_2: blocks.*.attn1``.

    Raises:
        CompiledError: it is not compiled.

    Example:
        >>> model = smoothcache.compile(model, schedule)
        >>> image = sample(model)
        >>> print(smoothcache.report(model))
    """
    forwards = compiled_forwards(model_or_pipeline)
    reports = [_report(forward, f"{name}: " if len(forwards) > 1 else "") for name, forward in forwards.items()]
    total, uncached, done = reports[0]
    for other, its_uncached, its_done in reports[1:]:
        total.calls += other.calls
        total.groups += other.groups
        total.variants += other.variants
        total.compile_seconds += other.compile_seconds
        total.graphs += other.graphs
        total.breaks += other.breaks
        total.whole += other.whole
        total.lost_share = max(total.lost_share, other.lost_share)
        total.uncompiled_calls += other.uncompiled_calls
        total.forced += other.forced
        total.failures += other.failures
        total.cache_bytes += other.cache_bytes
        uncached, done = uncached + its_uncached, done + its_done
    total.mac_ratio = uncached / done if done else 1.0
    times = [time for forward in forwards.values() for time in forward.times]
    total.times, total.step_seconds = by_kind(times), by_step(times)
    return total


def _report(forward: CompiledForward, prefix: str) -> tuple[Report, int, int]:
    """One model's report, and the FLOPs of its calls uncached and as they were run."""
    session = forward.session
    groups: dict[str, GroupReport] = {}
    seen: Counter[str] = Counter()
    forced: Counter[str] = Counter()
    done = uncached = cache_bytes = 0
    seconds: list[float] = []
    for program in session.programs:
        seconds.extend(variant.seconds for variant in program.dispatcher.variants.values())
        for binding in program.bindings:
            forced.update(_forced(binding))
            cache_bytes += binding.cache_bytes
            done += sum(flops * count for (_, flops), count in binding.calls.items())
            uncached += program.builder.flops * sum(binding.calls.values())
        _count_sites(program, groups, seen, prefix)
    if forward.uncompiled_calls and forward.calls > forward.uncompiled_calls:
        # They did what a call does that computes everything.
        of_each = uncached // (forward.calls - forward.uncompiled_calls)
        uncached, done = (flops + forward.uncompiled_calls * of_each for flops in (uncached, done))
    breaks = breaks_of(session)
    report = Report(
        trajectories=session.clock.trajectories,
        steps=session.clock.steps_begun,
        calls=forward.calls,
        groups=list(groups.values()),
        variants=len(seconds),
        compile_seconds=seconds,
        graphs=len(session.programs),
        breaks=breaks,
        lost_share=share_outside(session) if breaks else 0.0,
        whole=session.capture.names_of_whole,
        uncompiled_calls=forward.uncompiled_calls,
        forced=forced,
        failures=Counter(what for program in session.programs for what in program.builder.failures.values()),
        cache_bytes=cache_bytes,
    )
    return report, uncached, done


def _forced(binding: Binding) -> Counter[str]:
    """Site calls that were computed beyond the plan, by reason and step in words."""
    return Counter(
        {
            reason.value if step < 0 else f"{reason.value}, at step {step}": count
            for (reason, step), count in binding.forced.items()
        }
    )


def _count_sites(program: Program, groups: dict[str, GroupReport], seen: Counter[str], prefix: str) -> None:
    here: Counter[str] = Counter()
    for binding in program.bindings:
        calls = sum(binding.calls.values())
        for index, site in enumerate(binding.sites):
            entry = groups.setdefault(site.group, GroupReport(prefix + site.group, site.kind))
            computed = sum(count for (mask, _), count in binding.calls.items() if mask.computes(index))
            here[site.name] += 1
            if here[site.name] > seen[site.name]:  # it may be in graphs of other shapes, too
                seen[site.name] += 1
                entry.sites += 1
            entry.computed += computed
            entry.reused += calls - computed
            entry.planned += sum(count for plan, count in binding.planned.items() if not plan >> index & 1)
