"""Reads tried out while a model is calibrated: what they do to its output, as sketches."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..calibration.effects import DIMENSIONS, Effects

#: Elements of each branch output that inner products are taken over.
ELEMENTS = 4096


class EffectSums:
    """Sums of sketches of one model's effects, by step and lag, over all its trajectories and streams."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._elements: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._signs: dict[Hashable, tuple[int, list[torch.Tensor]]] = {}

    def add(self, step: int, lag: int, change: Sequence[torch.Tensor], stream: Hashable, trajectory: int) -> None:
        """Add what reading from ``lag`` steps back changes of each output. All steps of a trajectory share signs."""
        signs = self._signs_for(change, stream, trajectory)
        place = step, lag
        for values, sign in zip(change, signs, strict=True):
            padded = torch.nn.functional.pad(values.float().flatten() * sign, (0, -values.numel() % DIMENSIONS))
            sketch = padded.view(-1, DIMENSIONS).sum(0)
            self._sums[place] = self._sums[place] + sketch if place in self._sums else sketch
            self._elements[place] += values.numel()

    def _signs_for(self, change: Sequence[torch.Tensor], stream: Hashable, trajectory: int) -> list[torch.Tensor]:
        known, signs = self._signs.get(stream, (-1, []))
        if known != trajectory or [len(sign) for sign in signs] != [values.numel() for values in change]:
            generator = torch.Generator().manual_seed(zlib.crc32(repr((stream, trajectory)).encode()))
            signs = [
                (2 * torch.randint(2, (values.numel(),), generator=generator) - 1).to(values.device, torch.float32)
                for values in change
            ]
            self._signs[stream] = trajectory, signs
        return signs

    @staticmethod
    def together(all_sums: Sequence[EffectSums], steps: int, reach: int) -> Effects | None:
        """The effects of all denoisers of a pipeline; None if nothing was tried out."""
        sketch = np.zeros((steps, reach + 1, DIMENSIONS))
        elements = np.zeros((steps, reach + 1))
        for sums in all_sums:
            for (step, lag), values in sums._sums.items():
                sketch[step, lag] += values.double().cpu().numpy()
                elements[step, lag] += sums._elements[step, lag]
        if not elements.any():
            return None
        sketch /= np.sqrt(np.where(elements > 0, elements, np.nan))[..., None]
        sketch[:, 0] = 0.0
        return Effects(sketch.astype(np.float32), elements.max())


def floating_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of what a model returns."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


class Tokens:
    """The same random tokens of outputs of one shape, each time."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._places: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """A share of a tensor's rows, at least one: ``[tokens, width]`` of ``[..., width]``."""
        rows = output.reshape(-1, output.shape[-1])
        key = len(rows), rows.device
        if key not in self._places:
            generator = torch.Generator().manual_seed(len(rows))
            count = max(1, int(self.share * len(rows)))
            self._places[key] = torch.randperm(len(rows), generator=generator)[:count].sort()[0].to(rows.device)
        return rows[self._places[key]]


class Subset:
    """The same random elements of outputs of one size, each time."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """At most 4096 elements of a tensor, drawn with replacement, in float64 (float32 where there is none)."""
        flat = output.flatten()
        dtype = torch.float32 if output.device.type == "mps" else torch.float64
        if len(flat) <= ELEMENTS:
            return flat.to(dtype)
        key = len(flat), flat.device
        if key not in self._places:
            generator = torch.Generator().manual_seed(len(flat))
            self._places[key] = torch.randint(len(flat), (ELEMENTS,), generator=generator).to(flat.device)
        return flat[self._places[key]].to(dtype)
