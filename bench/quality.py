"""How good samples are for how much arithmetic: ``python bench/quality.py``.

The package's trained DiT, 50 Euler steps of its rectified flow with guidance 1.5, the same noise for all. Against the
uncached sample of 50 steps, and against one of many more steps, which the sampler would converge to: fewer steps, the
paper's schedules by alpha, every n-th step (FORA), and the same with reads that forecast (orders 1 and 2).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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

STEPS = 50
PICTURE = RESULTS.parents[1] / "docs" / "bench" / "quality.png"
ORDERS = {0: "every n-th step", 1: "every n-th step, order 1", 2: "every n-th step, order 2"}


def schedules(
    model: torch.nn.Module, shares: Sequence[float], intervals: Sequence[int]
) -> Iterator[tuple[str, Schedule]]:
    """Method and schedule."""
    calibration = smoothcache.calibrate(model, lambda model: calibration_trajectories(model, 10, STEPS), progress=False)
    for share in shares:
        with contextlib.suppress(smoothcache.CalibrationError):  # three lags do not reach as low as all shares
            yield "alpha", calibration.schedule(compute=share)
    for interval in intervals:
        uniform = Schedule.uniform(STEPS, interval, kinds=("attn", "ffn"))
        rows = {kind: (*row[:-1], True) for kind, row in uniform.compute.items()}  # as the alpha rule: the last one too
        for order, name in ORDERS.items():
            yield name, replace(uniform, compute=rows, order=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--converged", type=int, default=200, help="steps of the converged reference (200)")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.6, 0.5, 0.4, 0.3, 0.2), help="of the arithmetic")
    parser.add_argument("--intervals", type=int, nargs="+", default=(2, 3, 4, 5), help="n of every n-th step")
    parser.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    parser.add_argument("--write", action="store_true", help="write bench/results/quality.json and docs/bench")
    arguments = parser.parse_args()

    model = load_model("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.arange(arguments.samples) % model.num_classes
    plain = copy.deepcopy(model)
    smoothcache.compile(plain, Schedule(STEPS), backend=arguments.backend)

    def run(sampled: torch.nn.Module, steps: int) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        images = sample(sampled, labels, steps=steps, seed=5)
        return images, time.perf_counter() - start

    run(plain, STEPS)  # compiles
    reference, seconds = run(plain, STEPS)
    with smoothcache.disabled(plain):
        converged, _ = run(plain, arguments.converged)
    rows: list[dict[str, Any]] = []

    def note(method: str, share: float, images: torch.Tensor, took: float) -> None:
        to_uncached, to_converged = psnr(reference, images), psnr(converged, images)
        rows.append(
            {"method": method, "compute": share, "psnr": to_uncached, "psnr_converged": to_converged, "seconds": took}
        )
        print(f"{method:26s} {share:.2f}  {to_uncached:5.1f} ({to_converged:.1f}) dB  {took:.2f} s", flush=True)

    own = psnr(converged, reference)
    print(f"uncached, {STEPS} steps: {own:.1f} dB to {arguments.converged} steps, {seconds:.2f} s")
    for share in arguments.shares:
        steps = round(share * STEPS)
        fewer = copy.deepcopy(model)
        smoothcache.compile(fewer, Schedule(steps), backend=arguments.backend)
        run(fewer, steps)
        note("fewer steps", share, *run(fewer, steps))
    for method, schedule in schedules(copy.deepcopy(model), arguments.shares, arguments.intervals):
        cached = copy.deepcopy(model)
        smoothcache.compile(cached, schedule, backend=arguments.backend)
        run(cached, STEPS)
        note(method, schedule.compute_fraction, *run(cached, STEPS))
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
        for method, colour in zip(methods, COLOURS, strict=False):
            points = sorted((row["compute"], row[key]) for row in rows if row["method"] == method)
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=method, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of the branches' arithmetic")
        axis.grid(alpha=0.25)
    axes[1].axhline(own, color="0.4", linestyle="--", linewidth=0.8, label=f"uncached, {STEPS} steps")
    axes[0].set_ylabel("PSNR (dB)")
    axes[1].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
