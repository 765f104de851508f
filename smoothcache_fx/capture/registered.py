"""The backend that is registered with Dynamo by name: ``torch.compile(model, backend="smoothcache")``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ScheduleError
from ..runtime.calls import ModelCall
from ..runtime.clock import Clock
from ..schedules.schedule import Schedule
from .inner import inner_compiler
from .session import Session, check_selectors, compile_frame

# For ``torch.compile(model, backend="smoothcache")`` there is no call of ours around the model's: a program ticks the
# clock itself. One program may run for several models of a class, and one model may have several, for other shapes:
# the clock is found by the parameter that the graph uses first.
_clocks = WeakIdKeyDictionary()


def smoothcache_backend(
    gm: GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that is registered with Dynamo as ``smoothcache``, for a model that is captured as one graph.

    ``torch.compile(model, backend="smoothcache", options={"schedule": schedule})``. Each call of the model is one
    step, or one of ``options["calls_per_step"]`` calls of a step. ``options["backend"]`` names the inner compiler
    (``inductor``); all other options are the inner compiler's. Where the model breaks into several graphs, or runs
    must start anew half-way, use ``smoothcache_fx.compile``.

    Raises:
        ScheduleError: no schedule was given, or it selects sites that the model does not have.
    """
    settings = dict(options or {})
    schedule = settings.pop("schedule", None)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f'the backend "smoothcache" needs options={{"schedule": Schedule(...)}}; got {schedule!r} as schedule'
        )
    name, calls = settings.pop("backend", "inductor"), settings.pop("calls_per_step", 1)
    inner = inner_compiler(name, mode, settings or None, None)
    own_clock = Clock(schedule.steps, calls)
    session = Session(schedule, inner, own_clock, None)
    program, run = compile_frame(session, gm, inputs)
    check_selectors(schedule, program.builder.sites)
    weights = program.frame.weights

    def clock_of(arguments: Sequence[Any]) -> Clock:
        if not weights:
            return own_clock
        clock = _clocks.get(arguments[weights[0]])
        if clock is None or (clock.steps, clock.calls_per_step) != (schedule.steps, calls):
            clock = _clocks[arguments[weights[0]]] = Clock(schedule.steps, calls)
        return clock

    @functools.wraps(run)
    def tick_and_run(*arguments: Any) -> Any:
        clock = session.clock = clock_of(arguments)
        session.current.call = ModelCall(clock.tick())
        try:
            return run(*arguments)
        except BaseException:
            clock.abandon()
            raise
        finally:
            session.current.call.end()

    return tick_and_run
