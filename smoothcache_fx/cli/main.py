"""The command line: ``smoothcache``, or ``python -m smoothcache_fx``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ScheduleError, SmoothCacheError
from ..schedules.schedule import HISTORY_DTYPES
from .models import dtype_named, from_diffusers, made_by, meta_inputs, progress, shape_given, uncallable, value_given

if TYPE_CHECKING:
    from ..reports.explain import Explanation
    from ..schedules.schedule import Schedule

#: Thresholds and budgets of the demo's schedules, which compute about the same: a half to a third of the FLOPs.
DEMO_ALPHAS, DEMO_BUDGETS = (0.08, 0.12, 0.18), (0.5, 0.36, 0.28)
QUICK_ALPHAS, QUICK_BUDGETS = (0.3,), (0.4,)
PROGRESS = "say every few seconds on stderr which step runs (if that is a terminal)"
FACTORY = "MODULE:FACTORY, or path/to/file.py:FACTORY: called without arguments, it returns"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="smoothcache", description="SmoothCache for any Diffusion Transformer, as a compiler pass."
    )
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str, *examples: str) -> Any:
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog="\n".join(f"example: smoothcache {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    demo = command(
        "demo",
        _demo,
        "calibrate, schedule, compile and sample a small trained DiT, and measure all of it",
        "demo --alphas 0.1 0.2 --output results",
    )
    demo.add_argument("--quick", action="store_true", help="20 steps, one alpha and one budget")
    demo.add_argument("--samples", type=int, default=120, help="images per configuration, in batches of 40 (120)")
    demo.add_argument("--alphas", type=float, nargs="+", metavar="ALPHA", help="thresholds of the paper's rule")
    demo.add_argument("--compute", type=float, nargs="+", metavar="SHARE", help="shares of the branches' FLOPs")
    demo.add_argument("--steps", type=int, help="denoising steps (50)")
    demo.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    demo.add_argument("--output", type=Path, default=Path("smoothcache-demo"), help="folder for what is written")

    explain = command(
        "explain",
        _explain,
        "what can be cached in a model, your own or one of diffusers without its weights",
        "explain my_model.py:build --json",
        "explain DiTTransformer2DModel --config config.json --dtype bfloat16 --input hidden_states=2x4x32x32 "
        "--input timestep=2:int64 --input class_labels=2:int64",
    )
    explain.add_argument(
        "factory", help=f"{FACTORY} a model in eval mode and its inputs, a tuple or a dict; or a class of diffusers"
    )
    explain.add_argument("--config", type=Path, help="of the class: the config.json beside its weights, or its folder")
    explain.add_argument(
        "--input",
        type=shape_given,
        action="append",
        default=[],
        metavar="NAME=SHAPE[:DTYPE]",
        help="a tensor for the class's forward, such as hidden_states=1x4096x64 or class_labels=2:int64 (--dtype)",
    )
    explain.add_argument(
        "--value",
        type=value_given,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="what is no tensor, such as height=32",
    )
    explain.add_argument(
        "--dtype", type=dtype_named, help="of the class's weights, and of inputs that name none (float32)"
    )
    explain.add_argument("--schedule", type=Path, help="also predict what this schedule saves")
    explain.add_argument("--plot", type=Path, help="draw what each step of the schedule costs")
    explain.add_argument("--json", action="store_true", help="for machines")

    calibrate = command(
        "calibrate", _calibrate, "measure the errors of reuse, for `schedule`", "calibrate my_model.py:build -o c.json"
    )
    calibrate.add_argument("factory", help=f"{FACTORY} a model or pipeline, and a function that samples with it")
    calibrate.add_argument("-o", "--output", type=Path, required=True, help="the calibration file")
    calibrate.add_argument("--lags", type=int, default=3, help="how many steps back to look (3)")
    calibrate.add_argument("--order", type=int, default=1, help="of the forecasts that schedules may have (1)")
    calibrate.add_argument("--paper", action="store_true", help="measure what the paper's rule needs, and no more")
    calibrate.add_argument(
        "--probes", type=int, default=0, help="further runs to see how errors at a step reach the end (0)"
    )
    calibrate.add_argument("--steps", type=int, help="of a trajectory, if the model has no timestep to tell it by")
    calibrate.add_argument("--calls-per-step", type=int, help="of a bare model (1)")
    calibrate.add_argument("--progress", action=argparse.BooleanOptionalAction, help=PROGRESS)

    schedule = command(
        "schedule", _schedule, "make a schedule", "schedule calibration.json --compute 0.5 -o schedule.json"
    )
    schedule.add_argument("calibration", type=Path, nargs="?", help="a calibration file; none for --interval")
    rule = schedule.add_mutually_exclusive_group(required=True)
    rule.add_argument("--alpha", type=float, help="the largest error allowed (the paper's rule)")
    rule.add_argument("--compute", type=float, help="the largest share of the branches' FLOPs to compute")
    rule.add_argument("--interval", type=int, help="compute every so many steps (FORA); needs --steps")
    schedule.add_argument("--steps", type=int, help="for --interval")
    schedule.add_argument(
        "--solver", choices=("greedy", "optimal"), help="of --compute: the least predicted error, or the paper's rule"
    )
    schedule.add_argument(
        "--rows",
        choices=("joint", "group", "site"),
        help="one row for all groups, one for each group, or one for each site (the last with --solver optimal)",
    )
    schedule.add_argument(
        "--order", type=int, help="of the forecasts that reused branches read (the best for --compute, else 0)"
    )
    schedule.add_argument("--max-variants", type=int, help="have groups share rows until there are no more variants")
    schedule.add_argument(
        "--history-dtype", choices=HISTORY_DTYPES, help="keep the history of forecasts as differences in this dtype"
    )
    schedule.add_argument("-o", "--output", type=Path, help="the schedule file")
    schedule.add_argument("--json", action="store_true", help="for machines")

    choose = command(
        "choose",
        _choose,
        "sample with the most promising schedules, and take the best for a budget, or the cheapest for a quality",
        "choose my_model.py:build --compute 0.4 -o schedule.json",
        "choose my_model.py:build --at-least 35 -o schedule.json",
    )
    choose.add_argument("factory", help=f"{FACTORY} a model or pipeline, and a function that samples with it")
    wanted = choose.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--compute", type=float, help="the largest share of the branches' FLOPs to compute")
    wanted.add_argument("--at-least", type=float, help="the PSNR to the uncached samples to reach, in dB")
    choose.add_argument("-o", "--output", type=Path, required=True, help="the schedule file")
    choose.add_argument("--orders", type=int, nargs="+", default=(0, 1, 2), help="of the forecasts to try (0 1 2)")
    choose.add_argument("--lags", type=int, default=5, help="the longest reuse (5)")
    choose.add_argument("--trajectories", type=int, default=20, help="how often to sample in all, at most (20)")
    choose.add_argument("--probes", type=int, default=4, help="of them, to see how errors at a step reach the end (4)")
    choose.add_argument("--steps", type=int, help="of a trajectory, if the model has no timestep to tell it by")
    choose.add_argument("--calls-per-step", type=int, help="of a bare model (1)")
    choose.add_argument("--progress", action=argparse.BooleanOptionalAction, help=PROGRESS)

    convert = command(
        "convert",
        _convert,
        "read a schedule file, also a published one, and write ours",
        "convert theirs.json ours.json",
        "convert DDIM50_router.pt ours.json --names 'transformer_blocks.{block}.attn1' 'transformer_blocks.{block}.ff'",
    )
    convert.add_argument(
        "source", type=Path, help="ours, one that dit-smoothcache publishes, or a router of Learning-to-Cache (.pt)"
    )
    convert.add_argument("target", type=Path)
    convert.add_argument("--threshold", type=float, help="of a router's scores: branches above it are computed (0.1)")
    convert.add_argument(
        "--names",
        nargs=2,
        metavar=("ATTN", "FFN"),
        help="what a router's branches are called in your model, with {block} for the block's index "
        "(*.{block}.attn *.{block}.mlp)",
    )

    plot = command(
        "plot",
        _plot,
        "draw calibration errors or schedules",
        "plot calibration.json -o errors.png",
        "plot calibration.json --sites -o sites.png",
        "plot ours.json theirs.json -o schedules.png",
    )
    plot.add_argument("files", type=Path, nargs="+", help="one calibration file, or schedule files")
    plot.add_argument("-o", "--output", type=Path, required=True, help="such as errors.png or errors.svg")
    plot.add_argument("--alphas", type=float, nargs="+", default=(), help="thresholds to mark")
    plot.add_argument("--sites", action="store_true", help="of a calibration: a heat map by site and step")
    plot.add_argument("--lag", type=int, default=1, help="of --sites: how many steps back (1)")

    compare = command(
        "compare",
        _compare,
        "sample uncached and with schedules: how fast, how far apart",
        "compare my_model.py:build a.json b.json --plot frontier.png",
    )
    compare.add_argument("factory", help=f"{FACTORY} a model or pipeline, and a function that samples with it")
    compare.add_argument("schedules", type=Path, nargs="+", help="schedule files")
    compare.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    compare.add_argument("--mode", help="as for torch.compile")
    compare.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    compare.add_argument("--calls-per-step", type=int, help="of a bare model (1)")
    compare.add_argument("--progress", action=argparse.BooleanOptionalAction, help=PROGRESS)
    compare.add_argument("--plot", type=Path, help="draw the frontier")
    compare.add_argument("--json", action="store_true", help="for machines")

    diff = command(
        "diff",
        _diff,
        "what a pass changed, from two files that smoothcache.dump wrote",
        "diff graphs/graph_0/captured.py graphs/graph_0/variant_1.py",
    )
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    diff.add_argument("--context", type=int, default=1, help="unchanged lines around changed ones (1)")

    doctor = command("doctor", _doctor, "what this machine has and lacks, with a short self-test", "doctor")
    doctor.add_argument("--no-self-test", action="store_true", help="compile nothing")
    doctor.add_argument("--json", action="store_true", help="for machines")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 1 after an error that was told. Wrong usage exits with 2."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # whoever reads the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SmoothCacheError, ImportError, OSError, TypeError, ValueError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(options: argparse.Namespace) -> None:
    from ..demo.run import run_demo

    alphas, budgets, steps = (QUICK_ALPHAS, QUICK_BUDGETS, 20) if options.quick else (DEMO_ALPHAS, DEMO_BUDGETS, 50)
    run_demo(
        options.output,
        samples=options.samples,
        alphas=tuple(options.alphas or alphas),
        budgets=tuple(options.compute or budgets),
        steps=steps if options.steps is None else options.steps,
        backend=options.backend,
        say=lambda line: print(line, flush=True),
    )


def _explain(options: argparse.Namespace) -> None:
    from ..schedules.schedule import Schedule

    if options.plot and not options.schedule:
        raise ValueError("--plot draws what each step of a schedule costs: give --schedule too")
    schedule = None if options.schedule is None else Schedule.load(options.schedule)
    if options.factory.isidentifier():
        found = _explain_class(options, schedule)
    else:
        found = _explain_made(options, schedule)
    if options.plot:
        found.prediction.plot(options.plot)
    _show(found, options.json)


def _explain_made(options: argparse.Namespace, schedule: Schedule | None) -> Explanation:
    """What a factory of the user's makes."""
    if options.config or options.input or options.value or options.dtype:
        raise ValueError(f"--config, --input, --value and --dtype are for a class of diffusers, not {options.factory}")
    from ..reports.explain import explain

    model, inputs = made_by(options.factory, "a model and its inputs")
    if isinstance(inputs, Mapping):
        return explain(model, schedule=schedule, **inputs)
    if isinstance(inputs, (tuple, list)):
        return explain(model, *inputs, schedule=schedule)
    raise TypeError(f"{options.factory} gave {type(inputs).__name__} as inputs, expected a tuple or a dict")


