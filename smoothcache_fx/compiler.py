"""``compile`` puts a cached, compiled forward on a module; ``remove`` takes it off again."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .backend import Session, check_selectors
from .clock import Call, Clock, TimestepReader
from .errors import CompiledError, NoSitesError
from .inner import inner_compiler
from .pipelines import denoisers, follow_cache_context, is_pipeline
from .schedule import Schedule
from .scheduler_clock import DenoiserClock, SchedulerClock
from .traced import Traced

log = logging.getLogger(__name__)
Model = TypeVar("Model")

# The compiled forward of each compiled model, wherever hooks that were put on later have moved it. The model holds
# it; a reference from here would hold the model.
_forwards = WeakIdKeyDictionary()


class CompiledForward:
    """What stands in a compiled module's ``forward``: moves the clock, then calls the compiled original.

    Attributes:
        model: the module.
        original: its own forward, uncompiled.
        session: programs, schedule and clock.
        enabled: whether calls are cached and compiled; ``disabled(model)`` clears it for a while.
        calls, uncompiled_calls: how many there were, and how many of them Dynamo declined to compile.
        peers: the compiled forwards that the schedule was given for: all denoisers of a pipeline.
        settings: what ``compile`` was called with.
    """

    def __init__(
        self, place: ForwardPlace, session: Session, compiled: Callable[..., Any], settings: Mapping[str, Any]
    ) -> None:
        functools.update_wrapper(self, place.forward, updated=())
        self.model = place.model
        self.original = place.forward
        self.session = session
        self.enabled = True
        self.calls = 0
        self.uncompiled_calls = 0
        self.peers = [self]
        self.settings = settings
        self.undo_context: Callable[[], None] = lambda: None
        self._compiled = compiled
        self._timestep = TimestepReader(self.original)
        self._checked_programs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original(*args, **kwargs)
        check_inference(self.model, args, kwargs)
        clock = self.session.clock
        clock.enter(Call(type(self.model).__name__, self._timestep, args, kwargs))
        try:
            with torch.no_grad():
                output = self._compiled(*args, **kwargs)
            if len(self.session.programs) != self._checked_programs:
                self._check_sites()
        except BaseException:
            clock.abandon()
            raise
        self.calls += 1
        if self.session.ran_at != clock.serial:
            self._note_uncompiled_call()
        return output

    def _note_uncompiled_call(self) -> None:
        if not self.uncompiled_calls:
            log.warning(
                "Dynamo ran %s uncompiled and so uncached, most likely since it hit its recompile limit: see "
                "TORCH_LOGS=recompiles for what changes between calls, or raise torch._dynamo.config.recompile_limit",
                type(self.model).__name__,
            )
        self.uncompiled_calls += 1

    def _check_sites(self) -> None:
        """After the first call every graph of the model is known: does the schedule fit it?"""
        programs = self.session.programs
        if not self._sites():
            raise no_sites_error(self.model, programs)
        known = [peer._sites() for peer in self.peers]
        if all(known):
            check_selectors(self.session.schedule, [site for sites in known for site in sites])
        self._checked_programs = len(programs)

    def _sites(self) -> list[Any]:
        return [site for program in self.session.programs for binding in program.bindings for site in binding.sites]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise CompiledError(
            "a compiled model cannot be copied: the copy would run this one's weights. Call smoothcache.remove(model) "
            "first, then copy it and compile the copy"
        )

    def __reduce__(self) -> Any:
        raise CompiledError(
            "a compiled model cannot be pickled. Save its state_dict(), or call smoothcache.remove(model) first"
        )


def no_sites_error(model: torch.nn.Module, programs: list[Any]) -> NoSitesError:
    """Says what was looked at, and why nothing of it can be cached."""
    rejections = [rejection for program in programs for rejection in program.builder.rejections]
    lines = [
        f"  {r.node.name} in {r.module or 'the model'}{f' ({r.source})' if r.source else ''}: {r.reason}"
        for r in rejections[:10]
    ]
    if len(rejections) > len(lines):
        lines.append(f"  and {len(rejections) - len(lines)} more")
    looked = "\n".join(lines) if lines else "  no add of two tensors was found at all"
    return NoSitesError(
        f"{type(model).__name__} has no residual branch that can be cached: in {len(programs)} captured graph(s) "
        f"these adds were looked at:\n{looked}\nA site is x + f(x) with a matmul, convolution or custom op that uses "
        "parameters in f: attention, or a feed-forward on a sequence of tokens."
    )


def check_inference(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``CompiledError`` for a call that wants gradients or the training mode's dropout."""
    if model.training:
        raise CompiledError(
            f"{type(model).__name__} is in training mode, but caching is for inference: call model.eval() first"
        )
    for name, value in (*enumerate(args), *kwargs.items()):
        if not isinstance(value, torch.Tensor) and isinstance(value, (list, tuple, dict)):
            leaves = pytree.tree_leaves(value)
        else:
            leaves = (value,)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise CompiledError(
                    f"the input {name!r} requires gradients, but a cached branch has none: pass "
                    "tensor.detach(), or call smoothcache.remove(model) to train it"
                )


