"""How good samples are for how much arithmetic: ``python bench/quality.py``.

The package's trained DiT, 50 Euler steps of its rectified flow with guidance 1.5, the same noise for all. Against the
uncached sample of 50 steps, and against one of many more steps, which the sampler would converge to: fewer steps, the
paper's schedules by alpha, every n-th step (FORA), the same with reads that forecast (orders 1 and 2), and optimal
schedules of each order for the same budgets.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result

import smoothcache_fx as smoothcache
from smoothcache_fx.comparison import psnr
from smoothcache_fx.demo.run import calibration_trajectories
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.demo.weights import load_model
from smoothcache_fx.plots import COLOURS, new_figure
from smoothcache_fx.schedule import Schedule

PICTURE = RESULTS.parents[1] / "docs" / "bench" / "quality.png"
#: Colours tell orders apart, lines the rows.
STYLES = {
    "fewer steps": ("0.45", "s-"),
    "alpha": (COLOURS[1], "^-"),
    "every n-th step": (COLOURS[0], "o--"),
    "every n-th step, order 1": (COLOURS[2], "o--"),
    "every n-th step, order 2": (COLOURS[3], "o--"),
    "optimal": (COLOURS[0], "o-"),
    "optimal, order 1": (COLOURS[2], "o-"),
    "optimal, order 2": (COLOURS[3], "o-"),
}
ORDERS = {0: "", 1: ", order 1", 2: ", order 2"}


def schedules(
    model: torch.nn.Module, steps: int, shares: Sequence[float], intervals: Sequence[int], calibrated: int, lags: int
) -> Iterator[tuple[str, Schedule]]:
    """Method and schedule; what is calibrated is calibrated on other noise than is sampled."""

    def trajectories(model: torch.nn.Module) -> torch.Tensor:
        return sample(model, torch.arange(calibrated) % model.num_classes, steps=steps, seed=1)

    calibration = smoothcache.calibrate(model, lambda model: calibration_trajectories(model, 10, steps), progress=False)
    for share in shares:
        with contextlib.suppress(smoothcache.CalibrationError):  # three lags do not reach as low as all shares
            yield "alpha", calibration.schedule(compute=share)
    calibration = smoothcache.calibrate(model, trajectories, lags=lags, order=2, progress=False)
    calibration = smoothcache.measure_sensitivity(model, trajectories, calibration, progress=False)
    for interval in intervals:
        uniform = Schedule.uniform(steps, interval, kinds=("attn", "ffn"))
        rows = {kind: (*row[:-1], True) for kind, row in uniform.compute.items()}  # as the alpha rule: the last one too
        for order, suffix in ORDERS.items():
            fora = replace(uniform, compute=rows, order=order)
            yield f"every n-th step{suffix}", fora
            yield f"optimal{suffix}", calibration.schedule(compute=fora.compute_fraction, solver="optimal", order=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calibrated", type=int, default=40, help="samples of the calibration for optimal schedules")
    parser.add_argument("--lags", type=int, default=8, help="the longest reuse of optimal schedules (8)")
    parser.add_argument("--converged", type=int, default=200, help="steps of the converged reference (200)")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.6, 0.5, 0.4, 0.3, 0.2), help="of the arithmetic")
    parser.add_argument("--intervals", type=int, nargs="+", default=(2, 3, 4, 5), help="n of every n-th step")
    parser.add_argument("--timed", action="store_true", help="note seconds: only where nothing else runs")
    parser.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    parser.add_argument("--write", action="store_true", help="write bench/results/quality.json and docs/bench")
    arguments = parser.parse_args()

    model = load_model("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.arange(arguments.samples) % model.num_classes
    plain = copy.deepcopy(model)
    smoothcache.compile(plain, Schedule(arguments.steps), backend=arguments.backend)

    def run(sampled: torch.nn.Module, steps: int) -> tuple[torch.Tensor, float | None]:
        if arguments.timed:
            sample(sampled, labels, steps=steps, seed=5)  # compiles
        start = time.perf_counter()
        images = sample(sampled, labels, steps=steps, seed=5)
        return images, time.perf_counter() - start if arguments.timed else None

    reference, seconds = run(plain, arguments.steps)
    with smoothcache.disabled(plain):
        converged, _ = run(plain, arguments.converged)
    rows: list[dict[str, Any]] = []

    def note(method: str, share: float, images: torch.Tensor, took: float | None) -> None:
        to_uncached, to_converged = psnr(reference, images), psnr(converged, images)
        middle = statistics.median(map(psnr, reference, images))
        rows.append(
            {
                "method": method,
                "compute": share,
                "psnr": to_uncached,
                "median_psnr": middle,
                "psnr_converged": to_converged,
                "seconds": took,
            }
        )
        figures = f"{to_uncached:5.1f} (median {middle:.1f}), converged {to_converged:.1f} dB"
        print(f"{method:26s} {share:.2f}  {figures}" + (f"  {took:.2f} s" if took else ""), flush=True)

    own = psnr(converged, reference)
    print(f"uncached, {arguments.steps} steps: {own:.1f} dB to {arguments.converged} steps")
    for share in arguments.shares:
        steps = round(share * arguments.steps)
        fewer = copy.deepcopy(model)
        smoothcache.compile(fewer, Schedule(steps), backend=arguments.backend)
        note("fewer steps", share, *run(fewer, steps))
    settings = (arguments.steps, arguments.shares, arguments.intervals, arguments.calibrated, arguments.lags)
    for method, schedule in schedules(copy.deepcopy(model), *settings):
        cached = copy.deepcopy(model)
        smoothcache.compile(cached, schedule, backend=arguments.backend)
        note(method, schedule.compute_fraction, *run(cached, arguments.steps))
    if arguments.write:
        result = {"arguments": vars(arguments), "uncached": {"psnr_converged": own, "seconds": seconds}, "rows": rows}
        print(f"written to {write_result('quality', result)}")
        draw(rows, own, PICTURE)


def draw(rows: list[dict[str, Any]], own: float, path: Path) -> None:
    """PSNR over compute, to the uncached sample and to the converged one."""
    figure = new_figure(8.5, 3.8)
    axes = figure.subplots(1, 2)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, key, title in (
        (axes[0], "psnr", "to the uncached sample"),
        (axes[1], "psnr_converged", "to the converged sample"),
    ):
        for method in methods:
            colour, line = STYLES[method]
            points = sorted((row["compute"], row[key]) for row in rows if row["method"] == method)
            axis.plot(*zip(*points, strict=True), line, color=colour, label=method, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of the branches' arithmetic")
        axis.grid(alpha=0.25)
    axes[1].axhline(own, color="0.4", linestyle="--", linewidth=0.8, label="uncached")
    axes[0].set_ylabel("PSNR (dB)")
    axes[1].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