def _explain_class(options: argparse.Namespace, schedule: Schedule | None) -> Explanation:
    """A class of diffusers, without weights: nothing is computed."""
    from ..reports.explain import explain

    dtype = options.dtype or torch.float32
    model = from_diffusers(options.factory, options.config, dtype)
    inputs = meta_inputs(model, dict(options.input), dict(options.value), dtype)
    try:
        return explain(model, schedule=schedule, **inputs)
    except SmoothCacheError:
        raise
    except Exception as error:  # most likely the inputs: forward's own defaults are None for much that it needs
        raise uncallable(model, inputs, error) from error


def _calibrate(options: argparse.Namespace) -> None:
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
            progress=False,
        )
        if options.probes:
            calibration = measure_sensitivity(
                model, sample, calibration, probes=options.probes, calls_per_step=options.calls_per_step, progress=False
            )
    calibration.save(options.output)
    print(calibration)


def _schedule(options: argparse.Namespace) -> None:
    from ..calibration.calibration import Calibration
    from ..schedules.schedule import Schedule

    if options.interval is not None:
        if options.steps is None or options.calibration is not None:
            raise ValueError("--interval needs --steps, and no calibration: it computes every so many steps")
        if options.solver or options.rows or options.max_variants:
            raise ValueError("--solver, --rows and --max-variants are for --compute; --interval says the rows itself")
        schedule = dataclasses.replace(Schedule.uniform(options.steps, options.interval), order=options.order or 0)
    elif options.calibration is None:
        raise ValueError("--alpha and --compute need a calibration file: smoothcache calibrate makes one")
    else:
        calibration = Calibration.load(options.calibration)
        schedule = calibration.schedule(
            alpha=options.alpha,
            compute=options.compute,
            solver=options.solver,
            order=options.order,
            rows=options.rows,
            max_variants=options.max_variants,
        )
    schedule = dataclasses.replace(schedule, history_dtype=options.history_dtype)
    if options.output is not None:
        schedule.save(options.output)
    if options.json:
        rows = {selector: list(row) for selector, row in schedule.compute.items()}
        print(json.dumps({"steps": schedule.steps, "order": schedule.order, "compute": rows}))
    else:
        print(schedule)


