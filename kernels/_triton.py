"""Triton where it is installed, and what its kernels here share: which elements a program handles, and where they lie.

A launch sees every tensor as ``[groups, samples, tokens, width]`` (``layout.py``). A program handles ``BLOCK``
neighbouring elements of one sample, whatever its width: rows of any width fill the blocks alike, and neighbours in
memory stay in one thread's 128-bit access. Bases of samples are 64-bit; indices within one are 64-bit where needed.
"""

from __future__ import annotations

import os

import torch

from .layout import FLAT, ROWS

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no release for this system; the plain references run there.
    triton = tl = None

#: Triton's interpreter runs kernels on CPU tensors. It is chosen when kernels are defined, that is on import.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

#: Elements a program handles, and its warps: 8 elements a thread, one 128-bit access for 16-bit dtypes.
BLOCK = 1024
WARPS = 4

#: Products and sums are rounded one by one, as in the plain references: contracted to fused multiply-adds they differ
#: in the last bit. Memory sets the pace of these kernels, not arithmetic.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

#: Arguments that change with the batch, and are of no use to know when a kernel is compiled.
COUNTS = ["samples", "blocks"]


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take this tensor: on CUDA, and anywhere under Triton's interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


if triton is not None:
    _FLAT = tl.constexpr(FLAT)
    _ROWS = tl.constexpr(ROWS)

    @triton.jit
    def place(samples, blocks, WIDE: tl.constexpr, BLOCK: tl.constexpr):
        """This program's ``(group, sample)``, and the indices of its elements within that sample."""
        program = tl.program_id(0)
        sample = program // blocks
        block = program % blocks
        if WIDE:
            block = block.to(tl.int64)
        index = block * BLOCK + tl.arange(0, BLOCK)
        return (sample // samples).to(tl.int64), (sample % samples).to(tl.int64), index

    @triton.jit
    def offsets(group, sample, index, width, strides, KIND: tl.constexpr):
        """Where one tensor's elements lie, from its ``data_ptr``; ``KIND`` is one of ``layout.py``'s."""
        base = group * strides[0] + sample * strides[1]
        if KIND == _FLAT:
            return base + index
        row = (index // width) * strides[2]
        if KIND == _ROWS:
            return base + (row + index % width)
        return base + (row + (index % width) * strides[3])

    @triton.jit
    def gated(branch, gate, at, inside):
        """A branch in float32, times what its gate holds at these offsets, if it has one."""
        if gate is not None:
            branch *= tl.load(gate + at, inside, 0.0).to(tl.float32)
        return branch

else:
    place = offsets = gated = None
