"""A computed branch joins the residual stream, and is kept for the steps that reuse it, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import BLOCK, COUNTS, OPTIONS, gated, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import check_cache, check_stream, check_term, product, rounded_like


def residual_store_reference(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor) -> Tensor:
    """``residual_store`` in plain PyTorch."""
    out = rounded_like(x, x.float() + product(gate, y))
    cache.copy_(y)
    return out


def _check(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor) -> None:
    check_stream("residual_store", x)
    check_term("residual_store", x, gate, y, "y")
    check_cache("residual_store", y, cache)


@torch.library.custom_op(
    "smoothcache::residual_store",
    mutates_args=("cache",),
    schema="(Tensor x, Tensor? gate, Tensor y, Tensor(a!) cache) -> Tensor",
)
def residual_store(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor) -> Tensor:
    """``out = x + gate * y; cache <- y``: one read of each input, one write of each output.

    Triton on CUDA, the plain reference elsewhere; both give the same bits.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape; float32, float16 or bfloat16, any strides.
        gate: broadcasts to ``x``: ``[batch, 1, width]`` (adaLN), ``[batch, tokens, width]``, ``[batch, tokens, 1]``,
            ``[width]`` (layer scale); or none.
        y: the branch's output, of ``x``'s shape. Its dtype, and the gate's, may be another than ``x``'s.
        cache: like ``y`` in shape, dtype and device; takes its bits as they are.

    Returns:
        A new tensor like ``x``. Operands are converted to float32; the product of gate and ``y`` and the sum with
        ``x`` are each rounded to float32, and the sum once more to ``x``'s dtype.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not fit together; on CUDA, strides that take more than four loops.
    """
    _check(x, gate, y, cache)
    if runs_triton(x):
        return _launch(x, gate, y, cache)
    return residual_store_reference(x, gate, y, cache)


@residual_store.register_fake
def _(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor) -> Tensor:
    _check(x, gate, y, cache)
    return torch.empty_like(x)


def _launch(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor) -> Tensor:
    out = torch.empty_like(x)
    spread = x if gate is None else gate.expand(x.shape)
    at = layout_of((x, spread, y, cache, out), BLOCK)
    if at.programs:
        with torch.cuda.device_of(x):
            residual_store_kernel[(at.programs,)](
                x, gate, y, cache, out, at.samples, at.blocks, at.width, at.total, at.strides,
                KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out


if triton is not None:

    @triton.jit(do_not_specialize=COUNTS)
    def residual_store_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        gate,  # strides[1], or None
        y,  # strides[2]
        cache,  # strides[3]
        out,  # strides[4]
        samples,
        blocks,
        width,
        total,
        strides,
        KINDS: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        group, sample, index = place(samples, blocks, WIDE, BLOCK)
        inside = index < total
        value = tl.load(y + offsets(group, sample, index, width, strides[2], KINDS[2]), inside)
        stream = tl.load(x + offsets(group, sample, index, width, strides[0], KINDS[0]), inside).to(tl.float32)
        tl.store(cache + offsets(group, sample, index, width, strides[3], KINDS[3]), value, inside)
        at = offsets(group, sample, index, width, strides[1], KINDS[1])
        stream += gated(value.to(tl.float32), gate, at, inside)
        at = offsets(group, sample, index, width, strides[4], KINDS[4])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)
