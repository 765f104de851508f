"""``out = x + sum gates[i] * caches[i]`` in one pass: ``python bench/kernels/residual_accumulate.py``.

The run of DiT-XL/2 where all is reused: 56 terms, in one launch. Beside it, the same additions one by one, eagerly and
compiled by Inductor, which fuses them too. Least bytes: x and the caches read, out written, and a gate
``[batch, 1, width]`` for each.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main

from smoothcache_fx.kernels.residual_accumulate import residual_accumulate, residual_accumulate_reference

TERMS = 56


def expression(x: torch.Tensor, gates: list[torch.Tensor], caches: list[torch.Tensor]) -> torch.Tensor:
    for gate, cache in zip(gates, caches, strict=True):
        x = x + gate * cache
    return x


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    x, *caches = (torch.randn(shape.size, device=device).to(dtype) for _ in range(1 + TERMS))
    gates = [torch.randn(shape.batch, 1, shape.width, device=device).to(dtype) for _ in caches]
    operands = x, gates, caches
    return Case(
        bytes=sum(one.numel() for one in (x, x, *gates, *caches)) * dtype.itemsize,
        kernel=lambda: residual_accumulate(*operands),
        reference=lambda: residual_accumulate_reference(*operands),
        expression=expression,
        arguments=operands,
        roundings=TERMS,
    )


if __name__ == "__main__":
    main("residual_accumulate", __doc__, build)
