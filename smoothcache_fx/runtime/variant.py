"""What a captured graph can be made into: its sites, masks of them, and what one compiled variant takes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from ..schedules.coefficients import forecast_coefficients


class SiteName(NamedTuple):
    """What selectors look at."""

    name: str
    group: str
    kind: str


@dataclass(frozen=True)
class SiteInfo:
    """What a binding must know of a site of its program; the name is the one at this binding's place."""

    name: str
    group: str
    kind: str
    #: Positions of its caches, output by output.
    buffers: tuple[int, ...]
    #: How many caches an output has: one more than the order.
    slots: int
    flops: int
    cache_bytes: int
    #: Bytes of one slot, of all outputs.
    slot_bytes: int = 0
    #: Those of its buffers that hold a difference of outputs.
    differences: frozenset[int] = frozenset()
    #: The branches of a stack, which are not cached for themselves.
    holds: tuple[SiteName, ...] = ()


@dataclass(frozen=True)
class Mask:
    """One step's decision for a program's sites, as bit sets: which to compute, which of these to store.

    ``orders`` are those of the sites' forecasts, empty where all are 0. They are the same at each step.
    """

    compute: int
    store: int
    orders: tuple[int, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # It is looked up several times a call, and the orders may be those of hundreds of sites.
        object.__setattr__(self, "_hash", hash((self.compute, self.store, self.orders)))

    def __hash__(self) -> int:
        return self._hash

    def computes(self, index: int) -> bool:
        return bool(self.compute >> index & 1)

    def stores(self, index: int) -> bool:
        return bool(self.store >> index & 1)


#: Runs of neighbouring positions that are taken as slices, rather than item by item.
MOST_SLICES = 8


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the items at these positions, in C where there are many: models have hundreds of weights."""
    if len(positions) < 2:
        return lambda items: tuple([items[i] for i in positions])
    slices: list[slice] = []
    for position in positions:
        if slices and slices[-1].stop == position:
            slices[-1] = slice(slices[-1].start, position + 1)
        else:
            slices.append(slice(position, position + 1))
    if len(slices) == 1:
        (whole,) = slices
        return lambda items: tuple(items[whole])
    if len(slices) <= min(MOST_SLICES, len(positions) // 4):
        return lambda items: tuple(itertools.chain.from_iterable([items[part] for part in slices]))
    return operator.itemgetter(*positions)


class Variant:
    """One compiled variant: which inputs and buffers it takes, whether coefficients too, and what it costs."""

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        inputs: tuple[int, ...],
        buffers: tuple[int, ...],
        takes_coefficients: bool,
        flops: int,
    ) -> None:
        self.run = run
        self.inputs = inputs
        self.buffers = buffers
        self.takes_coefficients = takes_coefficients
        self.flops = flops
        self.seconds = 0.0
        self.pick_inputs = picker(inputs)


class VariantBuilder(Protocol):
    """What a program asks of the graph side."""

    #: Whether a compiled variant serves all sizes of a graph with symbolic sizes.
    shape_generic: bool
    #: Positions of the inputs that are symbolic sizes.
    shape_inputs: list[int]
    #: Those of them that are a size of an input or of a cache.
    size_inputs: list[int]

    def build(self, mask: Mask, inputs: Sequence[Any]) -> Variant: ...

    def build_uncompiled(self, mask: Mask) -> Variant: ...

    def holds_for(self, inputs: Sequence[Any]) -> bool: ...

    def allocate(self, buffer: int, inputs: Sequence[Any]) -> torch.Tensor: ...

    def size_of(self, buffer: int, inputs: Sequence[Any]) -> int: ...

    def coefficients(self, values: Sequence[float]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Plan:
    """A schedule laid out for one binding's sites: what to do at each step, as bit sets over the sites."""

    compute: tuple[int, ...]
    last_compute: tuple[tuple[int, ...], ...]
    store: int
    every: int
    orders: tuple[int, ...]
    masks: tuple[Mask, ...]
    #: What a site reads at a step, given its position and the steps whose outputs are stored, newest first.
    forecast: Callable[[int, int, Sequence[int]], Sequence[float]]

    def mask(self, compute: int) -> Mask:
        return Mask(compute, compute & self.store, self.orders)


def make_plan(
    rows: Sequence[Sequence[bool]],
    steps: int,
    orders: Sequence[int] = (),
    forecast: Callable[[int, int, Sequence[int]], Sequence[float]] | None = None,
) -> Plan:
    """Lay out one row per site. Sites that are never reused are computed and never stored.

    ``forecast`` gives the coefficients of a site's stored outputs; by default those of the polynomial in the step.
    """
    compute, last_compute = [], []
    latest = [0] * len(rows)
    for step in range(steps):
        bits = 0
        for index, row in enumerate(rows):
            if row[step]:
                bits |= 1 << index
                latest[index] = step
        compute.append(bits)
        last_compute.append(tuple(latest))
    store = sum(1 << index for index, row in enumerate(rows) if not all(row))
    orders = tuple(orders) if any(orders) else ()
    masks = {bits: Mask(bits, bits & store, orders) for bits in compute}
    return Plan(
        tuple(compute),
        tuple(last_compute),
        store,
        every=(1 << len(rows)) - 1,
        orders=orders,
        masks=tuple(masks[bits] for bits in compute),
        forecast=forecast or (lambda index, step, stored: forecast_coefficients(stored, step)),
    )
