"""The Dynamo backend: AOTAutograd -> passes -> GuardedProgram, one binding per place where the graph runs."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..errors import ScheduleError
from ..passes import container_of, replace_writes, work_outside
from ..passes.guard import placeholders
from ..passes.names import WEIGHT, common_module, drop_components, group_of, unique_names
from ..runtime.caches import CacheKeeper
from ..runtime.calls import CurrentCall, ModelCall, StepClock
from ..runtime.dispatch import Binding, Dispatcher, GuardedProgram, Plan, SiteInfo, make_plan, picker
from ..schedules.schedule import KINDS, Schedule
from . import _torch
from .inner import CompileVariant, InnerCompiler
from .variants import GraphBuilder

log = logging.getLogger(__name__)


class CapturedMeanwhile(BaseException):
    """Another thread has captured the model while this one waited to: Dynamo may find that graph if called again.

    Dynamo looks for a graph, then waits for its lock, and does not look again. No ``Exception``: it would wrap that.
    """


class Frame:
    """One frame that Dynamo captured: which of its inputs are weights, and what they are called.

    The same frame may run for many modules of one class. Then the inputs at ``weights`` tell where it is.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], weight_names: Mapping[int, str]) -> None:
        self.graph_break = _torch.graph_break(gm)
        self.break_stack = _torch.break_stack(gm)
        self._static_names: dict[int, str] = {}
        for index, (node, value) in enumerate(zip(placeholders(gm.graph), inputs, strict=True)):
            name = weight_names.get(id(value))
            if name is not None or isinstance(value, torch.nn.Parameter):
                self._static_names[index] = name or _torch.source_path(node)
        #: Positions of the frame's inputs that are parameters or, if it has none, buffers. Moving a module to another
        #: device (offloading does, at each run) gives it new buffers, but leaves the parameters the same objects.
        parameters = [i for i in self._static_names if isinstance(inputs[i], torch.nn.Parameter)]
        self.weights = tuple(parameters or self._static_names)
        self._parameters = {id(inputs[i]) for i in parameters}

    def has_all_of(self, root: torch.nn.Module | None) -> bool:
        """Whether all parameters of the model are among the frame's inputs."""
        return root is not None and self._parameters.issuperset(map(id, root.parameters())) and bool(self._parameters)

    def mark(self, captured: GraphModule) -> None:
        """Write the weights' names into the captured graph's placeholders, where the passes look for them."""
        for node in placeholders(captured.graph):
            index = _torch.dynamo_input_index(node)
            name = self._static_names.get(index) if index is not None else _torch.own_parameter_name(node)
            if name is not None:
                node.meta[WEIGHT] = name

    def names(self, inputs: Sequence[Any], weight_names: Mapping[int, str]) -> dict[int, str]:
        """The weights' names at the place whose weights these inputs are."""
        return {i: weight_names.get(id(inputs[i]), name) for i, name in self._static_names.items()}