def _choose(options: argparse.Namespace) -> None:
    from ..measure.choose import choose

    model, sample = made_by(options.factory, "a model or pipeline and a function")
    with progress(model, options.progress):
        found = choose(
            model,
            sample,
            compute=options.compute,
            at_least=options.at_least,
            orders=options.orders,
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


def _convert(options: argparse.Namespace) -> None:
    from ..importers import learning_to_cache
    from ..schedules.schedule import Schedule

    given = {"threshold": options.threshold, "names": options.names}
    given = {name: value for name, value in given.items() if value is not None}
    if _is_router(options.source):
        schedule = learning_to_cache(options.source, **given)
    elif given:
        raise ScheduleError(
            f"--{' and --'.join(given)} {'is' if len(given) == 1 else 'are'} for a router of Learning-to-Cache, a .pt "
            f"file that torch.save wrote, which {options.source} is not"
        )
    else:
        schedule = Schedule.load(options.source)
    schedule.save(options.target)
    print(schedule)


def _is_router(path: Path) -> bool:
    """Whether torch.save wrote it, by its name or its first bytes."""
    if path.suffix in (".pt", ".pth"):
        return True
    return path.is_file() and zipfile.is_zipfile(path)


def _plot(options: argparse.Namespace) -> None:
    from ..calibration.calibration import FORMAT, Calibration
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


def _compare(options: argparse.Namespace) -> None:
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
    _show(found, options.json)


def _diff(options: argparse.Namespace) -> None:
    from ..graphs.diff import diff_files

    for line in diff_files(options.before, options.after, context=options.context):
        print(line)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    missing = 0
    found = []
    for finding in examine(self_test=not options.no_self_test):
        missing += finding.missing
        found.append(vars(finding))
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps(found, indent=2))
    return int(missing > 0)


def _show(found: Any, as_json: bool) -> None:
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