def compile(
    model_or_pipeline: Model,
    schedule: Schedule,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: dict[str, Any] | None = None,
    calls_per_step: int = 1,
) -> Model:
    """Compile a Diffusion Transformer, or those of a pipeline, so that it follows a caching schedule.

    The module's ``forward`` is replaced on the instance; its class, parameters and state dict stay as they are. The
    graphs are captured and compiled at the first calls, one variant per distinct decision of the schedule.

    Of a pipeline (of diffusers, or any object with ``components`` by name and a ``scheduler``) all denoisers are
    compiled: the components whose ``forward`` takes a timestep. Its scheduler tells the step: ``set_timesteps``
    begins a trajectory, ``step`` ends a step. For a second pipeline that shares the denoisers but not the scheduler,
    call it again with that pipeline and an equal schedule.

    Args:
        model_or_pipeline: the transformer, in eval mode, or a pipeline.
        schedule: which branches to compute and which to reuse, per step; of a pipeline one step per timestep of the
            scheduler.
        backend: the inner compiler: ``inductor``, ``eager``, ``aot_eager`` or any name of
            ``torch._dynamo.list_backends(None)``.
        mode, dynamic, fullgraph, options: as for ``torch.compile``.
        calls_per_step: how often the sampler calls the model in one step (2 for a conditional and an unconditional
            call). The calls of one step have caches of their own. Not for pipelines, where it need not be known.

    Returns:
        The same object.

    Raises:
        CompiledError: it is compiled already.
        TypeError: it is neither a module nor a pipeline with a denoiser.
        ScheduleError: at the first call, where the schedule selects sites that the model does not have.
        NoSitesError: at the first call, where the model has no residual branch.
        StepError: at a call, where the sampler takes another number of steps than the schedule has; of a pipeline
            when its scheduler's ``set_timesteps`` is called.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a smoothcache Schedule, got {type(schedule).__name__}; "
            "make one with Schedule(...), Schedule.uniform(...) or calibration.schedule(...)"
        )
    if not isinstance(calls_per_step, int) or calls_per_step < 1:
        raise ValueError(f"calls_per_step must be a positive number of model calls, got {calls_per_step!r}")
    settings = {"backend": backend, "mode": mode, "dynamic": dynamic, "fullgraph": fullgraph, "options": options}
    if not is_pipeline(model_or_pipeline):
        check_compilable(model_or_pipeline)
        _install(model_or_pipeline, schedule, Clock(schedule.steps, calls_per_step), settings)
        return model_or_pipeline
    if calls_per_step != 1:
        raise ValueError(f"calls_per_step is {calls_per_step}, but a pipeline's scheduler tells where a step ends")
    models = denoisers(model_or_pipeline)
    if not _join(model_or_pipeline, models, schedule, settings):
        for model in models.values():
            check_compilable(model)
        shared = SchedulerClock(schedule.steps)
        inner_compiler(backend, mode, options, dynamic)  # raises for bad arguments before anything is replaced
        forwards = [_install(model, schedule, DenoiserClock(shared), settings) for model in models.values()]
        for forward in forwards:
            forward.peers = forwards
            forward.undo_context = follow_cache_context(forward.model, forward.session.clock)
        shared.attach(model_or_pipeline)
    return model_or_pipeline


def _install(
    model: torch.nn.Module, schedule: Schedule, clock: Clock | DenoiserClock, settings: Mapping[str, Any]
) -> CompiledForward:
    inner = inner_compiler(settings["backend"], settings["mode"], settings["options"], settings["dynamic"])
    session = Session(schedule, inner, clock, model)
    place = ForwardPlace(model)
    compiled = Traced(place.forward, session, dynamic=settings["dynamic"], fullgraph=settings["fullgraph"])
    forward = CompiledForward(place, session, compiled, settings)
    place.put(forward)
    _forwards[model] = weakref.ref(forward)
    return forward


def _join(
    pipeline: Any, models: Mapping[str, torch.nn.Module], schedule: Schedule, settings: Mapping[str, Any]
) -> bool:
    """Let the denoisers, if another pipeline's ``compile`` has compiled them, follow this one's scheduler too."""
    forwards = [_forward_of(model) for model in models.values()]
    if None in forwards:
        return False
    clocks = [forward.session.clock for forward in forwards]
    if not all(isinstance(clock, DenoiserClock) and clock.shared is clocks[0].shared for clock in clocks):
        return False
    shared = clocks[0].shared
    if shared.follows(pipeline):
        return False
    if any(forward.session.schedule != schedule or forward.settings != settings for forward in forwards):
        raise CompiledError(
            f"{', '.join(models)} of {type(pipeline).__name__} is compiled already, for another pipeline with another "
            "schedule or other options: give the same ones to share it, or call smoothcache.remove(pipeline) first"
        )
    shared.attach(pipeline)
    return True


class ForwardPlace:
    """Where a module keeps the forward that is to be replaced.

    accelerate's hooks (``enable_model_cpu_offload``) put themselves in ``forward`` and the module's own in
    ``_old_forward``. They must stay outside of what is compiled: they move the weights.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        hooked = "_hf_hook" in model.__dict__ and "_old_forward" in model.__dict__
        self.attribute = "_old_forward" if hooked else "forward"
        self.forward = getattr(model, self.attribute)

    def put(self, forward: Callable[..., Any]) -> None:
        """Set it, or take it off the instance where it is the class's own."""
        own = getattr(forward, "__self__", None) is self.model and forward.__func__ is type(self.model).forward
        if own and self.attribute == "forward":
            self.model.__dict__.pop("forward", None)
        else:
            setattr(self.model, self.attribute, forward)


