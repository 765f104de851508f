"""Levels of quality: how far the final sample may be predicted to be from the uncached one."""

from __future__ import annotations

from types import MappingProxyType

#: Relative L2 distances of final samples, as `measure_sensitivity` has them: 0.01 is 40 dB below the sample itself.
QUALITIES = MappingProxyType({"lossless": 0.0, "high": 0.01, "medium": 0.03, "fast": 0.1})
