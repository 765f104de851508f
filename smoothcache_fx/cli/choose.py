"""``smoothcache choose``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..calibration.measurements import FIT, GRAINS
from ..measure.metrics import METRICS, OVER
from .command import add_sampler, command, order
from .models import made_by, progress


def add(commands: Any) -> None:
    choose = command(
        commands,
        "choose",
        run,
        "sample with candidate schedules and keep the best within a budget, or the cheapest that is good enough",
        "choose my_model.py:build --compute 0.4 -o schedule.json",
        "choose my_model.py:build --at-least 35 -o schedule.json",
        "choose my_model.py:build --speedup 2 -o schedule.json",
    )
    add_sampler(choose)
    wanted = choose.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--compute", type=float, help="largest share of the branches' FLOPs to compute")
    wanted.add_argument("--at-least", type=float, help="metric to reach")
    wanted.add_argument("--speedup", type=float, help="how many times faster than uncached; steps are timed first")
    wanted.add_argument("--seconds", type=float, help="what one sampling run may take; steps are timed first")
    choose.add_argument(
        "--metric", choices=METRICS, default=METRICS[0], help="of cached samples beside uncached ones (psnr, in dB)"
    )
    choose.add_argument(
        "--over", choices=OVER, default=OVER[0], help="of all samples together, or the mean or median of single ones"
    )
    choose.add_argument("-o", "--output", type=Path, required=True, help="schedule file to write")
    choose.add_argument(
        "--orders", type=order, nargs="+", default=(0, 1, 2, FIT), help="forecast orders to try, and fit (all)"
    )
    choose.add_argument("--grains", choices=GRAINS, nargs="+", default=GRAINS[:1], help="what to cache as one (branch)")
    choose.add_argument("--lags", type=int, default=5, help="longest reuse to measure, in steps (5)")
    choose.add_argument("--trajectories", type=int, default=20, help="maximum number of sampling runs (20)")
    choose.add_argument(
        "--probes", type=int, default=4, help="runs spent measuring how an error at each step affects the sample (4)"
    )


def run(options: argparse.Namespace) -> None:
    from ..measure.choose import choose

    model, sample = made_by(options.factory, "a model or pipeline and a function")
    with progress(model, options.progress):
        found = choose(
            model,
            sample,
            compute=options.compute,
            at_least=options.at_least,
            speedup=options.speedup,
            seconds=options.seconds,
            metric=options.metric,
            over=options.over,
            orders=options.orders,
            grains=options.grains,
            lags=options.lags,
            trajectories=options.trajectories,
            probes=options.probes,
            steps=options.steps,
            calls_per_step=options.calls_per_step,
            progress=False,
        )
    found.schedule.save(options.output)
    print(found)
    print(found.schedule)
