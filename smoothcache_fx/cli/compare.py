"""``smoothcache compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import add_sampler, command, show
from .models import made_by, progress


def add(commands: Any) -> None:
    compare = command(
        commands,
        "compare",
        run,
        "compare the speed and the samples of schedules with the uncached model",
        "compare my_model.py:build a.json b.json --plot frontier.png",
    )
    add_sampler(compare, steps=False)
    compare.add_argument("schedules", type=Path, nargs="+", help="schedule files to compare")
    compare.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    compare.add_argument("--mode", help="mode of torch.compile")
    compare.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    compare.add_argument("--plot", type=Path, help="plot speed-up against quality")
    compare.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    from ..reports.compare import compare
    from ..schedules.schedule import Schedule

    model, sample = made_by(options.factory, "a model or pipeline and a function")
    schedules = {path.stem: Schedule.load(path) for path in options.schedules}
    with progress(model, options.progress, schedules):
        found = compare(
            model,
            schedules,
            sample,
            rounds=options.rounds,
            calls_per_step=options.calls_per_step,
            backend=options.backend,
            mode=options.mode,
        )
    if options.plot is not None:
        found.plot(options.plot)
    show(found, options.json)
