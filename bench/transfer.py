"""What one calibration is worth at other steps, samplers and guidance scales: ``python bench/transfer.py``.

The digits DiT, calibrated with 50 of Euler's steps and guidance 1.5. For each other number of steps, sampler and scale,
schedules from this calibration (``steps`` and ``timesteps`` given) are compared with those from a calibration made
there: PSNR in dB of each unseen sample to the uncached one of its seed, the median over samples.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import digits_model, write_result
from grains import psnrs
from quality_samplers import GUIDANCE, SAMPLERS

import smoothcache_fx as smoothcache
from smoothcache_fx import Calibration
from smoothcache_fx.graphs.tables import format_table

SOURCE = "euler", 50, GUIDANCE
#: Sampler, steps and guidance scale: all samplers, fewer and more steps, and another scale.
TARGETS = (
    *((name, steps, GUIDANCE) for name in SAMPLERS for steps in (20, 30, 100)),
    *((name, 30, 3.0) for name in SAMPLERS),
)
ORDERS = (None, "fit")
LAGS = 8


def calibrated(model: torch.nn.Module, name: str, steps: int, guidance: float, folder: Path) -> Calibration:
    """On ten samples of other seeds; what an earlier run has left in the folder is taken from there."""
    kept = folder / f"{name}_{steps}_{guidance}.json"

    def run(model: torch.nn.Module) -> None:
        SAMPLERS[name].run(model, torch.arange(10), steps, 1, guidance)

    if not kept.exists():
        smoothcache.calibrate(model, run, lags=LAGS, order=2, steps=steps, progress=False).save(kept)
    return Calibration.load(kept)


def measure(model: torch.nn.Module, compute: float, samples: int, folder: Path) -> list[dict[str, Any]]:
    source = calibrated(model, *SOURCE, folder)
    labels = torch.arange(samples) % 10
    found = []
    for name, steps, guidance in TARGETS:
        sampler = SAMPLERS[name]
        plain = sampler.run(model, labels, steps, 100, guidance)
        fresh = calibrated(model, name, steps, guidance, folder)
        for order in ORDERS:
            values = {}
            for kind, calibration in (
                ("fresh", fresh),
                ("transferred", source.transfer(timesteps=fresh.timesteps)),
                ("by steps alone", source.transfer(steps)),
            ):
                schedule = calibration.schedule(compute=compute, order=order)
                smoothcache.compile(model, schedule, backend="eager")
                values[kind] = psnrs(plain, sampler.run(model, labels, steps, 100, guidance))
                smoothcache.remove(model)
            medians = {kind: statistics.median(each.tolist()) for kind, each in values.items()}
            found.append(
                {"sampler": name, "steps": steps, "guidance": guidance, "order": order, "compute": compute, **medians}
            )
            cells = ", ".join(f"{kind} {value:.1f}" for kind, value in medians.items())
            print(f"{sampler.title}, {steps} steps, guidance {guidance}, order {order}: {cells}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", type=float, default=0.4, help="share of the arithmetic (0.4)")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep calibrations here, and take those that are there")
    parser.add_argument("--write", action="store_true", help="write bench/results/transfer.json")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(digits_model(), arguments.compute, arguments.samples, folder)
    rows = [("sampler", "steps", "guidance", "forecasts", "fresh", "transferred", "lost")]
    for run in found:
        order = "best order" if run["order"] is None else run["order"]
        lost = run["fresh"] - run["transferred"]
        cells = (f"{run['fresh']:.1f}", f"{run['transferred']:.1f}", f"{lost:+.1f}")
        rows.append((SAMPLERS[run["sampler"]].title, str(run["steps"]), str(run["guidance"]), order, *cells))
    print(f"\n{format_table(rows)}\n")
    lost = {
        str(order): statistics.median(run["fresh"] - run["transferred"] for run in found if run["order"] == order)
        for order in ORDERS
    }
    print(f"lost in the median over {len(TARGETS)} transfers, dB: {lost}")
    if arguments.write:
        result = {"compute": arguments.compute, "samples": arguments.samples, "lags": LAGS, "lost": lost, "runs": found}
        print(f"written to {write_result('transfer', result)}")


if __name__ == "__main__":
    main()
