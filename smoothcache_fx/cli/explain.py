"""``smoothcache explain``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SmoothCacheError
from .command import FACTORY, command, show
from .models import dtype_named, from_diffusers, made_by, meta_inputs, shape_given, uncallable, value_given

if TYPE_CHECKING:
    from ..reports.explanation import Explanation
    from ..schedules.schedule import Schedule


def add(commands: Any) -> None:
    explain = command(
        commands,
        "explain",
        run,
        "show what can be cached in your own model, or in a diffusers class without its weights",
        "explain my_model.py:build --json",
        "explain DiTTransformer2DModel --config config.json --dtype bfloat16 --input hidden_states=2x4x32x32 "
        "--input timestep=2:int64 --input class_labels=2:int64",
    )
    explain.add_argument(
        "factory", help=f"{FACTORY} (model in eval mode, inputs as a tuple or dict); or the name of a diffusers class"
    )
    explain.add_argument("--config", type=Path, help="config.json of the diffusers class, or the folder that holds it")
    explain.add_argument(
        "--input",
        type=shape_given,
        action="append",
        default=[],
        metavar="NAME=SHAPE[:DTYPE]",
        help="a tensor argument of forward, such as hidden_states=1x4096x64 or class_labels=2:int64 (--dtype)",
    )
    explain.add_argument(
        "--value",
        type=value_given,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a non-tensor argument of forward, such as height=32",
    )
    explain.add_argument(
        "--dtype", type=dtype_named, help="dtype of the weights, and of inputs without a dtype of their own (float32)"
    )
    explain.add_argument("--schedule", type=Path, help="also predict the speed-up and memory of this schedule")
    explain.add_argument("--plot", type=Path, help="plot the cost of each step of the schedule")
    explain.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
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
    show(found, options.json)


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
