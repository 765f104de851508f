"""The reference for every cached trajectory: a cache in eager mode, by hand, on the module's own forwards.

It shares no code with smoothcache_fx: it knows no graph and no selector, only which submodule's output is
which site's, and at which steps it is computed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from typing_extensions import Self

OracleType = TypeVar("OracleType", bound="Oracle")


class BranchLike(Protocol):
    """``module``: whose output is kept. ``call``: which of its calls in one call of the model it is."""

    @property
    def module(self) -> str: ...
    @property
    def call(self) -> int: ...


class ModuleCall:
    """Where the oracle finds a site: a module and which of its calls."""

    def __init__(self, module: str, call: int = 0) -> None:
        self.module, self.call = module, call


class Oracle:
    """Caches the outputs of submodules while it is open: ``with Oracle(...) as oracle``.

    A module's output is kept as it is, a tensor or a tuple, before whatever the caller applies to it (gates,
    residual adds). At a reused step the module does not run at all.

    Args:
        model: run uncompiled; its submodules' ``forward`` is replaced until the oracle is closed.
        branches: site name -> where to find it.
        rows: site name -> one entry a step, true where it is computed; a site without one is always computed.
        orders: site name -> degree of the polynomial in the step through the last outputs that is replayed; 0 if none.
        times: what the polynomial is one of, in place of the step.

    Attributes:
        calls: site name -> how often its module has really run.
    """

    def __init__(
        self,
        model: nn.Module,
        branches: Mapping[str, BranchLike],
        rows: Mapping[str, Sequence[int]],
        orders: Mapping[str, int] | None = None,
        times: Sequence[float] | None = None,
    ) -> None:
        unknown = set(rows) - set(branches)
        if unknown:
            raise ValueError(f"rows for {sorted(unknown)}, but the branches are {sorted(branches)}")
        for site, row in rows.items():
            if not row[0]:
                raise ValueError(f"the first step of {site!r} is reused, but nothing is kept before it")
        self.model = model
        self.rows = rows
        self.orders = orders or {}
        self.times = times
        self.calls: Counter[str] = Counter()
        self._sites: dict[str, dict[int, str]] = {}
        for site, branch in branches.items():
            calls = self._sites.setdefault(branch.module, {})
            if branch.call in calls:
                raise ValueError(f"{site!r} and {calls[branch.call]!r}: the same call of {branch.module!r}")
            calls[branch.call] = site
        self._kept: dict[tuple[str, int], list[tuple[float, Any]]] = {}
        self._step: int | None = None
        self._stream = 0
        self._ordinals: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for name in self._sites:
            module = self.model.get_submodule(name)
            if "forward" in module.__dict__:
                raise ValueError(f"{name!r} has an oracle already: give each a model of its own")
            module.forward = self._cached(name, module.forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self._sites:
            del self.model.get_submodule(name).forward

    @contextlib.contextmanager
    def step(self, step: int, stream: int = 0) -> Iterator[None]:
        """Around each call of the model: its step, and which of the step's calls it is."""
        if step == 0:
            self._kept = {key: value for key, value in self._kept.items() if key[1] != stream}
        self._step, self._stream = step, stream
        self._ordinals.clear()
        try:
            yield
        finally:
            self._step = None
        missed = {
            site for name, calls in self._sites.items() for call, site in calls.items() if self._ordinals[name] <= call
        }
        if missed:
            raise RuntimeError(f"the model ran without a call of {sorted(missed)}")

    def _cached(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def cached(*args: Any, **kwargs: Any) -> Any:
            if self._step is None:
                raise RuntimeError("call the model inside oracle.step(...)")
            ordinal = self._ordinals[name]
            self._ordinals[name] += 1
            site = self._sites[name].get(ordinal)
            if site is None:
                raise RuntimeError(f"call {ordinal} of {name!r} in one call of the model is no site's")
            now = float(self._step) if self.times is None else self.times[self._step]
            if site in self.rows and not self.rows[site][self._step]:
                return polynomial(self._kept[site, self._stream], now)
            self.calls[site] += 1
            output = forward(*args, **kwargs)
            before = self._kept.get((site, self._stream), [])
            self._kept[site, self._stream] = [(now, _copy(output)), *before[: self.orders.get(site, 0)]]
            return output

        return cached


def polynomial(kept: list[tuple[float, Any]], now: float) -> Any:
    """The outputs' polynomial through their times, at ``now``: its weights solved for; the sum in float32."""
    if len(kept) == 1:
        return _copy(kept[0][1])
    times = numpy.array([time for time, _ in kept]) - now
    weights = numpy.linalg.solve(numpy.vander(times, increasing=True).T, numpy.eye(len(kept))[0])

    def add_up(*values: Any) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        terms = [value.to(wide) * weight for weight, value in zip(weights.astype("f4").tolist(), values, strict=True)]
        return sum(terms[1:], terms[0]).to(values[0].dtype)

    return tree_map(add_up, *(output for _, output in kept))


def _copy(output: Any) -> Any:
    """The model may write into what a module returns; what is kept must stay as it was."""
    return tree_map_only(Tensor, Tensor.clone, output)
