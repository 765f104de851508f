"""How good samples are for how much compute: ``python bench/quality.py --sampler euler``.

The package's trained DiT with guidance 1.5, the same noise for all, by Euler's, the DDIM or the DPM-Solver++ sampler:
uncached, with fewer steps, and with schedules at about equal arithmetic. Those are the paper's greedy rule (alpha),
every n-th step (FORA), the same with forecasts (TaylorSeer), optimal rows, and what `choose` takes. Paired samples are
compared with the uncached ones and with those of four times the steps, which the sampler converges to; of the methods
in `JUDGED` also whole sets of images with real ones. What is calibrated is calibrated on other noise.

Sampling takes long: ``--folder`` keeps schedules and images, so that a run that was cut goes on.
``--times`` measures wall time of the judged methods for the plans that a run left there, and wants a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, interleaved, summary, write_result
from quality_pictures import draw_all
from quality_samplers import SAMPLERS, Sampler
from torch import Tensor

import smoothcache_fx as smoothcache
from smoothcache_fx.comparison import psnr
from smoothcache_fx.demo.data import load_digits
from smoothcache_fx.demo.metrics import Classifier, frechet_distance, real_frechet_distance
from smoothcache_fx.demo.weights import load_model
from smoothcache_fx.schedule import Schedule

ORDERS = (0, 1, 2)
#: Of these as many images are made as a distribution takes; of the others, ``--paired``.
JUDGED = ("uncached", "fewer steps", "alpha", "every n-th step", "TaylorSeer, order 1", "TaylorSeer, order 2", "chosen")
#: Resamplings of a set of images for the standard error of its Frechet distance.
RESAMPLINGS = 40


@dataclass(frozen=True)
class Point:
    """A method at one budget; the schedule of "fewer steps" has fewer steps and computes all."""

    method: str
    schedule: Schedule

    def share(self, steps: int) -> float:
        """Of the branches' arithmetic of so many uncached steps."""
        return self.schedule.compute_fraction * self.schedule.steps / steps


def plan(model: torch.nn.Module, sampler: Sampler, arguments: argparse.Namespace) -> list[Point]:
    """All points; rows of every n-th step compute the last step too, as those by alpha do."""
    steps = arguments.steps
    points = [Point("uncached", Schedule(steps))]
    for interval in arguments.intervals:
        uniform = Schedule.uniform(steps, interval, kinds=("attn", "ffn"))
        uniform = replace(uniform, compute={kind: (*row[:-1], True) for kind, row in uniform.compute.items()})
        points.append(Point("every n-th step", uniform))
        points += [Point(f"TaylorSeer, order {order}", replace(uniform, order=order)) for order in ORDERS[1:]]
    shares = sorted({*arguments.shares, *(point.share(steps) for point in points[1:])}, reverse=True)
    points += [Point("fewer steps", Schedule(round(share * steps))) for share in shares]

    def one_by_one(model: torch.nn.Module) -> None:
        for seed in range(10):  # as the paper calibrates: ten samples
            sampler.run(model, torch.tensor([seed % 10]), steps, 1000 + seed)

    greedy = smoothcache.calibrate(model, one_by_one, progress=False)
    for share in shares:
        with contextlib.suppress(smoothcache.CalibrationError):  # three lags do not reach as low as all shares
            rows = greedy.schedule(compute=share)
            points.append(Point("alpha", rows))
            points += [Point(f"alpha, order {order}", replace(rows, order=order)) for order in ORDERS[1:]]

    def together(model: torch.nn.Module) -> Tensor:
        return sampler.run(model, torch.arange(arguments.calibrated) % 10, steps, 1)

    calibration = smoothcache.calibrate(model, together, lags=arguments.lags, order=max(ORDERS), progress=False)
    calibration = smoothcache.measure_sensitivity(model, together, calibration, progress=False)
    for share in shares:
        points += [
            Point(f"optimal, order {order}", calibration.schedule(compute=share, solver="optimal", order=order))
            for order in ORDERS
        ]
        choice = smoothcache.choose(model, together, compute=share, calibration=calibration, progress=False)
        print(f"{choice}\n", flush=True)
        points.append(Point("chosen", choice.schedule))
    return points


