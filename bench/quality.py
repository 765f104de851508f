"""How good samples are for how much compute: ``python bench/quality.py --sampler euler``.

The package's trained DiT with guidance 1.5, the same noise for all, by Euler's, the DDIM or the DPM-Solver++ sampler:
uncached, with fewer steps, and with schedules at about equal arithmetic. Those are the paper's greedy rule (alpha),
every n-th step (FORA), the same with forecasts (TaylorSeer) and with fitted ones, optimal rows, and what `choose`
takes: of branches and stacks what comes nearest to the uncached samples, or to converged ones; also with a history of
differences in a narrower dtype; every n-th step and optimal rows also with all blocks cached as one (stacks). What is
calibrated is calibrated on other noise.

Paired samples are compared with the uncached ones, and with those of four times the steps, which the sampler converges
to. Of the methods in `JUDGED`, at some budgets of all, whole sets of images are compared with real ones.

Plans are stored with the results, and used again; ``--anew`` makes others. Sampling takes long: ``--folder`` keeps
schedules, images and times, so that a run that was cut goes on.
``--times`` measures wall time for the plans that a run left there, and wants a quiet machine. With ``--add`` what
was written before stays but for the ``--methods`` and budgets that are sampled now.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratio_of_medians, result_path, write_result
from quality_plans import GRAINS, METHODS, Plans, Point
from quality_results import add_times, earlier_result, joined, recorded, same_plans, verdict
from quality_samplers import SAMPLERS
from quality_tables import FAR, write_all
from torch import Tensor

import smoothcache_fx as smoothcache
from smoothcache_fx.demo.judge import Judge, load_judge
from smoothcache_fx.demo.weights import load_model
from smoothcache_fx.reports.compare import psnr
from smoothcache_fx.schedules.schedule import Schedule

#: Of these as many images are made as a distribution takes; of the others, ``--paired``. Of TaylorSeer's settings the
#: one that is nearer to the uncached sample with 50 steps.
JUDGED = ("uncached", "fewer steps", "alpha", "every n-th step", "TaylorSeer, order 2", "chosen")
#: What is sampled.
MODEL = "DiT of Fashion-MNIST"
#: PSNR in dB that images which are the same count as.
MOST = 120.0
#: Resamplings of a set of images for the standard error of its Frechet distance.
RESAMPLINGS = 40


def kept_plan(
    folder: Path, make: Callable[[], list[Point]], wanted: Sequence[str] | None = None, stored: Path | None = None
) -> list[Point]:
    """The points of an earlier run in the folder, or those that are stored with its results.

    If there are none, or not all that are wanted, those that are made now.
    """
    index = folder / "points.json"
    for found in (kept_points(index), [] if stored is None else stored_points(stored)):
        if found and {*(wanted or ())} <= {point.method for point in found}:
            points = found
            break
    else:
        points = make()
    for i, point in enumerate(points):
        point.schedule.save(folder / f"{i}.json")
    index.write_text(json.dumps([(point.method, point.budget) for point in points]))
    return points


def kept_points(index: Path) -> list[Point]:
    if not index.exists():
        return []
    named = json.loads(index.read_text())
    return [Point(*point, Schedule.load(index.with_name(f"{i}.json"))) for i, point in enumerate(named)]


def stored_points(path: Path) -> list[Point]:
    """What `store_points` wrote; nothing if it did not."""
    if not path.exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return kept_points(Path(folder) / "points.json")


def store_points(folder: Path, path: Path) -> None:
    """Pack the plans that a folder keeps, the same bytes for the same plans."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        return member

    named = json.loads((folder / "points.json").read_text())
    with tarfile.open(path, "w:xz") as archive:
        for name in ("points", *map(str, range(len(named)))):
            archive.add(folder / f"{name}.json", f"{name}.json", filter=plain)


def kept_images(path: Path, make: Callable[[], Tensor]) -> Tensor:
    if path.exists():
        return torch.load(path, weights_only=True)
    images = make()
    torch.save(images, path)
    return images


