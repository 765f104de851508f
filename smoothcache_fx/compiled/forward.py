"""The forward that stands in a compiled module's place, where that place is, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..capture.cuda_graphs import owned
from ..capture.dumping import write_session
from ..capture.session import Session, breaks_of, check_selectors
from ..capture.ways import Traced
from ..capture.whole import hooked_modules
from ..errors import CompiledError, NoSitesError
from ..runtime.calls import Call, ModelCall, TimestepReader
from ..runtime.pipelines import denoisers, is_pipeline
from ..runtime.scheduler_clock import DenoiserClock
from ..schedules.schedule import Schedule

log = logging.getLogger(__name__)

# The compiled forward of each compiled model, wherever hooks that were put on later have moved it. The model holds
# it; a reference from here would hold the model.
_forwards = WeakIdKeyDictionary()
_dump_numbers = itertools.count()


_NOT_EXPORTED = (
    "a compiled model cannot be exported or traced: what it computes differs from step to step. Call "
    "smoothcache.remove(model) first"
)


class _NotExportedError(CompiledError, AttributeError):
    """For ``hasattr``, too."""


class CompiledForward:
    """What stands in a compiled module's ``forward``: moves the clock, then calls the compiled original.

    Attributes:
        model: the module.
        original: its own forward, uncompiled.
        session: programs, schedule and clock.
        enabled: whether calls are cached and compiled; ``disabled(model)`` clears it for a while.
        calls, uncompiled_calls: how many there were, and how many of them ran without any site of ours.
        peers: the compiled forwards that the schedule was given for: all denoisers of a pipeline.
        schedules: what ``compile`` or ``set_schedule`` was given.
        times: what ``timed`` measured last, a ``CallTime`` a call.
        run: what an enabled call does; ``timed`` wraps it.
        settings: what ``compile`` was called with.
    """

    def __init__(self, place: ForwardPlace, session: Session, compiled: Traced, settings: Mapping[str, Any]) -> None:
        functools.update_wrapper(self, place.forward, updated=())
        self.model = place.model
        self.original = place.forward
        self.session = session
        self.enabled = True
        self.calls = 0
        self.uncompiled_calls = 0
        self.peers = [self]
        self.schedules: Any = session.schedule
        self.settings = settings
        self.times: list[Any] = []
        self.run: Callable[[tuple[Any, ...], dict[str, Any]], Any] = self._run
        self.undo_context: Callable[[], None] = lambda: None
        self._compiled = compiled
        self._timestep = TimestepReader(self.original)
        self._checked_programs = 0
        #: How many sites a call has had, at most.
        self._most_sites = 0
        self._told_fewer = False
        self._dump_directory = _dump_directory(type(place.model).__name__)
        self._dumped = 0

    def follow(self, schedule: Schedule) -> None:
        """Take another schedule. Each graph is laid out for it when it runs next."""
        self._compiled.follow(schedule)
        self.calls = self.uncompiled_calls = 0
        self._checked_programs = self._most_sites = 0

    def install(self, place: ForwardPlace) -> None:
        place.put(self)
        _forwards[self.model] = weakref.ref(self)

    def take_off(self) -> None:
        """Give the module its own forward back; graphs and caches stay, for ``install``."""
        place = ForwardPlace(self.model)
        if place.forward is self:
            place.put(self.original)
        del _forwards[self.model]

    def uninstall(self) -> None:
        self.enabled = False  # hooks that were put on later may go on calling it
        self.take_off()
        self.undo_context()
        self.session.close()

    # torch.compile on top of the compiled model: Dynamo must not trace the clock.
    @torch.compiler.disable(
        reason="smoothcache_fx has compiled this model already, and what it computes differs from step to step: it can "
        "be neither exported nor part of another graph. smoothcache.remove(model) gives the plain model back"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original(*args, **kwargs)
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise _NotExportedError(_NOT_EXPORTED)
        return self.run(args, kwargs)

    @property
    def __code__(self) -> Any:
        raise _NotExportedError(_NOT_EXPORTED)

    __globals__ = __code__

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_inference(self.model, args, kwargs)
        clock = self.session.clock
        moment = clock.enter(Call(type(self.model).__name__, self._timestep, args, kwargs))
        call = self.session.current.call = ModelCall(moment)
        try:
            with torch.no_grad():
                output = self._compiled(*args, **kwargs)
                if self.session.inner.cuda_graphs:
                    output = owned(output)  # samplers of several orders keep some of them
            if self.session.programs and len(self.session.programs) != self._checked_programs:
                self._check_sites()
        except BaseException:
            clock.abandon()
            raise
        finally:
            call.end()
            if self._dump_directory is not None:
                self._dump()
        self.calls += 1
        if not call.sites:
            self._note_uncached_call(call)
        elif call.sites < self._most_sites:
            self._note_fewer_sites(call.sites)
        self._most_sites = max(self._most_sites, call.sites)
        return output

    def _dump(self) -> None:
        """Write the graphs if there is a variant that has not been written, compiled or not."""
        graphs = sum(2 + len(program.builder.graphs) for program in self.session.programs)
        if graphs != self._dumped:
            self._dumped = graphs
            try:
                write_session(self.session, type(self.model).__name__, self._dump_directory)
            except Exception as error:  # noqa: BLE001 - looking on must not end a run, nor hide why it ended
                log.warning("SMOOTHCACHE_DUMP: the graphs cannot be written: %s: %s", type(error).__name__, error)

    def _note_uncached_call(self, call: ModelCall) -> None:
        if self.calls == 1 and self._sites():
            log.info("the first call ran uncached: another way of capture was found after it")
        elif not self.uncompiled_calls:
            if call.graphs:
                log.warning(
                    "%s ran with none of its sites, and so uncached.%s", type(self.model).__name__, self._hooks()
                )
            else:
                log.warning(
                    "Dynamo ran %s uncompiled and so uncached: TORCH_LOGS=recompiles,graph_breaks says why. It does so "
                    "under torch.compiler.set_stance('force_eager'), and at limits such as "
                    "torch._dynamo.config.recompile_limit",
                    type(self.model).__name__,
                )
        self.uncompiled_calls += 1

    def _note_fewer_sites(self, sites: int) -> None:
        """A model may have been told to leave out blocks. If not, a later graph has broken inside of branches."""
        hooks = self._hooks()
        if hooks and not self._told_fewer:
            self._told_fewer = True
            log.warning(
                "%s ran with %d of its %d sites: the rest is uncached.%s",
                type(self.model).__name__,
                sites,
                self._most_sites,
                hooks,
            )

    def _hooks(self) -> str:
        hooked = hooked_modules(self.model)
        return f" If that goes on: {describe_hooks(hooked)}, and compile it again" if hooked else ""

    def _check_sites(self) -> None:
        """After the first call every graph of the model is known: does the schedule fit it?"""
        if not self._sites():
            if self._most_sites:  # the model has changed while it ran: what it gives is right, but uncached
                return
            raise no_sites_error(self.model, self.session)
        known = [peer._sites() for peer in self.peers]
        if all(known):
            check_selectors(self.session.schedule, [site for sites in known for site in sites])
        self._checked_programs = len(self.session.programs)

    def _sites(self) -> list[Any]:
        return list(self.session.sites())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise CompiledError(
            "a compiled model cannot be copied: the copy would run this one's weights. Call smoothcache.remove(model) "
            "first, then copy it and compile the copy"
        )

    def __reduce__(self) -> Any:
        raise CompiledError(
            "a compiled model cannot be pickled. Save its state_dict(), or call smoothcache.remove(model) first"
        )


def _dump_directory(model: str) -> Path | None:
    """The model's own folder in ``SMOOTHCACHE_DUMP``, where its graphs are written."""
    root = os.environ.get("SMOOTHCACHE_DUMP")
    if not root:
        return None
    number = next(_dump_numbers)
    return Path(root) / (f"{model}_{number}" if number else model)


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
        own = (
            getattr(forward, "__self__", None) is self.model
            and getattr(forward, "__func__", None) is type(self.model).forward
        )
        if own and self.attribute == "forward":
            self.model.__dict__.pop("forward", None)
        else:
            setattr(self.model, self.attribute, forward)


