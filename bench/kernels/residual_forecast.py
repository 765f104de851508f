"""``out = x + gate * sum weights[i] * values[i]`` in one pass: ``python bench/kernels/residual_forecast.py``.

Of three values, a parabola's. Beside it, the same expression, its sum in float32 as the passes write it, eagerly and
compiled by Inductor, which fuses it too. Least bytes: x and the values read, out written, and a gate
``[batch, 1, width]``; the weights are a few bytes.
"""

from __future__ import annotations

import torch
from common import Case, Shape, main

from smoothcache_fx.kernels.residual_forecast import residual_forecast, residual_forecast_reference

#: Of a parabola through three neighbouring steps, at the next one.
WEIGHTS = (3.0, -3.0, 1.0)


def expression(x: torch.Tensor, gate: torch.Tensor, values: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    total = values[0].float() * weights[0]
    for number in range(1, len(values)):
        total = total + values[number].float() * weights[number]
    return x + gate * total.to(values[0].dtype)


def build(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    x, *values = (torch.randn(shape.size, device=device).to(dtype) for _ in range(1 + len(WEIGHTS)))
    gate = torch.randn(shape.batch, 1, shape.width, device=device).to(dtype)
    operands = x, gate, values, torch.tensor(WEIGHTS, device=device)
    return Case(
        bytes=sum(one.numel() for one in (x, x, gate, *values)) * dtype.itemsize,
        kernel=lambda: residual_forecast(*operands),
        reference=lambda: residual_forecast_reference(*operands),
        expression=expression,
        arguments=operands,
    )


if __name__ == "__main__":
    main("residual_forecast", __doc__, build)
