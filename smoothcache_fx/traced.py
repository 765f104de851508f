"""How a forward is captured: in the way that has the most work in sites."""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _torch
from .backend import Session, breaks_of, flops_in_sites, share_outside
from .eager_work import flops_by_container
from .whole import WholeModules, record

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
      made for (HunyuanVideo 1.5 sorts its text by validity).
    - The modules that broke the graph are kept whole, each as one op (HiDream's experts, chosen in Python).
    """

    def __init__(self, forward: Callable[..., Any], session: Session, **options: Any) -> None:
        self.session = session
        self._forward = forward
        self._compile = functools.partial(_torch.dynamo_compile, forward, session, **options)
        self._call = self._compile()
        self._tried = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._tried:
            if len(self.session.programs) < MANY_GRAPHS:
                return self._call(*args, **kwargs)
            with _torch.no_recompile_limit():
                return self._call(*args, **kwargs)
        try:
            inputs = copy.deepcopy((args, kwargs))  # the call may write to its own
        except Exception as error:  # noqa: BLE001 - whatever the caller's objects raise
            log.info("captured in one way only, since the inputs cannot be copied: %s", error)
            inputs = None
        output = self._call(*args, **kwargs)
        self._tried = True
        if inputs is not None and breaks_of(self.session):
            self.session.eager_flops = self._eager_flops(inputs)
        if inputs is not None and self._loses_work():
            stacks = [program.frame.break_stack for program in self.session.programs]
            self._try(self._compile(data_dependent_sizes=True), inputs)
            if self._loses_work() and (modules := self._whole_modules(stacks, inputs)):
                self._try(_with(modules, self._compile()), inputs, modules.names)
        if self.session.eager_flops:
            self.session.settled_share = share_outside(self.session)
        return output

    def _loses_work(self) -> bool:
        return bool(breaks_of(self.session)) and share_outside(self.session) >= WORTH_A_TRY

    def _eager_flops(self, inputs: tuple[Any, Any]) -> Counter[str] | None:
        """What the call costs uncompiled, by list of blocks."""
        root = self.session.root
        if root is None:
            return None
        args, kwargs = copy.deepcopy(inputs)
        try:
            with torch.random.fork_rng():
                return flops_by_container(root, lambda: self._forward(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - what PyTorch's FLOP counter cannot run
            log.info("the FLOPs of an eager call cannot be counted: %s", error)
            return None

    def _whole_modules(self, stacks: list[list[tuple[str, int]]], inputs: tuple[Any, Any]) -> WholeModules | None:
        """What broke the graph and can be kept whole."""
        root = self.session.root
        if root is None:
            return None
        args, kwargs = copy.deepcopy(inputs)
        try:
            with torch.random.fork_rng():
                return record(root, stacks, lambda: self._forward(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - what PyTorch's FLOP counter cannot run
            log.info("no module can be kept whole: %s", error)
            return None

    def _try(self, call: Callable[..., Any], inputs: tuple[Any, Any], whole: Sequence[str] = ()) -> None:
        """Make the first call again in another way, and keep that way if it has more work in sites."""
        before = flops_in_sites(self.session)
        kept = self.session.set_aside()
        args, kwargs = copy.deepcopy(inputs)
        try:
            with torch.random.fork_rng():
                call(*args, **kwargs)
        except _torch.CompileError as error:
            log.info("cannot be captured in another way: %s", error)
            self.session.put_back(kept)
            return
        now = flops_in_sites(self.session)
        log.info("FLOPs in sites: %.3g before, %.3g in another way", before, now)
        if now > before:
            self._call, self.session.whole = call, tuple(whole)
            for program in kept["programs"]:
                program.close()
        else:
            self.session.put_back(kept)


def _with(modules: WholeModules, call: Callable[..., Any]) -> Callable[..., Any]:
    def with_stand_ins(*args: Any, **kwargs: Any) -> Any:
        with modules:
            return call(*args, **kwargs)

    return with_stand_ins
