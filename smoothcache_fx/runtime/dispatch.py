"""Programs, bindings and the choice of a variant at each call. Nothing here knows of FX."""

from __future__ import annotations

import itertools
import logging
import operator
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..schedules import coefficients as forecast
from .caches import CacheKeeper, Stream, clear
from .calls import CurrentCall

log = logging.getLogger(__name__)

#: Lists of buffers that a stream keeps, one for each variant and position of its rings.
MOST_ARGUMENTS = 256


@dataclass(frozen=True)
class SiteInfo:
    """What a binding must know of a site of its program; the name is the one at this binding's place."""

    name: str
    group: str
    kind: str
    #: Positions of its caches, output by output.
    buffers: tuple[int, ...]
    #: How many of them belong to an output.
    history: int
    flops: int
    cache_bytes: int
    #: What one value of its history takes, of all outputs.
    history_bytes: int = 0
    #: Those of its buffers that hold a difference of outputs.
    differences: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Mask:
    """One step's decision for a program's sites, as bit sets: which to compute, which of these to store.

    ``orders`` are those of the sites' forecasts, empty where all are 0. They are the same at each step.
    """

    compute: int
    store: int
    orders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # It is looked up several times a call, and the orders may be those of hundreds of sites.
        object.__setattr__(self, "_hash", hash((self.compute, self.store, self.orders)))

    def __hash__(self) -> int:
        return self._hash


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
    """One compiled variant: which inputs and buffers it takes, whether weights too, and what it costs."""

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        inputs: tuple[int, ...],
        buffers: tuple[int, ...],
        weighs: bool,
        flops: int,
    ) -> None:
        self.run = run
        self.inputs = inputs
        self.buffers = buffers
        self.weighs = weighs
        self.flops = flops
        self.seconds = 0.0
        self.pick_inputs = picker(inputs)


class VariantBuilder(Protocol):
    """What a program asks of the graph side."""

    #: Whether a compiled variant serves all sizes of a graph with symbolic sizes.
    shape_generic: bool
    #: Positions of the inputs that are symbolic sizes.
    shape_inputs: Sequence[int]
    #: Those of them that are a size of an input or of a cache.
    size_inputs: Sequence[int]

    def build(self, mask: Mask, inputs: Sequence[Any]) -> Variant: ...

    def build_uncompiled(self, mask: Mask) -> Variant: ...

    def holds_for(self, inputs: Sequence[Any]) -> bool: ...

    def allocate(self, buffer: int, inputs: Sequence[Any]) -> torch.Tensor: ...

    def weights(self, values: Sequence[float]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Plan:
    """A schedule laid out for one binding's sites: what to do at each step, as bit sets over the sites."""

    compute: tuple[int, ...]
    last_compute: tuple[tuple[int, ...], ...]
    store: int
    every: int
    orders: tuple[int, ...]
    times: tuple[float, ...]
    masks: tuple[Mask, ...]

    def mask(self, compute: int) -> Mask:
        return Mask(compute, compute & self.store, self.orders)


def make_plan(
    rows: Sequence[Sequence[bool]], steps: int, orders: Sequence[int] = (), times: Sequence[float] | None = None
) -> Plan:
    """Lay out one row per site. Sites that are never reused are computed and never stored."""
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
        times=tuple(map(float, range(steps) if times is None else times)),
        masks=tuple(masks[bits] for bits in compute),
    )


class Binding:
    """A program at one place in the model: its names, its plan, its caches."""

    def __init__(self, sites: Sequence[SiteInfo], plan: Plan, buffer_count: int) -> None:
        self.sites = tuple(sites)
        self.plan = plan
        self.buffer_count = buffer_count
        self.streams: dict[Hashable, Stream] = {}
        self.calls: Counter[tuple[Mask, int]] = Counter()
        self.planned: Counter[int] = Counter()
        self.forced: Counter[str] = Counter()
        self._site_of = {buffer: index for index, site in enumerate(self.sites) for buffer in site.buffers}
        #: By step, by which steps' outputs the caches hold and where.
        self._weights: dict[tuple[Any, ...], torch.Tensor] = {}

    def stream(self, key: Hashable, signature: tuple[Any, ...], lane: int = 0) -> Stream:
        """The stream's cache; a new and empty one where the shapes of the inputs have changed."""
        stream = self.streams.get(key)
        if stream is None or stream.signature != signature:
            if stream is not None and stream.last_step >= 0:
                log.info("the shapes of the inputs changed from %s to %s: new caches", stream.signature, signature)
            stream = Stream(signature, lane, self.buffer_count, len(self.sites), bool(self.plan.orders))
            self.streams[key] = stream
        return stream

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
            reason = "no value in this trajectory yet" if stream.last_step < 0 else "an earlier step was missed"
            self.forced[f"{reason}, at step {step}"] += missing.bit_count()
            log.info("step %d: %d sites are computed beyond the plan: %s", step, missing.bit_count(), reason)
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
        for buffer in places:
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
        if not stream.heads or not mask.store >> index & 1:
            return buffer
        site, order = self.sites[index], self.plan.orders[index]
        slot = site.buffers.index(buffer) % site.history
        differs = buffer - slot + 1 in site.differences
        # Values have the ring in all of their slots, differences in all but the first.
        if slot != int(differs) or not order:
            return buffer
        return buffer + stream.heads[index] % (order if differs else order + 1)

    def weights(self, stream: Stream, step: int, builder: VariantBuilder) -> torch.Tensor:
        """What each buffer counts for in the forecasts of a step."""
        key = step, tuple(stream.stored), stream.heads
        found = self._weights.get(key)
        if found is None:
            times = self.plan.times
            values = [0.0] * self.buffer_count
            for index, (site, stored) in enumerate(zip(self.sites, stream.stored, strict=True)):
                own = forecast.weights([times[at] for at in stored], times[step]) if stored else ()
                for first in range(0, len(site.buffers), site.history):
                    buffers = site.buffers[first : first + site.history]
                    differs = not site.differences.isdisjoint(buffers)
                    for age, weight in enumerate(forecast.of_differences(own) if differs else own):
                        values[buffers[self._slot(index, stream.heads[index], age, differs)]] = weight
            if len(self._weights) > 4 * len(times):  # a sampler that misses steps has new ones again and again
                self._weights.clear()
            found = self._weights[key] = builder.weights(values)
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
                if mask.store >> index & 1:
                    order = mask.orders[index] if mask.orders else 0
                    stream.stored[index] = (step, *stored[:order])
                    if order:
                        heads[index] = (heads[index] + 1) % (order * (order + 1))
            stream.heads = tuple(heads)
        stream.last_step = step
        self.planned[self.plan.compute[step]] += 1

    @property
    def cache_bytes(self) -> int:
        """Bytes of all streams' buffers that exist."""
        return sum(stream.cache_bytes for stream in self.streams.values())


