"""The reference for trajectories with stacks: in eager mode, over ranges of a model's own lists of blocks.

It shares no code with smoothcache_fx. Everything is computed at every step; at a reused one the outputs of a range's
last block are replaced by what its first block was given and what the range added when it was last computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import Self

from .oracle import polynomial


class StackOracle:
    """Caches ranges of blocks while it is open: ``with StackOracle(...) as oracle``.

    A block's output belongs to its first input of the same shape. Of several outputs of one shape each belongs to the
    input that it is most alike: streams are sums.

    Args:
        model: run uncompiled.
        rows: ``transformer_blocks.2-27`` -> one entry a step, true where it is computed.
        order: degree of the polynomial in the step through what a range added last.
        times: what the polynomial is one of, in place of the step.
        coefficients: per range and step those of the kept values, newest first, in place of the polynomial's.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Mapping[str, Sequence[int]],
        order: int = 0,
        times: Sequence[float] | None = None,
        coefficients: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> None:
        self.model, self.rows, self.order, self.times = model, rows, order, times
        self.coefficients = coefficients or {}
        self._given: dict[str, list[Tensor]] = {}
        self._kept: dict[tuple[str, int, int], list[tuple[float, Tensor]]] = {}
        self._step, self._stream = 0, 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name in self.rows:
            container, _, ends = name.rpartition(".")
            blocks = self.model.get_submodule(container)
            first, last = (blocks.get_submodule(index) for index in ends.split("-"))
            self._hooks += [
                first.register_forward_pre_hook(self._before(name), with_kwargs=True),
                last.register_forward_hook(self._after(name)),
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def step(self, step: int, stream: int = 0) -> Iterator[None]:
        """Around each call of the model: its step, and which of the step's calls it is."""
        self._step, self._stream = step, stream
        self._given.clear()
        yield
        missed = set(self.rows) - set(self._given)
        if missed:
            raise RuntimeError(f"the model ran without {sorted(missed)}")

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._given[name] = [
                value.clone() for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim > 1
            ]

        return before

    def _after(self, name: str) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, structure = tree_flatten(output)
            tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim > 1}
            for place, leaf in tensors.items():
                leaves[place] = self._replaced(name, place, leaf, [leaf.shape for leaf in tensors.values()])
            return tree_unflatten(leaves, structure)

        return after

    def _replaced(self, name: str, place: int, output: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
        alike = [value for value in self._given[name] if value.shape == output.shape and value.dtype == output.dtype]
        if not alike:
            return output
        entry = alike[0]
        if shapes.count(output.shape) > 1:
            entry = max(
                alike, key=lambda value: float(torch.cosine_similarity(value.flatten(), output.flatten(), dim=0))
            )
        now = float(self._step) if self.times is None else self.times[self._step]
        key = name, place, self._stream
        if self.rows[name][self._step]:
            before = [] if self._step == 0 else self._kept.get(key, [])
            self._kept[key] = [(now, output - entry), *before[: self.order]]
            return output
        if weights := self.coefficients.get(name, {self._step: ()})[self._step]:
            return entry + sum(weight * value for weight, (_, value) in zip(weights, self._kept[key], strict=True))
        return entry + polynomial(self._kept[key], now)