class Program:
    """A frame with its captured graph and its bindings; what Dynamo calls in the frame's place.

    Attributes:
        builder: the captured graph, its sites and variants' graphs.
        dispatcher: runs each call, by the binding that is set on it.
        bindings: all places where the program has run so far.
        graph_break: why Dynamo ended the graph before the captured function did, and at which line; or None.
    """

    def __init__(self, session: Session, frame: Frame, captured: GraphModule, compile_variant: CompileVariant) -> None:
        frame.mark(captured)
        self.graph_break = frame.graph_break
        self.session = session
        self.frame = frame
        order, history_dtype = session.schedule.highest_order, session.schedule.history_dtype
        self.builder = GraphBuilder(captured, compile_variant, session.inner, order, history_dtype)
        self.dispatcher = session.dispatcher(self.builder)
        self.bindings: list[Binding] = []
        self._weights_among = picker(frame.weights)
        self._weight_names: list[dict[int, str]] = []
        self._places: dict[tuple[int, ...], _Place] = {}
        self._named_places: dict[tuple[str | None, ...], _Place] = {}
        self._last: tuple[tuple[int, ...] | None, _Place | None] = None, None
        # A frame with all parameters of the model runs at one place, even if offloading replaces them at each call.
        self._only_place = _Place() if frame.has_all_of(session.root) else None

    def bind(self, inputs: Sequence[Any], call: ModelCall) -> Binding:
        """The binding for the frame's inputs: the weights say at which module, the count says which call of it."""
        if (place := self._only_place) is None:
            weights = self._weights_among(inputs)
            key = tuple(map(id, weights))
            last_key, place = self._last  # both at once: other threads set them, too
            if key != last_key:  # to compare hundreds of numbers is faster than to hash them
                place = self._place(key, weights)
                self._last = key, place
        if call.graphs:
            self.session.broken = True
        call.graphs += 1
        ordinal = call.ordinals.get(place, 0)
        call.ordinals[place] = ordinal + 1
        if ordinal >= len(place.bindings):
            with _torch.compile_lock:
                while ordinal >= len(place.bindings):
                    binding = self._new_binding(inputs, len(place.bindings))
                    place.bindings.append(binding)
                    self.bindings.append(binding)
        found = place.bindings[ordinal]
        call.sites += len(found.sites)
        return found

    def _place(self, key: tuple[int, ...], weights: Sequence[torch.Tensor]) -> _Place:
        with _torch.compile_lock:
            place = self._places.get(key)
            if place is None:
                known = self.session.weight_names()
                names = tuple([known.get(identity) for identity in key])
                # The model's own are known by name: hooks that offload submodules replace them at each call.
                place = self._named_places.setdefault(names, _Place()) if None not in names else _Place()
                self._places[key] = place
                place.keep = None not in names
                leave = functools.partial(_leave, weakref.ref(self), key)
                place.weights = [weakref.ref(weight, leave) for weight in weights]
            return place

    def flops_outside(self, containers: Collection[str]) -> int:
        """FLOPs of these lists of blocks that lie outside of sites, over all bindings."""
        work = work_outside(self.builder.captured.graph, self.builder.sites)
        return sum(
            flops
            for names in self._weight_names
            for flops, weights in work
            # A graph without weights is a piece of a branch: an attention op between two breaks.
            if not weights or any(container_of(_weight_name(weight, names)) in containers for weight in weights)
        )

    def leave(self, key: tuple[int, ...]) -> None:
        """Forget the identities of weights, one of which is gone: another one may have it next.

        The place's caches are freed, unless it is known by the weights' names.
        """
        place = self._places.pop(key, None)
        self._last = None, None
        for binding in () if place is None or place.keep else place.bindings:
            binding.streams.clear()

    def close(self) -> None:
        """Free caches and variants. What Dynamo has compiled still holds the dispatcher: it is emptied, too."""
        self.bindings.clear()
        self._weight_names.clear()
        self._places.clear()
        self._named_places.clear()
        self._last = None, None
        if self._only_place is not None:
            self._only_place.bindings.clear()
        self.dispatcher.close()

    def _new_binding(self, inputs: Sequence[Any], call: int) -> Binding:
        builder = self.builder
        names = self.frame.names(inputs, self.session.weight_names())
        self._weight_names.append(names)
        paths = []
        for site in builder.sites:
            parameters = [_weight_name(weight, names) for weight in site.weights]
            paths.append(drop_components(common_module(parameters), site.containers))
        kinds = [site.kind for site in builder.sites]
        sites = [
            SiteInfo(
                name,
                group_of(name),
                site.kind,
                builder.buffers_of(site),
                builder.history,
                site.flops,
                site.cache_bytes,
                builder.history_bytes_of(site),
                builder.differences_of(site),
            )
            for name, site in zip(unique_names(paths, kinds, call), builder.sites, strict=True)
        ]
        log.info("bound %d sites: %s", len(sites), ", ".join(site.name for site in sites))
        binding = Binding(sites, self.session.plan(sites), builder.buffer_count)
        self.session.keeper.add(binding)
        return binding


