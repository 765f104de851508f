"""How near the default plan for a budget comes to the uncached sample: ``python bench/first_recipe.py --write``.

Small models with random weights, and the trained one of digits, each in its own pipeline and sampler. Calibrated on one
seed with ``calibrate(model, run)``; PSNR, in dB, to the uncached samples of that seed and of two others. Beside
``schedule(compute=...)``, at the cost of every n-th step:

- every n-th step, and that with forecasts of order 1 (TaylorSeer's),
- the paper's rule (``solver="greedy"``), and whether a warning said that it is behind every n-th step.

``--write`` writes ``bench/results/first_recipe.json`` and the table, ``first_recipe.md``. About 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, digits_model, write_result

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from smoothcache_fx.demo.model import DiT, randomize
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.graphs.tables import format_table
from smoothcache_fx.reports.compare import as_vector, psnr

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CALIBRATED, OTHERS = 1, (2, 3)
INTERVALS = (2, 3, 4)
METHODS = ("every n-th", "every n-th, order 1", "paper's rule", "default")
Run = Callable[[Any, int], torch.Tensor]


def models(steps: int) -> dict[str, Callable[[], tuple[Any, Run]]]:
    """By name what makes a model or pipeline, and samples from it with a seed."""
    from pipelines.build import CASES, run

    def digits() -> tuple[Any, Run]:
        return digits_model(), lambda model, seed: sample(model, [0, 1, 2, 3], steps=steps, seed=seed)

    def bare(weights: int) -> tuple[Any, Run]:
        model = DiT(image_size=8, patch_size=2, channels=4, width=64, depth=4, heads=4, num_classes=10)
        return randomize(model, weights).eval(), lambda model, seed: sample(model, [0, 1], steps=steps, seed=seed)

    def pipeline(name: str) -> tuple[Any, Run]:
        return CASES[name].make(), lambda pipe, seed: run(CASES[name], pipe, steps, seed=seed)

    return {
        "digits, Euler": digits,
        "bare DiT, Euler": lambda: bare(0),
        "bare DiT, other weights": lambda: bare(1),
        "SD3, flow-match Euler": lambda: pipeline("sd3"),
        "Flux, two calls a step": lambda: pipeline("flux_true_cfg"),
        "DiT, DDIM": lambda: pipeline("dit_ddim"),
        "PixArt-Sigma, DPM-Solver++": lambda: pipeline("pixart_sigma"),
    }


class Heard(logging.Handler):
    """Whether the package has said that a schedule is behind every n-th step."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.behind = False

    def emit(self, record: logging.LogRecord) -> None:
        self.behind |= "predicted to err less than this schedule" in record.getMessage()


def schedules(calibration: smoothcache.Calibration, interval: int) -> tuple[dict[str, Schedule], bool]:
    """All methods at the cost of every n-th step, the paper's rule at most at that; and whether it was warned of."""
    steps = calibration.steps
    every = Schedule.uniform(steps, interval)
    compute = math.ceil(steps / interval) / steps
    found = {
        "every n-th": every,
        "every n-th, order 1": dataclasses.replace(every, order=1),
        "default": calibration.schedule(compute=compute),
    }
    log, heard = logging.getLogger("smoothcache_fx"), Heard()
    log.addHandler(heard)
    try:
        found["paper's rule"] = calibration.schedule(compute=compute, solver="greedy")
    except smoothcache.CalibrationError:  # no alpha is that cheap, with these lags
        pass
    finally:
        log.removeHandler(heard)
    return {method: found[method] for method in METHODS if method in found}, heard.behind


def measure(name: str, steps: int) -> list[dict[str, Any]]:
    """A row for each interval and method."""
    model, run = models(steps)[name]()
    calibration = smoothcache.calibrate(model, lambda model: run(model, CALIBRATED), progress=False)
    uncached = {seed: as_vector(run(model, seed)) for seed in (CALIBRATED, *OTHERS)}
    rows = []
    for interval in INTERVALS:
        found_schedules, warned = schedules(calibration, interval)
        for method, schedule in found_schedules.items():
            smoothcache.compile(model, schedule, backend="eager")
            try:
                found = {seed: psnr(sampled, as_vector(run(model, seed))) for seed, sampled in uncached.items()}
                ratio = smoothcache.report(model).mac_ratio
            finally:
                smoothcache.remove(model)
            rows.append(
                {
                    "model": name,
                    "steps": steps,
                    "interval": interval,
                    "method": method,
                    "order": schedule.order,
                    "mac_ratio": ratio,
                    "warned": warned and method == "paper's rule",
                    "psnr_calibrated": found[CALIBRATED],
                    "psnr_others": statistics.mean(found[seed] for seed in OTHERS),
                }
            )
    return rows


def table(rows: list[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """A line for each model, number of steps and interval, with the PSNR of each method: calibrated seed, others."""
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["model"], row["steps"], row["interval"]), {})
        line[row["method"]] = f"{row['psnr_calibrated']:.1f}, {row['psnr_others']:.1f}"
    heading = ("model", "steps", "n", *METHODS)
    body = [
        (model, str(steps), str(n), *(line.get(m, "-") for m in METHODS)) for (model, steps, n), line in lines.items()
    ]
    if not markdown:
        return format_table([heading, *body])
    rule = ("---", *["---:"] * (len(heading) - 1))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heading, rule, *body))


def right_warnings(rows: list[Mapping[str, Any]]) -> tuple[int, int]:
    """How many schedules were warned of, and how many of these are behind every n-th step on the calibrated seed."""
    every = {(r["model"], r["steps"], r["interval"]): r["psnr_calibrated"] for r in rows if r["method"] == "every n-th"}
    warned = [row for row in rows if row["warned"]]
    return len(warned), sum(
        row["psnr_calibrated"] < every[row["model"], row["steps"], row["interval"]] for row in warned
    )


def behind(rows: list[Mapping[str, Any]], which: str) -> float:
    """How far the default plan is behind every n-th step where it is farthest; negative if it never is."""
    by = {(row["model"], row["steps"], row["interval"], row["method"]): row[which] for row in rows}
    cases = {key[:3] for key in by}
    return max(by[(*case, "every n-th")] - by[(*case, "default")] for case in cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some of the models, by name")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28])
    parser.add_argument("--write", action="store_true", help="write bench/results/first_recipe.json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [n for n in models(1) if not arguments.models or n in arguments.models]
    if not names:
        parser.error(f"no model is called {arguments.models}; there are {', '.join(models(1))}")
    rows: list[dict[str, Any]] = []
    for name in names:
        for steps in arguments.steps:
            rows += measure(name, steps)
            print(f"{name}, {steps} steps: done", file=sys.stderr, flush=True)
    print(table(rows))
    worst = {which: behind(rows, which) for which in ("psnr_calibrated", "psnr_others")}
    print(
        "the default is behind every n-th step by at most", {key: round(value, 2) for key, value in worst.items()}, "dB"
    )
    warned, right = right_warnings(rows)
    print(f"warnings that the paper's rule is behind every n-th step: {warned}, of which {right} are right")
    if arguments.write:
        path = write_result("first_recipe", {"rows": rows, "behind": worst, "warned": warned, "right": right})
        (RESULTS / "first_recipe.md").write_text(table(rows, markdown=True) + "\n")
        print(path)


if __name__ == "__main__":
    main()
