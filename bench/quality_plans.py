"""The methods that `quality.py` compares, and their schedules at each budget."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from quality_samplers import Sampler
from torch import Tensor

import smoothcache_fx as smoothcache
from smoothcache_fx import Calibration
from smoothcache_fx.schedules.schedule import HISTORY_DTYPES, Schedule

ORDERS = (0, 1, 2)
FIT = "fit"
#: Samples that fits, and rows of stacks, are calibrated on; without sensitivities.
FITTED = 20
#: What is cached as one: the kinds that a schedule selects, and how methods are then called.
GRAINS = {"branch": (("attn", "ffn"), ""), "stack": (("stack",), "stacks, ")}
#: By the function of `Plans` that makes them.
METHODS = {
    "every_nth": tuple(
        f"{prefix}{name}"
        for _, prefix in GRAINS.values()
        for name in ("every n-th step", "TaylorSeer, order 1", "TaylorSeer, order 2")
    ),
    "every_nth_fitted": tuple(f"{prefix}every n-th step, fit" for _, prefix in GRAINS.values()),
    "fewer_steps": ("fewer steps",),
    "by_alpha": ("alpha", "alpha, order 1", "alpha, order 2"),
    "optimal": tuple(
        f"{prefix}optimal, {order}"
        for _, prefix in GRAINS.values()
        for order in (*(f"order {order}" for order in ORDERS), FIT)
    ),
    "chosen": ("chosen", "chosen, converged", *(f"chosen, history in {dtype}" for dtype in HISTORY_DTYPES)),
}


@dataclass(frozen=True)
class Point:
    """A method at one budget, a share of the arithmetic; the schedule of "fewer steps" has fewer, and computes all."""

    method: str
    budget: float
    schedule: Schedule

    def share(self, steps: int) -> float:
        """Of the branches' arithmetic of so many uncached steps."""
        return self.schedule.compute_fraction * self.schedule.steps / steps


