"""The command line: ``smoothcache``, or ``python -m smoothcache_fx``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import SmoothCacheError

#: Thresholds of the demo's schedules, which compute about a half to a third of the branches' FLOPs.
DEMO_ALPHAS = (0.08, 0.12, 0.18)
FACTORY = "MODULE:FACTORY, or path/to/file.py:FACTORY: called without arguments, it returns"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="smoothcache", description="SmoothCache for any Diffusion Transformer, as a compiler pass."
    )
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str) -> Any:
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example: smoothcache {example}",
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
    demo.add_argument("--samples", type=int, default=100, help="images per configuration, in batches of 50 (100)")
    demo.add_argument("--alphas", type=float, nargs="+", default=DEMO_ALPHAS, metavar="ALPHA", help="thresholds")
    demo.add_argument("--steps", type=int, default=50, help="denoising steps (50)")
    demo.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    demo.add_argument("--output", type=Path, default=Path("smoothcache-demo"), help="folder for what is written")

    explain = command("explain", _explain, "what can be cached in a model", "explain my_model.py:build --json")
    explain.add_argument("factory", help=f"{FACTORY} a model in eval mode and its inputs, a tuple or a dict")
    explain.add_argument("--schedule", type=Path, help="also predict what this schedule saves")
    explain.add_argument("--json", action="store_true", help="for machines")

    calibrate = command(
        "calibrate", _calibrate, "measure the errors of reuse, for `schedule`", "calibrate my_model.py:build -o c.json"
    )
    calibrate.add_argument("factory", help=f"{FACTORY} a model or pipeline, and a function that samples with it")
    calibrate.add_argument("-o", "--output", type=Path, required=True, help="the calibration file")
    calibrate.add_argument("--lags", type=int, default=3, help="how many steps back to look (3)")
    calibrate.add_argument("--steps", type=int, help="of a trajectory, if the model has no timestep to tell it by")
    calibrate.add_argument("--calls-per-step", type=int, default=1, help="of a bare model (1)")

    schedule = command(
        "schedule", _schedule, "make a schedule", "schedule calibration.json --alpha 0.18 -o schedule.json"
    )
    schedule.add_argument("calibration", type=Path, nargs="?", help="a calibration file; none for --interval")
    rule = schedule.add_mutually_exclusive_group(required=True)
    rule.add_argument("--alpha", type=float, help="the largest error allowed (the paper's rule)")
    rule.add_argument("--compute", type=float, help="the largest share of the branches' FLOPs to compute")
    rule.add_argument("--interval", type=int, help="compute every so many steps (FORA); needs --steps")
    schedule.add_argument("--steps", type=int, help="for --interval")
    schedule.add_argument("-o", "--output", type=Path, help="the schedule file")
    schedule.add_argument("--json", action="store_true", help="for machines")

    convert = command(
        "convert",
        _convert,
        "read a schedule file, also a published one, and write ours",
        "convert theirs.json ours.json",
    )
    convert.add_argument("source", type=Path, help="ours, or one that dit-smoothcache publishes")
    convert.add_argument("target", type=Path)

    plot = command("plot", _plot, "draw calibration errors or schedules", "plot calibration.json -o errors.png")
    plot.add_argument("files", type=Path, nargs="+", help="one calibration file, or schedule files")
    plot.add_argument("-o", "--output", type=Path, required=True, help="such as errors.png or errors.svg")
    plot.add_argument("--alphas", type=float, nargs="+", default=(), help="thresholds to mark")

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
    compare.add_argument("--rounds", type=int, default=1, help="timed rounds (1)")
    compare.add_argument("--calls-per-step", type=int, default=1, help="of a bare model (1)")
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
    """Run a command; returns the exit code: 0, or 1 after an error that was told."""
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
    from .demo.run import run_demo

    run_demo(
        options.output,
        samples=options.samples,
        alphas=tuple(options.alphas),
        steps=options.steps,
        backend=options.backend,
        say=lambda line: print(line, flush=True),
    )


def _explain(options: argparse.Namespace) -> None:
    from .explain import explain
    from .schedule import Schedule

    model, inputs = _made_by(options.factory, "a model and its inputs")
    schedule = None if options.schedule is None else Schedule.load(options.schedule)
    if isinstance(inputs, Mapping):
        found = explain(model, schedule=schedule, **inputs)
    elif isinstance(inputs, (tuple, list)):
        found = explain(model, *inputs, schedule=schedule)
    else:
        raise TypeError(f"{options.factory} gave {type(inputs).__name__} as inputs, expected a tuple or a dict")
    _show(found, options.json)


def _calibrate(options: argparse.Namespace) -> None:
    from .recording import calibrate

    model, sample = _made_by(options.factory, "a model or pipeline and a function")
    calibration = calibrate(
        model, sample, lags=options.lags, steps=options.steps, calls_per_step=options.calls_per_step
    )
    calibration.save(options.output)
    print(calibration)


def _schedule(options: argparse.Namespace) -> None:
    from .calibration import Calibration
    from .schedule import Schedule

    if options.interval is not None:
        if options.steps is None or options.calibration is not None:
            raise ValueError("--interval needs --steps, and no calibration: it computes every so many steps")
        schedule = Schedule.uniform(options.steps, options.interval)
    elif options.calibration is None:
        raise ValueError("--alpha and --compute need a calibration file: smoothcache calibrate makes one")
    else:
        calibration = Calibration.load(options.calibration)
        schedule = calibration.schedule(alpha=options.alpha, compute=options.compute)
    if options.output is not None:
        schedule.save(options.output)
    if options.json:
        print(json.dumps({"steps": schedule.steps, "compute": {k: list(v) for k, v in schedule.compute.items()}}))
    else:
        print(schedule)


def _convert(options: argparse.Namespace) -> None:
    from .schedule import Schedule

    schedule = Schedule.load(options.source)
    schedule.save(options.target)
    print(schedule)


def _plot(options: argparse.Namespace) -> None:
    from .calibration import FORMAT, Calibration
    from .plots import plot_errors, plot_schedules
    from .schedule import Schedule

    if len(options.files) == 1 and _format_of(options.files[0]) == FORMAT:
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
    from .comparison import compare
    from .schedule import Schedule

    model, sample = _made_by(options.factory, "a model or pipeline and a function")
    found = compare(
        model,
        {path.stem: Schedule.load(path) for path in options.schedules},
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
    from .graph_diff import diff_files

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


def _made_by(factory: str, expected: str) -> tuple[Any, Any]:
    """The two things that the factory returns."""
    place, separator, name = factory.rpartition(":")
    if not separator or not place or not name:
        raise ValueError(f"got {factory!r}, expected MODULE:FACTORY or path/to/file.py:FACTORY")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.exists():
            raise ValueError(f"there is no file {place}")
        sys.path.insert(0, str(path.parent))
        place = path.stem
    else:
        sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(place), name, None)
    if not callable(function):
        raise TypeError(f"{place} has no function called {name!r}")
    made = function()
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"{factory} returned {type(made).__name__}, expected a tuple of two: {expected}")
    return made