def kept_plan(folder: Path, make: Callable[[], list[Point]]) -> list[Point]:
    """The points of an earlier run in the folder, or those that ``make`` gives."""
    index = folder / "points.json"
    if index.exists():
        methods = json.loads(index.read_text())
        return [Point(method, Schedule.load(folder / f"{i}.json")) for i, method in enumerate(methods)]
    points = make()
    for i, point in enumerate(points):
        point.schedule.save(folder / f"{i}.json")
    index.write_text(json.dumps([point.method for point in points]))
    return points


def kept_images(path: Path, make: Callable[[], Tensor]) -> Tensor:
    if path.exists():
        return torch.load(path, weights_only=True)
    images = make()
    torch.save(images, path)
    return images


def cached_copy(model: torch.nn.Module, schedule: Schedule, backend: str) -> torch.nn.Module:
    return smoothcache.compile(copy.deepcopy(model), schedule, backend=backend)


def set_figures(images: Tensor, labels: Tensor, classifier: Classifier, real: Tensor) -> dict[str, float]:
    """Accuracy and Frechet distance to real digits, its standard error by resampling the images."""
    generator = torch.Generator().manual_seed(0)
    resampled = [
        frechet_distance(images[torch.randint(len(images), (len(images),), generator=generator)], real)
        for _ in range(RESAMPLINGS)
    ]
    return {
        "accuracy": classifier.accuracy(images, labels),
        "frechet": frechet_distance(images, real),
        "frechet_error": statistics.stdev(resampled),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sample all points, print and return their figures."""
    sampler = SAMPLERS[arguments.sampler]
    model = load_model("cuda" if torch.cuda.is_available() else "cpu")
    points = kept_plan(folder, lambda: plan(model, sampler, arguments))
    paired = arguments.paired
    batches = -(-arguments.images // paired)
    labels = torch.arange(paired) % model.num_classes
    classifier, real = Classifier(), load_digits().held_out_images

    def batch(sampled: torch.nn.Module, steps: int, index: int) -> Tensor:
        return sampler.run(sampled, labels, steps, 5 + index).cpu()

    def images(schedule: Schedule, count: int) -> Tensor:
        number = next(i for i, point in enumerate(points) if point.schedule == schedule)
        sampled: list[torch.nn.Module] = []  # made when it is needed

        def make(index: int) -> Tensor:
            if not sampled:
                sampled.append(cached_copy(model, schedule, arguments.backend))
            return batch(sampled[0], schedule.steps, index)

        return torch.cat([kept_images(folder / f"{number}-{i}.pt", lambda i=i: make(i)) for i in range(count)])

    def converge() -> Tensor:
        return batch(model, 4 * arguments.steps, 0)

    converged = kept_images(folder / "converged.pt", converge)
    reference = images(points[0].schedule, 1)
    rows: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (point.method not in JUDGED, -point.share(arguments.steps))):
        judged = point.method in JUDGED and batches > 0
        made = images(point.schedule, batches if judged else 1)
        own = point is points[0]
        row = {
            "method": point.method,
            "compute": point.share(arguments.steps),
            "psnr": None if own else psnr(reference, made[:paired]),
            "median_psnr": None if own else statistics.median(map(psnr, reference, made[:paired])),
            "psnr_converged": psnr(converged, made[:paired]),
            "median_psnr_converged": statistics.median(map(psnr, converged, made[:paired])),
        }
        if judged:
            row |= set_figures(made, labels.repeat(batches), classifier, real)
        rows.append(row)
        print(describe(row), flush=True)
    floor = real_frechet_distance(batches * paired) if batches else None
    settings = {key: value for key, value in vars(arguments).items() if key not in ("folder", "write", "times")}
    return {
        "arguments": settings,
        "real_versus_real_frechet_distance": floor,
        "classifier_held_out_accuracy": classifier.held_out_accuracy,
        "rows": rows,
    }


def describe(row: dict[str, Any]) -> str:
    figures = "" if row["psnr"] is None else f"{row['psnr']:5.1f} (median {row['median_psnr']:.1f}), "
    figures += f"converged {row['psnr_converged']:.1f} (median {row['median_psnr_converged']:.1f}) dB"
    if "frechet" in row:
        figures += f", recognised {row['accuracy']:.2%}, Frechet {row['frechet']:.3f} +- {row['frechet_error']:.3f}"
    return f"{row['method']:20s} {row['compute']:.2f}  {figures}"


def verdict(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each budget, by how much what was chosen is better than others of about as much compute.

    In dB beside the best method without forecasts, and beside TaylorSeer's; and Frechet distances above the best of all
    others, in standard errors of the two.
    """
    rows = result["rows"]
    without = ("fewer steps", "alpha", "every n-th step")
    found: dict[str, dict[str, float]] = {}
    for chosen in (row for row in rows if row["method"] == "chosen"):
        near = [row for row in rows if abs(row["compute"] - chosen["compute"]) <= 0.021 and row["psnr"] is not None]
        line: dict[str, float] = {}
        for key in ("psnr", "median_psnr", "psnr_converged", "median_psnr_converged"):
            for name, methods in (("order 0", without), ("TaylorSeer", JUDGED[4:6])):
                theirs = [row[key] for row in near if row["method"] in methods]
                if theirs:
                    line[f"{key} over {name}"] = chosen[key] - max(theirs)
        others = [row for row in near if "frechet" in row and row["method"] != "chosen"]
        if others:
            best = min(others, key=lambda row: row["frechet"])
            error = float(np.hypot(best["frechet_error"], chosen["frechet_error"]))
            line["frechet, standard errors above the best"] = (chosen["frechet"] - best["frechet"]) / error
        found[f"{chosen['compute']:.2f}"] = line
    return found


def measure_times(arguments: argparse.Namespace, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add wall time of a paired batch to the rows of `JUDGED` methods, all taking turns."""
    sampler = SAMPLERS[arguments.sampler]
    model = load_model("cuda" if torch.cuda.is_available() else "cpu")
    points = [point for point in kept_plan(folder, list) if point.method in JUDGED]
    labels = torch.arange(arguments.paired) % model.num_classes
    schedules = list(dict.fromkeys(point.schedule for point in points))
    sampled = {schedule: cached_copy(model, schedule, "inductor") for schedule in schedules}

    def once(schedule: Schedule) -> Callable[[], object]:
        return lambda: sampler.run(sampled[schedule], labels, schedule.steps, 5)

    seconds = interleaved({str(i): once(schedule) for i, schedule in enumerate(schedules)}, rounds=3)
    for point in points:
        took = summary(seconds[str(schedules.index(point.schedule))])
        share = point.share(arguments.steps)
        row = next(row for row in rows if (row["method"], row["compute"]) == (point.method, share))
        row["seconds"] = took
        print(f"{point.method:20s} {share:.2f}  {took['median']:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="euler")
    parser.add_argument("--steps", type=int, help="of the uncached sampler (50; 25 of dpm)")
    parser.add_argument("--paired", type=int, default=130, help="images in a batch, and compared in pairs (130)")
    parser.add_argument("--images", type=int, default=0, help="images in a set to judge (0: none are judged)")
    parser.add_argument("--calibrated", type=int, default=40, help="samples to calibrate optimal schedules (40)")
    parser.add_argument("--lags", type=int, default=8, help="the longest reuse of optimal schedules (8)")
    parser.add_argument("--shares", type=float, nargs="*", default=(0.6,), help="budgets beside those of the intervals")
    parser.add_argument("--intervals", type=int, nargs="+", default=(2, 3, 4, 5), help="n of every n-th step")
    parser.add_argument("--backend", default="eager", help="inner compiler while sampling (eager)")
    parser.add_argument("--folder", type=Path, help="keep schedules and images here, and go on from what is there")
    parser.add_argument("--times", action="store_true", help="add wall times to what was written; run on nothing else")
    parser.add_argument("--write", action="store_true", help="write bench/results/ and docs/bench/")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or SAMPLERS[arguments.sampler].steps
    name = f"quality_{arguments.sampler}"
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.times:
            result = json.loads((RESULTS / f"{name}.json").read_text())
            measure_times(arguments, folder, result["rows"])
        else:
            result = run(arguments, folder)
            result["verdict"] = verdict(result)
            for compute, line in result["verdict"].items():
                print(compute, ", ".join(f"{key} {value:+.1f}" for key, value in line.items()))
    if arguments.write:
        print(f"written to {write_result(name, result)}")
        draw_all()


if __name__ == "__main__":
    main()
