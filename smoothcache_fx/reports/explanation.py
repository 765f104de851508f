"""What ``explain`` returns, and how it is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..graphs.tables import Printable, format_bytes, format_flops, format_table
from .prediction import Prediction
from .report import describe_breaks


@dataclass(frozen=True)
class SiteExplanation:
    """One site: where it is, what it would cache and what that saves, in one call of the model.

    Attributes:
        name, group, kind: as in schedules.
        shapes: of the cached values, one per branch.
        gates: per branch, the shapes of the factors applied between cache and residual add.
        flops: work that is saved when the site is reused.
        cache_bytes: memory for one stream.
    """

    name: str
    group: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    gates: tuple[tuple[tuple[int, ...], ...], ...]
    flops: int
    cache_bytes: int


@dataclass(frozen=True)
class StackExplanation:
    """A run of blocks that can be cached as one, in one call of the model.

    Attributes:
        name: what selects it: `transformer_blocks.0-18`.
        branches: how many it holds.
        shapes: of the cached values, one per residual stream.
        flops: work that is saved when it is reused.
        cache_bytes: memory for one stream of calls.
        begins, ends: why it holds no earlier and no later block.
    """

    name: str
    branches: int
    shapes: tuple[tuple[int, ...], ...]
    flops: int
    cache_bytes: int
    begins: str
    ends: str


@dataclass(frozen=True)
class AddExplanation:
    """An add of two tensors that is no site's: its name in the graph, the reason, the module and the source line."""

    node: str
    reason: str
    module: str
    source: str | None


@dataclass
class Explanation(Printable):
    """What ``explain`` found; ``print`` it.

    Attributes:
        model: name of the model's class.
        sites, adds: the branches that can be cached, and adds that were looked at and not taken.
        stacks: the longest runs of blocks that can be cached as one, as the selector `stack` takes them.
        unstacked: blocks that are in none, and why.
        graphs: graphs that the model was captured as.
        flops: of one uncached call.
        breaks: lines of the model that broke the graph, with the reason, and how many graphs ended there.
        lost_share: FLOPs of blocks that lie in no site, over ``flops``, where the graph broke.
        whole: modules that are one op in the graph and run uncompiled, since the graph would break inside of them.
        prediction: of the schedule, if one was given.
    """

    model: str
    sites: list[SiteExplanation]
    adds: list[AddExplanation]
    graphs: int
    flops: int
    breaks: Counter[str] = field(default_factory=Counter)
    lost_share: float = 0.0
    whole: tuple[str, ...] = ()
    prediction: Prediction | None = None
    stacks: list[StackExplanation] = field(default_factory=list)
    unstacked: dict[str, str] = field(default_factory=dict)

    @property
    def cache_bytes(self) -> int:
        """Memory for one stream if all branches are cached."""
        return sum(site.cache_bytes for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists and numbers, for JSON."""
        found = {**asdict(self), "breaks": dict(self.breaks), "cache_bytes": self.cache_bytes}
        if self.prediction is not None:
            found["prediction"]["speedup"] = self.prediction.speedup
        return found

    def groups(self) -> dict[str, list[SiteExplanation]]:
        """The sites by group, in the model's order."""
        groups: dict[str, list[SiteExplanation]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site)
        return groups

    def __str__(self) -> str:
        rows = [("group", "kind", "sites", "shape", "gate", "FLOPs", "share", "cache")]
        for group, sites in self.groups().items():
            flops = sum(site.flops for site in sites)
            rows.append(
                (
                    group,
                    sites[0].kind,
                    str(len(sites)),
                    " + ".join(str(list(shape)) for shape in sites[0].shapes),
                    " + ".join(" * ".join(str(list(shape)) for shape in gate) or "none" for gate in sites[0].gates),
                    format_flops(flops),
                    f"{flops / max(1, self.flops):.1%}",
                    format_bytes(sum(site.cache_bytes for site in sites)),
                )
            )
        inside = sum(site.flops for site in self.sites)
        lines = [
            f"{self.model}: {len(self.sites)} sites in {self.graphs} graph{'s' if self.graphs != 1 else ''}",
            format_table(rows),
            f"{format_flops(self.flops)} a call, {inside / max(1, self.flops):.1%} of it in sites, "
            + f"{format_bytes(self.cache_bytes)} of cache a stream",
            *self._stacks(),
        ]
        if self.prediction is not None:
            lines.append(str(self.prediction))
        lines.extend(describe_breaks(self.breaks, self.lost_share, self.whole))
        lines.extend(self._rejected())
        return "\n".join(lines)

    def _stacks(self) -> Iterator[str]:
        if self.stacks:
            rows = [("stack", "branches", "streams", "FLOPs", "share", "cache", "ends at")]
            for one in self.stacks:
                share = f"{one.flops / max(1, self.flops):.1%}"
                streams = " + ".join(str(list(shape)) for shape in one.shapes)
                size = format_bytes(one.cache_bytes)
                rows.append((one.name, str(one.branches), streams, format_flops(one.flops), share, size, one.ends))
            yield format_table(rows)
        for name, reason in self.unstacked.items():
            yield f"{name} is in no stack: {reason}"

    def _rejected(self) -> Iterator[str]:
        by_reason: dict[str, list[AddExplanation]] = {}
        for add in self.adds:
            by_reason.setdefault(add.reason, []).append(add)
        if by_reason:
            yield "adds not taken:"
        for reason, adds in by_reason.items():
            example = f", such as {adds[0].source}" if adds[0].source else ""
            yield f"  {len(adds)}: {reason}{example}"
