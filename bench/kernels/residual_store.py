"""``out = x + gate * y; cache <- y`` in one pass: ``python bench/kernels/residual_store.py``.

Beside it, the same two lines eagerly and compiled by Inductor. Least bytes: x and y read, out and cache written, and a
gate ``[batch, 1, width]``.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main

from smoothcache_fx.kernels.residual_store import residual_store, residual_store_reference


def expression(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    cache.copy_(y)
    return x + gate * y


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    x, y = (torch.randn(shape.size, device=device).to(dtype) for _ in range(2))
    gate = torch.randn(shape.batch, 1, shape.width, device=device).to(dtype)
    operands = x, gate, y, torch.empty_like(y)
    return Case(
        bytes=(4 * x.numel() + gate.numel()) * dtype.itemsize,
        kernel=lambda: residual_store(*operands),
        reference=lambda: residual_store_reference(*operands),
        expression=expression,
        arguments=operands,
        written=operands[3:],
    )


if __name__ == "__main__":
    main("residual_store", __doc__, build)
