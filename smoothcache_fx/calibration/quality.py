"""What a schedule can be asked for by name: levels of quality, and what samples shall be near."""

from __future__ import annotations

from types import MappingProxyType

#: Relative L2 distances of final samples, as `measure_sensitivity` has them: 0.01 is 40 dB below the sample itself.
QUALITIES = MappingProxyType({"lossless": 0.0, "high": 0.01, "medium": 0.03, "fast": 0.1})

#: How far ahead forecasts aim, by what samples shall be near: a step's output is best taken from its middle.
LEADS = MappingProxyType({"uncached": 0.0, "converged": 0.5})
