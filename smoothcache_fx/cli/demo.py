"""``smoothcache demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command

#: Thresholds and budgets of the demo's schedules, which compute about the same: a half to a third of the FLOPs.
DEMO_ALPHAS, DEMO_BUDGETS = (0.08, 0.12, 0.18), (0.5, 0.36, 0.28)
QUICK_ALPHAS, QUICK_BUDGETS = (0.3,), (0.4,)


def add(commands: Any) -> None:
    demo = command(
        commands,
        "demo",
        run,
        "calibrate, compile and sample a small trained DiT, and measure speed and quality",
        "demo --alphas 0.1 0.2 --output results",
    )
    demo.add_argument("--quick", action="store_true", help="a short run: 20 steps, one alpha, one budget")
    demo.add_argument("--samples", type=int, default=120, help="images per configuration, in batches of 40 (120)")
    demo.add_argument("--alphas", type=float, nargs="+", metavar="ALPHA", help="error thresholds for the paper's rule")
    demo.add_argument(
        "--compute", type=float, nargs="+", metavar="SHARE", help="compute budgets, as shares of the branches' FLOPs"
    )
    demo.add_argument("--steps", type=int, help="denoising steps (50)")
    demo.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    demo.add_argument("--output", type=Path, default=Path("smoothcache-demo"), help="output folder")


def run(options: argparse.Namespace) -> None:
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