class Dispatcher(Protocol):
    """Runs a captured graph. The call that the thread is in has its binding; inputs come as one list, to be cleared."""

    _boxed_call: bool

    def __call__(self, inputs: list[Any]) -> Sequence[Any]: ...

    def close(self) -> None: ...


class GuardedProgram:
    """The dispatcher of a captured graph with guards: decides, and runs the variant for the decision."""

    _boxed_call = True  # tells AOTAutograd that the inputs come as one list

    def __init__(
        self, builder: VariantBuilder, current: CurrentCall, keeper: CacheKeeper, compiling: AbstractContextManager[Any]
    ) -> None:
        self.builder = builder
        self._keeper = keeper
        self.current = current
        self.variants: dict[Hashable, Variant] = {}
        #: Held where a variant is compiled: only one thread may compile at a time.
        self._compiling = compiling
        #: Held where a binding is read and changed.
        self._lock = threading.Lock()
        self._holds: dict[tuple[Any, ...], bool] = {}

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        call = self.current.call
        binding, moment = call.binding, call.moment
        signature = tuple([inputs[i] for i in self.builder.shape_inputs])
        with self._lock:
            stream = binding.stream(moment.stream, tuple([inputs[i] for i in self.builder.size_inputs]), moment.lane)
            if stream.called != moment.trajectory:
                stream.called = moment.trajectory
                self._keeper.begins(moment.trajectory, moment.lane)
            mask = binding.decide(stream, moment.trajectory, moment.step)
        variant = self._variant(binding, mask, signature, inputs)
        buffers = stream.arguments.get((variant, stream.heads))
        if buffers is None:
            buffers = binding.arguments(stream, variant, mask, self.builder, inputs)
        arguments = [*variant.pick_inputs(inputs), *buffers]
        if variant.weighs:
            arguments.append(binding.weights(stream, moment.step, self.builder))
        inputs.clear()
        try:
            outputs = variant.run(arguments)
        except BaseException:
            stream.trajectory = -1  # some buffers may be half written
            raise
        with self._lock:
            binding.commit(stream, mask, moment.step)
            binding.calls[mask, variant.flops] += 1
        if log.isEnabledFor(logging.DEBUG):
            computed = mask.compute.bit_count()
            log.debug("step %d, stream %s: computed %d of %d", moment.step, moment.stream, computed, len(binding.sites))
        return outputs

    def close(self) -> None:
        """Forget the variants."""
        self.variants.clear()
        self._holds.clear()

    def _variant(self, binding: Binding, mask: Mask, signature: tuple[Any, ...], inputs: Sequence[Any]) -> Variant:
        if not signature:
            key: Hashable = mask
        elif not self.builder.shape_generic:
            key = mask, signature
        else:
            if signature not in self._holds:
                self._holds[signature] = self.builder.holds_for(inputs)
            key = mask if self._holds[signature] else (mask, None)
        variant = self.variants.get(key)
        if variant is None:
            with self._compiling:
                variant = self.variants.get(key)  # another thread may have been here
                if variant is None:
                    variant = self.variants[key] = self._build(binding, key, mask, inputs)
        return variant

    def _build(self, binding: Binding, key: Hashable, mask: Mask, inputs: Sequence[Any]) -> Variant:
        if key == (mask, None):
            log.warning("a variant does not hold for inputs of these sizes: it runs uncompiled, and slower")
            binding.forced["sizes outside of what a variant was compiled for: run uncompiled"] += 1
            return self.builder.build_uncompiled(mask)
        start = time.perf_counter()
        variant = self.builder.build(mask, inputs)
        variant.seconds = time.perf_counter() - start
        self._holds.clear()  # compiling may have assumed more of the sizes
        return variant
