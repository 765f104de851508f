"""A branch joins the residual stream, and the next block's norm and adaLN modulation follow, in one pass over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import runs_triton, tl, triton
from .layout import row_layout
from .operands import check_broadcast, check_cache, check_stream, check_term, product, rounded_like

#: A program keeps its whole row in registers.
WIDEST = 8192
#: Elements of a row per warp: 16 a thread, two 128-bit accesses for 16-bit dtypes.
PER_WARP = 512


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
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``residual_norm`` in plain PyTorch."""
    out = rounded_like(x, x.float() + product(gate, y, scale))
    if cache is not None:
        cache.copy_(y)
    value = out.float()
    if not rms:
        value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * weight.float()
    if bias is not None:
        value = value + bias.float()
    if modulation is not None:
        value = value * (1 + modulation.float())
    if shift is not None:
        value = value + shift.float()
    return out, rounded_like(x, value)


def _check(x: Tensor, gate: Tensor | None, y: Tensor, cache: Tensor | None, spread: dict[str, Tensor | None]) -> None:
    op = "residual_norm"
    check_stream(op, x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected rows of 1 to {WIDEST} elements: use residual_store or "
            "residual_load, and the model's own norm"
        )
    check_term(op, x, gate, y, "y")
    if cache is not None:
        check_cache(op, y, cache)
    for name, operand in spread.items():
        check_broadcast(op, x, operand, name)


@torch.library.custom_op(
    "smoothcache::residual_norm",
    mutates_args=("cache",),
    schema="(Tensor x, Tensor? gate, Tensor y, Tensor(a!)? cache, Tensor? weight, Tensor? bias, Tensor? modulation, "
    "Tensor? shift, float eps, bool rms=False, float scale=1.0) -> (Tensor, Tensor)",
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
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``out = x + (gate * scale) * y; cache <- y; h = norm(out) * (1 + modulation) + shift``: one read of the row.

    ``residual_store`` followed by a LayerNorm or RMSNorm over the last dimension and adaLN's modulation. Without a
    cache it is ``residual_load``, with the earlier step's output as ``y``. Triton on CUDA, the plain reference
    elsewhere.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape with rows of up to ``WIDEST`` elements;
            float32, float16 or bfloat16, any strides.
        gate: broadcasts to ``x``, or None.
        y: the branch's output, of ``x``'s shape. Its dtype, and those of what is broadcast, may be others than ``x``'s.
        cache: like ``y`` in shape, dtype and device, takes its bits as they are; or None.
        y: the branch's output, of ``x``'s shape. Its dtype and those of what is broadcast may be others than ``x``'s.
        modulation, shift: adaLN's scale and shift, broadcast to ``x``: ``[batch, 1, width]``; or None.
        eps: added to the variance, or to the mean square.
        rms: RMSNorm, ``out * rsqrt(mean(out**2) + eps)``; else LayerNorm, the same of ``out - mean(out)``.
        scale: a gate that is the same everywhere; rounded to float32.

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
        return _launch(x, gate, y, cache, spread, eps, rms, scale)
    return residual_norm_reference(x, gate, y, cache, weight, bias, modulation, shift, eps, rms, scale)


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
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check(x, gate, y, cache, {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift})
    return torch.empty_like(x), torch.empty_like(x)


def _launch(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    cache: Tensor | None,
    spread: dict[str, Tensor | None],
    eps: float,
    rms: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, normed = torch.empty_like(x), torch.empty_like(x)
    tensors = (x, gate, y, cache, *spread.values(), out, normed)
    strides = tuple((x if one is None else one.expand(x.shape)).stride() for one in tensors)
    at = row_layout(tuple(x.shape), strides)
    rows = at.groups * at.samples * at.tokens
    block = triton.next_power_of_2(at.width)
    if rows:
        with torch.cuda.device_of(x):
            residual_norm_kernel[(rows,)](
                *tensors, scale, eps, at.samples, at.tokens, at.width, at.strides,
                RMS=rms, BLOCK=block, num_warps=max(1, block // PER_WARP), enable_fp_fusion=False,
            )  # fmt: skip
    return out, normed


if triton is not None:

    @triton.jit
    def _columns(group, sample, token, column, strides):
        """Where a row's elements lie, from the tensor's ``data_ptr``."""
        return (group * strides[0] + sample * strides[1] + token * strides[2]) + column * strides[3]

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
        scale,
        eps,
        samples,
        tokens,
        width,
        strides,
        RMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        token = (row % tokens).to(tl.int64)
        sample = (row // tokens % samples).to(tl.int64)
        group = (row // tokens // samples).to(tl.int64)
        column = tl.arange(0, BLOCK).to(tl.int64)
        inside = column < width

        # Past the end of the row all are 0, so that sums may run over the block.
        branch = tl.load(y + _columns(group, sample, token, column, strides[2]), inside, 0.0)
        stream = tl.load(x + _columns(group, sample, token, column, strides[0]), inside, 0.0).to(tl.float32)
        # Launched from compiled code a scalar may come as float64.
        factor = tl.full((), scale, tl.float32)
        if gate is not None:
            at = _columns(group, sample, token, column, strides[1])
            factor = tl.load(gate + at, inside, 0.0).to(tl.float32) * factor
        # What is needed after the sums is read before them: no load moves over their barriers.
        if weight is not None:
            weights = tl.load(weight + _columns(group, sample, token, column, strides[4]), inside, 0.0)
        if bias is not None:
            biases = tl.load(bias + _columns(group, sample, token, column, strides[5]), inside, 0.0)
        if modulation is not None:
            factors = tl.load(modulation + _columns(group, sample, token, column, strides[6]), inside, 0.0)
        if shift is not None:
            shifts = tl.load(shift + _columns(group, sample, token, column, strides[7]), inside, 0.0)
        if cache is not None:
            tl.store(cache + _columns(group, sample, token, column, strides[3]), branch, inside)
        stream += branch.to(tl.float32) * factor
        rounded = stream.to(out.dtype.element_ty)
        tl.store(out + _columns(group, sample, token, column, strides[8]), rounded, inside)

        value = rounded.to(tl.float32)
        if not RMS:
            value = tl.where(inside, value - tl.sum(value) / width, 0.0)
        value *= tl.rsqrt(tl.sum(value * value) / width + tl.full((), eps, tl.float32))
        if weight is not None:
            value *= weights.to(tl.float32)
        if bias is not None:
            value += biases.to(tl.float32)
        if modulation is not None:
            value *= 1 + factors.to(tl.float32)
        if shift is not None:
            value += shifts.to(tl.float32)
        at = _columns(group, sample, token, column, strides[9])
        tl.store(normed + at, value.to(normed.dtype.element_ty), inside)
