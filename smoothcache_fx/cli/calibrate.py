"""``smoothcache calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..calibration.measurements import GRAINS
from .command import add_sampler, command
from .models import made_by, progress


def add(commands: Any) -> None:
    calibrate = command(
        commands,
        "calibrate",
        run,
        "measure reuse errors, the input of `schedule`",
        "calibrate my_model.py:build -o c.json",
    )
    add_sampler(calibrate)
    calibrate.add_argument("-o", "--output", type=Path, required=True, help="the calibration file")
    calibrate.add_argument("--lags", type=int, default=3, help="longest reuse to measure, in steps (3)")
    calibrate.add_argument("--order", type=int, default=1, help="highest forecast order that schedules may use (1)")
    calibrate.add_argument(
        "--grain",
        choices=GRAINS,
        default=GRAINS[0],
        help="what to cache as one: each branch, or runs of blocks (branch)",
    )
    calibrate.add_argument("--paper", action="store_true", help="measure only what the paper's rule needs")
    calibrate.add_argument(
        "--probes", type=int, default=0, help="extra runs that measure how an error at each step affects the sample (0)"
    )


def run(options: argparse.Namespace) -> None:
    from ..measure.calibrate import calibrate
    from ..measure.sensitivity import measure_sensitivity

    if options.probes and options.paper:
        raise ValueError("--probes is for schedules that the paper's rule does not make: leave out --paper")

    model, sample = made_by(options.factory, "a model or pipeline and a function")
    with progress(model, options.progress):
        calibration = calibrate(
            model,
            sample,
            lags=options.lags,
            order=None if options.paper else options.order,
            steps=options.steps,
            calls_per_step=options.calls_per_step,
            grain=options.grain,
            progress=False,
        )
        if options.probes:
            calibration = measure_sensitivity(
                model, sample, calibration, probes=options.probes, calls_per_step=options.calls_per_step, progress=False
            )
    calibration.save(options.output)
    print(calibration)
