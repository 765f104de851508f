"""What the passes did, as numbers: ``torch._dynamo.utils.counters["smoothcache"]``, over all graphs of the process."""

from __future__ import annotations

from torch._dynamo.utils import counters


def count(**numbers: int) -> None:
    """Add to the counters of these names."""
    for name, number in numbers.items():
        counters["smoothcache"][name] += number
