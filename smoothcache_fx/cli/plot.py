"""``smoothcache plot``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .command import command


def add(commands: Any) -> None:
    plot = command(
        commands,
        "plot",
        run,
        "plot calibration errors or schedules",
        "plot calibration.json -o errors.png",
        "plot calibration.json --sites -o sites.png",
        "plot ours.json theirs.json -o schedules.png",
    )
    plot.add_argument("files", type=Path, nargs="+", help="one calibration file, or schedule files")
    plot.add_argument(
        "-o", "--output", type=Path, required=True, help="image to write, such as errors.png or errors.svg"
    )
    plot.add_argument("--alphas", type=float, nargs="+", default=(), help="thresholds to mark in the plot")
    plot.add_argument("--sites", action="store_true", help="plot a calibration as a heat map of sites and steps")
    plot.add_argument("--lag", type=int, default=1, help="for --sites: reuse distance in steps (1)")


def run(options: argparse.Namespace) -> None:
    from ..calibration.calibration import Calibration
    from ..calibration.file import FORMAT
    from ..plots import plot_errors, plot_schedules, plot_site_errors
    from ..schedules.schedule import Schedule

    calibrated = len(options.files) == 1 and _format_of(options.files[0]) == FORMAT
    if options.sites and not calibrated:
        raise ValueError("--sites draws one calibration file, which smoothcache calibrate makes")
    if options.sites:
        plot_site_errors(Calibration.load(options.files[0]), options.output, lag=options.lag)
    elif calibrated:
        plot_errors(Calibration.load(options.files[0]), options.output, alphas=tuple(options.alphas))
    else:
        plot_schedules({path.stem: Schedule.load(path) for path in options.files}, options.output)
    print(options.output)


def _format_of(path: Path) -> str | None:
    """The format that a file says it has; None where it says none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return data.get("format") if isinstance(data, dict) else None
