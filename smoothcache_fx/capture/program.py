"""A frame that Dynamo captured, and the program that runs in its place: a binding per place in the model."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..errors import ScheduleError
from ..passes.cuts import container_of, work_outside
from ..passes.names import STACK, WEIGHT, BlockRange, block_of, common_module, drop_components, group_of, unique_names
from ..passes.rewriting import placeholders
from ..passes.sites import Site
from ..passes.stacks import Stack, as_site, find_stacks
from ..runtime.binding import Binding
from ..runtime.calls import ModelCall
from ..runtime.variant import SiteInfo, SiteName, Variant, picker
from ..schedules.schedule import Schedule
from ..schedules.selectors import block_range
from . import _torch
from .budget import bytes_of, within
from .inner import CompileVariant
from .variants import GraphBuilder

if TYPE_CHECKING:
    from .session import Session

log = logging.getLogger(__name__)


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

    def ranges_of(self, schedule: Schedule) -> list[BlockRange]:
        """The ranges of blocks that the schedule selects as stacks, as they are called at the first place.

        A frame of one block runs at the others, too, where it may be selected.
        """
        ranges = list(schedule.block_ranges)
        for container in {group_of(found.container) for found in ranges}:
            blocks = {found for name in self._static_names.values() for found in _blocks_in(name, container)}
            if len(blocks) == 1:
                ((own, index),) = blocks
                if not any(found.container == own and index in found.indices for found in ranges):
                    ranges.append(BlockRange(own, index, index))
        return ranges

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
        self._captured, self._compile_variant = captured, compile_variant
        self._weights_among = picker(frame.weights)
        # A frame with all parameters of the model runs at one place, even if offloading replaces them at each call.
        self._has_one_place = frame.has_all_of(session.root)
        self._layouts = [self._lay_out()]
        self.dispatcher = session.dispatcher(self._layouts[0].builder)
        self._take(self._layouts[0])
        self._followed = session.schedule

    def _lay_out(self) -> _Layout:
        """The graph as the session's schedule needs it."""
        schedule = self.session.schedule
        builder = GraphBuilder(
            self._captured,
            self._compile_variant,
            self.session.inner,
            schedule.highest_order,
            schedule.history_dtype,
            self._stacks,
        )
        limited = self.session.max_cache_bytes is not None
        return _Layout(builder, schedule, limited, _Place() if self._has_one_place else None)

    def _take(self, layout: _Layout) -> None:
        """Serve calls by this layout from now on."""
        self.builder, self.bindings = layout.builder, layout.bindings
        self.dispatcher.serve(layout.builder, layout.variants)
        self._places, self._named_places, self._only_place = layout.places, layout.named_places, layout.only_place
        self._weight_names = layout.weight_names
        self._last: tuple[tuple[int, ...] | None, _Place | None] = None, None

    def _follow(self) -> None:
        """The session has another schedule: take the graph as that needs it, with all variants made so far."""
        with _torch.compile_lock:
            schedule = self.session.schedule
            layout = next((layout for layout in self._layouts if layout.fits(schedule)), None)
            if layout is None:
                layout = self._lay_out()
                self._layouts.append(layout)
            if layout.builder is not self.builder:
                for binding in self.bindings:
                    binding.streams.clear()
                self._take(layout)
            for binding in layout.bindings:
                check_stacks(schedule, binding.sites)
                binding.follow(self.session.plan(binding.sites))
            self._followed = schedule

    def _stacks(self, graph: Graph, branches: list[Site]) -> list[Stack]:
        """The stacks that the schedule selects, and those that a limit of memory makes of what it leaves."""
        schedule, room = self.session.schedule, self.session.room()
        ranges = self.frame.ranges_of(schedule)
        longest = STACK in schedule.compute
        selected = find_stacks(graph, branches, ranges, longest)[0] if ranges or longest else []
        if room is None:
            return selected
        left = [branch for branch in branches if not any(branch in stack.sites for stack in selected)]
        found = [stack for stack in find_stacks(graph, left)[0] if set(stack.sites) <= set(left)]
        taken = sum(bytes_of(schedule, as_site(stack, branches)) for stack in selected)
        return [*selected, *within(schedule, left, found, room, taken)]

    def bind(self, inputs: Sequence[Any], call: ModelCall) -> Binding:
        """The binding for the frame's inputs: the weights say at which module, the count says which call of it."""
        if self._followed is not self.session.schedule:
            self._follow()
        if (place := self._only_place) is None:
            weights = self._weights_among(inputs)
            key = tuple(map(id, weights))
            last_key, place = self._last  # both at once: other threads set them, too
            if key != last_key:  # to compare hundreds of numbers is faster than to hash them
                place = self._place(key, weights)
                self._last = key, place
        if call.graphs:
            self.session.capture.broken = True
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
        if self.session.max_cache_bytes is not None:
            call.stream_bytes += found.stream_bytes
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

    def names_of(self, binding: Binding, stacks: Sequence[Site]) -> dict[Site, str]:
        """What stacks are called at a binding's place."""
        return {site: found.name for site, found in _names_of(stacks, self._weight_names[binding], 0).items()}

    def flops_outside(self, containers: Collection[str]) -> int:
        """FLOPs of these lists of blocks that lie outside of sites, over all bindings."""
        work = work_outside(self.builder.captured.graph, self.builder.sites)
        return sum(
            flops
            for names in self._weight_names.values()
            for flops, weights in work
            # A graph without weights is a piece of a branch: an attention op between two breaks.
            if not weights or any(container_of(_weight_name(weight, names)) in containers for weight in weights)
        )

    def leave(self, key: tuple[int, ...]) -> None:
        """Forget the identities of weights, one of which is gone: another one may have it next.

        The place's caches are freed, unless it is known by the weights' names. Its bindings stay for a compiled model's
        report; a program of the registered backend, which serves any number of models, drops them.
        """
        self._last = None, None
        for layout in self._layouts:
            place = layout.places.pop(key, None)
            for binding in () if place is None or place.keep else place.bindings:
                binding.streams.clear()
                if self.session.root is None:
                    layout.bindings.remove(binding)
                    del layout.weight_names[binding]

    def close(self) -> None:
        """Free caches and variants. What Dynamo has compiled still holds the dispatcher: it is emptied, too."""
        for layout in self._layouts:
            layout.close()
        self._last = None, None
        self.dispatcher.close()

    def _new_binding(self, inputs: Sequence[Any], call: int) -> Binding:
        builder = self.builder
        names = self.frame.names(inputs, self.session.weight_names())
        branches = _names_of(builder.branches, names, call)
        found = {**branches, **_names_of([site for site in builder.sites if site.entries], names, call)}
        sites = [
            SiteInfo(
                **found[site]._asdict(),
                buffers=builder.buffers_of(site),
                slots=builder.slots,
                flops=site.flops,
                cache_bytes=site.cache_bytes,
                slot_bytes=builder.slot_bytes_of(site),
                differences=builder.differences_of(site),
                holds=tuple(branches[held] for held in site.holds),
            )
            for site in builder.sites
        ]
        check_stacks(self.session.schedule, sites)
        log.info("bound %d sites: %s", len(sites), ", ".join(site.name for site in sites))
        binding = Binding(sites, self.session.plan(sites), builder.buffer_count)
        self.session.keeper.add(binding)
        if self.session.max_cache_bytes is not None:
            binding.make_room = self.session.keeper.make_room
        self._weight_names[binding] = names
        return binding


