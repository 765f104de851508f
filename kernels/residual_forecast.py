"""A reused branch that is forecast joins the residual stream: the weighted sum of what earlier steps kept, gated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import BLOCK, COUNTS, OPTIONS, gated, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import check_stream, check_term, forecast_reference
from .residual_load import residual_load_reference

#: Values that a forecast weighs: those of a line, or of a parabola.
LENGTHS = (2, 3)


def residual_forecast_reference(
    x: Tensor, gate: Tensor | None, values: Sequence[Tensor], coefficients: Tensor
) -> Tensor:
    """``residual_forecast`` in plain PyTorch."""
    return residual_load_reference(x, gate, forecast_reference(values, coefficients))


def _check(x: Tensor, gate: Tensor | None, values: Sequence[Tensor], coefficients: Tensor) -> None:
    op = "residual_forecast"
    check_stream(op, x)
    if len(values) not in LENGTHS:
        raise ValueError(
            f"{op}: got {len(values)} values, expected 2 or 3: use residual_load for one, and the plain expression for "
            "more"
        )
    for number, value in enumerate(values):
        check_term(op, x, gate, value, f"values[{number}]")
    if coefficients.dtype != torch.float32:
        raise TypeError(f"{op}: coefficients is {coefficients.dtype}, expected torch.float32: cast it first")
    if coefficients.shape != (len(values),):
        raise ValueError(
            f"{op}: coefficients has shape {list(coefficients.shape)}, expected [{len(values)}]: one a value"
        )
    if coefficients.device != x.device:
        raise ValueError(
            f"{op}: coefficients is on {coefficients.device}, expected x's device {x.device}: move it there first"
        )


@torch.library.custom_op(
    "smoothcache::residual_forecast",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor[] values, Tensor coefficients) -> Tensor",
)
def residual_forecast(x: Tensor, gate: Tensor | None, values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``out = x + gate * sum_i coefficients[i] * values[i]`` in one pass.

    Triton on CUDA, the plain reference elsewhere; both give the same bits. These are the bits of ``residual_load`` with
    the sum as its cache; so with coefficients 1, 0 (and 0), those of ``residual_load`` with ``values[0]``, but for the
    sign where both ``x`` and ``values[0]`` are zero.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape; float32, float16 or bfloat16, any strides.
        gate: broadcasts to ``x``: ``[batch, 1, width]`` (adaLN), ``[batch, tokens, width]``, ``[batch, tokens, 1]``,
            ``[width]`` (layer scale); or none.
        values: the branch's outputs of two or three earlier steps, or the last one and differences of such; each of
            ``x``'s shape and of any of these dtypes, as the gate may be. They are finite: a coefficient of 0 keeps
            neither a NaN nor an infinity out.
        coefficients: float32 ``[len(values)]`` on ``x``'s device, any stride and offset. It is read where the op runs,
            so that its numbers may change while a captured graph stays.

    Returns:
        A new tensor like ``x``. Operands are converted to float32; each coefficient's product with its value, and their
        sum, first to last, are rounded to float32, and the sum once more to the dtype of ``values[0]``. Then the gate's
        product with the sum, and what that and ``x`` add up to are each rounded to float32, and the last once more to
        ``x``'s dtype.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, devices or numbers of values and coefficients that do not fit together; on CUDA, strides
            that take more than four loops.
    """
    _check(x, gate, values, coefficients)
    if runs_triton(x):
        return _launch(x, gate, values, coefficients)
    return residual_forecast_reference(x, gate, values, coefficients)


@residual_forecast.register_fake
def _(x: Tensor, gate: Tensor | None, values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    _check(x, gate, values, coefficients)
    return torch.empty_like(x)


def _launch(x: Tensor, gate: Tensor | None, values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    out = torch.empty_like(x)
    spread = x if gate is None else gate.expand(x.shape)
    at = layout_of((x, spread, *values, out), BLOCK)
    if at.programs:
        with torch.cuda.device_of(x):
            residual_forecast_kernel[(at.programs,)](
                x, gate, tuple(values), coefficients, out, coefficients.stride(0), at.samples, at.blocks, at.width,
                at.total, at.strides, VALUES=len(values), KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out


if triton is not None:
    # Each site has its part of one tensor of coefficients: one kernel for all of them, wherever theirs begins.
    @triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["coefficients"])
    def residual_forecast_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        gate,  # strides[1], or None
        values,  # strides[2:VALUES + 2]
        coefficients,  # [VALUES] with coefficient_stride
        out,  # strides[VALUES + 2]
        coefficient_stride,
        samples,
        blocks,
        width,
        total,
        strides,
        VALUES: tl.constexpr,
        KINDS: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        group, sample, index = place(samples, blocks, WIDE, BLOCK)
        inside = index < total
        at = offsets(group, sample, index, width, strides[2], KINDS[2])
        branch = tl.load(values[0] + at, inside).to(tl.float32) * tl.load(coefficients)
        for number in tl.static_range(1, VALUES):
            at = offsets(group, sample, index, width, strides[2 + number], KINDS[2 + number])
            value = tl.load(values[number] + at, inside).to(tl.float32)
            branch += value * tl.load(coefficients + number * coefficient_stride)
        branch = branch.to(values[0].dtype.element_ty).to(tl.float32)
        stream = tl.load(x + offsets(group, sample, index, width, strides[0], KINDS[0]), inside).to(tl.float32)
        stream += gated(branch, gate, offsets(group, sample, index, width, strides[1], KINDS[1]), inside)
        at = offsets(group, sample, index, width, strides[VALUES + 2], KINDS[VALUES + 2])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)
