"""How far a cached trajectory may be from the oracle's: the one table of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float


#: The eager backends run the module's own kernels in its order; only views between them may differ.
SAME_KERNELS = {torch.float32: Tolerance(1e-6, 1e-6), torch.bfloat16: Tolerance(1e-6, 1e-6)}
#: Inductor fuses, so sums are reordered and bfloat16 is rounded less often.
FUSED_KERNELS = {torch.float32: Tolerance(1e-5, 1e-5), torch.bfloat16: Tolerance(2e-2, 2e-2)}


def tolerance(dtype: torch.dtype, backend: str = "eager") -> Tolerance:
    return (FUSED_KERNELS if backend == "inductor" else SAME_KERNELS)[dtype]


def excess(actual: Tensor, expected: Tensor, allowed: Tolerance) -> float:
    """The largest error over the tolerance there: up to 1 is close enough. NaN anywhere is infinitely far."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )
    actual, expected = actual.double(), expected.double()
    over = (actual - expected).abs() / (allowed.atol + allowed.rtol * expected.abs())
    return float(over.nan_to_num(nan=float("inf")).max())


def assert_trajectories_close(
    actual: list[Tensor], expected: list[Tensor], allowed: Tolerance, what: str
) -> None:
    """All model outputs of two trajectories, in order; the message names the first that is too far off."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} calls, expected {len(expected)}"
    for call, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        over = excess(ours, theirs, allowed)
        assert over <= 1, f"{what}: the output of call {call} is {over:.3g} times the tolerance {allowed} off"
