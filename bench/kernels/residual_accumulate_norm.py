"""A run of reused branches, then LayerNorm and modulation: ``python bench/kernels/residual_accumulate_norm.py``.

DiT-XL/2 where all is reused: 56 terms and the last layer's norm, in one launch that does not write the stream. Beside
it, the same expression eagerly and compiled by Inductor. Least bytes: x and the caches read, h written, and a gate
``[batch, 1, width]`` for each cache, scale and shift.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main
from residual_accumulate import TERMS
from residual_norm import EPS, TOLERANCES

from smoothcache_fx.kernels.residual_accumulate_norm import residual_accumulate_norm, residual_accumulate_norm_reference


def expression(
    x: torch.Tensor,
    gates: list[torch.Tensor],
    caches: list[torch.Tensor],
    modulation: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    for gate, cache in zip(gates, caches, strict=True):
        x = x + gate * cache
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + modulation) + shift


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    x, *caches = (torch.randn(shape.size, device=device).to(dtype) for _ in range(1 + TERMS))
    vectors = torch.randn(TERMS + 2, shape.batch, 1, shape.width, device=device).to(dtype)
    modulation, shift, *gates = vectors
    operands = x, gates, caches, None, None, None, modulation, shift, EPS
    return Case(
        bytes=(2 * x.numel() + vectors.numel() + sum(cache.numel() for cache in caches)) * dtype.itemsize,
        kernel=lambda: residual_accumulate_norm(*operands, keep=False)[1],
        reference=lambda: residual_accumulate_norm_reference(*operands, keep=False)[1],
        expression=expression,
        arguments=(x, gates, caches, modulation, shift),
        tolerance=TOLERANCES[dtype],
        roundings=TERMS,
    )


if __name__ == "__main__":
    main("residual_accumulate_norm", __doc__, build)
