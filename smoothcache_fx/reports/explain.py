"""``explain`` and ``dump``: look at what would be cached, and at the graphs."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..capture import _torch
from ..capture.dumping import write_session
from ..capture.inner import inner_compiler
from ..capture.program import Program
from ..capture.session import Session, breaks_of, share_outside
from ..capture.variants import GraphBuilder
from ..capture.ways import Traced
from ..checks import byte_count, instance
from ..compiled.forward import ForwardPlace, check_inference, compiled_forwards, forward_of, no_sites_error
from ..errors import CompiledError
from ..passes.facts import packet, tensor_value
from ..passes.flops import concrete
from ..passes.names import STACK
from ..passes.stacks import as_site, find_stacks
from ..runtime.calls import ModelCall
from ..runtime.clock import Clock
from ..runtime.pipelines import first_calls, is_pipeline
from ..runtime.variant import SiteInfo, Variant
from ..schedules.schedule import Schedule
from .explanation import AddExplanation, Explanation, SiteExplanation, StackExplanation
from .prediction import predict, predictions_together

log = logging.getLogger(__name__)


def explain(
    model_or_pipeline: Any,
    *args: Any,
    schedule: Schedule | None = None,
    max_cache_bytes: int | str | None = None,
    **kwargs: Any,
) -> Explanation:
    """What could be cached in the model, for these inputs.

    A model that is one graph is captured and not run: nothing is computed, and weights and inputs may be fake or on
    the meta device. One that is not is run, uncompiled: once, and again where graph breaks keep work out of sites.

    Args:
        model_or_pipeline: the transformer, compiled or not, in eval mode; or a pipeline.
        args, kwargs: inputs of one call. Of a pipeline one function, called with it, that runs it: the inputs are those
            of its denoiser's first call, at which the run ends. Where there are two denoisers, it goes on until both
            were called; names then begin with the component's, and ``schedule`` is taken as if both were called at
            every step.
        schedule: also predict what it costs and saves.
        max_cache_bytes: as for ``compile``, of the schedule's caches in one stream of calls: the prediction is of what
            would fit.

    Raises:
        TypeError: it is neither a module nor a pipeline, or a pipeline was given without a function.
        NoSitesError: the model has no residual branch; says what was looked at.
        CompiledError: the model is in training mode, or an input requires gradients.
        ScheduleError: two selectors of the schedule contradict each other.

    Example:
        >>> print(smoothcache.explain(model, latents, timestep))
        >>> print(smoothcache.explain(pipe, lambda pipe: pipe([207], num_inference_steps=4)))
        >>> print(smoothcache.explain(model, latents, timestep, schedule=schedule).prediction)
    """
    if is_pipeline(model_or_pipeline):
        if kwargs or len(args) != 1 or not callable(args[0]):
            raise TypeError(
                f"explain of {type(model_or_pipeline).__name__} takes one function that runs it, such as "
                "explain(pipe, lambda pipe: pipe(prompt)), from whose first call of the denoiser the inputs are taken"
            )
        calls = first_calls(model_or_pipeline, args[0])
        found = {
            name: explain(model, *a, schedule=schedule, max_cache_bytes=max_cache_bytes, **k)
            for name, (model, a, k) in calls.items()
        }
        return next(iter(found.values())) if len(found) == 1 else _together(found)
    model = model_or_pipeline
    if schedule is not None:
        instance(schedule, "schedule", Schedule, "Calibration.schedule or Schedule.uniform makes one")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module or a pipeline, got {type(model).__name__}")
    check_inference(model, args, kwargs)
    limit = None if max_cache_bytes is None else byte_count(max_cache_bytes, "max_cache_bytes")
    if limit is not None and schedule is None:
        raise ValueError("max_cache_bytes is given without a schedule, and so there are no caches to fit into it")
    with torch.no_grad(), contextlib.ExitStack() as sessions:

        def captured(schedule: Schedule | None = None, limit: int | None = None) -> Session:
            session = _captured(model, args, kwargs, schedule, limit)
            sessions.callback(session.close)
            return session

        planned = captured(schedule, limit)
        # Of a model whose branches become parts of stacks the branches are told as they are without.
        merged = schedule is not None and (limit is not None or schedule.has_stacks)
        branches = captured() if merged else planned
        explanation = _explain_branches(model, branches)
        # Where the graph breaks, stacks may be captured in another way than branches.
        runs = captured(Schedule(1, {STACK: (True,)})) if breaks_of(branches) else branches
        explanation.stacks, explanation.unstacked = _explain_stacks(runs)
        if schedule is not None:
            explanation.prediction = predict(planned.programs, schedule)
        return explanation


def _captured(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    schedule: Schedule | None,
    limit: int | None,
) -> Session:
    """The model's graphs, with the caches and the stacks of a schedule."""
    new = functools.partial(_new_session, model=model, schedule=schedule or Schedule(1), limit=limit)
    return _captured_only(model, new, args, kwargs) or _captured_and_run(model, new, args, kwargs)


