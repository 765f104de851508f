"""SmoothCache's calibration as its authors published it, written anew as the reference for comparisons.

The package `dit-smoothcache` imports a `calibration` subpackage that none of its releases (0.1.0 and 0.1.1,
wheel and source) contains, so it cannot be run beside ours. This says in its own words what that helper, as
it stands in the authors' repository (`SmoothCache/calibration/calibration_helper.py`), does:

- It wraps modules by name. Each call appends to one list per lag the relative L1 error of that module's
  output of so many calls ago against the present one, over the whole batch. A list starts with the first call
  for which there is an earlier output, so entry i of lag k's list is the error at call i + k.
- Lists of modules with the same last name are averaged entry by entry.
- The scan below turns the averages into a row.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import torch


def published_scan(lists: Sequence[Sequence[float]], threshold: float, steps: int) -> list[int]:
    """Row of 0 and 1 from the averaged lists, `lists[k - 1]` being lag k's."""
    row = [1] * steps
    position = 0
    while position < steps:
        fitting = [
            lag for lag, values in enumerate(lists, start=1) if position < len(values) and values[position] <= threshold
        ]
        skipped = max(fitting, default=0)
        for step in range(position + 1, min(position + skipped + 1, steps)):
            row[step] = 0
        position += skipped + 1
    row[0] = row[-1] = 1
    return row


class PublishedCalibration:
    """Records the modules called `components` of `model` over one trajectory, inside `with recording()`."""

    def __init__(self, model: torch.nn.Module, components: Sequence[str], lags: int, steps: int) -> None:
        self.lags, self.steps = lags, steps
        self.lists: dict[str, list[list[float]]] = {}
        self._modules = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in components}
        self._earlier = {name: deque(maxlen=lags) for name in self._modules}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(lambda *call, name=name: self._record(name, call[-1]))
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, name: str, output: torch.Tensor) -> None:
        output = output.detach().float()
        lists = self.lists.setdefault(name, [[] for _ in range(self.lags)])
        for values, before in zip(lists, self._earlier[name], strict=False):
            values.append(float((before - output).abs().sum() / output.abs().sum()))
        self._earlier[name].appendleft(output.clone())

    def schedule(self, threshold: float) -> dict[str, list[int]]:
        """Last name -> row."""
        components = defaultdict(list)
        for name, lists in self.lists.items():
            components[name.rpartition(".")[2]].append(lists)
        return {
            component: published_scan(
                [
                    [sum(values) / len(values) for values in zip(*same_lag, strict=True)]
                    for same_lag in zip(*blocks, strict=True)
                ],
                threshold,
                self.steps,
            )
            for component, blocks in components.items()
        }
