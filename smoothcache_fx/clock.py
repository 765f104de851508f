"""Which step, which trajectory and which stream a call of the model belongs to."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import StepError

log = logging.getLogger(__name__)

#: What the argument that carries the noise level is called in DiT, diffusers, k-diffusion and stable-audio-tools.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_level")


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
    """One call of a model, as a clock sees it.

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

    def tensors(self) -> dict[int | str, torch.Tensor]:
        """The tensors that the model is given, by position or name."""
        given = (*enumerate(self._args), *self._kwargs.items())
        return {name: value for name, value in given if isinstance(value, torch.Tensor)}


class Clock:
    """Counts the calls of a bare model: ``calls_per_step`` calls to a step, ``steps`` steps to a trajectory.

    Without ``steps`` (calibration) a trajectory is as long as it turns out to be.

    ``begin()`` starts a trajectory at the next call. Where the timestep can be read, the count is checked against
    it: a trajectory runs from one end of the noise levels to the other, so a timestep back at its start means that
    the sampler has begun anew. A sampler that takes another number of steps than ``steps`` is then an error and not
    a picture made from another picture's cache.

    Attributes:
        step: index of the step, from 0, in sampling order.
        stream: which of the step's calls this is, from 0.
        trajectory: index of the trajectory, from 0.
        serial: number of calls so far; each call has its own.
        trajectories, steps_begun: how many there were.
    """

    def __init__(self, steps: int | None, calls_per_step: int = 1) -> None:
        self.steps = steps
        self.calls_per_step = calls_per_step
        self.trajectory = -1
        self.serial = 0
        self.step = -1
        self.stream = 0
        self.steps_begun = 0
        self._calls = 0
        self._begin_next = True
        self._explicit = False
        self._first: float | None = None
        self._last: float | None = None

    @property
    def trajectories(self) -> int:
        return self.trajectory + 1

    def enter(self, call: Call, *, wait: bool = False) -> None:
        """``tick`` with the call's timestep; ``wait`` allows a copy of it from a device."""
        self.tick(call.timestep(wait=wait))

    def begin(self) -> None:
        """The next call is the first of a trajectory. From now on only this, and no count, begins one."""
        self._begin_next = True
        self._explicit = True

    def abandon(self) -> None:
        """The call failed, so the trajectory is over: the next call begins another."""
        self._begin_next = True

    def tick(self, timestep: float | None = None) -> None:
        """Move to the next call. Raises ``StepError`` where it cannot be a call of the schedule's trajectory."""
        complete = self.steps is not None and self._calls == self.steps * self.calls_per_step
        restarted = self._restarted(timestep)
        if not self._begin_next:
            if complete and not restarted and (self._explicit or restarted is False):
                self._misfit(f"it goes on after {self.steps} steps")
            if restarted and not complete and self.steps is not None:
                self._misfit(f"it began anew after {self._describe(self._calls)}")
        if self._begin_next or complete or restarted:
            self.trajectory += 1
            self._calls = 0
            self._first = timestep
            self._begin_next = False
        self.step, self.stream = divmod(self._calls, self.calls_per_step)
        self.steps_begun += self.stream == 0
        self._calls += 1
        self._last = timestep
        self.serial += 1

    def _restarted(self, timestep: float | None) -> bool | None:
        """Whether the timestep is back at (or before) the trajectory's first, or None where that cannot be told."""
        if timestep is None or self._first is None or self._last is None:
            return None
        travelled = self._last - self._first
        if travelled == 0.0:
            return None
        return (timestep - self._first) * travelled <= 0.0

    def _describe(self, calls: int) -> str:
        steps, rest = divmod(calls, self.calls_per_step)
        return f"{steps} steps" + (f" and {rest} of {self.calls_per_step} calls" if rest else "")

    def _misfit(self, what: str) -> None:
        self._begin_next = True
        raise StepError(
            f"the sampler does not run the schedule's {self.steps} steps: {what}. Use a schedule made for the number "
            "of steps that the sampler takes, pass calls_per_step if it calls the model more than once a step, and "
            "call smoothcache.reset(model) before each trajectory if runs may end early."
        )
