"""How a forward is captured: in the way that has the most work in sites."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch

from . import _torch
from .backend import Session, breaks_of, flops_in_sites, share_outside

log = logging.getLogger(__name__)

#: Share of FLOPs that lies in no site where the graph broke, before another capture is tried.
WORTH_A_TRY = 0.01


class Traced:
    """A forward compiled for a session.

    Dynamo breaks the graph where a size depends on data, which may cut attention in two (Mochi drops the text's
    padding by ``nonzero``). It can keep such sizes in the graph instead, but then a whole stream of tokens may have
    a size that no cache can be made for (HunyuanVideo 1.5 sorts its text by validity). So where the first call shows
    that breaks keep work out of sites, it is made once more in the other way, on copies of its inputs, and what
    has more in sites is kept, with what it has stored.
    """

    def __init__(self, forward: Callable[..., Any], session: Session, **options: Any) -> None:
        self.session = session
        self._call = _torch.dynamo_compile(forward, session, **options)
        self._other: Callable[..., Any] | None = _torch.dynamo_compile(
            forward, session, data_dependent_sizes=True, **options
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._other is None:
            return self._call(*args, **kwargs)
        try:
            inputs = copy.deepcopy((args, kwargs))  # the call may write to its own
        except Exception as error:  # noqa: BLE001 - whatever the caller's objects raise
            log.info("captured in one way only, since the inputs cannot be copied: %s", error)
            inputs = None
        output = self._call(*args, **kwargs)
        if inputs is not None and breaks_of(self.session) and share_outside(self.session) >= WORTH_A_TRY:
            self._try_other(*inputs)
        self._other = None
        return output

    def _try_other(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = flops_in_sites(self.session)
        kept = self.session.set_aside()
        try:
            with torch.random.fork_rng():
                self._other(*args, **kwargs)
        except _torch.CompileError as error:
            log.info("sizes that depend on data cannot stay in the graph: %s", error)
            self.session.put_back(kept)
            return
        now = flops_in_sites(self.session)
        log.info("FLOPs in sites: %.3g with graph breaks, %.3g with data-dependent sizes", before, now)
        if now > before:
            self._call = self._other
            for program in kept["programs"]:
                program.close()
        else:
            self.session.put_back(kept)
