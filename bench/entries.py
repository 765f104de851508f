"""What `end_to_end.py` sees of one configuration: its first trajectory, its timed ones, and its graphs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from common import synchronize
from ddim import CallTimer, Peer, Sampler
from torch import Tensor
from torch._dynamo.utils import counters

PLAIN, OURS, THEIRS = "plain", "smoothcache", "peer"
EAGER, DEFAULT, AUTOTUNE = "eager", "default", "max-autotune"


class VerificationError(RuntimeError):
    """Two configurations that must give the same outputs do not."""


@dataclass
class Entry:
    """A configuration: how it is made, and what was seen of it.

    Attributes:
        name, kind, mode: ``mode`` is eager or that of torch.compile.
        peer: what is sampled from; None where it was refused.
        refused: why there are no figures.
        cached: for each step, whether less than everything is computed.
        mac_ratio: uncached FLOPs over those of this trajectory.
        outputs, first: of the first trajectory, and its seconds.
        graphs, recompiled: that Dynamo made in the first call, and in all others.
        calls: seconds of each call, for each round.
        held, peak: bytes that it keeps between trajectories, and that a trajectory takes beyond.
    """

    name: str
    kind: str
    mode: str
    peer: Peer | None = None
    refused: str | None = None
    cached: list[bool] = field(default_factory=list)
    mac_ratio: float = 1.0
    outputs: Tensor | None = None
    first: float = 0.0
    graphs: int = 0
    recompiled: int = 0
    timers: list[CallTimer] = field(default_factory=list)
    held: int = 0
    peak: int = 0

    def run_first(self, sampler: Sampler, allocated: int) -> None:
        """The first trajectory, in which all is compiled. ``allocated``: CUDA bytes before the peer was made."""
        before = _graphs()
        after_call = []
        synchronize()
        start = time.perf_counter()
        self.outputs = sampler.outputs(self.peer, lambda: after_call.append(_graphs()))
        synchronize()
        self.first = time.perf_counter() - start
        self.graphs, self.recompiled = after_call[0] - before, after_call[-1] - after_call[0]
        self.held = allocated_bytes() - allocated
        if not self.outputs.isfinite().all():
            raise VerificationError(f"{self.name} gives outputs that are not finite")
        print(f"{self.name}: first trajectory {self.first:.1f} s, {self.graphs} graphs, {self.recompiled} more later")

    def run(self, sampler: Sampler) -> None:
        """One timed trajectory."""
        timer, graphs, allocated = CallTimer(sampler.device != "cpu"), _graphs(), allocated_bytes()
        if sampler.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        sampler(self.peer, timer.call)
        self.timers.append(timer)
        self.recompiled += _graphs() - graphs
        if sampler.device != "cpu":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - allocated)

    def cached_step_share(self) -> float | None:
        """Median seconds of calls that reuse something, over the median of those that reuse nothing."""
        by_kind: dict[bool, list[float]] = {True: [], False: []}
        for timer in self.timers:
            for cached, seconds in zip(self.cached, timer.seconds(), strict=True):
                by_kind[cached].append(seconds)
        if not all(by_kind.values()):
            return None
        return statistics.median(by_kind[True]) / statistics.median(by_kind[False])


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest over the steps: norm of the difference of the outputs over the norm of the second."""
    distance = (ours.double() - theirs.double()).flatten(1).norm(dim=1)
    return float((distance / theirs.double().flatten(1).norm(dim=1)).max())


def require_same(what: str, ours: Tensor, theirs: Tensor, limit: float) -> float:
    """Their difference. Raises ``VerificationError`` where it is above the limit."""
    found = difference(ours, theirs)
    if not found <= limit:
        raise VerificationError(f"{what}: outputs differ by {found:.3g} of their norm, at most {limit:.3g} is rounding")
    print(f"{what}: outputs differ by {found:.3g} of their norm (limit {limit:.3g})")
    return found
