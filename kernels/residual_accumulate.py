"""A run of reused branches joins the residual stream at once: each cache is read once, the stream written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import BLOCK, COUNTS, OPTIONS, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import check_stream, check_term, check_weights, forecast_reference, product, rounded_like

#: Terms that one launch adds; more take several, with a float32 sum between them. Sixteen would spill registers where
#: rows are of odd width, and so cannot be read 128 bits at a time.
TERMS_PER_LAUNCH = 12


Weights = Sequence[Tensor | None] | None


def residual_accumulate_reference(
    x: Tensor, gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights = None
) -> Tensor:
    """``residual_accumulate`` in plain PyTorch."""
    stream = x.float()
    for gate, own, weight in terms_of(gates, values, weights):
        branch = own[0] if weight is None else forecast_reference(own, weight)
        stream = stream + product(gate, branch, 1.0)
    return rounded_like(x, stream)


def terms_of(
    gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights = None
) -> list[tuple[Tensor | None, Sequence[Tensor], Tensor | None]]:
    """Gate, values and weights of each term: as many values as it has weights, or the one."""
    terms, first = [], 0
    for gate, weight in zip(gates, [None] * len(gates) if weights is None else weights, strict=True):
        count = 1 if weight is None else weight.numel()
        terms.append((gate, values[first : first + count], weight))
        first += count
    return terms


def _check(x: Tensor, gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights) -> None:
    op = "residual_accumulate"
    check_stream(op, x)
    if weights is not None and len(weights) != len(gates):
        raise ValueError(
            f"{op}: got {len(gates)} gates and {len(weights)} weights, expected the same number of each: give None for "
            "a term without"
        )
    for number, weight in enumerate(weights or ()):
        if weight is not None:
            check_weights(op, x, weight, f"weights[{number}]")
    expected = len(gates) if weights is None else sum(1 if one is None else one.numel() for one in weights)
    if not gates or len(values) != expected:
        raise ValueError(
            f"{op}: got {len(gates)} gates and {len(values)} values, expected at least one gate and {expected} values: "
            "one a gate, or as many as its weights; give None for a branch without a gate"
        )
    for gate, own, _ in terms_of(gates, values, weights):
        for value in own:
            number = next(i for i, one in enumerate(values) if one is value)
            check_term(op, x, gate, value, f"values[{number}]")


@torch.library.custom_op(
    "smoothcache::residual_accumulate",
    mutates_args=(),
    schema="(Tensor x, Tensor?[] gates, Tensor[] values, Tensor?[]? weights=None) -> Tensor",
)
def residual_accumulate(
    x: Tensor, gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights = None
) -> Tensor:
    """``out = x + sum_i gates[i] * sum_k weights[i][k] * value_ik``: reused branches that follow on each other.

    Triton on CUDA, the plain reference elsewhere; both give the same bits. The stream between two branches is kept in
    float32, where one ``residual_load`` after the other rounds it to ``x``'s dtype each time.

    Args:
        x: the residual stream, ``[batch, tokens, width]`` or any shape; float32, float16 or bfloat16, any strides.
        gates: one a term; each broadcasts to ``x`` (``[batch, 1, width]``, ``[batch, tokens, width]``,
            ``[batch, tokens, 1]``, ``[width]``) or is None.
        values: the branches' outputs of earlier steps, term by term, each of ``x``'s shape: one a term, or as many as
            the term has weights.
        weights: float32 ``[1 to 3]`` on ``x``'s device for a term that is a forecast, None for one that is a value as
            it is; None where no term is a forecast. They are read where the op runs.

    Returns:
        A new tensor like ``x``. Operands are converted to float32. A forecast's products and sums are rounded to
        float32, first to last, and once more to the dtype of its first value. The product with the gate and the
        running sum, first to last, are rounded to float32, and the last sum once more to ``x``'s dtype.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, devices or numbers of terms that do not fit together; on CUDA, strides that take more than
            four loops.
    """
    _check(x, gates, values, weights)
    if not runs_triton(x) or weights is not None:
        return residual_accumulate_reference(x, gates, values, weights)
    stream = x
    for first in range(0, len(values), TERMS_PER_LAUNCH):
        part = slice(first, first + TERMS_PER_LAUNCH)
        last = first + TERMS_PER_LAUNCH >= len(values)
        out = torch.empty_like(x, dtype=x.dtype if last else torch.float32)
        _launch(stream, gates[part], values[part], [1.0] * len(values[part]), out)
        stream = out
    return stream


@residual_accumulate.register_fake
def _(x: Tensor, gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights = None) -> Tensor:
    _check(x, gates, values, weights)
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