def _together(found: Mapping[str, Explanation]) -> Explanation:
    """One explanation of a pipeline's denoisers."""
    each = found.values()
    predictions = [one.prediction for one in each if one.prediction is not None]
    weights = [one.flops for one in each]
    return Explanation(
        model=", ".join(f"{name} ({one.model})" for name, one in found.items()),
        sites=[
            replace(site, name=f"{name}: {site.name}", group=f"{name}: {site.group}")
            for name, one in found.items()
            for site in one.sites
        ],
        adds=[add for one in each for add in one.adds],
        graphs=sum(one.graphs for one in each),
        flops=sum(weights),
        breaks=sum((one.breaks for one in each), Counter()),
        lost_share=max(one.lost_share for one in each),
        whole=tuple(name for one in each for name in one.whole),
        prediction=predictions_together(predictions, weights) if predictions else None,
        stacks=[replace(stack, name=f"{name}: {stack.name}") for name, one in found.items() for stack in one.stacks],
        unstacked={f"{name}: {block}": why for name, one in found.items() for block, why in one.unstacked.items()},
    )


class _Captured(BaseException):
    """The model is captured; there is no need to run it. No Exception: nothing on the way may handle it."""


class _NotRun:
    """The dispatcher of a graph that need not run."""

    _boxed_call = True

    def __init__(self) -> None:
        self.variants: dict[Hashable, Variant] = {}

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        raise _Captured

    def serve(self, builder: Any, variants: dict[Hashable, Variant]) -> None:
        self.variants = variants

    def close(self) -> None:
        pass


class _CaptureSession(Session):
    def dispatcher(self, builder: GraphBuilder) -> _NotRun:
        return _NotRun()


def _new_session(kind: type[Session], model: torch.nn.Module, schedule: Schedule, limit: int | None) -> Session:
    clock = Clock(1)
    session = kind(schedule, inner_compiler("eager", None, None, None), clock, model, limit)
    session.current.call = ModelCall(clock.tick())
    return session


