"""``compile`` puts a cached, compiled forward on a module; ``remove`` takes it off again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..capture.inner import InnerCompiler, inner_compiler
from ..capture.session import Session
from ..capture.ways import Traced
from ..checks import byte_count, flag, instance, whole_number
from ..errors import CompiledError, SmoothCacheError
from ..runtime.calls import StepClock
from ..runtime.clock import Clock
from ..runtime.pipelines import denoisers, follow_cache_context, is_pipeline
from ..runtime.scheduler_clock import DenoiserClock, SchedulerClock
from ..schedules.schedule import Schedule
from .forward import CompiledForward, ForwardPlace, compiled_forwards, forward_of
from .schedules import Schedules, ScheduleSet, only_schedule, schedules_of

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Any)

#: More variants than this take longer to compile than users expect, and are warned about.
MANY_VARIANTS = 6
#: What is followed before the first run of a pipeline with several schedules.
EVERYTHING = Schedule(1)


def compile(
    model_or_pipeline: Model,
    schedule: Schedules,
    *,
    quality: str | None = None,
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: dict[str, Any] | None = None,
    calls_per_step: int | None = None,
    max_cache_bytes: int | str | None = None,
) -> Model:
    """Compile a Diffusion Transformer, or those of a pipeline, so that it follows a caching schedule.

    The module's ``forward`` is replaced on the instance; its class, parameters and state dict stay as they are. The
    graphs are captured and compiled at the first calls, one variant per distinct decision of the schedule.

    Of a pipeline (of diffusers, or any object with ``components`` by name and a ``scheduler``) all denoisers are
    compiled: the components whose ``forward`` takes a timestep. Its scheduler gives the step: ``set_timesteps``
    begins a trajectory, ``step`` ends a step. For a second pipeline that shares the denoisers but not the scheduler,
    call it again with that pipeline and an equal schedule.

    Args:
        model_or_pipeline: the transformer, in eval mode, or a pipeline.
        schedule: which branches to compute and which to reuse, per step; of a pipeline one step per timestep of the
            scheduler. For a pipeline also a set of schedules by their number of steps, ``{20: a, 30: b}``, of which
            each run takes its own, or a `Calibration`, which makes them when they are needed.
        quality: of the schedules that a calibration makes: ``lossless``, ``high``, ``medium`` (the default) or
            ``fast``, as for `Calibration.schedule`.
        backend: the inner compiler: ``inductor``, ``eager``, ``aot_eager`` or any name of
            ``torch._dynamo.list_backends(None)``.
        mode, dynamic, fullgraph, options: as for ``torch.compile``; ``guard_filter_fn`` among the options is Dynamo's.
        calls_per_step: how often the sampler calls the model in one step (2 for a conditional and an unconditional
            call). The calls of one step have caches of their own. By default each call is a step, and two calls in a
            row at one timestep are an error; 1 allows them. Not for pipelines, where it need not be known.
        max_cache_bytes: what a model's caches may take in all, a number or such as ``"2GiB"``. Where branches would
            take more, runs of blocks are cached as one (``stack``), those that save most first; each is computed where
            one of its branches would be. It is decided when the model is captured, before caches are allocated.

    Returns:
        The same object.

    Raises:
        CompiledError: it is compiled already, or in training mode; at the first call, where PyTorch cannot capture it.
        TypeError: it is neither a module nor a pipeline with a denoiser, or the schedule is no ``Schedule``.
        ValueError: ``calls_per_step`` is not positive, or is given for a pipeline; both mode and options are given.
        RuntimeError: ``torch.compile`` knows no such mode or option; its ``InvalidBackend`` for an unknown backend.
        ScheduleError: at the first call, where the schedule selects sites that the model does not have, or where its
            caches do not fit into ``max_cache_bytes`` even as stacks; at a later call, where more streams need more.
        NoSitesError: at the first call, where the model has no residual branch.
        StepError: at a call of a bare model that goes on after the schedule's last step, that comes from a second
            thread before the first one's trajectory has ended, or that repeats the last one's timestep; of a pipeline
            when its scheduler's ``set_timesteps`` is given a number of steps that there is no schedule for.

    Example:
        >>> schedule = smoothcache.Schedule.uniform(50, 2)  # every second step is computed
        >>> model = smoothcache.compile(model, schedule)
        >>> image = sample(model, seed=0)
    """
    if calls_per_step is not None:
        calls_per_step = whole_number(calls_per_step, "calls_per_step", 1, SmoothCacheError)
    if mode is not None:
        instance(mode, "mode", str, "one of torch.compile's, such as 'reduce-overhead'")
    if options is not None:
        instance(options, "options", Mapping, "torch.compile's options, by name")
    fullgraph = flag(fullgraph, "fullgraph")
    dynamic = None if dynamic is None else flag(dynamic, "dynamic")
    limit = None if max_cache_bytes is None else byte_count(max_cache_bytes, "max_cache_bytes")
    settings = {
        "backend": backend,
        "mode": mode,
        "dynamic": dynamic,
        "fullgraph": fullgraph,
        "options": options,
        "max_cache_bytes": limit,
    }
    if not is_pipeline(model_or_pipeline):
        only = only_schedule(schedule, quality)
        _tell_variants(only)
        check_compilable(model_or_pipeline)
        _install(model_or_pipeline, only, Clock(only.steps, calls_per_step, only.timesteps), settings)
        return model_or_pipeline
    schedules = schedules_of(schedule, quality)
    if calls_per_step not in (None, 1):
        raise ValueError(f"calls_per_step is {calls_per_step}, but a pipeline's scheduler says where a step ends")
    models = denoisers(model_or_pipeline)
    if not _join(model_or_pipeline, models, schedules, settings):
        for name in models:
            check_compilable(model_or_pipeline.components[name])
        # Of a set the first run takes its own.
        first = schedules if isinstance(schedules, Schedule) else EVERYTHING
        shared = SchedulerClock(first.steps, first.timesteps)
        _inner_compiler(settings)  # raises for bad arguments before anything is replaced
        clocks = [DenoiserClock(shared) for _ in models]
        pairs = zip(models.values(), clocks, strict=True)
        forwards = [_install(model, first, clock, settings) for model, clock in pairs]
        for forward, clock in zip(forwards, clocks, strict=True):
            forward.peers = forwards
            forward.undo_context = follow_cache_context(forward.model, clock)
        shared.attach(model_or_pipeline)
        _follow(forwards, shared, schedules)
    return model_or_pipeline


def set_schedule(model_or_pipeline: Model, schedule: Schedules, *, quality: str | None = None) -> Model:
    """Let a compiled model or pipeline follow another schedule, or other ones, from the next call on.

    Captured graphs stay, and so does every variant that both schedules have in common: two schedules with one row for
    all groups and forecasts of one order have all. Nothing that is cached is read any more, and `report` counts anew.
    Call it between trajectories; one that is under way begins again.

    Args:
        model_or_pipeline, schedule, quality: as for `compile`.

    Returns:
        The same object.

    Raises:
        CompiledError: it is not compiled.
        StepError: another thread is in the midst of a pipeline's run.
        TypeError, ScheduleError: as for `compile`; what the model does not have is found at the next call.

    Example:
        >>> model = smoothcache.compile(model, calibration.schedule(compute=0.5))
        >>> image = sample(model, seed=0)
        >>> model = smoothcache.set_schedule(model, calibration.schedule(compute=0.3))
        >>> faster = sample(model, seed=0)
    """
    forwards = list(compiled_forwards(model_or_pipeline).values())
    forward, clock = forwards[0], forwards[0].session.clock
    if is_pipeline(model_or_pipeline):
        schedules = schedules_of(schedule, quality)
        assert isinstance(clock, DenoiserClock)
        _follow(forwards, clock.shared, schedules)
        return model_or_pipeline
    if not isinstance(clock, Clock):
        raise CompiledError(
            f"{type(forward.model).__name__} was compiled as a part of a pipeline, whose scheduler gives its steps: "
            "call smoothcache.set_schedule(pipeline, schedule)"
        )
    only = only_schedule(schedule, quality)
    forward.follow(only)
    forward.schedules = only
    forward.session.clock = clock.for_schedule(only.steps, only.timesteps)
    return model_or_pipeline


def _follow(forwards: Sequence[CompiledForward], shared: SchedulerClock, schedules: Schedule | ScheduleSet) -> None:
    """Let a pipeline's denoisers follow a schedule from the next run on, or each run the one that a set has for it."""

    def take(schedule: Schedule) -> None:
        if any(forward.session.schedule is not schedule for forward in forwards):
            shared.follow(schedule.steps, schedule.timesteps)
            for forward in forwards:
                forward.follow(schedule)

    if isinstance(schedules, Schedule):
        take(schedules)
        shared.choose = None
    else:
        shared.choose = lambda scheduler: take(schedules.schedule_for(scheduler))
    for forward in forwards:
        forward.schedules = schedules


