"""``timed``: how long each kind of step takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.session import Session
from ..compiled.forward import CompiledForward, compiled_forwards


@dataclass(frozen=True)
class CallTime:
    """One call of the model: its step, how many of its sites it computed, and its seconds, the device's included."""

    step: int
    computed: int
    sites: int
    seconds: float

    @property
    def kind(self) -> str:
        """``computed`` (every site), ``cached`` (none), ``mixed``, or ``uncompiled`` where no graph of ours ran."""
        if not self.sites:
            return "uncompiled"
        return {self.sites: "computed", 0: "cached"}.get(self.computed, "mixed")


@dataclass(frozen=True)
class KindTime:
    """Calls of one kind: how many, and the median and the 20th and 80th percentile of their seconds."""

    kind: str
    calls: int
    median: float
    p20: float
    p80: float


def by_kind(calls: Sequence[CallTime]) -> list[KindTime]:
    """The calls summed up by kind, the most computed first."""
    result = []
    for kind in ("computed", "mixed", "cached", "uncompiled"):
        seconds = sorted(call.seconds for call in calls if call.kind == kind)
        if seconds:
            last = len(seconds) - 1
            p20, p80 = seconds[round(0.2 * last)], seconds[round(0.8 * last)]
            result.append(KindTime(kind, len(seconds), statistics.median(seconds), p20, p80))
    return result


def by_step(calls: Sequence[CallTime]) -> dict[int, float]:
    """The median seconds of a call at each step."""
    steps: dict[int, list[float]] = {}
    for call in calls:
        steps.setdefault(call.step, []).append(call.seconds)
    return {step: statistics.median(seconds) for step, seconds in sorted(steps.items())}


@contextlib.contextmanager
def timed(model_or_pipeline: Any) -> Iterator[None]:
    """Time each call inside of the ``with``; ``report`` then says what each kind of step takes.

    Each call waits for the device before and after, so a run as a whole takes longer. Calls that compile are left
    out. Each ``with`` starts anew.

    Raises:
        CompiledError: it is not compiled.

    Example:
        >>> model = smoothcache.compile(model, schedule)
        >>> image = sample(model)  # compiles
        >>> with smoothcache.timed(model):
        ...     image = sample(model)
        >>> print(smoothcache.report(model))
    """
    forwards = list(compiled_forwards(model_or_pipeline).values())
    for forward in forwards:
        forward.times = []
        forward.run = _timing(forward, forward.run)
    try:
        yield
    finally:
        for forward in forwards:
            forward.run = forward.run.__wrapped__  # type: ignore[attr-defined]


def _timing(forward: CompiledForward, run: Callable[..., Any]) -> Callable[..., Any]:
    session = forward.session

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graphs, sites, computed = _counts(session)
        synchronize()
        start = time.perf_counter()
        output = run(args, kwargs)
        synchronize()
        seconds = time.perf_counter() - start
        now = _counts(session)
        if now[0] == graphs:
            forward.times.append(CallTime(session.current.call.moment.step, now[2] - computed, now[1] - sites, seconds))
        return output

    call.__wrapped__ = run  # type: ignore[attr-defined]
    return call


def _counts(session: Session) -> tuple[int, int, int]:
    """Graphs and variants compiled so far, and calls of sites and computed ones."""
    graphs = sites = computed = 0
    for program in session.programs:
        graphs += 1 + len(program.dispatcher.variants)
        for binding in program.bindings:
            sites += len(binding.sites) * sum(binding.calls.values())
            computed += sum(mask.compute.bit_count() * count for (mask, _), count in binding.calls.items())
    return graphs, sites, computed


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
