"""Which of the model calls inside one step of a pipeline a call is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch

from .calls import Call


@dataclass
class _Seen:
    """The last call of an unnamed stream: its tensors, kept so that nothing else gets their memory."""

    tensors: list[torch.Tensor]
    places: AbstractSet[Hashable]
    has_fixed_input: bool = False


class Streams:
    """Identifies the model calls of one step: by the name that ``cache_context`` gave, else by their inputs.

    Calls without a name are counted. Where guidance is switched off for some steps the count alone would take the
    conditional call for the unconditional one, so a call belongs to the stream with which it shares most tensors: the
    text's embeddings stay where they are in memory for a whole run.
    """

    def __init__(self) -> None:
        self._ordinals: Counter[Hashable] = Counter()
        self._seen: dict[Any, _Seen] = {}
        self._taken: set[int] = set()

    def next_step(self) -> None:
        self._ordinals.clear()
        self._taken.clear()

    def key(self, call: Call, name: Hashable = None, *, certain: bool = False) -> tuple[Hashable, ...] | None:
        """The stream of the step's next call; ``name`` is that of its ``cache_context``.

        ``certain`` asks for a call that shares a tensor with the stream's last one, where there was one: None if not.
        """
        ordinal = self._ordinals[name]
        self._ordinals[name] += 1
        if name is not None and not certain:
            return name, ordinal
        tensors = call.tensors()
        places = {(name, t.data_ptr(), t.shape, t.stride()) for name, t in tensors.items() if t.data_ptr()}
        if name is not None:
            last = self._seen.get((name, ordinal))
            self._seen[name, ordinal] = _Seen(list(tensors.values()), places)
            return (name, ordinal) if last is None or last.places & places else None
        stream, fixed = self._match(ordinal, places)
        if certain and not fixed and stream in self._seen:
            return None
        self._taken.add(stream)
        self._seen[stream] = _Seen(list(tensors.values()), places, fixed)
        return None, stream

    def _match(self, ordinal: int, places: AbstractSet[Hashable]) -> tuple[int, bool]:
        free = {stream: seen for stream, seen in self._seen.items() if stream not in self._taken}
        shared = {stream: len(seen.places & places) for stream, seen in free.items()}
        most = max(shared.values(), default=0)
        if most:
            best = [stream for stream, count in shared.items() if count == most]
            return (ordinal if ordinal in best else min(best)), True
        if ordinal not in self._taken and not (ordinal in free and free[ordinal].has_fixed_input):
            return ordinal, False
        return max(self._seen, default=-1) + 1, False
