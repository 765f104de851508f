"""``compile`` puts a cached, compiled forward on a module; ``remove`` takes it off again."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from . import _torch
from .backend import Session, check_selectors
from .clock import Clock, TimestepReader
from .errors import CompiledError, NoSitesError
from .inner import inner_compiler
from .schedule import Schedule

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=torch.nn.Module)


class CompiledForward:
    """What stands in a compiled module's ``forward``: moves the clock, then calls the compiled original.

    Attributes:
        model: the module.
        original: its own forward, uncompiled.
        session: programs, schedule and clock.
        enabled: whether calls are cached and compiled; ``disabled(model)`` clears it for a while.
        calls, uncompiled_calls: how many there were, and how many of them Dynamo declined to compile.
    """

    def __init__(self, model: torch.nn.Module, session: Session, compiled: Callable[..., Any]) -> None:
        self.model = model
        self.original = model.forward
        self.replaced = model.__dict__.get("forward")
        self.session = session
        self.enabled = True
        self.calls = 0
        self.uncompiled_calls = 0
        self._compiled = compiled
        self._timestep = TimestepReader(self.original)
        self._checked_programs = 0
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original(*args, **kwargs)
        check_inference(self.model, args, kwargs)
        clock = self.session.clock
        clock.tick(self._timestep.read(args, kwargs))
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
        sites = [site for program in programs for binding in program.bindings for site in binding.sites]
        if not sites:
            raise no_sites_error(self.model, programs)
        check_selectors(self.session.schedule, sites)
        self._checked_programs = len(programs)

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
        "parameters in f, on tensors of at least three dimensions."
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
    """Compile a Diffusion Transformer so that it follows a caching schedule.

    The module's ``forward`` is replaced on the instance; its class, parameters and state dict stay as they are. The
    graphs are captured and compiled at the first calls, one variant per distinct decision of the schedule.

    Args:
        model_or_pipeline: the transformer, in eval mode.
        schedule: which branches to compute and which to reuse, per step.
        backend: the inner compiler: ``inductor``, ``eager``, ``aot_eager`` or any name of
            ``torch._dynamo.list_backends(None)``.
        mode, dynamic, fullgraph, options: as for ``torch.compile``.
        calls_per_step: how often the sampler calls the model in one step (2 for a conditional and an unconditional
            call). The calls of one step have caches of their own.

    Returns:
        The same object.

    Raises:
        CompiledError: it is compiled already.
        ScheduleError: at the first call, where the schedule selects sites that the model does not have.
        NoSitesError: at the first call, where the model has no residual branch.
        StepError: at a call, where the sampler takes another number of steps than the schedule has.
    """
    model = model_or_pipeline
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a smoothcache Schedule, got {type(schedule).__name__}; "
            "make one with Schedule(...), Schedule.uniform(...) or calibration.schedule(...)"
        )
    check_compilable(model)
    if not isinstance(calls_per_step, int) or calls_per_step < 1:
        raise ValueError(f"calls_per_step must be a positive number of model calls, got {calls_per_step!r}")
    inner = inner_compiler(backend, mode, options, dynamic)
    session = Session(schedule, inner, Clock(schedule.steps, calls_per_step), model)
    compiled = _torch.dynamo_compile(model.forward, session, dynamic=dynamic, fullgraph=fullgraph)
    model.forward = CompiledForward(model, session, compiled)
    return model


def check_compilable(model: Any) -> None:
    """Raise for what is no plain module, or has been compiled before."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model.__dict__.get("forward"), CompiledForward):
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


def compiled_forward(model: Any) -> CompiledForward:
    """The model's compiled forward. Raises ``CompiledError`` if it has none."""
    forward = getattr(model, "__dict__", {}).get("forward")
    if not isinstance(forward, CompiledForward):
        raise CompiledError(f"{type(model).__name__} is not compiled: call smoothcache.compile(model, schedule) first")
    return forward


def remove(model: Model) -> Model:
    """Give the module its own forward back and free the caches. Returns the module."""
    forward = compiled_forward(model)
    if forward.replaced is None:
        del model.__dict__["forward"]
    else:
        model.forward = forward.replaced
    forward.session.close()
    return model


def reset(model: torch.nn.Module) -> None:
    """Begin a trajectory: the next call is step 0. From the first use on, only this begins a trajectory."""
    compiled_forward(model).session.clock.begin()


@contextlib.contextmanager
def disabled(model: torch.nn.Module) -> Iterator[None]:
    """Run the original forward, uncompiled and uncached, inside the ``with``. The schedule's step stays where it is."""
    forward = compiled_forward(model)
    before, forward.enabled = forward.enabled, False
    try:
        yield
    finally:
        forward.enabled = before
