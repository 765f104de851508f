"""The reference for a whole pipeline: ``oracle.Oracle`` in each denoiser, its steps told by the scheduler.

It shares no code with smoothcache_fx: the scheduler's methods are wrapped here by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from helpers.cases import Branch
from helpers.oracle import Oracle
from zoo.case import matches

from .build import PipelineCase


def branches_of(case: PipelineCase, model: nn.Module) -> dict[str, Branch]:
    """Module name -> branch, for all that the case lists."""
    return {
        name: Branch(name, kind, matmuls=0)
        for kind, patterns in case.branches.items()
        for name, _ in model.named_modules()
        if any(matches(name, pattern) for pattern in patterns)
    }


@contextlib.contextmanager
def cached_by_hand(
    case: PipelineCase,
    pipe: Any,
    rows: Mapping[str, Sequence[int]],
    begin: int = 0,
    stream_of: Callable[[int, Mapping[str, Any]], int] = lambda ordinal, inputs: ordinal,
) -> Iterator[list[Oracle]]:
    """Run the pipeline inside: branches of each kind are computed where its row says so, else reused.

    ``begin`` is the step that a run begins with; ``stream_of(ordinal, inputs)`` says which stream a call of the model
    is, given which of the step's calls it is.
    """
    scheduler = pipe.scheduler
    place = {"step": 0, "serial": 0}

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        type(scheduler).set_timesteps(scheduler, *args, **kwargs)
        place.update(step=0, serial=place["serial"] + 1)

    def step(*args: Any, **kwargs: Any) -> Any:
        result = type(scheduler).step(scheduler, *args, **kwargs)
        place.update(step=place["step"] + 1, serial=place["serial"] + 1)
        return result

    def stepwise(forward: Callable[..., Any], oracle: Oracle) -> Callable[..., Any]:
        last = {"serial": -1, "ordinal": 0}

        def call(*args: Any, **kwargs: Any) -> Any:
            ordinal = last["ordinal"] + 1 if last["serial"] == place["serial"] else 0
            last.update(serial=place["serial"], ordinal=ordinal)
            with oracle.step(begin + place["step"], stream_of(ordinal, kwargs)):
                return forward(*args, **kwargs)

        return call

    # Signatures are looked at by pipelines: set_timesteps(sigmas=...), step(generator=...).
    set_timesteps.__wrapped__, step.__wrapped__ = scheduler.set_timesteps, scheduler.step
    with contextlib.ExitStack() as stack:
        oracles = []
        for name in case.denoisers:
            model = getattr(pipe, name)
            branches = branches_of(case, model)
            oracle = Oracle(model, branches, {site: rows[branch.kind] for site, branch in branches.items()})
            oracles.append(stack.enter_context(oracle))
            model.forward = stepwise(model.forward, oracle)
            model.forward.__wrapped__ = type(model).forward.__get__(model)
            stack.callback(delattr, model, "forward")
        scheduler.set_timesteps, scheduler.step = set_timesteps, step
        stack.callback(delattr, scheduler, "set_timesteps")
        stack.callback(delattr, scheduler, "step")
        yield oracles
