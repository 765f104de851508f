"""``residual_store`` with the next LayerNorm and its modulation in one pass: ``python bench/kernels/residual_norm.py``.

Beside it, the same expression eagerly and compiled by Inductor, which fuses it too. Least bytes: x and y read, out,
cache and h written, and gate, scale and shift ``[batch, 1, width]``.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main

from smoothcache_fx.kernels.residual_norm import residual_norm, residual_norm_reference

EPS = 1e-6
#: Rows are summed in another order than the reference's, so that a rounding may fall the other way.
TOLERANCES = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-6}


def expression(
    x: torch.Tensor,
    gate: torch.Tensor,
    y: torch.Tensor,
    cache: torch.Tensor,
    modulation: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    cache.copy_(y)
    out = x + gate * y
    return out, torch.nn.functional.layer_norm(out, out.shape[-1:], eps=EPS) * (1 + modulation) + shift


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    x, y = (torch.randn(shape.size, device=device).to(dtype) for _ in range(2))
    gate, modulation, shift = (torch.randn(shape.batch, 1, shape.width, device=device).to(dtype) for _ in range(3))
    cache = torch.empty_like(y)
    operands = x, gate, y, cache, None, None, modulation, shift, EPS
    return Case(
        bytes=(5 * x.numel() + 3 * gate.numel()) * dtype.itemsize,
        kernel=lambda: residual_norm(*operands),
        reference=lambda: residual_norm_reference(*operands),
        expression=expression,
        arguments=(x, gate, y, cache, modulation, shift),
        written=(cache,),
        tolerance=TOLERANCES[dtype],
    )


if __name__ == "__main__":
    main("residual_norm", __doc__, build)
