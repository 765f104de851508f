"""Calibration's sums for three lags in one pass: ``python bench/kernels/relative_l1.py``.

Beside it, the plain reference eagerly and compiled by Inductor. Least bytes: the fresh output and the three earlier
ones read.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main

from smoothcache_fx.kernels.relative_l1 import relative_l1, relative_l1_reference

LAGS = 3


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    fresh, *earlier = (torch.randn(shape.size, device=device).to(dtype) for _ in range(1 + LAGS))
    return Case(
        bytes=(1 + LAGS) * fresh.numel() * dtype.itemsize,
        kernel=lambda: relative_l1(fresh, earlier),
        reference=lambda: relative_l1_reference(fresh, earlier),
        expression=relative_l1_reference,
        arguments=(fresh, earlier),
        tolerance=1e-6,
    )


if __name__ == "__main__":
    main("relative_l1", __doc__, build)