def _captured_only(
    model: torch.nn.Module, new: Callable[[type[Session]], Session], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Session | None:
    """The model's session after capture; None if ``compile`` would make more than one graph of it.

    Python between graphs may read values, so the model must then run.
    """
    place, compiled = ForwardPlace(model), forward_of(model)
    if place.attribute != "forward":
        return None  # hooks move weights and inputs to where they can be captured
    session = new(_CaptureSession)
    forward = place.forward if compiled is None else compiled.original
    try:
        _torch.dynamo_compile(forward, session, fullgraph=True)(*args, **kwargs)
    except _Captured:
        if not _reads_numbers(session):
            return session
        log.info("a number is read from a tensor, where compile's graph breaks, so the model is run")
    except Exception as error:  # noqa: BLE001 - the run that follows raises it again, if it is not of the capture
        log.info("not one graph, so the model is run: %s", error)
    session.close()
    return None


def _reads_numbers(session: Session) -> bool:
    """Whether a graph reads a number from a tensor (``item``): Dynamo breaks there, unless one graph is asked for."""
    nodes = (node for program in session.programs for node in program.builder.captured.graph.nodes)
    return any(packet(node) is torch.ops.aten._local_scalar_dense for node in nodes)


def _captured_and_run(
    model: torch.nn.Module, new: Callable[[type[Session]], Session], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Session:
    session = new(Session)
    with _forward_replaced(model, session) as forward:
        forward(*args, **kwargs)
    return session


def _explain_branches(model: torch.nn.Module, session: Session) -> Explanation:
    programs = session.programs
    sites = [
        _explain_site(program, index, info)
        for program in programs
        for binding in program.bindings
        for index, info in enumerate(binding.sites)
    ]
    if not sites:
        raise no_sites_error(model, session)
    breaks = breaks_of(session)
    return Explanation(
        model=type(model).__name__,
        sites=sites,
        adds=[
            AddExplanation(add.node.name, add.reason, add.module, add.source)
            for program in programs
            for add in program.builder.rejections
        ],
        graphs=len(programs),
        flops=sum(program.builder.flops * len(program.bindings) for program in programs),
        breaks=breaks,
        lost_share=share_outside(session) if breaks else 0.0,
        whole=session.capture.names_of_whole,
    )


def _explain_stacks(session: Session) -> tuple[list[StackExplanation], dict[str, str]]:
    """The stacks of all graphs, by their names at each place where a graph runs; and the blocks in none."""
    stacks: list[StackExplanation] = []
    unstacked: dict[str, str] = {}
    for program in session.programs:
        found, missed = find_stacks(program.builder.captured.graph, program.builder.branches)
        sites = {stack: as_site(stack, program.builder.branches) for stack in found}
        for binding in program.bindings:
            names = program.names_of(binding, list(sites.values()))
            for stack, site in sites.items():
                shapes = tuple(tuple(map(concrete, tensor_value(node).shape)) for node in stack.exits)
                stacks.append(
                    StackExplanation(
                        names[site],
                        len(stack.sites),
                        shapes,
                        site.flops,
                        site.cache_bytes,
                        stack.begins,
                        stack.ends,
                    )
                )
        unstacked |= {str(one.block): one.reason for one in missed}
    return stacks, unstacked


@contextlib.contextmanager
def _forward_replaced(model: torch.nn.Module, session: Session) -> Iterator[Callable[..., Any]]:
    """The model's forward captured for the session, with the hooks around it that move weights between devices."""
    place, compiled = ForwardPlace(model), forward_of(model)
    traced = Traced(place.forward if compiled is None else compiled.original, session)
    if compiled is not None and place.forward is not compiled:
        yield traced  # somebody has wrapped the compiled forward
        return
    place.put(traced)
    try:
        yield model.forward
    finally:
        place.put(place.forward)


def _explain_site(program: Program, index: int, info: SiteInfo) -> SiteExplanation:
    site = program.builder.sites[index]
    shapes = tuple(tuple(concrete(size) for size in tensor_value(output).shape) for output in site.outputs)
    return SiteExplanation(info.name, info.group, info.kind, shapes, site.gates, site.flops, site.cache_bytes)


def dump(model_or_pipeline: Any, directory: str | PathLike[str]) -> list[Path]:
    """Write the graphs of a compiled model: captured, guarded, and each variant made so far.

    Each is a Python file that runs and a Graphviz drawing (also an SVG, where Graphviz is installed); ``sites.json``
    has sites, masks and where Inductor's code lies, ``README.md`` says what is what. Where a pipeline has two denoisers
    each has its own folder, named after its component. With the environment variable
    ``SMOOTHCACHE_DUMP=directory`` every compiled model writes its own whenever it has a new variant.

    Returns:
        The files written, the index first: ``README.md``, ``sites.json``, ``graph_0/captured.py``, ...

    Raises:
        CompiledError: it is not compiled, or has not run since.

    Example:
        >>> model = smoothcache.compile(model, schedule)
        >>> image = sample(model)
        >>> files = smoothcache.dump(model, "graphs")
    """
    forwards = compiled_forwards(model_or_pipeline)
    run = {name: forward for name, forward in forwards.items() if forward.session.programs}
    if not run:
        raise CompiledError("nothing is captured yet: run what you have compiled once, then dump its graphs")
    written = []
    for name, forward in run.items():
        folder = Path(directory, name) if len(forwards) > 1 else Path(directory)
        written += write_session(forward.session, type(forward.model).__name__, folder)
    return written
