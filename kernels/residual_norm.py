"""A branch joins the residual stream, and the next block's norm and adaLN modulation follow, in one pass over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ._norms import PER_WARP, Spread, check_rows, columns, norm_reference, normalise, place_row, read, rows_of
from ._triton import gated, runs_triton, tl, triton
from .operands import check_cache, check_stream, check_term, product, rounded_like


def residual_norm_reference(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    cache: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """``residual_norm`` in plain PyTorch."""
    out = rounded_like(x, x.float() + product(gate, y))
    if cache is not None:
        cache.copy_(y)
    spread = {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift}
    return out, norm_reference(out, spread, eps, rms)


def _check(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor | None, spread: Spread) -> None:
    op = "residual_norm"
    check_stream(op, x)
    check_rows(op, x, spread, "residual_store or residual_load")
    check_term(op, x, gate, y, "y")
    if cache is not None:
        check_cache(op, y, cache)


@torch.library.custom_op(
    "smoothcache::residual_norm",
    mutates_args=("cache",),
    schema="(Tensor x, Tensor? gate, Tensor y, Tensor(a!)? cache, Tensor? weight, Tensor? bias, Tensor? modulation, "
    "Tensor? shift, float eps, bool rms=False) -> (Tensor, Tensor)",
)
def residual_norm(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    cache: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """``out = x + gate * y; cache <- y; h = norm(out) * (1 + modulation) + shift``: one read of the row.

    ``residual_store`` followed by a LayerNorm or RMSNorm over the last dimension and adaLN's modulation. Without a
    cache it is ``residual_load``, with the earlier step's output as ``y``. Triton on CUDA, the plain reference
    elsewhere.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape with rows of up to ``WIDEST`` elements;
            float32, float16 or bfloat16, any strides.
        gate: broadcasts to ``x``, or None.
        y: the branch's output, of ``x``'s shape. Its dtype, and those of what is broadcast, may be others than ``x``'s.
        cache: like ``y`` in shape, dtype and device, takes its bits as they are; or None.
        weight, bias: the norm's own, broadcast to ``x``: ``[width]``; or None.
        modulation, shift: adaLN's scale and shift, broadcast to ``x``: ``[batch, 1, width]``; or None.
        eps: added to the variance, or to the mean square.
        rms: RMSNorm, ``out * rsqrt(mean(out**2) + eps)``; else LayerNorm, the same of ``out - mean(out)``.

    Returns:
        ``out``, the same bits as ``residual_store`` gives, and ``h``, both new tensors like ``x``. ``h`` is made of
        ``out`` as rounded to ``x``'s dtype; all of it is float32, rounded to ``x``'s dtype once. Sums over a row are
        taken in another order than the reference's, so that ``h`` may differ in the last bit.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not fit together, rows that are too wide; on CUDA, strides that take more
            than three loops over the rows.
    """
    spread = {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift}
    _check(x, gate, y, cache, spread)
    if runs_triton(x):
        return _launch(x, gate, y, cache, spread, eps, rms)
    return residual_norm_reference(x, gate, y, cache, weight, bias, modulation, shift, eps, rms)


@residual_norm.register_fake
def _(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    cache: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(x, gate, y, cache, {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift})
    return torch.empty_like(x), torch.empty_like(x)


def _launch(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    cache: Tensor | None,
    spread: Spread,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    out, normed = torch.empty_like(x), torch.empty_like(x)
    tensors = (x, gate, y, cache, *spread.values(), out, normed)
    at, rows, block = rows_of(x, tensors)
    if rows:
        with torch.cuda.device_of(x):
            residual_norm_kernel[(rows,)](
                *tensors, eps, at.samples, at.tokens, at.width, at.strides,
                RMS=rms, BLOCK=block, num_warps=max(1, block // PER_WARP), enable_fp_fusion=False,
            )  # fmt: skip
    return out, normed


if triton is not None:

    @triton.jit(do_not_specialize=["samples", "tokens"])
    def residual_norm_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        gate,  # strides[1]; it and all others but y, out and normed may be None
        y,  # strides[2]
        cache,  # strides[3]
        weight,  # strides[4]
        bias,  # strides[5]
        modulation,  # strides[6]
        shift,  # strides[7]
        out,  # strides[8]
        normed,  # strides[9]
        eps,
        samples,
        tokens,
        width,
        strides,
        RMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        group, sample, token, column = place_row(samples, tokens, BLOCK)
        inside = column < width
        # Past the end of the row all are 0, so that sums may run over the block.
        branch = tl.load(y + columns(group, sample, token, column, strides[2]), inside, 0.0)
        stream = tl.load(x + columns(group, sample, token, column, strides[0]), inside, 0.0).to(tl.float32)
        stream += gated(branch.to(tl.float32), gate, columns(group, sample, token, column, strides[1]), inside)
        # What is needed after the sums is read before them: no load moves over their barriers.
        weights = read(weight, columns(group, sample, token, column, strides[4]), inside, 1.0)
        biases = read(bias, columns(group, sample, token, column, strides[5]), inside, 0.0)
        factors = read(modulation, columns(group, sample, token, column, strides[6]), inside, 0.0)
        shifts = read(shift, columns(group, sample, token, column, strides[7]), inside, 0.0)
        if cache is not None:
            tl.store(cache + columns(group, sample, token, column, strides[3]), branch, inside)
        rounded = stream.to(out.dtype.element_ty)
        tl.store(out + columns(group, sample, token, column, strides[8]), rounded, inside)
        value = normalise(rounded.to(tl.float32), weights, biases, factors, shifts, inside, width, eps, RMS)
        at = columns(group, sample, token, column, strides[9])
        tl.store(normed + at, value.to(normed.dtype.element_ty), inside)
