"""A run of reused branches joins the residual stream, and the next norm and adaLN modulation follow, in one pass.

In the variant that reuses everything a model's last norm reads nothing but such a run's sum. Beside
``residual_accumulate`` and a norm the stream is read once less, and not written where nothing else needs it: of 60
passes over ``[batch, tokens, width]`` for 56 terms, 58 or 57 are left. Yet it is no faster on an H200, by a
sweep that is not in this repository: 660 us for 56 terms of ``[64, 256, 1152]`` in bfloat16, where
``residual_accumulate`` takes 513 and Inductor's norm behind it 70. A program has one row, and rows of 1152 leave 7 of
16 lanes idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._addresses import address_table
from ._norms import Spread, check_rows, columns, norm_reference, normalise, place_row, read, rows_of
from ._runs import Coefficients, Gates, Part, Run, accumulate_reference, add_terms, alike, check_run, parts_of
from ._triton import runs_triton, tl, triton
from .operands import rounded_like
from .residual_accumulate import joined, launch_each

OP = "residual_accumulate_norm"
#: Elements of a row per warp, 4 a thread, as far as a program may have so many warps.
PER_WARP, MOST_WARPS = 128, 32
#: Elements of a row that a program loads at once, written out as so many iterations of the loop; more would spill.
AT_ONCE = 16384


def residual_accumulate_norm_reference(
    x: Tensor,
    gates: Gates,
    values: Sequence[Tensor],
    coefficients: Coefficients,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool = False,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """``residual_accumulate_norm`` in plain PyTorch."""
    out = rounded_like(x, accumulate_reference(x, Run(gates, values, coefficients)))
    spread = {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift}
    return out if keep else x.new_empty(0), norm_reference(out, spread, eps, rms)


def _check(x: Tensor, run: Run, spread: Spread, traced: bool = False) -> None:
    check_run(OP, x, run, traced)
    check_rows(OP, x, spread, "residual_accumulate")


@torch.library.custom_op(
    "smoothcache::residual_accumulate_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor?[] gates, Tensor[] values, Tensor?[]? coefficients, Tensor? weight, Tensor? bias, "
    "Tensor? modulation, Tensor? shift, float eps, bool rms=False, bool keep=True) -> (Tensor, Tensor)",
)
def residual_accumulate_norm(
    x: Tensor,
    gates: Gates,
    values: Sequence[Tensor],
    coefficients: Coefficients,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool = False,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """``out = x + sum_i gates[i] * sum_k coefficients[i][k] * value_ik; h = norm(out) * (1 + modulation) + shift``.

    ``residual_accumulate`` followed by a LayerNorm or RMSNorm over the last dimension and adaLN's modulation. Triton on
    CUDA, the plain reference elsewhere.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape with rows of up to ``WIDEST`` elements;
            float32, float16 or bfloat16, any strides.
        gates, values, coefficients: as ``residual_accumulate`` takes them.
        weight, bias: the norm's own, broadcast to ``x``: ``[width]``; or None.
        modulation, shift: adaLN's scale and shift, broadcast to ``x``: ``[batch, 1, width]``; or None.
        eps: added to the variance, or to the mean square.
        rms: RMSNorm, ``out * rsqrt(mean(out**2) + eps)``; else LayerNorm, the same of ``out - mean(out)``.
        keep: whether ``out`` is wanted. If not, it is not written.

    Returns:
        ``out``, the same bits as ``residual_accumulate`` gives, or an empty tensor; and ``h``. Both are new, and like
        ``x``. ``h`` is made of ``out`` as rounded to ``x``'s dtype; all of it is float32, rounded to ``x``'s dtype
        once. Sums over a row are taken in another order than the reference's, so that ``h`` may differ in the last
        bit.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, devices or numbers of terms that do not fit together, rows that are too wide; on CUDA,
            strides that take more than three loops over the rows.
    """
    spread = {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift}
    run = Run(gates, values, coefficients)
    _check(x, run, spread)
    if runs_triton(x):
        return _launch(x, run, spread, eps, rms, keep)
    return residual_accumulate_norm_reference(
        x, gates, values, coefficients, weight, bias, modulation, shift, eps, rms, keep
    )


@residual_accumulate_norm.register_fake
def _(
    x: Tensor,
    gates: Gates,
    values: Sequence[Tensor],
    coefficients: Coefficients,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool = False,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    spread = {"weight": weight, "bias": bias, "modulation": modulation, "shift": shift}
    _check(x, Run(gates, values, coefficients), spread, traced=True)
    return torch.empty_like(x) if keep else x.new_empty(0), torch.empty_like(x)


def _launch(x: Tensor, run: Run, spread: Spread, eps: float, rms: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """The run's last part and the norm in one launch; what cannot be part of its loop before it, in float32."""
    *before, last = parts_of(x, alike(x, run))
    stream = launch_each(x, joined(before), torch.float32)
    out, normed = torch.empty_like(x) if keep else None, torch.empty_like(x)
    _launch_last(stream, last, spread, out, normed, eps, rms)
    return x.new_empty(0) if out is None else out, normed