def digest(schedule: Schedule) -> str:
    """Names what is sampled with a schedule, in all runs: one row for all groups is the same as one for each kind."""
    schedule = replace(schedule, flops=None)
    rows = {*schedule.compute.values()}
    if len(rows) == 1 and isinstance(schedule.order, int):
        kinds, _ = GRAINS["stack" if schedule.has_stacks else "branch"]
        schedule = replace(schedule, compute=dict.fromkeys(kinds, rows.pop()))
    return hashlib.sha256(repr(schedule).encode()).hexdigest()[:16]


def cached_copy(model: torch.nn.Module, schedule: Schedule, backend: str) -> torch.nn.Module:
    return smoothcache.compile(copy.deepcopy(model), schedule, backend=backend)


def distances(reference: Tensor, images: Tensor) -> dict[str, Any]:
    """PSNR in dB of all images together, which a few decide that went another way; mean and median of the images' own.

    Standard errors and 95% intervals by resampling the images; ``far`` is the share of images that went another way.
    """
    squares = (images - reference).square().flatten(1).mean(1)
    draws = torch.randint(len(images), (1000, len(images)), generator=torch.Generator().manual_seed(0))
    each = torch.tensor([min(psnr(*pair), MOST) for pair in zip(reference, images, strict=True)])
    figures: dict[str, Any] = {
        "psnr": psnr(reference, images),
        "psnr_error": float((10 * squares[draws].mean(1).log10()).std()),
        "mean_psnr": float(each.mean()),
        "mean_psnr_error": float(each.std()) / math.sqrt(len(each)),
        "median_psnr": float(each.quantile(0.5)),
        "far": float((each < FAR).float().mean()),
    }
    resampled = {"mean_psnr": each[draws].mean(1), "median_psnr": each[draws].quantile(0.5, dim=1)}
    for name, values in resampled.items():
        figures[f"{name}_interval"] = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return figures


