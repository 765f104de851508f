"""Calibration's error: how far a branch's output lies from what it was some steps ago.

``sum|y_t - y_{t-k}| / sum|y_t|`` over all elements, Eq. 4 of the paper (arXiv 2411.10510); the denominator is the
fresh output, the one that a cached step would replace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def relative_l1(fresh: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
    """Numerators and denominator of the relative L1 error, for all lags.

    Args:
        fresh: this step's output, any shape and floating dtype.
        earlier: outputs of the same shape from one, two, ... steps ago, on any device.

    Returns:
        float64 ``[1 + len(earlier)]`` on ``fresh``'s device: ``sum|fresh|``, then ``sum|fresh - earlier[k]|``.
        Differences are taken in float32 (float64 for float64 input), sums in float64.
    """
    precise = torch.promote_types(fresh.dtype, torch.float32)
    value = fresh.to(precise)
    sums = [value.abs().sum(dtype=torch.float64)]
    for other in earlier:
        if other.shape != fresh.shape:
            raise ValueError(f"outputs of one branch differ in shape: {tuple(fresh.shape)} after {tuple(other.shape)}")
        sums.append((value - other.to(device=fresh.device, dtype=precise)).abs_().sum(dtype=torch.float64))
    return torch.stack(sums)
