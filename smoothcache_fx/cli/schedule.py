"""``smoothcache schedule``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ..calibration.measurements import FIT
from ..calibration.quality import LEADS, QUALITIES
from ..schedules.schedule import HISTORY_DTYPES
from .command import command, order


def add(commands: Any) -> None:
    schedule = command(
        commands,
        "schedule",
        run,
        "make a schedule from a calibration",
        "schedule calibration.json --compute 0.5 -o schedule.json",
        "schedule calibration.json --compute 0.5 --steps 30 -o schedule_30.json",
    )
    schedule.add_argument("calibration", type=Path, nargs="?", help="calibration file (not with --interval)")
    rule = schedule.add_mutually_exclusive_group(required=True)
    rule.add_argument("--alpha", type=float, help="largest error allowed (the paper's rule)")
    rule.add_argument("--compute", type=float, help="largest share of the branches' FLOPs to compute")
    rule.add_argument("--quality", choices=tuple(QUALITIES), help="how far the final sample may be predicted to be off")
    rule.add_argument("--interval", type=int, help="compute every N-th step (FORA); needs --steps")
    schedule.add_argument("--steps", type=int, help="denoising steps (default: those of the calibration)")
    schedule.add_argument(
        "--solver",
        choices=("greedy", "optimal"),
        help="for --compute: minimize the predicted error, or apply the paper's rule",
    )
    schedule.add_argument(
        "--rows",
        choices=("joint", "group", "site"),
        help="plan one row for all groups, one per group, or one per site (site: --solver optimal only)",
    )
    schedule.add_argument(
        "--order",
        type=order,
        help="forecast order of reused branches, or fit (default: best for --compute, else 0)",
    )
    schedule.add_argument("--max-variants", type=int, help="let groups share rows until this many variants are left")
    schedule.add_argument(
        "--history-dtype", choices=HISTORY_DTYPES, help="store forecast history as differences in this dtype"
    )
    schedule.add_argument(
        "--target",
        choices=tuple(LEADS),
        default="uncached",
        help="what samples shall be near; for converged, forecasts aim at the middle of their step",
    )
    schedule.add_argument("-o", "--output", type=Path, help="schedule file to write")
    schedule.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    from ..calibration.calibration import Calibration
    from ..schedules.schedule import Schedule

    if options.interval is not None:
        if options.steps is None or options.calibration is not None:
            raise ValueError("--interval needs --steps and no calibration: it computes every n-th step")
        if options.solver or options.rows or options.max_variants:
            raise ValueError("--solver, --rows and --max-variants are for --compute; --interval says the rows itself")
        if options.order == FIT:
            raise ValueError("--order fit needs a calibration: it fits the forecasts to what was measured")
        schedule = Schedule.uniform(options.steps, options.interval)
        schedule = dataclasses.replace(schedule, order=options.order or 0, lead=LEADS[options.target])
    elif options.calibration is None:
        raise ValueError("--alpha, --compute and --quality need a calibration file: smoothcache calibrate makes one")
    else:
        calibration = Calibration.load(options.calibration)
        schedule = calibration.schedule(
            alpha=options.alpha,
            compute=options.compute,
            solver=options.solver,
            order=options.order,
            rows=options.rows,
            max_variants=options.max_variants,
            quality=options.quality,
            target=options.target,
            steps=options.steps,
        )
    schedule = dataclasses.replace(schedule, history_dtype=options.history_dtype)
    if options.output is not None:
        schedule.save(options.output)
    if options.json:
        rows = {selector: list(row) for selector, row in schedule.compute.items()}
        print(json.dumps({"steps": schedule.steps, "order": schedule.order, "compute": rows}))
    else:
        print(schedule)