def _tell_variants(schedule: Schedule) -> None:
    if schedule.variants > MANY_VARIANTS:
        log.warning(
            "the schedule makes up to %d variants, each of which is compiled: rows='joint' or max_variants= of "
            "Calibration.schedule make fewer",
            schedule.variants,
        )
    else:
        log.info("up to %d variants will be compiled for each graph of the model", schedule.variants)


def _install(
    model: torch.nn.Module, schedule: Schedule, clock: StepClock, settings: Mapping[str, Any]
) -> CompiledForward:
    session = Session(schedule, _inner_compiler(settings), clock, model, settings["max_cache_bytes"])
    session.close_with(model)
    place = ForwardPlace(model)
    compiled = Traced(
        place.forward,
        session,
        dynamic=settings["dynamic"],
        fullgraph=settings["fullgraph"],
        guard_filter_fn=(settings["options"] or {}).get("guard_filter_fn"),
    )
    forward = CompiledForward(place, session, compiled, settings)
    forward.install(place)
    return forward


def _inner_compiler(settings: Mapping[str, Any]) -> InnerCompiler:
    options = {name: value for name, value in (settings["options"] or {}).items() if name != "guard_filter_fn"}
    return inner_compiler(settings["backend"], settings["mode"], options or None, settings["dynamic"])


