"""What is lost where runs of blocks are cached as one: ``python bench/grains.py``.

The digits DiT (12 blocks) with guidance, by three samplers: the first three steps computed, which forecasts need, then
every n-th; by branch and by stack, with forecasts of orders 0 to 2 and with coefficients fitted on ten other samples.
PSNR in dB of each sample to the uncached one of its seed, the median over samples; cache memory.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from common import digits_model, result_path, write_result
from quality_plans import FIT, GRAINS, ORDERS
from quality_samplers import SAMPLERS, Sampler

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from smoothcache_fx.graphs.tables import format_bytes, format_table

INTERVALS = (2, 3, 4, 6, 8)
COMPUTED_FIRST = 3
FORECASTS = (*ORDERS, FIT)


def psnrs(plain: torch.Tensor, cached: torch.Tensor) -> np.ndarray:
    """Of each sample, over the range of all uncached ones."""
    peak = plain.max() - plain.min()
    errors = (cached - plain).double().square().flatten(1).mean(1)
    return (20 * torch.log10(peak) - 10 * torch.log10(errors)).numpy()


def calibrated(model: torch.nn.Module, sampler: Sampler, grain: str, lags: int) -> smoothcache.Calibration:
    """On ten samples of other seeds."""

    def run(model: torch.nn.Module) -> None:
        sampler.run(model, torch.arange(10), sampler.steps, 1)

    return smoothcache.calibrate(model, run, lags=lags, order=2, grain=grain, steps=sampler.steps, progress=False)


def measure(
    model: torch.nn.Module, name: str, intervals: list[int], samples: int, forecasts: list[int | str]
) -> list[dict[str, object]]:
    """PSNR of all samples, and cache bytes, for each interval, grain and forecast of one sampler."""
    sampler = SAMPLERS[name]
    steps, labels = sampler.steps, torch.arange(samples) % 10

    def run() -> torch.Tensor:
        return sampler.run(model, labels, steps, 100)

    plain = run()
    calibrations = {}
    if FIT in forecasts:
        calibrations = {grain: calibrated(model, sampler, grain, max(intervals) - 1) for grain in GRAINS}
    found: list[dict[str, object]] = []
    rows = [("computed", *(f"{grain}, {order}" for grain in GRAINS for order in forecasts))]
    for interval in intervals:
        row = [step < COMPUTED_FIRST or step % interval == 0 for step in range(steps)]
        cells = []
        for grain, (kinds, _) in GRAINS.items():
            for order in forecasts:
                degree = max(ORDERS) if order == FIT else order
                schedule = Schedule(steps, dict.fromkeys(kinds, row), order=degree)
                if order == FIT:
                    schedule = calibrations[grain].fit(schedule)
                smoothcache.compile(model, schedule, backend="eager")
                values = psnrs(plain, run())
                cache_bytes = smoothcache.report(model).cache_bytes
                smoothcache.remove(model)
                cells.append((float(np.median(values)), cache_bytes))
                found.append(
                    {
                        "sampler": name,
                        "interval": interval,
                        "computed": sum(row),
                        "grain": grain,
                        "order": order,
                        "psnr": values.tolist(),
                        "cache_bytes": cache_bytes,
                    }
                )
        rows.append((f"{sum(row)} of {steps}", *(f"{value:.1f}" for value, _ in cells)))
        print(f"{sampler.title}, every {interval}th step: {', '.join(rows[-1][1:])}", flush=True)
    rows.append(("caches", *(format_bytes(size) for _, size in cells)))
    print(f"\n{sampler.title}\n{format_table(rows)}\n")
    return found


def key(run: dict[str, object]) -> tuple[object, ...]:
    """What a run is of."""
    return run["sampler"], run["interval"], run["grain"], run["order"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=list(SAMPLERS))
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--intervals", type=int, nargs="+", default=INTERVALS)
    parser.add_argument("--forecasts", nargs="+", default=FORECASTS, help="orders 0 to 2, and fit (all)")
    parser.add_argument("--write", action="store_true", help="write bench/results/grains.json; other rows there stay")
    arguments = parser.parse_args()
    forecasts = [order for order in FORECASTS if str(order) in map(str, arguments.forecasts)]
    model = digits_model()
    found = []
    for name in arguments.samplers:
        found += measure(model, name, arguments.intervals, arguments.samples, forecasts)
    if arguments.write:
        if result_path("grains").exists():
            earlier = json.loads(result_path("grains").read_text())["runs"]
            found = list({key(run): run for run in (*earlier, *found)}.values())
        print(f"written to {write_result('grains', {'computed_first': COMPUTED_FIRST, 'runs': found})}")


if __name__ == "__main__":
    main()
