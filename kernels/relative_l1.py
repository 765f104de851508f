"""Calibration's error: how far a branch's output lies from what it was some steps ago.

``sum|y_t - y_{t-k}| / sum|y_t|`` over all elements, Eq. 4 of the paper (arXiv 2411.10510); the denominator is the
fresh output, the one that a cached step would replace.

Two launches: sums of 4096 elements each, and their sum. On an H200 they take 11.4 us at ``[2, 256, 1152]`` in bfloat16,
where Inductor's code takes 13.8 and a copy of as many bytes 6.3, and 53, 55 and 41 us at 64 samples
(``bench/results/kernels_relative_l1_cuda.json``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import COUNTS, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import DTYPES

#: Elements whose float32 sum a program takes, and its warps: 16 elements a thread.
BLOCK, WARPS = 4096, 8
#: Partial sums that are added at once, always in the same order, and warps that do it.
FINISH_BLOCK, FINISH_WARPS = 1024, 4
#: Lags that one launch compares with; more take several, and each reads the fresh output again.
LAGS_PER_LAUNCH = 8


def relative_l1_reference(fresh: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """``relative_l1`` in plain PyTorch, all sums in float64."""
    precise = torch.promote_types(fresh.dtype, torch.float32)
    value = fresh.to(precise)
    sums = [value.abs().sum(dtype=torch.float64)]
    for other in earlier:
        sums.append((value - other.to(device=fresh.device, dtype=precise)).abs_().sum(dtype=torch.float64))
    return torch.stack(sums)


def _check(fresh: Tensor, earlier: Sequence[Tensor]) -> None:
    for other in earlier:
        if other.shape != fresh.shape:
            raise ValueError(f"outputs of one branch differ in shape: {tuple(fresh.shape)} after {tuple(other.shape)}")


@torch.library.custom_op(
    "smoothcache::relative_l1", mutates_args=(), schema="(Tensor fresh, Tensor[] earlier) -> Tensor"
)
def relative_l1(fresh: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Numerators and denominator of the relative L1 error, for all lags.

    On CUDA one pass of a Triton kernel over all lags, for float32, float16 and bfloat16; plain PyTorch elsewhere. The
    same input gives the same bits each time.

    Args:
        fresh: this step's output, any shape and floating dtype.
        earlier: outputs of the same shape from one, two, ... steps ago, on any device.

    Returns:
        float64 ``[1 + len(earlier)]`` on ``fresh``'s device: ``sum|fresh|``, then ``sum|fresh - earlier[k]|``.
        Differences are taken in float32 (float64 for float64 input), sums in float64; the kernel sums each 4096
        elements in float32 first.

    Raises:
        ValueError: the shapes differ.
    """
    _check(fresh, earlier)
    if runs_triton(fresh) and all(one.dtype in DTYPES for one in (fresh, *earlier)):
        return _launch(fresh, [other.to(fresh.device) for other in earlier])
    return relative_l1_reference(fresh, earlier)


@relative_l1.register_fake
def _(fresh: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    _check(fresh, earlier)
    return fresh.new_empty(1 + len(earlier), dtype=torch.float64)


def _launch(fresh: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    if fresh.dim() > 4:
        # More loops than the kernel has; tensors without gaps take one.
        fresh, earlier = fresh.contiguous(), [other.contiguous() for other in earlier]
    if not fresh.numel():
        return torch.zeros(1 + len(earlier), dtype=torch.float64, device=fresh.device)
    out = torch.empty(1 + len(earlier), dtype=torch.float64, device=fresh.device)
    for first in range(0, max(1, len(earlier)), LAGS_PER_LAUNCH):
        some = tuple(earlier[first : first + LAGS_PER_LAUNCH])
        at = layout_of((fresh, *some), BLOCK)
        partial = torch.empty(1 + len(some), at.programs, dtype=torch.float32, device=fresh.device)
        # The denominator is the same each time.
        rows, sums = (partial[1:], out[1 + first :]) if first else (partial, out)
        with torch.cuda.device_of(fresh):
            relative_l1_kernel[(at.programs,)](
                fresh, some, partial, at.programs, at.samples, at.blocks, at.width, at.total, at.strides,
                LAGS=len(some), KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            relative_l1_finish_kernel[(len(rows),)](
                rows, sums, at.programs, BLOCK=FINISH_BLOCK, num_warps=FINISH_WARPS, enable_fp_fusion=False
            )
    return out


if triton is not None:

    @triton.jit(do_not_specialize=[*COUNTS, "programs"])
    def relative_l1_kernel(
        fresh,  # [groups, samples, tokens, width] with strides[0]
        earlier,  # strides[1:LAGS + 1]
        partial,  # [1 + LAGS, programs], contiguous
        programs,
        samples,
        blocks,
        width,
        total,
        strides,
        LAGS: tl.constexpr,
        KINDS: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        group, sample, index = place(samples, blocks, WIDE, BLOCK)
        inside = index < total
        # Past the end all are 0, and so are their differences.
        value = tl.load(fresh + offsets(group, sample, index, width, strides[0], KINDS[0]), inside, 0.0).to(tl.float32)
        mine = partial + tl.program_id(0)
        tl.store(mine, tl.sum(tl.abs(value)))
        for lag in tl.static_range(LAGS):
            at = offsets(group, sample, index, width, strides[1 + lag], KINDS[1 + lag])
            other = tl.load(earlier[lag] + at, inside, 0.0).to(tl.float32)
            tl.store(mine + (1 + lag) * programs.to(tl.int64), tl.sum(tl.abs(value - other)))

    @triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["partial", "out"])
    def relative_l1_finish_kernel(
        partial,  # [sums, programs], contiguous
        out,  # [sums], float64
        programs,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        mine = partial + row.to(tl.int64) * programs
        total = tl.zeros((BLOCK,), tl.float64)
        for first in tl.range(0, programs, BLOCK):
            index = first + tl.arange(0, BLOCK)
            total += tl.load(mine + index, index < programs, 0.0).to(tl.float64)
        tl.store(out + row, tl.sum(total))