class _Layout:
    """A captured graph as one kind of schedule needs it: its sites and caches, variants, and places where it ran.

    Schedules differ in what is computed when, and have it in common, but for stacks, what histories are kept in, and
    higher orders, which need more caches.
    """

    def __init__(self, builder: GraphBuilder, schedule: Schedule, limited: bool, only_place: _Place | None) -> None:
        self.builder = builder
        self.variants: dict[Hashable, Variant] = {}
        self.bindings: list[Binding] = []
        self.weight_names: dict[Binding, dict[int, str]] = {}
        self.places: dict[tuple[int, ...], _Place] = {}
        self.named_places: dict[tuple[str | None, ...], _Place] = {}
        self.only_place = only_place
        self._schedule = schedule
        #: Whether a limit of memory has made stacks, by what this very schedule takes.
        self._limited = limited

    def fits(self, schedule: Schedule) -> bool:
        """Whether it serves a schedule."""
        own = self._schedule
        if self._limited:
            return own == schedule
        same_stacks = _stacks_of(own) == _stacks_of(schedule)
        same_history = own.history_dtype == schedule.history_dtype or not schedule.highest_order
        return same_stacks and same_history and schedule.highest_order < self.builder.slots

    def close(self) -> None:
        """Free caches and variants."""
        for kept in (self.variants, self.bindings, self.weight_names, self.places, self.named_places):
            kept.clear()
        if self.only_place is not None:
            self.only_place.bindings.clear()


