"""What to expect of a schedule for other samples, from those that it was tried on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from ..calibration.statistics import t_quantile
from ..errors import CalibrationError, SmoothCacheError
from ..reports.compare import as_vector, psnr

#: Samples that are farther from their uncached ones, in dB, have become other pictures.
FORKED = 25.0


@dataclass(frozen=True)
class Expectation:
    """The PSNR, in dB, of single samples to their uncached ones, or to those of ``choose(target=)``.

    Attributes:
        samples: how many there were.
        mean, median: over the samples, infinite ones counted as 120 dB.
        low, high: the 95% interval of the mean (Student's t); NaN of a single sample.
        forked: share of the samples below 25 dB, which have become other pictures.
    """

    samples: int
    mean: float
    median: float
    low: float
    high: float
    forked: float

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ({self.low:.1f} to {self.high:.1f} for other samples)"
        forked = f"{self.forked:.0%} of them became other pictures"
        return f"{self.mean:.1f} dB in the mean of {self.samples} samples{interval}; {forked}"


def expectation(uncached: Any, cached: Any) -> Expectation | None:
    """Of what ``sample`` returned: a batch of samples, or a list or other structure of batches or single images.

    None where that holds no numbers, and only the user's own metric can tell.
    """
    try:
        pairs = list(zip(samples_of(uncached), samples_of(cached), strict=True))
    except SmoothCacheError:
        return None
    values = np.array([min(psnr(*pair), 120.0) for pair in pairs])
    count, mean = len(values), float(values.mean())
    half = t_quantile(count - 1) * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Expectation(count, mean, float(np.median(values)), mean - half, mean + half, float((values < FORKED).mean()))


def samples_of(value: Any) -> Sequence[torch.Tensor]:
    """Each sample as a vector: the first axis of tensors and arrays of three axes and more counts samples."""
    found = [as_vector(one) for leaf in pytree.tree_leaves(value) for one in _split(leaf)]
    return found or [as_vector(value)]


def batches_of_one(value: Any) -> list[Any]:
    """Each sample, as a batch that holds nothing else, or a list of one image."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            found += [one[None] for one in leaf] if leaf.ndim >= 3 else [leaf]
        elif hasattr(leaf, "__array_interface__"):
            found.append([leaf])
    if not found:
        raise CalibrationError(
            f"sample(model) returned a {type(value).__name__} without tensors, arrays or images: over= needs single "
            "samples, leave it out for a metric of your own"
        )
    return found


def arrays_of(value: Any) -> list[NDArray[np.float64]]:
    """Each image, float64 [channels, height, width].

    Raises:
        CalibrationError: what ``sample`` returned are no images.
    """
    found = []
    for leaf in pytree.tree_leaves(value):
        for one in _split(leaf):
            pixels = one.detach().cpu().numpy() if isinstance(one, torch.Tensor) else np.array(one)
            image = pixels.astype(np.float64)
            if image.ndim == 2:
                image = image[None]
            if image.ndim == 3 and image.shape[-1] in (1, 3, 4) and image.shape[0] not in (1, 3, 4):
                image = np.moveaxis(image, -1, 0)
            if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
                raise CalibrationError(
                    f"sample(model) returned arrays of shape {list(pixels.shape)}, expected images of 1, 3 or 4 "
                    "channels: give a metric of your own for other samples"
                )
            found.append(image)
    return found


def _split(leaf: Any) -> Sequence[Any]:
    """The samples of a batch; an image, and what has fewer than three axes, is one."""
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return list(leaf) if leaf.ndim >= 3 else [leaf]
    return [leaf] if hasattr(leaf, "__array_interface__") else []
