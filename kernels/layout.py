"""How tensors of one shape lie in memory, as few nested loops as that takes: what a launch needs to know.

Any strides are taken (slices, transposes, broadcasts), as long as four loops are enough. Dimensions are ordered as the
last tensor lies in memory, and neighbours that all tensors run through without a gap become one. For ``x`` ``[batch,
tokens, width]`` and a gate ``[batch, 1, width]``, all contiguous:

    x    [2, 256, 1152], strides (294912, 1152, 1)        groups 1, samples 2, tokens 256, width 1152
    gate [2, 256, 1152], strides (1152, 0, 1)             x is flat: a sample has no gap; the gate has rows
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Strides = tuple[int, ...]
#: How a tensor's samples lie in memory: without gaps; in rows without gaps; any other way.
FLAT, ROWS, STRIDED = range(3)
#: Past this, offsets do not fit in 32 bits.
INT32 = 2**31
#: A row of so many blocks gets programs of its own: the last block's idle part is then small.
BLOCKS_PER_ROW = 16


@dataclass(frozen=True)
class Layout:
    """One launch: ``groups * samples * blocks`` programs.

    Attributes:
        groups, samples, tokens, width: sizes of the four loops, outermost first.
        strides: in elements, per tensor: those of the four loops.
        kinds: per tensor ``FLAT``, ``ROWS`` or ``STRIDED``.
        blocks: programs per sample.
        wide: whether offsets within a sample need 64 bits.
    """

    groups: int
    samples: int
    tokens: int
    width: int
    strides: tuple[Strides, ...]
    kinds: tuple[int, ...]
    blocks: int
    wide: bool

    @property
    def programs(self) -> int:
        return self.groups * self.samples * self.blocks

    @property
    def total(self) -> int:
        """Elements in a sample."""
        return self.tokens * self.width


def layout_of(tensors: Sequence[torch.Tensor], block: int) -> Layout:
    """The layout of tensors of one shape; the last one's order in memory is followed."""
    return layout(tuple(tensors[0].shape), tuple(tensor.stride() for tensor in tensors), block)


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], strides: tuple[Strides, ...], block: int) -> Layout:
    """``layout_of`` for tensors of this shape with these strides.

    Raises:
        ValueError: four loops are not enough.
    """
    if 0 in shape:
        nothing = ((0, 0, 0, 0),) * len(strides)
        return Layout(0, 0, 0, 0, nothing, (FLAT,) * len(strides), blocks=0, wide=False)
    loops = _loops(shape, strides)
    if len(loops) > 4:
        raise ValueError(
            f"tensors of shape {list(shape)} with strides {[list(one) for one in strides]} take {len(loops)} nested "
            "loops to run through, and 4 at most are supported: make those with gaps contiguous first"
        )
    if len(loops) == 1 or (len(loops) == 2 and loops[-1][0] >= BLOCKS_PER_ROW * block):
        loops.insert(-1, (1, (0,) * len(strides)))
    loops = [(1, (0,) * len(strides))] * (4 - len(loops)) + loops
    (groups, _), (samples, _), (tokens, _), (width, _) = loops
    per_tensor = tuple(zip(*(steps for _, steps in loops), strict=True))
    blocks = -(-tokens * width // block)
    # Elements past a sample's end are masked, but their offsets are computed.
    last = blocks * block - 1
    reach = max([last, *(last // width * token + (width - 1) * column for *_, token, column in per_tensor)])
    kinds = tuple(_kind(tokens, width, token, column) for *_, token, column in per_tensor)
    return Layout(groups, samples, tokens, width, per_tensor, kinds, blocks, reach >= INT32)


@functools.lru_cache(maxsize=4096)
def row_layout(shape: tuple[int, ...], strides: tuple[Strides, ...]) -> Layout:
    """The layout for programs that take one row each: the last dimension stays ``width``, with its own strides.

    ``groups * samples * tokens`` programs; ``kinds``, ``blocks`` and ``wide`` have no meaning here.

    Raises:
        ValueError: the rows take more than three loops.
    """
    *outer, width = shape
    loops = [(0, (0,) * len(strides))] if 0 in outer else _loops(tuple(outer), tuple(one[:-1] for one in strides))
    if len(loops) > 3:
        raise ValueError(
            f"the rows of tensors of shape {list(shape)} with strides {[list(one) for one in strides]} take "
            f"{len(loops)} nested loops to run through, and 3 at most are supported: make those with gaps contiguous"
        )
    loops = [(1, (0,) * len(strides))] * (3 - len(loops)) + loops + [(width, tuple(one[-1] for one in strides))]
    (groups, _), (samples, _), (tokens, _), _ = loops
    per_tensor = tuple(zip(*(steps for _, steps in loops), strict=True))
    return Layout(groups, samples, tokens, width, per_tensor, (ROWS,) * len(strides), blocks=1, wide=False)


def _loops(shape: tuple[int, ...], strides: tuple[Strides, ...]) -> list[tuple[int, Strides]]:
    """``(size, stride per tensor)`` of each loop, outermost first."""
    dims = [(size, tuple(one[dim] for one in strides)) for dim, size in enumerate(shape) if size > 1]
    dims.sort(key=lambda dim: dim[1][-1], reverse=True)
    loops: list[tuple[int, Strides]] = []
    for size, steps in dims:
        if loops and all(outer == size * inner for outer, inner in zip(loops[-1][1], steps, strict=True)):
            loops[-1] = loops[-1][0] * size, steps
        else:
            loops.append((size, steps))
    return loops or [(1, (1,) * len(strides))]


def _kind(tokens: int, width: int, token_stride: int, column_stride: int) -> int:
    if column_stride != 1 and width > 1:
        return STRIDED
    return FLAT if tokens == 1 or token_stride == width else ROWS
