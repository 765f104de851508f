"""What the ops that end in a norm share: LayerNorm or RMSNorm over rows, its own weights, and adaLN's modulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._triton import tl, triton
from .layout import Layout, row_layout
from .operands import check_broadcast, rounded_like

#: A program keeps its whole row in registers.
WIDEST = 8192
#: Elements of a row per warp: 16 a thread, two 128-bit accesses for 16-bit dtypes.
PER_WARP = 512
#: ``weight``, ``bias``, ``modulation`` and ``shift`` by name, in the order in which they are applied.
Spread = Mapping[str, Tensor | None]


def check_rows(op: str, x: Tensor, spread: Spread, instead: str) -> None:
    """Rows that a program can hold, and what is spread over them; ``instead`` names what takes other rows."""
    if x.dim() == 0 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected rows of 1 to {WIDEST} elements: use {instead}, and the "
            "model's own norm"
        )
    for name, operand in spread.items():
        check_broadcast(op, x, operand, name)


def norm_reference(out: Tensor, spread: Spread, eps: float, rms: bool) -> Tensor:
    """The norm of ``out`` and what follows in float32, rounded once to its dtype."""
    weight, bias, modulation, shift = spread.values()
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
    return rounded_like(out, value)


def rows_of(x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Layout, int, int]:
    """The layout of a launch with one program for each row of ``x``; how many these are; elements that each handles."""
    strides = tuple((x if one is None else one.expand(x.shape)).stride() for one in tensors)
    at = row_layout(tuple(x.shape), strides)
    return at, at.groups * at.samples * at.tokens, triton.next_power_of_2(at.width)


if triton is not None:

    @triton.jit
    def place_row(samples, tokens, BLOCK: tl.constexpr):
        """This program's ``(group, sample, token)``, and the indices of its row's elements."""
        row = tl.program_id(0)
        token = (row % tokens).to(tl.int64)
        sample = (row // tokens % samples).to(tl.int64)
        group = (row // tokens // samples).to(tl.int64)
        return group, sample, token, tl.arange(0, BLOCK).to(tl.int64)

    @triton.jit
    def columns(group, sample, token, column, strides):
        """Where a row's elements lie, from the tensor's ``data_ptr``."""
        return (group * strides[0] + sample * strides[1] + token * strides[2]) + column * strides[3]

    @triton.jit
    def read(tensor, at, inside, OTHERWISE: tl.constexpr):
        """What a tensor holds at these offsets, 0 outside; ``OTHERWISE`` for no tensor.

        Not None, which Triton 3.6 cannot return from a function.
        """
        if tensor is None:
            return tl.full(at.shape, OTHERWISE, tl.float32)
        else:
            return tl.load(tensor + at, inside, 0.0)

    @triton.jit
    def normalise(value, weights, biases, factors, shifts, inside, width, eps, RMS: tl.constexpr):
        """The norm of a row, which is 0 outside, and what follows."""
        if not RMS:
            value = tl.where(inside, value - tl.sum(value) / width, 0.0)
        # Launched from compiled code a scalar may come as float64.
        value *= tl.rsqrt(tl.sum(value * value) / width + tl.full((), eps, tl.float32))
        value = value * weights.to(tl.float32) + biases.to(tl.float32)
        return value * (1 + factors.to(tl.float32)) + shifts.to(tl.float32)

else:
    place_row = columns = read = normalise = None
