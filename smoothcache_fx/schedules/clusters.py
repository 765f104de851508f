"""Groups that share a row, so that a schedule has few variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

Cluster = tuple[str, ...]

#: Share of the branches' FLOPs below which a group shares a row: its own would cost variants and save nothing.
LIGHT = 0.03


def variants_of(rows: Sequence[Sequence[bool]]) -> int:
    """How many different decisions there are over the steps."""
    return len(set(zip(*rows, strict=True)))


def clustered(flops: Mapping[str, float]) -> list[Cluster]:
    """Each group by itself, but those that weigh little with the one before them (the first with the one after)."""
    clusters: list[Cluster] = []
    first: Cluster = ()
    total = sum(flops.values())
    for group, weight in flops.items():
        if weight >= LIGHT * total:
            clusters.append((*first, group))
            first = ()
        elif clusters:
            clusters[-1] = (*clusters[-1], group)
        else:
            first = (*first, group)
    return clusters or [first]


def joined(clusters: Sequence[Cluster], rows: Sequence[Sequence[bool]]) -> list[Cluster]:
    """The clusters with those two made one whose rows differ, at the fewest steps."""

    def differing(pair: tuple[int, int]) -> int:
        return sum(a != b for a, b in zip(rows[pair[0]], rows[pair[1]], strict=True))

    pairs = [pair for pair in combinations(range(len(clusters)), 2) if differing(pair)]
    first, second = min(pairs, key=differing)
    rest = [cluster for i, cluster in enumerate(clusters) if i != second]
    rest[first] = (*clusters[first], *clusters[second])
    return rest
