"""What the residual ops take, checked before anything runs: the same errors eagerly, when traced, and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Values that a forecast weighs at the most: those of a parabola.
MOST_VALUES = 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_stream(op: str, x: Tensor) -> None:
    """``x``, the residual stream that everything is added to."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x is {x.dtype}, expected one of {_names()}: cast it, or use the plain expression")


def check_term(op: str, x: Tensor, gate: Tensor | None, y: Tensor, name: str) -> None:
    """One ``gate * y`` that is added to ``x``; ``name`` is what the op's signature calls ``y``."""
    check_value(op, x, y, name)
    check_broadcast(op, x, gate, "gate")


def check_value(op: str, x: Tensor, y: Tensor, name: str) -> None:
    """A branch's output."""
    _check_operand(op, x, y, name)
    if y.shape != x.shape:
        raise ValueError(f"{op}: {name} has shape {list(y.shape)}, expected x's {list(x.shape)}: expand or reshape it")


def check_broadcast(op: str, x: Tensor, operand: Tensor | None, name: str) -> None:
    """A gate, or what else is spread over ``x``; None is none."""
    if operand is None:
        return
    _check_operand(op, x, operand, name)
    missing = x.dim() - operand.dim()
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(operand.shape, x.shape[missing:], strict=True)):
        raise ValueError(
            f"{op}: {name} has shape {list(operand.shape)}, which does not broadcast to x's {list(x.shape)}: expected "
            "one like [batch, 1, width], [batch, tokens, 1] or [width]"
        )


def check_cache(op: str, y: Tensor, cache: Tensor) -> None:
    """The buffer that takes ``y`` as it is."""
    if cache.shape != y.shape or cache.dtype != y.dtype or cache.device != y.device:
        raise ValueError(
            f"{op}: cache is {cache.dtype} {list(cache.shape)} on {cache.device}, expected one like y: {y.dtype} "
            f"{list(y.shape)} on {y.device}"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        raise ValueError(
            f"{op}: cache is expanded (strides {list(cache.stride())} for shape {list(cache.shape)}), so that several "
            "elements share one place: expected a buffer with room for all, such as torch.empty_like(y)"
        )


def check_coefficients(op: str, x: Tensor, coefficients: Tensor, name: str) -> None:
    """The coefficients of one forecast: a line's, or a parabola's."""
    if coefficients.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {coefficients.dtype}, expected torch.float32: cast it first")
    if coefficients.dim() != 1 or not 1 <= coefficients.numel() <= MOST_VALUES:
        raise ValueError(
            f"{op}: {name} has shape {list(coefficients.shape)}, expected [1] to [{MOST_VALUES}]: one for each value"
        )
    if coefficients.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {coefficients.device}, expected x's device {x.device}: move it there first"
        )


def forecast_reference(values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_k coefficients[k] * values[k]`` in float32, each product and sum rounded, in the first value's dtype."""
    total = values[0].float() * coefficients[0]
    for number in range(1, len(values)):
        total = total + values[number].float() * coefficients[number]
    return total.to(values[0].dtype)


def product(gate: Tensor | None, y: Tensor) -> Tensor:
    """``gate * y`` in float32, or ``y`` where there is no gate: the plain form of what all kernels compute."""
    return y.float() if gate is None else y.float() * gate.float()


def rounded_like(x: Tensor, value: Tensor) -> Tensor:
    """``value`` rounded once to ``x``'s dtype, laid out in memory as the ops' output is."""
    return torch.empty_like(x).copy_(value)


def _check_operand(op: str, x: Tensor, operand: Tensor, name: str) -> None:
    if operand.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {operand.dtype}, expected one of {_names()}: cast it first")
    if operand.device != x.device:
        raise ValueError(f"{op}: {name} is on {operand.device}, expected x's device {x.device}: move it there first")


def _names() -> str:
    return ", ".join(str(dtype) for dtype in DTYPES)
