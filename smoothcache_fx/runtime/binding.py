"""One place in the model that a captured graph serves: its plan, its streams and their caches."""

from __future__ import annotations

import enum
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ..schedules.coefficients import difference_coefficients
from .caches import Stream, clear
from .variant import Mask, Plan, SiteInfo, Variant, VariantBuilder

log = logging.getLogger(__name__)

#: Lists of buffers that a stream keeps, one for each variant and position of its rings.
MOST_ARGUMENTS = 256


class Forced(enum.Enum):
    """Why a site was computed where the plan says reuse."""

    NO_VALUE = "no value in this trajectory yet"
    MISSED_STEP = "an earlier step was missed"
    OTHER_SIZES = "sizes outside of what a variant was compiled for: run uncompiled"


class Binding:
    """A program at one place in the model: its names, its plan, its caches."""

    def __init__(self, sites: Sequence[SiteInfo], plan: Plan, buffer_count: int) -> None:
        self.sites = tuple(sites)
        self.plan = plan
        self.buffer_count = buffer_count
        self.streams: dict[Hashable, Stream] = {}
        #: Called with the bytes of caches that are to be allocated, if they are limited.
        self.make_room: Callable[[int], None] | None = None
        self.calls: Counter[tuple[Mask, int]] = Counter()
        self.planned: Counter[int] = Counter()
        #: Site calls that were computed beyond the plan, by reason and step.
        self.forced: Counter[tuple[Forced, int]] = Counter()
        self._site_of = {buffer: index for index, site in enumerate(self.sites) for buffer in site.buffers}
        #: By step, by which steps' outputs the caches hold and where.
        self._coefficients: dict[tuple[Any, ...], torch.Tensor] = {}

    def stream(self, key: Hashable, signature: tuple[Any, ...], lane: int = 0) -> Stream:
        """The stream's cache; a new and empty one where the shapes of the inputs have changed."""
        stream = self.streams.get(key)
        if stream is None or stream.signature != signature:
            if stream is not None and stream.last_step >= 0:
                log.info("the shapes of the inputs changed from %s to %s: new caches", stream.signature, signature)
            stream = Stream(signature, lane, self.buffer_count, len(self.sites), bool(self.plan.orders))
            self.streams[key] = stream
        return stream

    def follow(self, plan: Plan) -> None:
        """Go on by another plan, from the beginning of a trajectory. Caches stay where they are if they can."""
        if plan.orders != self.plan.orders:
            self.streams.clear()
        for stream in self.streams.values():
            stream.trajectory = -1
        self.plan = plan
        self._coefficients.clear()
        for count in (self.calls, self.planned, self.forced):
            count.clear()

    def decide(self, stream: Stream, trajectory: int, step: int) -> Mask:
        """The plan's mask for the step, with every site computed whose cache does not hold what the plan reads."""
        planned = self.plan.compute[step]
        if stream.trajectory != trajectory:
            stream.begin(trajectory)
            if self.plan.orders:
                clear(stream.buffers)
        if stream.last_step == step - 1 and step > 0:
            return self.plan.masks[step]
        missing = self._missing(stream, step)
        if missing:
            reason = Forced.NO_VALUE if stream.last_step < 0 else Forced.MISSED_STEP
            self.forced[reason, step] += missing.bit_count()
            log.info("step %d: %d sites are computed beyond the plan: %s", step, missing.bit_count(), reason.value)
        return self.plan.mask(planned | missing) if missing else self.plan.masks[step]

    def _missing(self, stream: Stream, step: int) -> int:
        reused = self.plan.every & ~self.plan.compute[step]
        needed = self.plan.last_compute[step]
        return sum(
            1 << index
            for index in range(len(self.sites))
            if reused >> index & 1 and (not stream.stored[index] or stream.stored[index][0] < needed[index])
        )

    def arguments(
        self, stream: Stream, variant: Variant, mask: Mask, builder: VariantBuilder, inputs: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """The buffers that a variant takes; those that do not exist are made.

        What reads takes all slots of a ring in their order, at whatever step: a CUDA graph finds them where they were.
        What stores takes the slot at the ring's head.
        """
        places = [self._place(stream, mask, buffer) for buffer in variant.buffers]
        missing = [buffer for buffer in places if stream.buffers[buffer] is None]
        if missing and self.make_room is not None:
            self.make_room(sum(builder.size_of(buffer, inputs) for buffer in missing))
        for buffer in missing:
            if stream.buffers[buffer] is None:
                stream.buffers[buffer] = builder.allocate(buffer, inputs)
                if mask.orders:
                    clear([stream.buffers[buffer]])
        if len(stream.arguments) > MOST_ARGUMENTS:  # a sampler that misses steps has other heads again and again
            stream.arguments.clear()
        found = stream.arguments[variant, stream.heads] = tuple([stream.buffers[buffer] for buffer in places])
        return found

    def _place(self, stream: Stream, mask: Mask, buffer: int) -> int:
        """Which buffer a variant's cache is: of one that is stored, the slot at the head of the ring."""
        index = self._site_of[buffer]
        if not stream.heads or not mask.stores(index):
            return buffer
        site, order = self.sites[index], self.plan.orders[index]
        slot = site.buffers.index(buffer) % site.slots
        differs = buffer - slot + 1 in site.differences
        # Values have the ring in all of their slots, differences in all but the first.
        if slot != int(differs) or not order:
            return buffer
        return buffer + stream.heads[index] % (order if differs else order + 1)

    def coefficients(self, stream: Stream, step: int, builder: VariantBuilder) -> torch.Tensor:
        """Each buffer's coefficient in the forecasts of a step."""
        key = step, tuple(stream.stored), stream.heads
        found = self._coefficients.get(key)
        if found is None:
            values = [0.0] * self.buffer_count
            for index, (site, stored) in enumerate(zip(self.sites, stream.stored, strict=True)):
                own = self.plan.forecast(index, step, stored) if stored else ()
                for first in range(0, len(site.buffers), site.slots):
                    buffers = site.buffers[first : first + site.slots]
                    differs = not site.differences.isdisjoint(buffers)
                    for age, coefficient in enumerate(difference_coefficients(own) if differs else own):
                        values[buffers[self._slot(index, stream.heads[index], age, differs)]] = coefficient
            # A sampler that misses steps has new ones again and again.
            if len(self._coefficients) > 4 * len(self.plan.compute):
                self._coefficients.clear()
            found = self._coefficients[key] = builder.coefficients(values)
        return found

    def _slot(self, index: int, head: int, age: int, differs: bool) -> int:
        """Where a site's ring holds the value, or the difference, of this age; ``head`` is what is written next."""
        order = self.plan.orders[index]
        if differs:
            return 1 + (head - age) % order if age else 0
        return (head - 1 - age) % (order + 1)

    def commit(self, stream: Stream, mask: Mask, step: int) -> None:
        """Note what the call has stored. Only after it has succeeded: a failed one leaves the cache unknown."""
        if mask.store:
            heads = list(stream.heads)
            for index, stored in enumerate(stream.stored):
                if mask.stores(index):
                    order = mask.orders[index] if mask.orders else 0
                    stream.stored[index] = (step, *stored[:order])
                    if order:
                        heads[index] = (heads[index] + 1) % (order * (order + 1))
            stream.heads = tuple(heads)
        stream.last_step = step
        self.planned[self.plan.compute[step]] += 1

    @property
    def stream_bytes(self) -> int:
        """Bytes of one stream's buffers once all that the plan stores has been stored."""
        orders = self.plan.orders or (0,) * len(self.sites)
        return sum(
            site.cache_bytes + order * site.slot_bytes
            for index, (site, order) in enumerate(zip(self.sites, orders, strict=True))
            if self.plan.store >> index & 1
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of all streams' buffers that exist."""
        return sum(stream.cache_bytes for stream in self.streams.values())
