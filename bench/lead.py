"""How near samples come to converged ones with forecasts that aim ahead: ``python bench/lead.py --write``.

The demo's DiT with guidance 1.5, by three samplers: every n-th step computed, forecasts that aim 0, 1/4 and 1/2 of a
step ahead. PSNR in dB of single samples, the mean, to the samples of four times the steps and to the uncached ones.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import statistics
from typing import Any

import torch
from common import write_result
from quality_samplers import SAMPLERS

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from smoothcache_fx.demo import load_model
from smoothcache_fx.graphs.tables import format_table
from smoothcache_fx.reports.compare import psnr

LEADS = (0.0, 0.25, 0.5)
ORDERS = (1, 2)


def mean_psnr(reference: torch.Tensor, images: torch.Tensor) -> float:
    return statistics.fmean(psnr(*pair) for pair in zip(reference, images, strict=True))


def measure(name: str, samples: int, intervals: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of one sampler, the uncached first."""
    sampler, model = SAMPLERS[name], load_model()
    steps, labels = sampler.steps, torch.arange(samples) % model.num_classes
    converged, uncached = (sampler.run(model, labels, count, 5) for count in (4 * steps, steps))
    rows = [{"sampler": name, "interval": 1, "order": 0, "lead": 0.0, "converged": mean_psnr(converged, uncached)}]
    for order in ORDERS:
        cached = None
        for interval, lead in itertools.product(intervals, LEADS):
            row = Schedule.uniform(steps, interval)
            schedule = dataclasses.replace(row, order=order, lead=lead)
            if cached is None:
                cached = smoothcache.compile(copy.deepcopy(model), schedule, backend="eager")
            else:
                smoothcache.set_schedule(cached, schedule)
            images = sampler.run(cached, labels, steps, 5)
            distances = {"converged": mean_psnr(converged, images), "uncached": mean_psnr(uncached, images)}
            rows.append({"sampler": name, "interval": interval, "order": order, "lead": lead, **distances})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", choices=sorted(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--write", action="store_true", help="write bench/results/lead.json")
    arguments = parser.parse_args()
    rows = [row for name in arguments.samplers for row in measure(name, arguments.samples, tuple(arguments.intervals))]
    table = [("sampler", "every n-th", "order", "ahead", "to converged", "to uncached")]
    for row in rows:
        near = f"{row['uncached']:.1f}" if "uncached" in row else "-"
        names = (SAMPLERS[row["sampler"]].title, str(row["interval"]), str(row["order"]), f"{row['lead']:g}")
        table.append((*names, f"{row['converged']:.1f}", near))
    print(format_table(table))
    if arguments.write:
        print(f"written to {write_result('lead', {'samples': arguments.samples, 'rows': rows})}")


if __name__ == "__main__":
    main()
