"""One run of a scheduler: at which step it is, and whose calls are its own."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from .calls import Call
from .streams import Streams


class Run:
    """One run of a scheduler, from ``set_timesteps`` on.

    Attributes:
        scheduler: which one runs.
        thread: where ``set_timesteps`` was called.
        lane: which set of caches it has; runs of other threads that go on at the same time have others.
        length: how many timesteps it has.
        index: of the step, None before the first call.
        trajectory: changes whenever nothing cached before may be used.
        step_serial: identifies the step, also where several have one index.
        doubtful: whether an earlier run of the thread has not ended, so that its calls may come between.
        mixed: whether calls of two runs are known to take turns: none can be attributed.
        streams: per denoiser, which of a step's calls are which.
    """

    def __init__(self, scheduler: Any, lane: int, trajectory: int, *, doubtful: bool) -> None:
        self.scheduler = weakref.ref(scheduler)
        self.thread = threading.get_ident()
        self.lane = lane
        self.length = len(scheduler.timesteps)
        self.index: int | None = None
        self.trajectory = trajectory
        self.step_serial = 0
        self.doubtful = doubtful
        self.mixed = False
        self.streams: dict[Any, tuple[int, int, Streams]] = {}
        # A scheduler that does not reset it would say where the last run ended.
        self.trusts_step_index = getattr(scheduler, "step_index", None) is None
        self.called_in_step = self.called_in_trajectory = False
        self.start = 0
        self.timesteps: list[tuple[float, ...]] = []
        #: A call's timestep over the scheduler's.
        self.scale: float | None = None

    @property
    def ended(self) -> bool:
        return self.scheduler() is None or (self.index is not None and self.index >= self.length)

    def next_step(self) -> None:
        self.called_in_step = False
        self.step_serial += 1

    def stepped(self) -> None:
        index = getattr(self.scheduler(), "step_index", None) if self.trusts_step_index else None
        self.index = int(index) if index is not None else (self.index or 0) + 1
        self.next_step()

    def begin(self, call: Call) -> None:
        """Set the index of the first step: not 0 where a pipeline begins with an image (strength below 1)."""
        scheduler = self.scheduler()
        index = getattr(scheduler, "step_index", None) if self.trusts_step_index else None
        if index is None and hasattr(scheduler, "begin_index"):
            index = scheduler.begin_index
        elif index is None:
            # DDIM and its like keep no index: one wait for the device per run.
            timesteps, timestep = torch.as_tensor(scheduler.timesteps).tolist(), call.timestep(wait=True)
            index = timesteps.index(timestep) if timestep in timesteps else 0
        self.index = self.start = int(index or 0)

    def fits(self, call: Call) -> bool:
        """Whether the call's timestep is the step's, on the scale of the run's first call. Waits for the device."""
        timestep = call.timestep(wait=True)
        if timestep is None:
            return True
        own = float(torch.as_tensor(self.scheduler().timesteps)[self.index])
        if self.scale is None and own:
            self.scale = timestep / own
        return self.scale is None or abs(timestep - self.scale * own) <= 1e-3 * max(abs(timestep), abs(self.scale))
