"""A run of reused branches joins the residual stream at once: each cache is read once, the stream written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import BLOCK, COUNTS, OPTIONS, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import check_stream, check_term, product, rounded_like

#: Terms that one launch adds; more take several, with a float32 sum between them. Sixteen would spill registers where
#: rows are of odd width, and so cannot be read 128 bits at a time.
TERMS_PER_LAUNCH = 12


def residual_accumulate_reference(
    x: Tensor, gates: Sequence[Tensor | None], caches: Sequence[Tensor], scales: Sequence[float] | None = None
) -> Tensor:
    """``residual_accumulate`` in plain PyTorch."""
    stream = x.float()
    for gate, cache, scale in zip(gates, caches, _scales(caches, scales), strict=True):
        stream = stream + product(gate, cache, scale)
    return rounded_like(x, stream)


def _scales(caches: Sequence[Tensor], scales: Sequence[float] | None) -> Sequence[float]:
    return [1.0] * len(caches) if scales is None else scales


def _check(x: Tensor, gates: Sequence[Tensor | None], caches: Sequence[Tensor], scales: Sequence[float] | None) -> None:
    check_stream("residual_accumulate", x)
    lengths = len(gates), len(caches), len(_scales(caches, scales))
    if len(set(lengths)) != 1 or not caches:
        raise ValueError(
            "residual_accumulate: got {} gates, {} caches and {} scales, expected the same number of each, and one at "
            "least: give None for a branch without a gate".format(*lengths)
        )
    for number, (gate, cache) in enumerate(zip(gates, caches, strict=True)):
        check_term("residual_accumulate", x, gate, cache, f"caches[{number}]")


@torch.library.custom_op(
    "smoothcache::residual_accumulate",
    mutates_args=(),
    schema="(Tensor x, Tensor?[] gates, Tensor[] caches, float[]? scales=None) -> Tensor",
)
def residual_accumulate(
    x: Tensor, gates: Sequence[Tensor | None], caches: Sequence[Tensor], scales: Sequence[float] | None = None
) -> Tensor:
    """``out = x + sum_i (gates[i] * scales[i]) * caches[i]``: reused branches that follow on each other.

    Triton on CUDA, the plain reference elsewhere; both give the same bits. The stream between two branches is kept in
    float32, where one ``residual_load`` after the other rounds it to ``x``'s dtype each time.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape; float32, float16 or bfloat16, any strides.
        gates: each broadcasts to ``x`` (``[batch, 1, width]``, ``[batch, tokens, width]``, ``[batch, tokens, 1]``,
            ``[width]``) or is None.
        caches: the branches' outputs of an earlier step in their order, each of ``x``'s shape; one or more. Over
            ``TERMS_PER_LAUNCH`` take several passes.
        scales: gates that are the same everywhere, rounded to float32; all 1 by default.

    Returns:
        A new tensor like ``x``. Operands are converted to float32; each gate times its scale, the product with the
        cache and the running sum, first to last, are rounded to float32, and the last sum once more to ``x``'s dtype.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, devices or numbers of terms that do not fit together; on CUDA, strides that take more than
            four loops.
    """
    _check(x, gates, caches, scales)
    if not runs_triton(x):
        return residual_accumulate_reference(x, gates, caches, scales)
    scales = _scales(caches, scales)
    stream = x
    for first in range(0, len(caches), TERMS_PER_LAUNCH):
        part = slice(first, first + TERMS_PER_LAUNCH)
        last = first + TERMS_PER_LAUNCH >= len(caches)
        out = torch.empty_like(x, dtype=x.dtype if last else torch.float32)
        _launch(stream, gates[part], caches[part], scales[part], out)
        stream = out
    return stream


@residual_accumulate.register_fake
def _(
    x: Tensor, gates: Sequence[Tensor | None], caches: Sequence[Tensor], scales: Sequence[float] | None = None
) -> Tensor:
    _check(x, gates, caches, scales)
    return torch.empty_like(x)


def _launch(
    x: Tensor, gates: Sequence[Tensor | None], caches: Sequence[Tensor], scales: Sequence[float], out: Tensor
) -> None:
    spread = [cache if gate is None else gate.expand(x.shape) for gate, cache in zip(gates, caches, strict=True)]
    at = layout_of((x, *spread, *caches, out), BLOCK)
    if at.programs:
        with torch.cuda.device_of(x):
            residual_accumulate_kernel[(at.programs,)](
                x, tuple(gates), tuple(caches), out, tuple(scales), at.samples, at.blocks, at.width, at.total,
                at.strides, TERMS=len(caches), KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip


if triton is not None:

    @triton.jit(do_not_specialize=COUNTS)
    def residual_accumulate_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        gates,  # strides[1:TERMS + 1], each may be None
        caches,  # strides[TERMS + 1:2 * TERMS + 1]
        out,  # strides[2 * TERMS + 1]
        scales,
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
            at = offsets(group, sample, index, width, strides[TERMS + 1 + term], KINDS[TERMS + 1 + term])
            kept = tl.load(caches[term] + at, inside).to(tl.float32)
            # Launched from compiled code a scalar may come as float64.
            factor = tl.full((), scales[term], tl.float32)
            if gates[term] is not None:
                at = offsets(group, sample, index, width, strides[1 + term], KINDS[1 + term])
                factor = tl.load(gates[term] + at, inside).to(tl.float32) * factor
            stream += kept * factor
        at = offsets(group, sample, index, width, strides[2 * TERMS + 1], KINDS[2 * TERMS + 1])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)