def _leave(program: weakref.ref[Program], key: tuple[int, ...], lost: object) -> None:
    held = program()
    if held is not None:
        held.leave(key)


def _weight_name(weight: Node, names: Mapping[int, str]) -> str:
    """The name of a weight's placeholder, given the names of the frame's inputs at some place."""
    index = _torch.dynamo_input_index(weight)
    return weight.meta[WEIGHT] if index is None else names[index]


class _Place:
    """The bindings of a program at one set of weights, by the ordinal of the call within a call of the model."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []
        self.weights: list[weakref.ref[torch.Tensor]] = []
        #: Whether it goes on when its weights are replaced.
        self.keep = False


class Session:
    """What all programs of one compiled model share: the schedule, the clock, the names of the weights."""

    def __init__(
        self, schedule: Schedule, inner: InnerCompiler, clock: StepClock, root: torch.nn.Module | None
    ) -> None:
        self.schedule = schedule
        self.inner = inner
        self.clock = clock
        #: The call that each thread is in.
        self.current = CurrentCall()
        self.keeper = CacheKeeper()
        self.programs: list[Program] = []
        #: How often Dynamo has captured something.
        self.captured = 0
        #: Whether more than one graph has run in one call of the model.
        self.broken = False
        #: Modules that stand as one op in the graph, by name, since it would break inside of them.
        self.whole: tuple[str, ...] = ()
        #: FLOPs of an eager call by list of blocks, where the graph broke (``eager_work.py``).
        self.eager_flops: Counter[str] | None = None
        #: ``share_outside`` once the first call is over. Graphs of later sizes would count beside those of the first.
        self.settled_share: float | None = None
        # Dynamo keeps what it compiled, and so the session, in the globals of the model's own code, even when the model
        # is gone: the session must not keep the model.
        self._root = None if root is None else weakref.ref(root)

    @property
    def root(self) -> torch.nn.Module | None:
        """The compiled model, if there is a single one and it still exists."""
        return None if self._root is None else self._root()

    def weight_names(self) -> dict[int, str]:
        """Qualified names of the root module's parameters and buffers, by the tensors' identity."""
        return module_weight_names(self.root)

    def plan(self, sites: Sequence[SiteInfo]) -> Plan:
        return plan_sites(self.schedule, sites)

    def close_with(self, model: torch.nn.Module) -> None:
        """Close when the model goes."""
        weakref.finalize(model, _close, weakref.ref(self)).atexit = False

    def close(self) -> None:
        """Free caches and variants: Dynamo holds on to the session for as long as to what it compiled."""
        for program in self.programs:
            program.close()
        self.programs.clear()

    def set_aside(self) -> dict[str, Any]:
        """Start without programs, as if nothing had run; returns what ``put_back`` takes."""
        kept = {"programs": self.programs, "broken": self.broken}
        self.programs, self.broken = [], False
        self.current.call = ModelCall(self.current.call.moment)
        return kept

    def put_back(self, kept: dict[str, Any]) -> None:
        """Have the programs of before ``set_aside`` again, in place of those made since."""
        self.close()
        for name, value in kept.items():
            setattr(self, name, value)

    def dispatcher(self, builder: GraphBuilder) -> Dispatcher:
        """What runs the calls of a program; calibration puts an observer here."""
        return GuardedProgram(builder, self.current, self.keeper, _torch.compile_lock)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend as Dynamo calls it: once per captured frame.

        Raises ``CapturedMeanwhile`` where this call has waited for another thread's capture and begun nothing else.
        """
        call = self.current.call
        if call.captured not in (None, self.captured) and not call.graphs:
            raise CapturedMeanwhile
        program, run = compile_frame(self, gm, inputs)
        self.programs.append(program)
        self.captured += 1
        if call.captured is not None:
            call.captured = self.captured
        return run