def forward_of(model: torch.nn.Module) -> CompiledForward | None:
    reference = _forwards.get(model)
    return None if reference is None else reference()


def compiled_forward(model: Any) -> CompiledForward:
    """The model's compiled forward. Raises ``CompiledError`` if it has none."""
    forward = forward_of(model) if isinstance(model, torch.nn.Module) else None
    if forward is None:
        raise CompiledError(f"{type(model).__name__} is not compiled: call smoothcache.compile(model, schedule) first")
    return forward


def compiled_forwards(model_or_pipeline: Any) -> dict[str, CompiledForward]:
    """The compiled forward of a model (under an empty name), or those of a pipeline's denoisers by component name.

    Raises ``CompiledError`` if it was not compiled, or of a pipeline only its model.
    """
    if not is_pipeline(model_or_pipeline):
        return {"": compiled_forward(model_or_pipeline)}
    forwards = {name: forward_of(model) for name, model in denoisers(model_or_pipeline).items()}
    for name, forward in forwards.items():
        clock = None if forward is None else forward.session.clock
        if not isinstance(clock, DenoiserClock):
            hint = "" if clock is None else f"; only its {name} is, by itself: give that"
            name = type(model_or_pipeline).__name__
            raise CompiledError(f"{name} is not compiled{hint}: call smoothcache.compile(pipeline, schedule) first")
    return forwards


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
            leaves = [value]
        for leaf in leaves:
            if isinstance(leaf, torch.fx.Proxy):
                raise _NotExportedError(_NOT_EXPORTED)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise CompiledError(
                    f"the input {name!r} requires gradients, but a cached branch has none: pass "
                    "tensor.detach(), or call smoothcache.remove(model) to train it"
                )


def describe_hooks(hooked: Sequence[str]) -> str:
    """What is wrong with hooks inside of a model, and what to do."""
    return (
        f"{len(hooked)} submodules, such as {hooked[0]}, have hooks of accelerate or diffusers: sequential or group "
        "offloading, layerwise casting. They break the graph inside of the branches. Take them off, or offload the "
        "model as a whole (enable_model_cpu_offload)"
    )


def no_sites_error(model: torch.nn.Module, session: Session) -> NoSitesError:
    """Says what was looked at, and why nothing of it can be cached."""
    rejections = [rejection for program in session.programs for rejection in program.builder.rejections]
    lines = [
        f"  {r.node.name} in {r.module or 'the model'}{f' ({r.source})' if r.source else ''}: {r.reason}"
        for r in rejections[:10]
    ]
    if len(rejections) > len(lines):
        lines.append(f"  and {len(rejections) - len(lines)} more")
    looked = "\n".join(lines) if lines else "  no add of two tensors was found at all"
    breaks = "".join(f"\n  {place}" for place in breaks_of(session))
    if breaks:
        looked += f"\nGraph breaks may have cut branches in two; the graph broke at{breaks}"
    if hooked := hooked_modules(model):
        looked += f"\n{describe_hooks(hooked)}"
    return NoSitesError(
        f"{type(model).__name__} has no residual branch that can be cached: in {len(session.programs)} captured "
        f"graph(s) these adds were looked at:\n{looked}\nA site is x + f(x) with a matmul, convolution or custom op "
        "that uses parameters in f: attention, or a feed-forward on a sequence of tokens."
    )
