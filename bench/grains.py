"""What is lost where runs of blocks are cached as one: ``python bench/grains.py``.

The digits DiT (12 blocks), 50 Euler steps with guidance: every n-th step computed, by branch and by stack, with
forecasts of orders 0 to 2 and with coefficients fitted on ten other samples. PSNR in dB of each sample to the uncached
one of its seed, the median over samples; cache memory.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import write_result

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from smoothcache_fx.demo import load_model, sample
from smoothcache_fx.graphs.tables import format_bytes, format_table

STEPS = 50
INTERVALS = (2, 3, 4, 6, 8)
ORDERS = (0, 1, 2, "fit")
GRAINS = {"branch": ("attn", "ffn"), "stack": ("stack",)}


def psnrs(plain: torch.Tensor, cached: torch.Tensor) -> np.ndarray:
    """Of each sample, over the range of all uncached ones."""
    peak = plain.max() - plain.min()
    errors = (cached - plain).double().square().flatten(1).mean(1)
    return (20 * torch.log10(peak) - 10 * torch.log10(errors)).numpy()


def calibrated(model: torch.nn.Module, grain: str, lags: int) -> smoothcache.Calibration:
    """On ten samples of other seeds."""

    def run(model: torch.nn.Module) -> None:
        sample(model, torch.arange(10), steps=STEPS, seed=1)

    return smoothcache.calibrate(model, run, lags=lags, order=2, grain=grain, steps=STEPS, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--intervals", type=int, nargs="+", default=INTERVALS)
    parser.add_argument("--write", action="store_true", help="write bench/results/grains.json")
    arguments = parser.parse_args()
    model = load_model().eval()
    labels = torch.arange(arguments.samples) % 10

    def run() -> torch.Tensor:
        return sample(model, labels, steps=STEPS, seed=100)

    plain = run()
    calibrations = {grain: calibrated(model, grain, max(arguments.intervals) - 1) for grain in GRAINS}
    rows = [("computed", *(f"{grain}, {order}" for grain in GRAINS for order in ORDERS))]
    found, memory = [], {}
    for interval in arguments.intervals:
        cells = []
        for grain, kinds in GRAINS.items():
            for order in ORDERS:
                row = Schedule.uniform(STEPS, interval).compute["attn"]
                schedule = Schedule(STEPS, dict.fromkeys(kinds, row), order=2 if order == "fit" else order)
                if order == "fit":
                    schedule = calibrations[grain].fit(schedule)
                smoothcache.compile(model, schedule, backend="eager")
                values = psnrs(plain, run())
                memory[grain, order] = smoothcache.report(model).cache_bytes
                smoothcache.remove(model)
                cells.append(float(np.median(values)))
                found.append({"interval": interval, "grain": grain, "order": order, "psnr": values.tolist()})
        rows.append((f"{sum(row)} of {STEPS}", *(f"{value:.1f}" for value in cells)))
        print(f"every {interval}th step: {', '.join(f'{value:.1f}' for value in cells)}", flush=True)
    rows.append(("caches", *map(format_bytes, memory.values())))
    print(format_table(rows))
    if arguments.write:
        sizes = [{"grain": grain, "order": order, "cache_bytes": size} for (grain, order), size in memory.items()]
        print(f"written to {write_result('grains', {'steps': STEPS, 'runs': found, 'memory': sizes})}")


if __name__ == "__main__":
    main()