def _launch_last(
    x: Tensor, part: Part, spread: Spread, out: Tensor | None, normed: Tensor, eps: float, rms: bool
) -> None:
    gate, values = part.gate, tuple(part.values[: part.count])
    at, rows, block = rows_of(x, (x, gate, *spread.values(), out, normed, *values))
    if rows:
        table = address_table(part.addresses(), x.device)
        with torch.cuda.device_of(x):
            residual_accumulate_norm_kernel[(rows,)](
                x, table, gate, values, *spread.values(), out, normed, eps, len(part.gates), part.coefficient_stride,
                at.samples, at.tokens, at.width, at.strides,
                VALUES=len(values), FORECAST=part.coefficients is not None, ALL_GATED=part.all_gated,
                ALIGNED=part.is_aligned, RMS=rms, BLOCK=block, AT_ONCE=_iterations(part, block),
                num_warps=min(MOST_WARPS, max(1, block // PER_WARP)), enable_fp_fusion=False,
            )  # fmt: skip


def _iterations(part: Part, block: int) -> int:
    """Iterations whose loads are under way at once."""
    return max(1, AT_ONCE // (block * (part.count + (part.gate is not None))))


if triton is not None:

    @triton.jit(do_not_specialize=["samples", "tokens", "terms"])
    def residual_accumulate_norm_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        table,  # see add_terms
        gate,  # any one of the gates; all have strides[1]; it and all down to out may be None
        values,  # those of any one term; all have strides[8:VALUES + 8]
        weight,  # strides[2]
        bias,  # strides[3]
        modulation,  # strides[4]
        shift,  # strides[5]
        out,  # strides[6]
        normed,  # strides[7]
        eps,
        terms,
        coefficient_stride,
        samples,
        tokens,
        width,
        strides,
        VALUES: tl.constexpr,
        FORECAST: tl.constexpr,
        ALL_GATED: tl.constexpr,
        ALIGNED: tl.constexpr,
        RMS: tl.constexpr,
        BLOCK: tl.constexpr,
        AT_ONCE: tl.constexpr,
    ):
        group, sample, token, column = place_row(samples, tokens, BLOCK)
        inside = column < width
        # Past the end of the row all are 0, so that sums may run over the block.
        stream = tl.load(x + columns(group, sample, token, column, strides[0]), inside, 0.0).to(tl.float32)
        values_at = ()
        for number in tl.static_range(VALUES):
            values_at += (columns(group, sample, token, column, strides[8 + number]),)
        stream = add_terms(
            stream, table, terms, gate, columns(group, sample, token, column, strides[1]), values, values_at,
            coefficient_stride, column, width, VALUES, FORECAST, ALL_GATED, ALIGNED, AT_ONCE,
        )  # fmt: skip
        # What is needed after the sums is read before them: no load moves over their barriers.
        norm_weights = read(weight, columns(group, sample, token, column, strides[2]), inside, 1.0)
        biases = read(bias, columns(group, sample, token, column, strides[3]), inside, 0.0)
        factors = read(modulation, columns(group, sample, token, column, strides[4]), inside, 0.0)
        shifts = read(shift, columns(group, sample, token, column, strides[5]), inside, 0.0)
        rounded = stream.to(normed.dtype.element_ty)
        if out is not None:
            tl.store(out + columns(group, sample, token, column, strides[6]), rounded, inside)
        value = normalise(rounded.to(tl.float32), norm_weights, biases, factors, shifts, inside, width, eps, RMS)
        at = columns(group, sample, token, column, strides[7])
        tl.store(normed + at, value.to(normed.dtype.element_ty), inside)
