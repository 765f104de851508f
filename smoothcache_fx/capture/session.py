"""One compiled model's capture: its programs, its caches, and what did not become part of a graph."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from ..errors import ScheduleError
from ..passes.cuts import container_of
from ..passes.names import STACK, block_of
from ..passes.replace_writes import replace_writes
from ..runtime.binding import Binding
from ..runtime.caches import CacheKeeper
from ..runtime.calls import CurrentCall, ModelCall, StepClock
from ..runtime.dispatch import Dispatcher, GuardedDispatcher
from ..runtime.variant import Plan, SiteInfo, make_plan
from ..schedules.schedule import KINDS, Schedule
from ..schedules.selectors import block_range, selects_stacks, specificity
from . import _torch
from .budget import order_of, row_of
from .inner import CompileVariant, InnerCompiler
from .program import Frame, Program
from .variants import GraphBuilder
from .whole import WholeModules

log = logging.getLogger(__name__)


class CapturedMeanwhile(BaseException):
    """Another thread has captured the model while this one waited to: Dynamo may find that graph if called again.

    Dynamo looks for a graph, then waits for its lock, and does not look again. No ``Exception``: it would wrap that.
    """


@dataclass
class Capture:
    """What one way of capturing a model has given; swapped as a whole where another way is tried.

    Attributes:
        programs: one for each graph.
        broken: whether more than one graph has run in one call of the model.
        whole: modules that stand as one op in the graph, since it would break inside of them. The graphs name them by
            number alone, so they live as long as the graphs.
        eager_flops: FLOPs of an eager call by list of blocks, where the graph broke (``eager_work.py``).
        settled_share: ``share_outside`` once the first call is over; graphs of later sizes would count beside those of
            the first.
        recorded: what a calibration has recorded of these programs.
    """

    programs: list[Program] = field(default_factory=list)
    broken: bool = False
    whole: WholeModules | None = None
    eager_flops: Counter[str] | None = None
    settled_share: float | None = None
    recorded: Any = None

    def close(self) -> None:
        """Free caches, variants and modules."""
        for program in self.programs:
            program.close()
        self.programs.clear()
        self.whole = None

    @property
    def names_of_whole(self) -> tuple[str, ...]:
        """The names of the modules that are kept whole."""
        return tuple(self.whole.names) if self.whole else ()


class Session:
    """What all programs of one compiled model share: the schedule, the clock, the names of the weights."""

    def __init__(
        self,
        schedule: Schedule,
        inner: InnerCompiler,
        clock: StepClock,
        root: torch.nn.Module | None,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.schedule = schedule
        #: What all caches together may take.
        self.max_cache_bytes = max_cache_bytes
        self.inner = inner
        self.clock = clock
        #: The call that each thread is in.
        self.current = CurrentCall()
        self.keeper = CacheKeeper(max_cache_bytes)
        self.capture = Capture()
        #: How often Dynamo has captured something.
        self.captured = 0
        # Dynamo keeps what it compiled, and so the session, in the globals of the model's own code, even when the model
        # is gone: the session must not keep the model.
        self._root = None if root is None else weakref.ref(root)

    @property
    def root(self) -> torch.nn.Module | None:
        """The compiled model, if there is a single one and it still exists."""
        return None if self._root is None else self._root()

    @property
    def programs(self) -> list[Program]:
        return self.capture.programs

    def bindings(self) -> Iterator[Binding]:
        """Of all programs: each place in the model where a graph has run."""
        return (binding for program in self.programs for binding in program.bindings)

    def sites(self) -> Iterator[SiteInfo]:
        """Of all bindings; a site that is in graphs of several shapes is there for each."""
        return (site for binding in self.bindings() for site in binding.sites)

    def weight_names(self) -> dict[int, str]:
        """Qualified names of the root module's parameters and buffers, by the tensors' identity."""
        return module_weight_names(self.root)

    def room(self) -> int | None:
        """Bytes that are left for one stream's caches of the call's next graph; None if there is no limit."""
        if self.max_cache_bytes is None:
            return None
        streams = getattr(self.clock, "calls_per_step", None) or 1
        return self.max_cache_bytes // streams - self.current.call.stream_bytes

    def plan(self, sites: Sequence[SiteInfo]) -> Plan:
        return plan_sites(self.schedule, sites)

    def close_with(self, model: torch.nn.Module) -> None:
        """Close when the model goes."""
        weakref.finalize(model, _close, weakref.ref(self)).atexit = False

    def close(self) -> None:
        """Free caches and variants: Dynamo holds on to the session for as long as to what it compiled."""
        self.capture.close()

    def set_aside(self) -> Capture:
        """Start without programs, as if nothing had run; returns what ``put_back`` takes."""
        kept, self.capture = self.capture, Capture(eager_flops=self.capture.eager_flops)
        self.current.call = ModelCall(self.current.call.moment)
        return kept

    def put_back(self, kept: Capture) -> None:
        """Have what was captured before ``set_aside`` again, in place of what was since."""
        self.close()
        self.capture = kept

    def begin_anew(self) -> None:
        """Forget what was captured: the next call is like a first one."""
        self.close()
        self.capture = Capture()
        self.current.call.forget()

    def dispatcher(self, builder: GraphBuilder) -> Dispatcher:
        """What runs the calls of a program; calibration puts an observer here."""
        return GuardedDispatcher(builder, self.current, self.keeper, _torch.compile_lock)

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
    if session.capture.broken and not breaks:
        breaks["a line that Dynamo does not give, in a loop: TORCH_LOGS=graph_breaks shows it"] = 1
    return breaks


def flops_in_sites(session: Session) -> int:
    """FLOPs that all sites together save, in one call."""
    return sum(site.flops for site in session.sites())


def share_outside(session: Session) -> float:
    """The share of FLOPs that is work of blocks in no site, in lists of blocks that have sites, or in all if none has.

    It is that of an eager call where one was counted, since what Dynamo leaves to Python is in no graph.
    """
    if session.capture.settled_share is not None:
        return session.capture.settled_share
    containers = {container_of(site.name) for site in session.sites()}
    if counted := session.capture.eager_flops:
        everything = not containers or "" in containers
        blocks = sum(flops for name, flops in counted.items() if everything or name in containers)
        return max(0, blocks - flops_in_sites(session)) / max(1, counted.total())
    outside = sum(program.flops_outside(containers) for program in session.programs)
    whole = sum(program.builder.flops * len(program.bindings) for program in session.programs)
    return outside / max(1, whole)


def plan_sites(schedule: Schedule, sites: Sequence[SiteInfo]) -> Plan:
    """The schedule laid out for these sites."""
    orders = [order_of(schedule, site) for site in sites]

    def forecast(index: int, step: int, stored: Sequence[int]) -> Sequence[float]:
        return schedule.forecast(sites[index], step, stored)

    return make_plan([row_of(schedule, site) for site in sites], schedule.steps, orders, forecast)


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
    _check_held(schedule, sites)
    blocks = [found for site in sites for one in (site, *site.holds) if (found := _last_block(one)) is not None]
    for wanted in schedule.block_ranges:
        last = max((index for container, index in blocks if container == wanted.container), default=None)
        if last is not None and wanted.last > last:
            raise ScheduleError(
                f"the selector '{wanted}' reaches beyond the last block, {last}: select up to that, or up to a block "
                "before it"
            )
    unused = schedule.unused_selectors([one for site in sites for one in (site, *site.holds)])
    wrong = [selector for selector in unused if selector not in (*KINDS, STACK)]
    if not wrong and (not unused or len(unused) < len(schedule.selectors)):
        return
    if any(map(selects_stacks, wrong or unused)):
        raise ScheduleError(
            f"the schedule selects {', '.join(repr(s) for s in wrong or unused)}, but the model has no such run of "
            "blocks. print(smoothcache.explain(model, ...)) lists its stacks, and why they end where they do."
        )
    groups: dict[str, str] = {site.group: site.kind for site in sites}
    listed = "\n".join(f"  {group} ({kind})" for group, kind in groups.items()) or "  (none)"
    raise ScheduleError(
        f"the schedule selects {', '.join(repr(s) for s in wrong or unused)}, but the model has no such site. "
        f"Its groups are:\n{listed}\nSelect by one of these, by the name of a site, or by kind."
    )


def _last_block(site: Any) -> tuple[str, int] | None:
    """The list of blocks that a site is in, and the last of its blocks."""
    if site.kind != STACK:
        return block_of(site.name)
    found = block_range(site.name)
    return None if found is None else (found.container, found.last)


def _check_held(schedule: Schedule, sites: Sequence[Any]) -> None:
    """Raise ``ScheduleError`` if a selector of branches selects some that are cached as parts of stacks.

    A kind selects what is left: it is an error only if that is nothing. Stacks that a limit of memory has made follow
    their branches' rows.
    """
    stacks = [site for site in sites if site.kind == STACK and schedule.selects(site)]
    held = {branch.name: (branch, stack) for stack in stacks for branch in stack.holds}
    chosen = [key for key in schedule.selectors if any(specificity(key, site) for site, _ in held.values())]
    for key in chosen:
        inside = [(branch, stack) for branch, stack in held.values() if specificity(key, branch) is not None]
        if key in KINDS and any(specificity(key, site) is not None for site in sites):
            continue
        branch, stack = inside[0]
        raise ScheduleError(
            f"the selector {key!r} overlaps with the stack {stack.name!r}: it selects {branch.name!r}"
            + (f" and {len(inside) - 1} more branches" if len(inside) > 1 else "")
            + ", which are cached as a part of that. Drop the selector, or select a range of blocks without these"
        )