class Plans:
    """The points of a sampler. What a method needs, such as a calibration, is made when it is asked for."""

    def __init__(self, model: torch.nn.Module, sampler: Sampler, arguments: argparse.Namespace, folder: Path) -> None:
        self.model, self.sampler, self.arguments, self.folder = model, sampler, arguments, folder
        steps = self.steps = arguments.steps
        self.rows: dict[float, tuple[bool, ...]] = {}
        for interval in arguments.intervals:
            row = Schedule.uniform(steps, interval).compute["attn"]
            row = (*row[:-1], True)  # the last step too, as rows by alpha do
            self.rows[sum(row) / steps] = row
        self.counts = {math.floor(share * steps + 1e-9): share for share in arguments.shares}
        self.counts |= {round(share * steps): share for share in self.rows}
        self.shares = sorted(self.counts.values(), reverse=True)

    def points(self) -> list[Point]:
        """Those of the methods that are wanted, after the uncached sampler's."""
        wanted = self.arguments.methods
        found = [Point("uncached", 1.0, Schedule(self.steps))]
        for family, methods in METHODS.items():
            if wanted is None or {*methods} & {*wanted}:
                found += getattr(self, family)()
        return [point for point in found if wanted is None or point.method in ("uncached", *wanted)]

    def every_nth(self) -> Iterator[Point]:
        for share, row in self.rows.items():
            for kinds, prefix in GRAINS.values():
                for order in ORDERS:
                    method = f"TaylorSeer, order {order}" if order else "every n-th step"
                    yield Point(prefix + method, share, Schedule(self.steps, dict.fromkeys(kinds, row), order=order))

    def every_nth_fitted(self) -> Iterator[Point]:
        for share, row in self.rows.items():
            for grain, (kinds, prefix) in GRAINS.items():
                schedule = Schedule(self.steps, dict.fromkeys(kinds, row), order=max(ORDERS))
                yield Point(f"{prefix}every n-th step, fit", share, self.calibration(grain).fit(schedule))

    def fewer_steps(self) -> Iterator[Point]:
        for count, share in sorted(self.counts.items(), reverse=True):
            yield Point("fewer steps", share, Schedule(count))

    def by_alpha(self) -> Iterator[Point]:
        def one_by_one(model: torch.nn.Module) -> None:
            for seed in range(10):  # as the paper calibrates: ten samples
                self.sampler.run(model, torch.tensor([seed % 10]), self.steps, 1000 + seed)

        greedy = smoothcache.calibrate(self.model, one_by_one, order=None, progress=False)
        for share in self.shares:
            with contextlib.suppress(smoothcache.CalibrationError):  # three lags do not reach as low as all shares
                rows = greedy.schedule(compute=share, solver="greedy")
                for order in ORDERS:
                    yield Point(f"alpha, order {order}" if order else "alpha", share, replace(rows, order=order))

    def optimal(self) -> Iterator[Point]:
        for grain, (_, prefix) in GRAINS.items():
            for share in self.shares:
                for order in (*ORDERS, FIT):
                    method = f"{prefix}optimal, " + (FIT if order == FIT else f"order {order}")
                    if self.wanted(method):
                        polynomials = grain == "branch" and order != FIT
                        calibration = self.with_sensitivity if polynomials else self.calibration(grain)
                        yield Point(method, share, calibration.schedule(compute=share, solver="optimal", order=order))

    def chosen(self) -> Iterator[Point]:
        """By sampling once uncached, and with schedules of branches and of stacks of least predicted error."""
        for share in self.shares:
            for method, target in (("chosen", None), ("chosen, converged", self.converged)):
                if not self.wanted(method):
                    continue
                choices = [
                    smoothcache.choose(
                        self.model,
                        self.together,
                        compute=share,
                        target=target,
                        over="mean",
                        trajectories=self.arguments.trajectories,
                        calibration=calibration,
                        progress=False,
                    )
                    for calibration in (self.with_sensitivity, self.calibration("stack"))
                ]
                best = max(choices, key=lambda choice: choice.metric)
                print(f"{method}, {share:.2f}\n{best}\n", flush=True)
                yield Point(method, share, best.schedule)
                if target is None and best.schedule.highest_order:
                    for dtype in HISTORY_DTYPES:
                        name = f"chosen, history in {dtype}"
                        if self.wanted(name):
                            yield Point(name, share, replace(best.schedule, history_dtype=dtype))

    def wanted(self, method: str) -> bool:
        """Whether a method is one of those that were asked for."""
        return self.arguments.methods is None or method in self.arguments.methods

    def converged(self, model: torch.nn.Module) -> Tensor:
        """What samples of ``together`` converge to; sampled once."""
        kept = self.folder / "converged_calibrated.pt"
        if not kept.exists():
            labels = torch.arange(self.arguments.calibrated) % 10
            torch.save(self.sampler.run(model, labels, 4 * self.steps, 1), kept)
        return torch.load(kept, weights_only=True)

    def together(self, model: torch.nn.Module, samples: int | None = None) -> Tensor:
        labels = torch.arange(samples or self.arguments.calibrated) % 10
        return self.sampler.run(model, labels, self.steps, 1)

    @functools.cached_property
    def with_sensitivity(self) -> Calibration:
        """What optimal rows of branches are made of."""
        kept = self.folder / "calibration.json"
        if not kept.exists():
            calibration = self._calibrated("branch", self.together)
            smoothcache.measure_sensitivity(self.model, self.together, calibration, progress=False).save(kept)
        return Calibration.load(kept)

    @functools.lru_cache  # noqa: B019 - one object lives as long as the script
    def calibration(self, grain: str) -> Calibration:
        """What fits, and rows of stacks, are made of."""
        kept = self.folder / f"calibration_{grain}.json"
        if not kept.exists():
            self._calibrated(grain, functools.partial(self.together, samples=FITTED)).save(kept)
        return Calibration.load(kept)

    def _calibrated(self, grain: str, run: Callable[[torch.nn.Module], Tensor]) -> Calibration:
        return smoothcache.calibrate(
            self.model, run, lags=self.arguments.lags, order=max(ORDERS), grain=grain, progress=False
        )
