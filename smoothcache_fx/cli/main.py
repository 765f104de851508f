"""The command line: ``smoothcache``, or ``python -m smoothcache_fx``. One file a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import SmoothCacheError
from . import calibrate, choose, compare, convert, demo, diff, doctor, explain, plot, schedule

#: In the order in which the help lists them.
COMMANDS = (demo, explain, calibrate, schedule, choose, convert, plot, compare, diff, doctor)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="smoothcache", description="SmoothCache for any Diffusion Transformer, as a compiler pass."
    )
    root.add_argument("--version", action="version", version=f"smoothcache_fx {__version__}")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS:
        module.add(commands)
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
