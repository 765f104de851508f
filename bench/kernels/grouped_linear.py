"""The linears that make the gates of 28 blocks, in one launch: ``python bench/kernels/grouped_linear.py``.

28 weights ``[width, width]`` meet one row a sample. Beside it, one ``addmm`` after the other, eagerly and compiled by
Inductor. Least bytes: the weights and biases read, the output written.
"""

from __future__ import annotations

import torch
from common import ROUNDING, Case, Shape, main

from smoothcache_fx.kernels.grouped_linear import grouped_linear, grouped_linear_reference

MEMBERS = 28


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    scale = shape.width**-0.5
    x = torch.randn(shape.batch, shape.width, device=device).to(dtype)
    weights = [(torch.randn(shape.width, shape.width, device=device) * scale).to(dtype) for _ in range(MEMBERS)]
    biases = [torch.randn(shape.width, device=device).to(dtype) for _ in range(MEMBERS)]
    operands = [x] * MEMBERS, weights, biases
    return Case(
        bytes=(sum(one.numel() for one in (*weights, *biases)) + MEMBERS * x.numel()) * dtype.itemsize,
        kernel=lambda: grouped_linear(*operands),
        reference=lambda: grouped_linear_reference(*operands),
        expression=grouped_linear_reference,
        arguments=operands,
        tolerance=2 * ROUNDING[dtype],
    )


if __name__ == "__main__":
    main("grouped_linear", __doc__, build)
