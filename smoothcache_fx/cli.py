"""The command line: ``python -m smoothcache_fx``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import SmoothCacheError

#: Thresholds of the demo's schedules, which compute about a half to a third of the branches' FLOPs.
DEMO_ALPHAS = (0.08, 0.12, 0.18)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m smoothcache_fx",
        description="SmoothCache for any Diffusion Transformer, as a compiler pass.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="calibrate, schedule, compile and sample a small trained DiT, and measure all of it",
        description="Calibrates the shipped DiT on 10 trajectories, derives a schedule for each alpha, samples the "
        "same seeds uncached and cached, and prints and writes what it measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--samples", type=int, default=100, help="images per configuration, in batches of 50")
    demo.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        default=DEMO_ALPHAS,
        metavar="ALPHA",
        help="thresholds to derive schedules for",
    )
    demo.add_argument("--steps", type=int, default=50, help="denoising steps")
    demo.add_argument("--backend", default="inductor", help="inner compiler")
    demo.add_argument("--output", type=Path, default=Path("smoothcache-demo"), help="folder for what is written")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 1 after an error that was told."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "demo":
            from .demo.run import run_demo

            run_demo(
                options.output,
                samples=options.samples,
                alphas=tuple(options.alphas),
                steps=options.steps,
                backend=options.backend,
                say=lambda line: print(line, flush=True),
            )
    except (SmoothCacheError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
