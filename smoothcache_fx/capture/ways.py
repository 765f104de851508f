"""How a forward is captured: in the way that has the most work in sites."""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import CompiledError, SmoothCacheError
from ..schedules.schedule import Schedule
from . import _torch
from .eager_work import flops_by_container
from .program import Program
from .session import CapturedMeanwhile, Session, breaks_of, flops_in_sites, share_outside
from .whole import WholeModules, hooked_modules, record

log = logging.getLogger(__name__)

#: Share of FLOPs that lies in no site where the graph broke, before another capture is tried.
WORTH_A_TRY = 0.01

#: Graphs from which on Dynamo's limit is lifted: it is 8, after which it runs a function uncompiled for good.
MANY_GRAPHS = 6


class Traced:
    """A forward compiled for a session.

    Where a graph break cuts a branch in two, no graph holds the whole of it. If the first call shows that, it is made
    once more in each of two other ways, on copies of its inputs, and the way with most work in sites is kept:

    - Dynamo breaks the graph where a size depends on data, as where Mochi drops the text's padding by ``nonzero``. It
      can keep such sizes in the graph instead. But then a whole stream of tokens may have a size that no cache can be
      made for (HunyuanVideo 1.5 sorts its text by validity). Where stacks are cached this is tried at any break.
    - The modules that broke the graph are kept whole, each as one op (HiDream's experts, chosen in Python).
    """

    def __init__(self, forward: Callable[..., Any], session: Session, **options: Any) -> None:
        self.session = session
        self._forward = forward
        self._compile = functools.partial(_torch.dynamo_compile, forward, session, **options)
        self._call = self._compile()
        self._tried = self._failed = False
        #: Held by the thread that looks at the first call.
        self._looking = threading.RLock()
        #: Sites of the first call, and how often the capture may begin anew because a later one has fewer.
        self._sites, self._again = 0, 3

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._later(args, kwargs) if self._tried else self._first(args, kwargs)
        except _torch.BackendFailed as error:
            if (told := _capture_error(self._forward, error)) is None:
                raise
            raise told from error
        except (SmoothCacheError, _torch.CompileError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not self._may_run_uncompiled():
                raise
            return self._uncompiled(args, kwargs, error)

    def follow(self, schedule: Schedule) -> None:
        """Run by another schedule. What was captured stays, but where stacks want another way of capture."""
        stacks_are_new = schedule.has_stacks and not self.session.schedule.has_stacks
        self.session.schedule = schedule
        if stacks_are_new and self.session.capture.broken:
            self._begin_anew()

    def _later(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graphs = len(self.session.programs)
        if graphs < MANY_GRAPHS and not self.session.capture.broken:
            output = self._run(args, kwargs)
        else:
            with _torch.no_recompile_limit():
                output = self._run(args, kwargs)
        if len(self.session.programs) != graphs:
            self._look_at(self.session.programs[graphs:])
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self.session
        while True:
            session.current.call.captured = session.captured
            try:
                return self._call(*args, **kwargs)
            except CapturedMeanwhile:
                log.info("another thread has captured the model meanwhile")
            except RuntimeError as error:
                if session.current.call.graphs or not _torch.refused_while_tracing(error):
                    raise

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            inputs = copy.deepcopy((args, kwargs))  # the call may write to its own
        except Exception as error:  # noqa: BLE001 - whatever the caller's objects raise
            log.info("captured in one way only, since the inputs cannot be copied: %s", error)
            inputs = None
        with _torch.no_recompile_limit():  # other models share the code behind a graph break
            output = self._run(args, kwargs)
            with self._looking:
                if not self._tried:  # another thread's first call may have ended before
                    self._tried = True
                    self._look_at_first(inputs)
        return output

    def _look_at_first(self, inputs: tuple[Any, Any] | None) -> None:
        """Whether the capture has lost work, and what else can be tried."""
        if inputs is not None and breaks_of(self.session):
            self.session.capture.eager_flops = self._eager_flops(inputs)
        if inputs is not None and (self._loses_work() or self._splits_stacks()):
            stacks = [program.frame.break_stack for program in self.session.programs]
            self._try(self._compile(data_dependent_sizes=True), inputs)
            if self._loses_work() and (modules := self._whole_modules(stacks, inputs)):
                self._try(_with(modules, self._compile()), inputs, modules)
        if self.session.capture.eager_flops:
            self.session.capture.settled_share = share_outside(self.session)
        self._sites = self.session.current.call.sites

    def _look_at(self, programs: Sequence[Program]) -> None:
        """Whether graphs that a later call has added have lost sites: the next call is then captured like a first one.

        Hooks that offload or cast submodules may be put on after the first run, and break graphs inside of branches.
        """
        sites = self.session.current.call.sites
        if 2 * sites < self._sites and self._again and any(program.graph_break for program in programs):
            self._again -= 1
            log.warning(
                "the model was captured anew and broke into more graphs, with %d sites where it had %d: something has "
                "changed in it, such as hooks for offloading. The next call captures it from the start",
                sites,
                self._sites,
            )
            self._begin_anew()

    def _may_run_uncompiled(self) -> bool:
        """Whether a call that has failed is to be made uncompiled: once, where hooks may be at fault."""
        return not self._failed and self.session.root is not None and bool(hooked_modules(self.session.root))

    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Any:
        """What a call gives that has failed as Dynamo runs it; if it fails like this, too, that is its error.

        The next call is compiled. accelerate's hooks make a function at their first call, which Dynamo cannot.
        """
        output = self._forward(*args, **kwargs)
        self._failed = True
        log.warning(
            "a call failed where Dynamo ran it, and so ran uncompiled; the next one is compiled from the start: %s: %s",
            type(error).__name__,
            error,
        )
        self._begin_anew()
        return output

    def _begin_anew(self) -> None:
        """Forget what was captured: the next call is like a first one."""
        self.session.begin_anew()
        self._call, self._tried = self._compile(), False

    def _loses_work(self) -> bool:
        return bool(breaks_of(self.session)) and share_outside(self.session) >= WORTH_A_TRY

    def _splits_stacks(self) -> bool:
        """Whether runs of blocks are to be cached as one and the graph breaks, maybe in the midst of one."""
        return self.session.schedule.has_stacks and bool(breaks_of(self.session))

    def _eager_flops(self, inputs: tuple[Any, Any]) -> Counter[str] | None:
        """What the call costs uncompiled, by list of blocks."""
        return self._run_eagerly(flops_by_container, inputs, "the FLOPs of an eager call cannot be counted")

    def _whole_modules(self, stacks: list[list[tuple[str, int]]], inputs: tuple[Any, Any]) -> WholeModules | None:
        """What broke the graph and can be kept whole."""
        return self._run_eagerly(lambda root, call: record(root, stacks, call), inputs, "no module can be kept whole")

    def _run_eagerly(self, look: Callable[..., Any], inputs: tuple[Any, Any], failed: str) -> Any:
        """``look(root, call)``, where ``call`` runs the model on copies of the inputs; None if that fails."""
        root = self.session.root
        if root is None:
            return None
        args, kwargs = copy.deepcopy(inputs)
        try:
            with torch.random.fork_rng():
                return look(root, lambda: self._forward(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - what PyTorch's FLOP counter cannot run
            log.info("%s: %s", failed, error)
            return None

    def _try(self, call: Callable[..., Any], inputs: tuple[Any, Any], whole: WholeModules | None = None) -> None:
        """Make the first call again in another way, and keep that way if it has more work in sites.

        Stacks may have as much in fewer.
        """
        before, sites = flops_in_sites(self.session), len(list(self.session.sites()))
        kept = self.session.set_aside()
        args, kwargs = copy.deepcopy(inputs)
        try:
            with torch.random.fork_rng():
                call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the call has been made: whatever is raised is of this other way
            log.info("cannot be captured in another way: %s: %s", type(error).__name__, error)
            self.session.put_back(kept)
            return
        now = flops_in_sites(self.session)
        log.info("FLOPs in sites: %.3g before, %.3g in another way", before, now)
        joined = self.session.schedule.has_stacks and len(list(self.session.sites())) < sites
        if now > before or (now == before and joined):
            self._call, self.session.capture.whole = call, whole
            kept.close()
        else:
            self.session.put_back(kept)


def _capture_error(forward: Callable[..., Any], error: _torch.BackendFailed) -> SmoothCacheError | None:
    """Our own error, or the user's message where PyTorch fails at an op of the model; None if it fails elsewhere."""
    inner = error.inner_exception
    if isinstance(inner, SmoothCacheError):
        return inner
    where = re.findall(r'File "(.*)", line (\d+), in (\w+)\n\s*(.*)', str(inner).partition("Original traceback:")[2])
    if not where or isinstance(inner, torch.OutOfMemoryError):
        return None
    file, line, function, code = where[-1]
    place = f" at {os.path.basename(file)}:{line} in {function}: {code}"
    model = type(getattr(forward, "__self__", forward)).__name__
    return CompiledError(
        f"{model} cannot be captured: PyTorch fails{place}. Put @torch.compiler.disable on the function that does "
        "this; what surrounds it is then captured. If it is not your own code, please report the model. PyTorch said: "
        f"{type(inner).__name__}: {str(inner).strip().partition(chr(10))[0]}"
    )


def _with(modules: WholeModules, call: Callable[..., Any]) -> Callable[..., Any]:
    def with_stand_ins(*args: Any, **kwargs: Any) -> Any:
        with modules:
            return call(*args, **kwargs)

    return with_stand_ins
