"""How far a cached trajectory may be from the oracle's: the one place that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float


#: The eager backends run the module's own kernels in its order; only views between them may differ.
SAME_KERNELS = {torch.float32: Tolerance(1e-6, 1e-6), torch.bfloat16: Tolerance(1e-6, 1e-6)}
#: Inductor fuses, so sums are reordered. In bfloat16 it also rounds less often than eager does, so that no
#: tolerance between the two is tight: see ``assert_as_exact``.
FUSED_KERNELS = {torch.float32: Tolerance(1e-5, 1e-5)}
#: Float32 sums in another order, in one op or a few.
REORDERED = Tolerance(1e-5, 1e-5)
#: Floats of Python's, added in another order.
DOUBLES = Tolerance(1e-9, 1e-9)
#: Every bit.
EXACT = Tolerance(0, 0)
#: A bfloat16 result of a few ops that round elsewhere: no more than that nothing is missing in it.
COARSE = Tolerance(0.1, 0.1)
#: A whole model of several blocks, where sums are reordered at each.
COMPILED = Tolerance(1e-4, 1e-4)
#: One sum of a whole tensor.
SUMS = Tolerance(1e-6, 0)
#: Root mean square error of a fused bfloat16 trajectory over that of the eager one, both against float32.
#: Correct ones reach 1.15; one wrong decision of one site gives 4 to 45.
ROUNDING = 1.5


def tolerance(dtype: torch.dtype, backend: str = "eager") -> Tolerance:
    return (FUSED_KERNELS if backend == "inductor" else SAME_KERNELS)[dtype]


def assert_close(actual: object, expected: object, allowed: Tolerance) -> None:
    """Tensors, or structures of them, as PyTorch compares them: dtypes, shapes and devices, too."""
    torch.testing.assert_close(actual, expected, rtol=allowed.rtol, atol=allowed.atol)


def excess(actual: Tensor, expected: Tensor, allowed: Tolerance) -> float:
    """The largest error over the tolerance there: up to 1 is close enough. NaN anywhere is infinitely far."""
    _check_alike(actual, expected)
    actual, expected = actual.double(), expected.double()
    over = (actual - expected).abs() / (allowed.atol + allowed.rtol * expected.abs())
    return float(over.nan_to_num(nan=float("inf")).max())


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: Tolerance) -> float:
    """The largest excess along two trajectories."""
    return max(excess(ours, theirs, allowed) for ours, theirs in zip(actual, expected, strict=True))


def assert_trajectories_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: Tolerance, what: str
) -> None:
    """All model outputs of two trajectories, in order; the message names the first that is too far off."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} calls, expected {len(expected)}"
    for call, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        over = excess(ours, theirs, allowed)
        assert over <= 1, f"{what}: the output of call {call} is {over:.3g} times the tolerance {allowed} off"


def rounding_ratios(actual: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Per call: the error of ``actual`` over that of ``expected``, against the float32 trajectory ``exact``."""
    for ours, theirs in zip(actual, expected, strict=True):
        _check_alike(ours, theirs)
    return [_rms(ours, true) / _rms(theirs, true) for ours, theirs, true in zip(actual, expected, exact, strict=True)]


def assert_as_exact(actual: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor], what: str) -> None:
    """``actual`` is about as near to the float32 trajectory as the oracle's in its own dtype is."""
    ratios = rounding_ratios(actual, expected, exact)
    assert all(ratio <= ROUNDING for ratio in ratios), f"{what}: errors over the oracle's by call: {ratios}"


def _check_alike(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )


def _rms(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).square().mean().sqrt())