def _close(session: weakref.ref[Session]) -> None:
    held = session()
    if held is not None:
        held.close()


def breaks_of(session: Session) -> Counter[str]:
    """Where and why graphs broke, with how many ended there."""
    found = (program.graph_break for program in session.programs)
    breaks = Counter(f"{place}: {reason}" for reason, place in filter(None, found))
    if session.broken and not breaks:
        breaks["a line that Dynamo does not give, in a loop: TORCH_LOGS=graph_breaks shows it"] = 1
    return breaks


def flops_in_sites(session: Session) -> int:
    """FLOPs that all sites together save, in one call."""
    return sum(site.flops for p in session.programs for binding in p.bindings for site in binding.sites)


def share_outside(session: Session) -> float:
    """The share of FLOPs that is work of blocks in no site, in lists of blocks that have sites, or in all if none has.

    It is that of an eager call where one was counted, since what Dynamo leaves to Python is in no graph.
    """
    if session.settled_share is not None:
        return session.settled_share
    programs = session.programs
    containers = {container_of(site.name) for p in programs for binding in p.bindings for site in binding.sites}
    if session.eager_flops:
        counted = session.eager_flops
        everything = not containers or "" in containers
        blocks = sum(flops for name, flops in counted.items() if everything or name in containers)
        return max(0, blocks - flops_in_sites(session)) / max(1, counted.total())
    outside = sum(program.flops_outside(containers) for program in programs)
    whole = sum(program.builder.flops * len(program.bindings) for program in programs)
    return outside / max(1, whole)


def plan_sites(schedule: Schedule, sites: Sequence[SiteInfo]) -> Plan:
    """The schedule laid out for these sites."""
    rows = [schedule.row_for(site) for site in sites]
    return make_plan(rows, schedule.steps, [schedule.order_for(site) for site in sites], schedule.times)


def module_weight_names(root: torch.nn.Module | None) -> dict[int, str]:
    if root is None:
        return {}
    named = [*root.named_buffers(remove_duplicate=False), *root.named_parameters(remove_duplicate=False)]
    # Of several names of one shared tensor the first in the module's order counts.
    return {id(tensor): name for name, tensor in reversed(named)}


def compile_frame(session: Session, gm: GraphModule, inputs: Sequence[Any]) -> tuple[Program, Callable[..., Any]]:
    """Capture a frame's ATen graph and return its program, with the function that Dynamo is to call."""
    if replace_writes(gm.graph):
        gm.recompile()
    frame = Frame(gm, inputs, session.weight_names())
    made: list[Program] = []

    def transform(captured: GraphModule, compile_variant: CompileVariant) -> Dispatcher:
        made.append(Program(session, frame, captured, compile_variant))
        return made[-1].dispatcher

    compiled = session.inner.capture(gm, inputs, transform)
    program = made[-1]  # another one came before it where what was on disk could not be used

    def run(*arguments: Any) -> Any:
        call = session.current.call
        call.binding = program.bind(arguments, call)
        # Dynamo has traced through __torch_function__: an op of the graph must not meet it on a weight again.
        with _torch.NoTorchFunction():
            return compiled(*arguments)

    return program, run


def check_selectors(schedule: Schedule, sites: Sequence[Any]) -> None:
    """Raise ``ScheduleError`` if a selector of the schedule fits no site; kinds that the model lacks are allowed."""
    unused = schedule.unused_selectors(sites)
    wrong = [selector for selector in unused if selector not in KINDS]
    if not wrong and (not unused or len(unused) < len(schedule.selectors)):
        return
    groups: dict[str, str] = {site.group: site.kind for site in sites}
    listed = "\n".join(f"  {group} ({kind})" for group, kind in groups.items()) or "  (none)"
    raise ScheduleError(
        f"the schedule selects {', '.join(repr(s) for s in wrong or unused)}, but the model has no such site. "
        f"Its groups are:\n{listed}\nSelect by one of these, by the name of a site, or by kind."
    )
