"""A reused branch joins the residual stream: what an earlier step kept, under this step's gate."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import BLOCK, COUNTS, OPTIONS, gated, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import check_stream, check_term, product, rounded_like


def residual_load_reference(x: Tensor, gate: Tensor | None, cache: Tensor) -> Tensor:
    """``residual_load`` in plain PyTorch."""
    return rounded_like(x, x.float() + product(gate, cache))


def _check(x: Tensor, gate: Tensor | None, cache: Tensor) -> None:
    check_stream("residual_load", x)
    check_term("residual_load", x, gate, cache, "cache")


@torch.library.custom_op(
    "smoothcache::residual_load",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor cache) -> Tensor",
)
def residual_load(x: Tensor, gate: Tensor | None, cache: Tensor) -> Tensor:
    """``out = x + gate * cache`` in one pass.

    Triton on CUDA, the plain reference elsewhere; both give the same bits, those that ``residual_store`` gives for
    ``y = cache``.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape; float32, float16 or bfloat16, any strides.
        gate: broadcasts to ``x``: ``[batch, 1, width]`` (adaLN), ``[batch, tokens, width]``, ``[batch, tokens, 1]``,
            ``[width]`` (layer scale); or none.
        cache: the branch's output of an earlier step, of ``x``'s shape. Its dtype, and the gate's, may be another
            than ``x``'s.

    Returns:
        A new tensor like ``x``. Operands are converted to float32; the product of gate and ``cache`` and the sum with
        ``x`` are each rounded to float32, and the sum once more to ``x``'s dtype.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not fit together; on CUDA, strides that take more than four loops.
    """
    _check(x, gate, cache)
    if runs_triton(x):
        return _launch(x, gate, cache)
    return residual_load_reference(x, gate, cache)


@residual_load.register_fake
def _(x: Tensor, gate: Tensor | None, cache: Tensor) -> Tensor:
    _check(x, gate, cache)
    return torch.empty_like(x)


def _launch(x: Tensor, gate: Tensor | None, cache: Tensor) -> Tensor:
    out = torch.empty_like(x)
    spread = x if gate is None else gate.expand(x.shape)
    at = layout_of((x, spread, cache, out), BLOCK)
    if at.programs:
        with torch.cuda.device_of(x):
            residual_load_kernel[(at.programs,)](
                x, gate, cache, out, at.samples, at.blocks, at.width, at.total, at.strides,
                KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out


if triton is not None:

    @triton.jit(do_not_specialize=COUNTS)
    def residual_load_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        gate,  # strides[1], or None
        cache,  # strides[2]
        out,  # strides[3]
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
        kept = tl.load(cache + offsets(group, sample, index, width, strides[2], KINDS[2]), inside).to(tl.float32)
        stream = tl.load(x + offsets(group, sample, index, width, strides[0], KINDS[0]), inside).to(tl.float32)
        stream += gated(kept, gate, offsets(group, sample, index, width, strides[1], KINDS[1]), inside)
        at = offsets(group, sample, index, width, strides[3], KINDS[3])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)
