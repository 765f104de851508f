"""How far errors move where ``max_history_bytes`` limits a calibration: ``python bench/calibration_memory.py``.

The digits DiT (12 blocks, 64 tokens, 8 samples with guidance), 20 Euler steps, the paper's errors over 3 lags: on all
tokens, and on as many as fit into a share of the memory.
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
import torch
from common import digits_model, write_result

import smoothcache_fx as smoothcache
from smoothcache_fx.demo import sample
from smoothcache_fx.graphs.tables import format_table

SHARES = (1 / 4, 1 / 16, 1 / 64, 1 / 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write bench/results/calibration_memory.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model = digits_model()

    def measured(limit: int | None) -> smoothcache.Calibration:
        def run(model: torch.nn.Module) -> None:
            sample(model, torch.arange(8), steps=arguments.steps)

        return smoothcache.calibrate(
            model, run, order=None, steps=arguments.steps, max_history_bytes=limit, progress=False
        )

    full = measured(None)
    rows = [("memory", "tokens", "median difference", "largest")]
    results = []
    for share in SHARES:
        some = measured(int(share * full.history_bytes))
        ratios = [np.abs(some.error(group) / full.error(group) - 1) for group in full.groups]
        differences = np.concatenate([ratio[np.isfinite(ratio)] for ratio in ratios])
        median, largest = float(np.median(differences)), float(differences.max())
        results.append({"share": share, "token_share": some.metadata["token_share"], "median": median, "max": largest})
        rows.append((f"{share:.1%}", f"{some.metadata['token_share']:.1%}", f"{median:.1%}", f"{largest:.1%}"))
    print(format_table(rows))
    if arguments.write:
        payload = {"full_bytes": full.history_bytes, "steps": arguments.steps, "shares": results}
        print(f"written to {write_result('calibration_memory', payload)}")


if __name__ == "__main__":
    main()
