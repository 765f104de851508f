"""The last product of a computed branch is written to its cache at once, and read there by what follows.

A branch that ends in a linear layer needs no memory of its own then, and its cache no copy. No kernel of ours is in it:
the product is PyTorch's, with another place for its output. Inductor writes the same call (``_inductor.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _check(left: Tensor, right: Tensor, bias: Tensor | None, cache: Tensor) -> None:
    op = "matmul_store"
    if left.dim() != 2 or right.dim() != 2:
        raise ValueError(
            f"{op}: left has shape {list(left.shape)} and right {list(right.shape)}, expected [rows, width] and "
            "[width, columns]: flatten them first"
        )
    if cache.dim() != 2 or cache.dtype != left.dtype or cache.device != left.device:
        raise ValueError(
            f"{op}: cache is {cache.dtype} {list(cache.shape)} on {cache.device}, expected the product's rows and "
            f"columns in {left.dtype} on {left.device}: view it so"
        )


@torch.library.custom_op(
    "smoothcache::matmul_store",
    mutates_args=("cache",),
    schema="(Tensor left, Tensor right, Tensor? bias, Tensor(a!) cache) -> ()",
)
def matmul_store(left: Tensor, right: Tensor, bias: Tensor | None, cache: Tensor) -> None:
    """``cache <- left @ right + bias``.

    Args:
        left: ``[rows, width]``, any dtype and strides that ``torch.addmm`` takes.
        right: ``[width, columns]``.
        bias: broadcasts to ``[rows, columns]``, or None.
        cache: ``[rows, columns]``, of ``left``'s dtype and device: takes the bits that ``torch.addmm`` or ``torch.mm``
            gives.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(left, right, bias, cache)
    if cache.shape != (left.shape[0], right.shape[1]):
        # PyTorch would resize it.
        raise ValueError(
            f"matmul_store: cache has shape {list(cache.shape)}, expected the product's "
            f"{[left.shape[0], right.shape[1]]}: view it so"
        )
    if bias is None:
        torch.mm(left, right, out=cache)
    else:
        torch.addmm(bias, left, right, out=cache)


@matmul_store.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None, cache: Tensor) -> None:
    _check(left, right, bias, cache)


@register_flop_formula(torch.ops.smoothcache.matmul_store)
def _flops(left: Sequence[int], right: Sequence[int], *arguments: object, **more: object) -> int:
    return 2 * left[0] * left[1] * right[1]
