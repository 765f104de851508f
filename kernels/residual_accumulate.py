"""A run of reused branches joins the residual stream at once: each cache is read once, the stream written once.

Two kernels. Up to ``UNROLLED`` values come as arguments of the launch, and the kernel is as long as the run. A longer
run, and any with forecasts, is a loop over a table of addresses (``_addresses.py``), whatever its length: one launch of
one kernel, and a tiny one before it that writes the table. Microseconds for 56 terms in bfloat16 on an H200, beside
Inductor's one kernel of 56 terms (``bench/results/kernels_residual_accumulate_cuda.json``; blocks by a sweep that is
not in this repository):

===============================  ================  =================  ================
elements, warps, written out     [2, 256, 1152]    [64, 256, 1152]    [1, 4608, 3072]
===============================  ================  =================  ================
512, 4, 4 iterations (taken)     30                521                396
2048, 4, 2 iterations            46                510                389
1024, 4, 3 copied ahead          37                580                443
Inductor                         28                538                410
===============================  ================  =================  ================

Copying loads ahead into shared memory is slower than writing out a few iterations, whose loads then overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._addresses import address_table
from ._runs import Coefficients, Gates, Part, Run, accumulate_reference, add_terms, alike, check_run, parts_of
from ._triton import BLOCK, COUNTS, OPTIONS, gated, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import rounded_like

OP = "residual_accumulate"
#: Values that one launch takes as arguments. Sixteen would spill registers where rows have an odd width: they cannot be
#: read 128 bits at a time.
UNROLLED = 12
#: The loop's elements a program, and iterations that are written out, so that their loads are under way at once.
LOOP_BLOCK, AT_ONCE = 512, 4


def residual_accumulate_reference(
    x: Tensor, gates: Gates, values: Sequence[Tensor], coefficients: Coefficients = None
) -> Tensor:
    """``residual_accumulate`` in plain PyTorch."""
    return rounded_like(x, accumulate_reference(x, Run(gates, values, coefficients)))


@torch.library.custom_op(
    "smoothcache::residual_accumulate",
    mutates_args=(),
    schema="(Tensor x, Tensor?[] gates, Tensor[] values, Tensor?[]? coefficients=None) -> Tensor",
)
def residual_accumulate(x: Tensor, gates: Gates, values: Sequence[Tensor], coefficients: Coefficients = None) -> Tensor:
    """``out = x + sum_i gates[i] * sum_k coefficients[i][k] * value_ik``: reused branches that follow on each other.

    Triton on CUDA, the plain reference elsewhere; both give the same bits. The stream between two branches is kept in
    float32, where one ``residual_load`` after the other rounds it to ``x``'s dtype each time.

    On CUDA one launch takes terms whose values have the same dtypes and strides, and so their gates and coefficients.
    Where gates differ in that, and are small, they are copied first. Where else something changes from one term to the
    next, another launch begins.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape; float32, float16 or bfloat16, any strides.
        gates: one a term; each broadcasts to ``x`` (``[batch, 1, width]``, ``[batch, tokens, width]``,
            ``[batch, tokens, 1]``, ``[width]``) or is None.
        values: the branches' outputs of earlier steps, term by term, each of ``x``'s shape: one a term, or as many as
            the term has coefficients.
        coefficients: float32 ``[1 to 3]`` on ``x``'s device for a term that is a forecast, None for one that is a value
            as it is; None where no term is a forecast. They are read where the op runs.

    Returns:
        A new tensor like ``x``. Operands are converted to float32. A forecast's products and sums are rounded to
        float32, first to last, and once more to the dtype of its first value. The product with the gate and the
        running sum, first to last, are rounded to float32, and the last sum once more to ``x``'s dtype.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, devices or numbers of terms that do not fit together; on CUDA, strides that take more than
            four loops.
    """
    run = Run(gates, values, coefficients)
    check_run(OP, x, run)
    if not runs_triton(x):
        return residual_accumulate_reference(x, gates, values, coefficients)
    return _launch(x, run)


@residual_accumulate.register_fake
def _(x: Tensor, gates: Gates, values: Sequence[Tensor], coefficients: Coefficients = None) -> Tensor:
    check_run(OP, x, Run(gates, values, coefficients), traced=True)
    return torch.empty_like(x)


def _launch(x: Tensor, run: Run) -> Tensor:
    return launch_each(x, launches_of(x, run), x.dtype)


def launches_of(x: Tensor, run: Run) -> list[Run]:
    """The run in as few parts as launches take: any few terms without forecasts, or any number of terms alike."""
    return [run] if _unrolls(run) else joined(parts_of(x, alike(x, run)))


def joined(parts: Sequence[Part]) -> list[Run]:
    """The parts, with neighbours put together that one launch of few terms takes."""
    found: list[Run] = []
    for part in parts:
        if found and _unrolls(found[-1]) and _unrolls(part) and len(found[-1].gates) + len(part.gates) <= UNROLLED:
            found[-1] = Run([*found[-1].gates, *part.gates], [*found[-1].values, *part.values])
        else:
            found.append(part)
    return found


def launch_each(x: Tensor, parts: Sequence[Run], dtype: torch.dtype) -> Tensor:
    """The stream behind the parts: one launch for each, with a float32 stream between them."""
    stream = x
    for number, part in enumerate(parts):
        out = torch.empty_like(x, dtype=dtype if number == len(parts) - 1 else torch.float32)
        (_launch_unrolled if _unrolls(part) else _launch_loop)(stream, part, out)
        stream = out
    return stream


def _unrolls(part: Run) -> bool:
    return len(part.gates) <= UNROLLED and not any(one is not None for one in part.coefficients or ())


def _launch_unrolled(x: Tensor, part: Run, out: Tensor) -> None:
    gates, caches = tuple(part.gates), tuple(part.values)
    spread = [x if gate is None else gate.expand(x.shape) for gate in gates]
    at = layout_of((x, out, *spread, *caches), BLOCK)
    if at.programs:
        with torch.cuda.device_of(x):
            residual_accumulate_kernel[(at.programs,)](
                x, gates, caches, out, at.samples, at.blocks, at.width, at.total, at.strides,
                TERMS=len(gates), KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip


def _launch_loop(x: Tensor, part: Part, out: Tensor) -> None:
    gate, values = part.gate, tuple(part.values[: part.count])
    at = layout_of((x, out, x if gate is None else gate.expand(x.shape), *values), LOOP_BLOCK)
    if at.programs:
        table = address_table(part.addresses(), x.device)
        with torch.cuda.device_of(x):
            residual_accumulate_loop_kernel[(at.programs,)](
                x, table, gate, values, out, len(part.gates), part.coefficient_stride,
                at.samples, at.blocks, at.width, at.total, at.strides,
                VALUES=len(values), FORECAST=part.coefficients is not None, ALL_GATED=part.all_gated,
                ALIGNED=part.is_aligned, KINDS=at.kinds, WIDE=at.wide, BLOCK=LOOP_BLOCK,
                AT_ONCE=AT_ONCE, **OPTIONS,
            )  # fmt: skip


if triton is not None:

    @triton.jit(do_not_specialize=COUNTS)
    def residual_accumulate_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        gates,  # strides[2:TERMS + 2], each may be None
        caches,  # strides[TERMS + 2:2 * TERMS + 2]
        out,  # strides[1]
        samples,
        blocks,
        width,
        total,
        strides,
        TERMS: tl.constexpr,
        KINDS: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        group, sample, index = place(samples, blocks, WIDE, BLOCK)
        inside = index < total
        stream = tl.load(x + offsets(group, sample, index, width, strides[0], KINDS[0]), inside).to(tl.float32)
        for term in tl.static_range(TERMS):
            at = offsets(group, sample, index, width, strides[TERMS + 2 + term], KINDS[TERMS + 2 + term])
            kept = tl.load(caches[term] + at, inside).to(tl.float32)
            at = offsets(group, sample, index, width, strides[2 + term], KINDS[2 + term])
            stream += gated(kept, gates[term], at, inside)
        at = offsets(group, sample, index, width, strides[1], KINDS[1])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=[*COUNTS, "terms"])
    def residual_accumulate_loop_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        table,  # see add_terms
        gate,  # any one of the gates, or None; all have strides[2]
        values,  # those of any one term; all have strides[3:VALUES + 3]
        out,  # strides[1]
        terms,
        coefficient_stride,
        samples,
        blocks,
        width,
        total,
        strides,
        VALUES: tl.constexpr,
        FORECAST: tl.constexpr,
        ALL_GATED: tl.constexpr,
        ALIGNED: tl.constexpr,
        KINDS: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
        AT_ONCE: tl.constexpr,
    ):
        group, sample, index = place(samples, blocks, WIDE, BLOCK)
        stream = tl.load(x + offsets(group, sample, index, width, strides[0], KINDS[0]), index < total).to(tl.float32)
        values_at = ()
        for number in tl.static_range(VALUES):
            values_at += (offsets(group, sample, index, width, strides[3 + number], KINDS[3 + number]),)
        stream = add_terms(
            stream, table, terms, gate, offsets(group, sample, index, width, strides[2], KINDS[2]), values, values_at,
            coefficient_stride, index, total, VALUES, FORECAST, ALL_GATED, ALIGNED, AT_ONCE,
        )  # fmt: skip
        at = offsets(group, sample, index, width, strides[1], KINDS[1])
        tl.store(out + at, stream.to(out.dtype.element_ty), index < total)
