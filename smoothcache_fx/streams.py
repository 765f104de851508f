"""Which of the model calls inside one step of a pipeline a call is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .clock import Call


@dataclass
class _Seen:
    """The last call of an unnamed stream: its tensors, kept so that nothing else gets their memory."""

    tensors: list[torch.Tensor]
    places: set[Hashable]
    has_fixed_input: bool = False


class Streams:
    """Tells the model calls of one step apart: by the name that ``cache_context`` gave, else by what they are given.

    Calls without a name are counted. Where guidance is switched off for some steps the count alone would take the
    conditional call for the unconditional one, so a call belongs to the stream with which it shares most tensors: the
    text's embeddings stay where they are in memory for a whole run.
    """

    def __init__(self) -> None:
        self.name: Hashable = None
        self._ordinals: Counter[Hashable] = Counter()
        self._seen: dict[int, _Seen] = {}
        self._taken: set[int] = set()

    def forget(self) -> None:
        self._seen.clear()

    def next_step(self) -> None:
        self._ordinals.clear()
        self._taken.clear()

    def key(self, call: Call) -> Hashable:
        """The stream of the step's next call."""
        ordinal = self._ordinals[self.name]
        self._ordinals[self.name] += 1
        if self.name is not None:
            return self.name, ordinal
        tensors = call.tensors()
        places = {(name, t.data_ptr(), t.shape, t.stride()) for name, t in tensors.items() if t.data_ptr()}
        stream, fixed = self._match(ordinal, places)
        self._taken.add(stream)
        self._seen[stream] = _Seen(list(tensors.values()), places, fixed)
        return None, stream

    def _match(self, ordinal: int, places: set[Hashable]) -> tuple[int, bool]:
        free = {stream: seen for stream, seen in self._seen.items() if stream not in self._taken}
        shared = {stream: len(seen.places & places) for stream, seen in free.items()}
        most = max(shared.values(), default=0)
        if most:
            best = [stream for stream, count in shared.items() if count == most]
            return (ordinal if ordinal in best else min(best)), True
        if ordinal not in self._taken and not (ordinal in free and free[ordinal].has_fixed_input):
            return ordinal, False
        return max(self._seen, default=-1) + 1, False
