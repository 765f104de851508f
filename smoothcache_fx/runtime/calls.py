"""One call of a model: its step and stream, and what a clock knows of it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: What the argument that carries the noise level is called in DiT, diffusers, k-diffusion and stable-audio-tools.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_level")


@dataclass(frozen=True)
class Moment:
    """Where one call of the model is in its sampling. It is made once per call and never changes.

    Attributes:
        step: index of the step, from 0, in sampling order.
        stream: which of the step's calls this is; each stream has its own caches.
        trajectory: what is cached may be read only within one trajectory. Each has its own number, later ones
            higher ones.
        lane: trajectories of one lane follow each other, those of different lanes go on at the same time.
    """

    step: int
    stream: Hashable
    trajectory: int
    lane: int = 0


class ModelCall:
    """One call of a compiled model while it runs: what its graphs share.

    Attributes:
        moment: where the call is in its sampling.
        binding: of the captured graph that runs now, set just before it runs.
        graphs, sites: how many captured graphs have run in this call, and how many sites they have.
        stream_bytes: what one stream's caches of these graphs take; counted only where memory is limited.
        ordinals: per place in the model, how often its graph has run in this call.
        captured: how many captures this call knows of: those before it began, and its own; or None.
    """

    __slots__ = ("binding", "captured", "graphs", "moment", "ordinals", "sites", "stream_bytes")

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.binding: Any = None
        self.graphs = self.sites = self.stream_bytes = 0
        self.ordinals: dict[Any, int] = {}
        self.captured: int | None = None

    def end(self) -> None:
        """Hold on to no cache."""
        self.binding = None
        self.ordinals.clear()

    def forget(self) -> None:
        """No graph has run in this call: what has is of no account any more."""
        self.end()
        self.graphs = self.sites = self.stream_bytes = 0


class CurrentCall(threading.local):
    """The call that this thread is in. Threads that share a model do not see each other's."""

    call: ModelCall = ModelCall(Moment(-1, None, -1))


class TimestepReader:
    """Reads a call's timestep where that needs no wait for a device: Python numbers and tensors on the CPU."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.position: int | None = None
        self.name: str | None = None
        for position, name in enumerate(inspect.signature(forward).parameters):
            if name in TIMESTEP_NAMES:
                self.position, self.name = position, name
                break

    def value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument as it is, or None."""
        if self.name is None:
            return None
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, wait: bool = False) -> float | None:
        """The first sample's timestep, or None. ``wait`` allows a copy from a device."""
        value = self.value(args, kwargs)
        if isinstance(value, torch.Tensor):
            if value.numel() == 0 or value.is_complex() or not (wait or value.device.type == "cpu"):
                return None
            # Each op on a tensor costs a step more than all else that the clock does.
            while value.numel() > 1:
                value = value[0]
            return float(value)
        return float(value) if isinstance(value, (int, float)) else None


class Call:
    """What a clock knows of one call of a model.

    Attributes:
        model: the class of the model, for messages.
    """

    def __init__(self, model: str, reader: TimestepReader, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model = model
        self._reader = reader
        self._args = args
        self._kwargs = kwargs

    def timestep(self, *, wait: bool = False) -> float | None:
        """The first sample's timestep, or None. ``wait`` allows a copy from a device."""
        return self._reader.read(self._args, self._kwargs, wait=wait)

    def timesteps(self) -> tuple[float, ...] | None:
        """All timesteps of the call (one per sample, or per frame), or None; waits for the device."""
        value = self._reader.value(self._args, self._kwargs)
        if isinstance(value, torch.Tensor):
            return tuple(value.detach().flatten().tolist())
        return (float(value),) if isinstance(value, (int, float)) else None

    def all_timesteps(self, *, wait: bool = False) -> Any:
        """The timestep argument's numbers, to compare with another call's, or None. ``wait`` as for ``timestep``."""
        value = self._reader.value(self._args, self._kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        return value.tolist() if wait or value.device.type == "cpu" else None

    def tensors(self) -> dict[int | str, torch.Tensor]:
        """The tensors that the model is given, by position or name."""
        given: list[tuple[int | str, Any]] = [*enumerate(self._args), *self._kwargs.items()]
        return {name: value for name, value in given if isinstance(value, torch.Tensor)}


class StepClock(Protocol):
    """What gives a session the step of its calls.

    Attributes:
        latest: where the last call was, of whatever thread: for onlookers.
        trajectories, steps_begun: how many there were.
    """

    latest: Moment

    @property
    def trajectories(self) -> int: ...

    @property
    def steps_begun(self) -> int: ...

    def enter(self, call: Call, *, wait: bool = False) -> Moment:
        """Where this call is. ``wait`` allows a copy of the timestep from a device.

        Raises ``StepError`` where it cannot be a call of the schedule's trajectory.
        """

    def begin(self) -> None:
        """Nothing that is cached may be read from the next call on; of a bare model a trajectory begins."""

    def abandon(self) -> None:
        """A call of this thread failed: nothing that its trajectory has cached may be read."""
