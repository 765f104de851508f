"""Metrics of samples by name: what ``choose(at_least=)`` asks for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..checks import function, one_of
from ..errors import CalibrationError
from ..reports.compare import Metric, as_vector, psnr
from .expectation import arrays_of, batches_of_one

METRICS = ("psnr", "ssim", "lpips")
#: What a metric is of: all samples together, or the mean or median of single ones.
OVER = ("pooled", "mean", "median")


def metric_of(metric: Metric | str | None) -> Metric:
    """The function for a name; a function as it is.

    Raises:
        CalibrationError: there is no such metric.
        ImportError: what it needs is not installed.
    """
    if metric is not None and not isinstance(metric, str):
        return function(metric, "metric", "the uncached and the cached samples")
    name = one_of(metric or "psnr", "metric", METRICS, CalibrationError)
    if name == "psnr":
        return lambda uncached, cached: psnr(as_vector(uncached), as_vector(cached))
    return _ssim() if name == "ssim" else _lpips()


def over_samples(metric: Metric, over: str) -> Metric:
    """The metric of all samples together, or the mean or median of what it is of each; infinite PSNR counts as 120."""
    if over == "pooled":
        return metric

    def of_each(uncached: Any, cached: Any) -> float:
        pairs = zip(batches_of_one(uncached), batches_of_one(cached), strict=True)
        values = [min(float(metric(*pair)), 120.0) for pair in pairs]
        return float(np.median(values) if over == "median" else np.mean(values))

    return of_each


def _ssim() -> Metric:
    """Structural similarity, the mean over images, by scikit-image."""
    metrics = _imported("skimage.metrics", "ssim", "scikit-image")

    def one(uncached: np.ndarray[Any, Any], cached: np.ndarray[Any, Any]) -> float:
        span = float(uncached.max() - uncached.min()) or 1.0
        sides = sorted(uncached.shape[-2:])
        window = min(7, sides[0] - 1 + sides[0] % 2)  # odd, and no wider than the image
        return float(metrics.structural_similarity(uncached, cached, data_range=span, win_size=window, channel_axis=0))

    return functools.partial(_mean, one)


def _lpips() -> Metric:
    """1 less the LPIPS distance (AlexNet), the mean over images; values are scaled to -1 to 1 by the uncached range."""
    lpips = _imported("lpips", "lpips", "lpips")
    network = lpips.LPIPS(net="alex", verbose=False)

    def one(uncached: np.ndarray[Any, Any], cached: np.ndarray[Any, Any]) -> float:
        low, high = float(uncached.min()), float(uncached.max())
        scaled = [
            torch.from_numpy(2 * (image - low) / ((high - low) or 1.0) - 1).float()[None].expand(1, 3, -1, -1)
            for image in (uncached, cached)
        ]
        with torch.no_grad():
            return 1.0 - float(network(*scaled))

    return functools.partial(_mean, one)


def _mean(one: Callable[[Any, Any], float], uncached: Any, cached: Any) -> float:
    pairs = zip(arrays_of(uncached), arrays_of(cached), strict=True)
    return float(np.mean([one(*pair) for pair in pairs]))


def _imported(module: str, metric: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"metric={metric!r} needs {package}: pip install {package}") from error
