"""The cache buffers of a stream, and which of them are kept from one trajectory to the next."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ScheduleError

if TYPE_CHECKING:
    from .binding import Binding
    from .variant import Variant

log = logging.getLogger(__name__)


class Stream:
    """The cache of one stream of a binding: its buffers, and for each site the steps whose outputs they hold.

    Attributes:
        lane: of the trajectories that it is a stream of.
        buffers: the cache buffers, None until a variant needs them.
        stored: per site the steps whose outputs it holds, newest first; of a site without forecasts only the newest.
        heads: per site how many values it has stored, modulo the lengths of a ring of values and of one of differences:
            so which slot of either the next store writes. Empty where no site has a ring.
    """

    def __init__(self, signature: tuple[Any, ...], lane: int, buffers: int, sites: int, rings: bool) -> None:
        self.signature = signature
        self.lane = lane
        self.buffers: list[torch.Tensor | None] = [None] * buffers
        self.stored: list[tuple[int, ...]] = [()] * sites
        self.heads: tuple[int, ...] = (0,) * sites if rings else ()
        self.trajectory = -1
        self.last_step = -1
        #: The last trajectory in which it was called.
        self.called = -1
        #: A variant's buffers, for the heads that it is called with.
        self.arguments: dict[tuple[Variant, tuple[int, ...]], tuple[torch.Tensor, ...]] = {}

    def begin(self, trajectory: int) -> None:
        """Forget what the caches hold. Rings begin at their first slot, so that each trajectory writes alike."""
        self.trajectory, self.last_step = trajectory, -1
        self.stored = [()] * len(self.stored)
        self.heads = (0,) * len(self.heads)

    @property
    def cache_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers if buffer is not None)


class CacheKeeper:
    """Frees caches of graphs that no longer run: those belong to a trajectory, not to a graph.

    When a trajectory begins, caches that the one before it in its lane has not used are idle: of another prompt length,
    another adapter, a stream that guidance no longer needs. The ones used last are kept, as CUDA graphs find them where
    they are, but together no more bytes than one trajectory has taken.
    """

    def __init__(self, limit: int | None = None) -> None:
        #: Bytes that all caches may take; None if there is no limit.
        self.limit = limit
        self._bindings: weakref.WeakSet[Binding] = weakref.WeakSet()
        self._latest: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, binding: Binding) -> None:
        with self._lock:
            self._bindings.add(binding)

    def make_room(self, needed: int) -> None:
        """Before caches are allocated. Idle ones are freed if that helps.

        Raises:
            ScheduleError: with ``needed`` bytes more the caches would be beyond the limit.
        """
        if self.limit is None or self._taken() + needed <= self.limit:
            return
        with self._lock:
            for binding in self._bindings:
                for key, stream in list(binding.streams.items()):
                    if stream.called != self._latest.get(stream.lane):
                        binding.streams.pop(key)
        taken = self._taken()
        if taken + needed > self.limit:
            streams = max((len(binding.streams) for binding in self._bindings), default=1)
            raise ScheduleError(
                f"caches of {taken} bytes are in use, {needed} more are needed, and max_cache_bytes is {self.limit}: "
                f"{streams} streams of calls have their own caches, such as the calls with and without a prompt. Allow "
                "more, take a schedule of stacks or of a lower order, or give calls_per_step, so that the plan counts "
                "them"
            )

    def _taken(self) -> int:
        return sum(binding.cache_bytes for binding in list(self._bindings))

    def begins(self, trajectory: int, lane: int) -> None:
        """A stream of a trajectory begins; the first one of it frees what is idle."""
        with self._lock:
            if self._latest.get(lane) == trajectory:
                return
            self._latest[lane] = trajectory
            self._free_idle(lane)

    def _free_idle(self, lane: int) -> None:
        groups: dict[int, list[tuple[Binding, Hashable]]] = {}
        taken: Counter[int] = Counter()
        for binding in self._bindings:
            for key, stream in list(binding.streams.items()):
                if stream.lane == lane:
                    groups.setdefault(stream.called, []).append((binding, key))
                    taken[stream.called] += stream.cache_bytes
        most, kept = max(taken.values(), default=0), 0
        for called in sorted(groups, reverse=True)[2:]:  # but for the trajectory that begins and the last one
            kept += taken[called]
            if kept > most:
                log.info("caches of an earlier trajectory are freed: %d bytes", taken[called])
                for binding, key in groups[called]:
                    binding.streams.pop(key, None)


def clear(buffers: Sequence[torch.Tensor | None]) -> None:
    """What is left of another trajectory counts for nothing, and must not be NaN: that times zero is NaN."""
    with torch.inference_mode(False), torch.no_grad():
        for buffer in buffers:
            if buffer is not None:
                buffer.zero_()
