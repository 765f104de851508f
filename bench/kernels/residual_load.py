"""``out = x + gate * cache`` in one pass: ``python bench/kernels/residual_load.py``.

Beside it, the same expression eagerly and compiled by Inductor. Least bytes: x and cache read, out written, and a gate
``[batch, 1, width]``.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main

from smoothcache_fx.kernels.residual_load import residual_load, residual_load_reference


def expression(x: torch.Tensor, gate: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return x + gate * cache


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    x, cache = (torch.randn(shape.size, device=device).to(dtype) for _ in range(2))
    operands = x, torch.randn(shape.batch, 1, shape.width, device=device).to(dtype), cache
    return Case(
        bytes=sum(one.numel() for one in (x, *operands)) * dtype.itemsize,
        kernel=lambda: residual_load(*operands),
        reference=lambda: residual_load_reference(*operands),
        expression=expression,
        arguments=operands,
    )


if __name__ == "__main__":
    main("residual_load", __doc__, build)