def _stacks_of(schedule: Schedule) -> tuple[Any, ...]:
    """What of a schedule makes stacks."""
    return STACK in schedule.compute, set(schedule.block_ranges)


def _leave(program: weakref.ref[Program], key: tuple[int, ...], lost: object) -> None:
    held = program()
    if held is not None:
        held.leave(key)


def _weight_name(weight: Node, names: Mapping[int, str]) -> str:
    """The name of a weight's placeholder, given the names of the frame's inputs at some place."""
    index = _torch.dynamo_input_index(weight)
    return weight.meta[WEIGHT] if index is None else names[index]


def _blocks_in(name: str, container: str) -> Iterator[tuple[str, int]]:
    """The blocks that a weight is in, of lists called like ``container`` but for indices."""
    level = 0
    while (found := block_of(name, level)) is not None:
        if group_of(found[0]) == container:
            yield found
        level += 1


def _names_of(sites: Sequence[Site], names: Mapping[int, str], call: int) -> dict[Site, SiteName]:
    """What sites are called at the place whose weights have these names."""
    paths = []
    for site in sites:
        parameters = [_weight_name(weight, names) for weight in site.weights]
        if site.entries:
            paths.append(_range_of(site, parameters))
        else:
            paths.append(drop_components(common_module(parameters), site.containers))
    unique = unique_names(paths, [site.kind for site in sites], call)
    return {site: SiteName(name, group_of(name), site.kind) for site, name in zip(sites, unique, strict=True)}


def _range_of(stack: Site, parameters: Iterable[str]) -> str:
    """The blocks of a stack at the place whose parameters these are. It may hold branches of other lists, too."""
    container = group_of(stack.name.rpartition(".")[0])
    found = [block for name in parameters if (block := block_of(name, stack.containers)) is not None]
    own = [block for block in found if group_of(block[0]) == container]
    if not own:  # its weights lie elsewhere
        return stack.name
    indices = [index for _, index in own]
    return str(BlockRange(own[0][0], min(indices), max(indices)))


def check_stacks(schedule: Schedule, sites: Sequence[SiteInfo]) -> None:
    """Raise ``ScheduleError`` where a graph that runs at several places would need other stacks at this one."""
    for site in sites:
        own = block_range(site.name) if site.kind == STACK else None
        if own is None:
            continue
        for wanted in schedule.block_ranges:
            if wanted.overlaps(own) and not wanted.holds(own):
                raise ScheduleError(
                    f"blocks {own.first} to {own.last} of {own.container!r} share a graph with other blocks of this "
                    f"model, and only some of them are in the range {wanted.first} to {wanted.last} that is selected; "
                    "select all of them or none"
                )


class _Place:
    """The bindings of a program at one set of weights, by the ordinal of the call within a call of the model."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []
        self.weights: list[weakref.ref[torch.Tensor]] = []
        #: Whether it goes on when its weights are replaced.
        self.keep = False
