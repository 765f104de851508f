"""What the commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from ..calibration.measurements import FIT

FACTORY = "MODULE:FACTORY, or path/to/file.py:FACTORY: a function without arguments that returns"


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a command; ``run`` gets the parsed options and may return the exit code."""
    added = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog="\n".join(f"example: smoothcache {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    return added


def add_sampler(parser: argparse.ArgumentParser, steps: bool = True) -> None:
    """What the factory returns, and how its steps are counted; ``steps`` only where no schedule gives them."""
    parser.add_argument("factory", help=f"{FACTORY} (model or pipeline, function that samples with it)")
    if steps:
        parser.add_argument("--steps", type=int, help="denoising steps (needed only if forward() takes no timestep)")
    parser.add_argument(
        "--calls-per-step", type=int, help="model calls per step, for bare models (default: inferred from the timestep)"
    )
    add_progress(parser)


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="report the current step on stderr every few seconds (default: if it is a terminal)",
    )


def show(found: Any, as_json: bool) -> None:
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def order(text: str) -> int | str:
    """The order of a forecast on the command line: a number, or ``fit``."""
    return text if text == FIT else int(text)