def set_figures(images: Tensor, uncached: Tensor, labels: Tensor, judge: Judge) -> dict[str, float]:
    """Accuracy, and Frechet distances to real images, beside that of the uncached images of the same noise.

    Standard errors by resampling: of the difference, both sets' images of the same noise together.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(images), (RESAMPLINGS, len(images)), generator=generator)
    resampled = [judge.frechet_distance(images[draw]) for draw in draws]
    beside = [each - judge.frechet_distance(uncached[draw]) for each, draw in zip(resampled, draws, strict=True)]
    distance = judge.frechet_distance(images)
    return {
        "accuracy": judge.accuracy(images, labels),
        "frechet": distance,
        "frechet_error": statistics.stdev(resampled),
        "frechet_over_uncached": distance - judge.frechet_distance(uncached),
        "frechet_over_uncached_error": statistics.stdev(beside),
    }


def run(arguments: argparse.Namespace, folder: Path, save: Callable[[dict[str, Any]], None]) -> None:
    """Sample all points and print their figures; save what there is after the pairs and after each budget's sets."""
    sampler = SAMPLERS[arguments.sampler]
    model = load_model("cuda" if torch.cuda.is_available() else "cpu")
    known = not arguments.anew and same_plans(result_path(f"quality_{arguments.sampler}"), recorded(arguments))
    stored = plans_path(arguments.sampler) if known else None
    points = kept_plan(folder, Plans(model, sampler, arguments, folder).points, arguments.methods, stored)
    if arguments.methods is not None:
        points = [point for point in points if point.method in ("uncached", *arguments.methods)]
    batches = -(-arguments.images // arguments.paired)
    labels = torch.arange(arguments.paired) % model.num_classes

    def images(point: Point, count: int) -> Tensor:
        """Batches of the point's schedule, which may be other points' too."""
        sampled: list[torch.nn.Module] = []  # made when it is needed

        def make(index: int) -> Tensor:
            if not sampled:
                sampled.append(cached_copy(model, point.schedule, arguments.backend))
            return sampler.run(sampled[0], labels, point.schedule.steps, 5 + index).cpu()

        name = digest(point.schedule)
        return torch.cat([kept_images(folder / f"{name}-{i}.pt", lambda i=i: make(i)) for i in range(count)])

    many = 4 * arguments.steps
    converged = kept_images(folder / "converged.pt", lambda: sampler.run(model, labels, many, 5).cpu())
    reference = images(points[0], 1)
    judge, images_in_sets = load_judge(), batches * arguments.paired
    rows: list[dict[str, Any]] = []
    result = {
        "arguments": recorded(arguments),
        "model": MODEL,
        "real_versus_real_frechet_distance": judge.real_frechet_distance(images_in_sets) if images_in_sets else None,
        "classifier_held_out_accuracy": judge.held_out_accuracy,
        "rows": rows,
    }
    for point in points:
        made = images(point, 1)
        own = point is points[0]
        row = {
            "method": point.method,
            "budget": point.budget,
            "compute": point.share(arguments.steps),
            "order": point.schedule.order,
            **(dict.fromkeys(distances(converged, made)) if own else distances(reference, made)),
            **{f"{name}_converged": value for name, value in distances(converged, made).items()},
        }
        if point.schedule.history_dtype is not None:
            same = replace(point, schedule=replace(point.schedule, history_dtype=None))
            row["psnr_same_rows"] = psnr(images(same, 1), made)
        rows.append(row)
        print(describe(row), flush=True)
    save(result)
    all_judged = {round(budget, 2) for budget in arguments.all_judged}
    budgets = {point.budget for point in points} if arguments.judged is None else arguments.judged
    budgets = sorted({round(budget, 2) for budget in budgets} - {1.0}, reverse=True)
    any_judged = any(point.method in JUDGED or point.budget in all_judged for point in points[1:])
    for budget in (1.0, *budgets) if batches and any_judged else ():
        for point, row in zip(points, rows, strict=True):
            judged = point.method in JUDGED or (budget in all_judged and point.schedule.history_dtype is None)
            if judged and abs(point.budget - budget) < 0.005 and "frechet" not in row:
                made, uncached = images(point, batches), images(points[0], batches)
                row |= set_figures(made, uncached, labels.repeat(batches), judge)
                if point is not points[0]:
                    row |= {f"{name}_set": value for name, value in distances(uncached, made).items()}
                    row["far_set"] = sum(each < FAR for each in map(psnr, uncached, made))
                print(describe(row), flush=True)
        save(result)


def plans_path(sampler: str) -> Path:
    """Where the plans of a sampler's results are stored."""
    return result_path(f"quality_{sampler}").with_suffix(".plans.tar.xz")


def describe(row: dict[str, Any]) -> str:
    figures = ""
    if row["psnr"] is not None:
        figures += f"{row['psnr']:5.1f} +- {row['psnr_error']:.1f} (mean {row['mean_psnr']:.1f}), "
    figures += f"converged {row['psnr_converged']:.1f} +- {row['psnr_error_converged']:.1f} "
    figures += f"(mean {row['mean_psnr_converged']:.1f}) dB"
    if "frechet" in row:
        if "psnr_set" in row:
            figures += f", of the set {row['psnr_set']:.1f} +- {row['psnr_error_set']:.1f} dB"
            figures += f" (mean {row['mean_psnr_set']:.1f}, {row['far_set']} under {FAR:.0f})"
        figures += f", recognised {row['accuracy']:.2%}, Frechet {row['frechet']:.3f} +- {row['frechet_error']:.3f}"
        figures += f", {row['frechet_over_uncached']:+.3f} +- {row['frechet_over_uncached_error']:.3f} over uncached"
    if "psnr_same_rows" in row:
        figures += f", to the same with full history {row['psnr_same_rows']:.1f} dB"
    return f"{row['method']:30s} {row['compute']:.2f}  {figures}"


def measure_times(arguments: argparse.Namespace, folder: Path) -> None:
    """Keep in the folder how many seconds a batch of ``--paired`` takes, of all methods but narrower histories.

    Those of one budget take turns with the uncached: how fast the machine is changes while all are measured.
    """
    sampler = SAMPLERS[arguments.sampler]
    model = load_model("cuda" if torch.cuda.is_available() else "cpu")
    uncached, *points = (point for point in kept_plan(folder, list) if point.schedule.history_dtype is None)
    points = [point for point in points if arguments.methods is None or point.method in arguments.methods]
    labels = torch.arange(arguments.paired) % model.num_classes
    path = folder / "times.json"
    how = {"batch": arguments.paired, "backend": arguments.backend, "threads": torch.get_num_threads()}
    kept = json.loads(path.read_text()) if path.exists() else {"timed": how, "budgets": []}
    if kept["timed"] != how:
        raise SystemExit(f"{path} has times of {kept['timed']}, not of {how}: remove it to measure anew")
    done = [budget["budget"] for budget in kept["budgets"]]
    for budget in sorted({point.budget for point in points}.difference(done), reverse=True):
        near = [uncached, *(point for point in points if point.budget == budget)]
        schedules = {digest(point.schedule): point.schedule for point in near}
        sampled = {name: cached_copy(model, schedule, arguments.backend) for name, schedule in schedules.items()}

        def once(name: str, sampled: Any = sampled, schedules: Any = schedules) -> Callable[[], object]:
            return lambda: sampler.run(sampled[name], labels, schedules[name].steps, 5)

        seconds = interleaved({name: once(name) for name in schedules}, rounds=5)
        batches = {point.method: seconds[digest(point.schedule)] for point in near}
        kept["budgets"].append({"budget": budget, "seconds": batches})
        path.write_text(json.dumps(kept))
        for method, own in batches.items():
            share = ratio_of_medians(own, batches[uncached.method])
            print(f"{method:30s} {budget:.2f}  {share:.3f} of the uncached", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="euler")
    parser.add_argument("--steps", type=int, help="of the uncached sampler (50; 25 of dpm)")
    parser.add_argument("--paired", type=int, default=130, help="images in a batch, and compared in pairs (130)")
    parser.add_argument("--images", type=int, default=0, help="images in a set to judge (0: none are judged)")
    parser.add_argument("--judged", type=float, nargs="*", help="budgets of which sets are judged (all)")
    parser.add_argument("--all-judged", type=float, nargs="*", default=(), help="those at which all methods are")
    parser.add_argument("--calibrated", type=int, default=80, help="samples to calibrate optimal schedules (80)")
    parser.add_argument("--lags", type=int, default=8, help="the longest reuse of optimal schedules (8)")
    parser.add_argument("--trajectories", type=int, default=7, help="that `choose` takes for a budget (7)")
    parser.add_argument("--shares", type=float, nargs="*", default=(0.6, 0.3), help="further budgets (0.6 0.3)")
    parser.add_argument("--intervals", type=int, nargs="*", default=(2, 3, 4, 5), help="n of every n-th step")
    parser.add_argument("--backend", help="inner compiler (eager; for times inductor)")
    parser.add_argument("--folder", type=Path, help="keep schedules and images here, and go on from what is there")
    parser.add_argument("--times", action="store_true", help="add wall times to what was written; run on nothing else")
    parser.add_argument("--write", action="store_true", help="write bench/results/ and docs/bench/")
    parser.add_argument("--methods", nargs="+", help="that are sampled or timed, beside the uncached (all)")
    parser.add_argument("--anew", action="store_true", help="make plans, though some are stored with the results")
    parser.add_argument("--add", action="store_true", help="keep other methods, budgets and times that were written")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or SAMPLERS[arguments.sampler].steps
    arguments.backend = arguments.backend or ("inductor" if arguments.times else "eager")
    known = {method for methods in METHODS.values() for method in methods}
    if unknown := sorted({*(arguments.methods or ())} - known):
        parser.error(f"no such methods: {unknown}; there are {sorted(known)}")
    if arguments.add and (arguments.times or not arguments.write):
        parser.error("--add goes with --write and without --times, which adds to what was written anyway")
    if arguments.methods is not None and arguments.write and not (arguments.add or arguments.times):
        parser.error("--methods with --write would lose the other methods' rows: give --add too")
    name = f"quality_{arguments.sampler}"
    earlier = earlier_result(result_path(name), recorded(arguments)) if arguments.add else None

    def save(result: dict[str, Any]) -> None:
        if earlier is not None:
            result = joined(earlier, result)
        add_times(result, folder)
        result["verdict"] = verdict(result)
        if arguments.write:
            print(f"written to {write_result(name, result)}", flush=True)
            if not (arguments.add or arguments.times):
                store_points(folder, plans_path(arguments.sampler))
            write_all()

    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.times:
            result = json.loads(result_path(name).read_text())
            measure_times(arguments, folder)
            save(result)
        else:
            run(arguments, folder, save)


if __name__ == "__main__":
    main()