def check_compilable(model: Any) -> None:
    """Raise for what is no plain module, or has been compiled before."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}; a pipeline has components and a scheduler"
        )
    if _forward_of(model) is not None:
        raise CompiledError(
            f"{type(model).__name__} is compiled already: call smoothcache.remove(model) first to compile it with "
            "another schedule"
        )
    if hasattr(model, "_orig_mod"):
        raise CompiledError(
            "the model is wrapped by torch.compile: pass the module itself (model._orig_mod); smoothcache.compile "
            "does what torch.compile does"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledError(
            "model.compile() was called on the model, so its forward would be passed by: build it without that; "
            "smoothcache.compile does what torch.compile does"
        )


def _forward_of(model: torch.nn.Module) -> CompiledForward | None:
    reference = _forwards.get(model)
    return None if reference is None else reference()


def compiled_forward(model: Any) -> CompiledForward:
    """The model's compiled forward. Raises ``CompiledError`` if it has none."""
    forward = _forward_of(model) if isinstance(model, torch.nn.Module) else None
    if forward is None:
        raise CompiledError(f"{type(model).__name__} is not compiled: call smoothcache.compile(model, schedule) first")
    return forward


def compiled_forwards(model_or_pipeline: Any) -> dict[str, CompiledForward]:
    """The compiled forward of a model (under an empty name), or those of a pipeline's denoisers by component name.

    Raises ``CompiledError`` if it was not compiled, or of a pipeline only its model.
    """
    if not is_pipeline(model_or_pipeline):
        return {"": compiled_forward(model_or_pipeline)}
    forwards = {name: _forward_of(model) for name, model in denoisers(model_or_pipeline).items()}
    for name, forward in forwards.items():
        clock = None if forward is None else forward.session.clock
        if not isinstance(clock, DenoiserClock):
            hint = "" if clock is None else f"; only its {name} is, by itself: give that"
            name = type(model_or_pipeline).__name__
            raise CompiledError(f"{name} is not compiled{hint}: call smoothcache.compile(pipeline, schedule) first")
    return forwards


def remove(model_or_pipeline: Model) -> Model:
    """Give the module its own forward back and free the caches. Returns the same object.

    Of a pipeline everything is given back: the denoisers' forwards, the schedulers, also for other pipelines that
    share the denoisers.
    """
    for forward in compiled_forwards(model_or_pipeline).values():
        _uninstall(forward)
    return model_or_pipeline


def _uninstall(forward: CompiledForward) -> None:
    forward.enabled = False  # hooks that were put on later may go on calling it
    place = ForwardPlace(forward.model)
    if place.forward is forward:
        place.put(forward.original)
    forward.undo_context()
    forward.session.close()
    del _forwards[forward.model]
    clock = forward.session.clock
    if isinstance(clock, DenoiserClock):
        clock.shared.denoisers.remove(clock)
        if not clock.shared.denoisers:
            clock.shared.detach()


def reset(model_or_pipeline: Any) -> None:
    """Begin a trajectory: the next call is step 0. From the first use on, only this begins a trajectory.

    Of a pipeline, whose scheduler tells the step, it forgets what is cached.
    """
    for forward in compiled_forwards(model_or_pipeline).values():
        forward.session.clock.begin()


@contextlib.contextmanager
def disabled(model_or_pipeline: Any) -> Iterator[None]:
    """Run the original forward, uncompiled and uncached, inside the ``with``. The schedule's step stays where it is.

    Of a pipeline any number of steps may be run inside.
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