def _join(
    pipeline: Any,
    models: Mapping[str, torch.nn.Module],
    schedules: Schedule | ScheduleSet,
    settings: Mapping[str, Any],
) -> bool:
    """Let the denoisers, if another pipeline's ``compile`` has compiled them, follow this one's scheduler too."""
    forwards = [forward_of(model) for model in models.values()]
    if None in forwards:
        return False
    clocks = [clock for forward in forwards if isinstance(clock := forward.session.clock, DenoiserClock)]
    if len(clocks) < len(forwards) or len({clock.shared for clock in clocks}) > 1:
        return False
    shared = clocks[0].shared
    if shared.follows(pipeline):
        return False
    if any(forward.schedules != schedules or forward.settings != settings for forward in forwards):
        raise CompiledError(
            f"{', '.join(models)} of {type(pipeline).__name__} is compiled already, for another pipeline with another "
            "schedule or other options: give the same ones to share it, or call smoothcache.remove(pipeline) first"
        )
    shared.attach(pipeline)
    return True


def check_compilable(model: Any) -> None:
    """Raise for anything but a plain module in eval mode that has not been compiled before."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}; a pipeline has components and a scheduler"
        )
    if forward_of(model) is not None:
        raise CompiledError(
            f"{type(model).__name__} is compiled already: call smoothcache.remove(model) first to compile it with "
            "another schedule"
        )
    if hasattr(model, "_orig_mod"):
        raise CompiledError(
            "the model is wrapped by torch.compile: pass the module itself (model._orig_mod); smoothcache.compile "
            "does what torch.compile does"
        )
    if model.training:
        raise CompiledError(
            f"{type(model).__name__} is in training mode, but caching is for inference: call model.eval() first"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledError(
            "model.compile() was called on the model, so its forward would be passed by: build it without that; "
            "smoothcache.compile does what torch.compile does"
        )


def remove(model_or_pipeline: Model) -> Model:
    """Give the module its own forward back and free the caches. Returns the same object.

    Of a pipeline everything is given back: the denoisers' forwards, the schedulers, also for other pipelines that
    share the denoisers.

    Example:
        >>> model = smoothcache.compile(model, schedule)
        >>> model = smoothcache.remove(model)  # as it was
    """
    for forward in compiled_forwards(model_or_pipeline).values():
        forward.uninstall()
        clock = forward.session.clock
        if isinstance(clock, DenoiserClock):
            clock.shared.denoisers.remove(clock)
            if not clock.shared.denoisers:
                clock.shared.detach()
    return model_or_pipeline


def reset(model_or_pipeline: Any) -> None:
    """Begin a trajectory: the next call is step 0. From the first use on, only this begins a trajectory.

    Of a pipeline, whose scheduler gives the step, it forgets what is cached.

    Example:
        >>> model = smoothcache.compile(model, schedule)
        >>> for seed in range(2):
        ...     smoothcache.reset(model)  # for a sampler that stops early, or has no timestep
        ...     image = sample(model, seed)
    """
    for forward in compiled_forwards(model_or_pipeline).values():
        forward.session.clock.begin()


@contextlib.contextmanager
def disabled(model_or_pipeline: Any) -> Iterator[None]:
    """Run the original forward, uncompiled and uncached, inside the ``with``. The schedule's step stays where it is.

    Of a pipeline any number of steps may be run inside.

    Example:
        >>> model = smoothcache.compile(model, schedule)
        >>> with smoothcache.disabled(model):
        ...     reference = sample(model, seed=0)
        >>> image = sample(model, seed=0)
    """
    forwards = compiled_forwards(model_or_pipeline).values()
    clocks = [f.session.clock.shared for f in forwards if isinstance(f.session.clock, DenoiserClock)]
    before = [forward.enabled for forward in forwards], [clock.following for clock in clocks]
    for forward in forwards:
        forward.enabled = False
    for clock in clocks:
        clock.following = False
    try:
        yield
    finally:
        for forward, enabled in zip(forwards, before[0], strict=True):
            forward.enabled = enabled
        for clock, following in zip(clocks, before[1], strict=True):
            clock.following = following
