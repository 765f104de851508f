"""A run of reused branches joins the residual stream at once: each cache is read once, the stream written once.

Two kernels. Up to ``UNROLLED`` values come as arguments of the launch, and the kernel is as long as the run. A longer
run, and any with forecasts, is a loop over a table of addresses (``_addresses.py``), whatever its length: one launch of
one kernel. On an H100 56 terms of ``[64, 256, 1152]`` took 1029 us in five launches of twelve terms, and 738 to 746 us
in two prototypes of the loop, flat blocks and a table; at batch 2 it was 61 against 41 to 42 us. This kernel, which
puts the two together, is not measured yet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._addresses import address_table
from ._triton import BLOCK, COUNTS, OPTIONS, offsets, place, runs_triton, tl, triton
from .layout import layout_of
from .operands import check_stream, check_term, check_weights, forecast_reference, product, rounded_like

#: Values that one launch takes as arguments. Sixteen would spill registers where rows have an odd width: they cannot be
#: read 128 bits at a time.
UNROLLED = 12
#: Iterations of the loop whose loads are under way at once.
STAGES = 3
#: A gate of at least this share of the stream is read where it lies, and not copied to lie as its neighbours do.
SMALL_GATE = 1 / 8
Term = tuple[Tensor | None, Sequence[Tensor], Tensor | None]
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


def terms_of(gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights = None) -> list[Term]:
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
    if not runs_triton(x):
        return residual_accumulate_reference(x, gates, values, weights)
    return _launch(x, terms_of(alike(x, gates), values, weights))


@residual_accumulate.register_fake
def _(x: Tensor, gates: Sequence[Tensor | None], values: Sequence[Tensor], weights: Weights = None) -> Tensor:
    _check(x, gates, values, weights)
    return torch.empty_like(x)


def alike(x: Tensor, gates: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gates, in one dtype and lying alike, as far as that takes copies of small tensors alone."""
    given = [gate for gate in gates if gate is not None]
    if len({_gate_key(x, gate) for gate in given}) <= 1 or any(gate.numel() > SMALL_GATE * x.numel() for gate in given):
        return gates
    dtype = functools.reduce(torch.promote_types, (gate.dtype for gate in given))
    shape = torch.broadcast_shapes(*(gate.shape for gate in given))
    stacked = iter(torch.stack([gate.to(dtype).expand(shape) for gate in given]))
    return [None if gate is None else next(stacked) for gate in gates]


def _gate_key(x: Tensor, gate: Tensor) -> tuple[object, ...]:
    return gate.dtype, gate.expand(x.shape).stride()


def _launch(x: Tensor, terms: Sequence[Term]) -> Tensor:
    """One launch for each part of the run, with a float32 stream between parts."""
    parts = parts_of(x, terms)
    stream = x
    for number, part in enumerate(parts):
        out = torch.empty_like(x, dtype=x.dtype if number == len(parts) - 1 else torch.float32)
        (_launch_unrolled if _unrolls(part) else _launch_loop)(stream, part, out)
        stream = out
    return stream


def parts_of(x: Tensor, terms: Sequence[Term]) -> list[list[Term]]:
    """The run in as few parts as launches take: any few terms without forecasts, or any number of terms alike."""
    if _unrolls(terms):
        return [list(terms)]
    parts: list[list[Term]] = []
    for term in terms:
        if parts and all(_alike(x, term, other) for other in (parts[-1][0], _gated(parts[-1]))):
            parts[-1].append(term)
        else:
            parts.append([term])
    joined: list[list[Term]] = []
    for part in parts:
        if joined and _unrolls([*joined[-1], *part]):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _unrolls(terms: Sequence[Term]) -> bool:
    return len(terms) <= UNROLLED and all(weight is None for _, _, weight in terms)


def _gated(terms: Sequence[Term]) -> Term:
    """The first term with a gate, or the first."""
    return next((term for term in terms if term[0] is not None), terms[0])


def _alike(x: Tensor, left: Term, right: Term) -> bool:
    """Whether the loop takes both: values of the same dtypes that lie alike, gates too where both have one."""
    (gate, values, weight), (other_gate, others, other_weight) = left, right
    kinds = [[(value.dtype, value.stride()) for value in some] for some in (values, others)]
    if kinds[0] != kinds[1] or (weight is None) != (other_weight is None):
        return False
    return gate is None or other_gate is None or _gate_key(x, gate) == _gate_key(x, other_gate)


def _launch_unrolled(x: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    gates, caches = tuple(gate for gate, _, _ in terms), tuple(values[0] for _, values, _ in terms)
    spread = [x if gate is None else gate.expand(x.shape) for gate in gates]
    at = layout_of((x, out, *spread, *caches), BLOCK)
    if at.programs:
        with torch.cuda.device_of(x):
            residual_accumulate_kernel[(at.programs,)](
                x, gates, caches, out, at.samples, at.blocks, at.width, at.total, at.strides,
                TERMS=len(terms), KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip


def _launch_loop(x: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    gate, values, weight = _gated(terms)
    # A row per term: addresses of its values, of its gate, of its weights.
    addresses = [one for term in terms for one in (*term[1], term[0], *([] if weight is None else [term[2]]))]
    read = [one for own_gate, own, _ in terms for one in (*own, own_gate) if one is not None]
    at = layout_of((x, out, x if gate is None else gate.expand(x.shape), *values), BLOCK)
    if at.programs:
        table = address_table(addresses, x.device)
        with torch.cuda.device_of(x):
            residual_accumulate_loop_kernel[(at.programs,)](
                x, table, gate, tuple(values), out, len(terms), 1 if weight is None else weight.stride(0),
                at.samples, at.blocks, at.width, at.total, at.strides,
                VALUES=len(values), FORECAST=weight is not None, ALL_GATED=all(term[0] is not None for term in terms),
                ALIGNED=all(one.data_ptr() % 16 == 0 for one in read),
                KINDS=at.kinds, WIDE=at.wide, BLOCK=BLOCK, STAGES=STAGES, **OPTIONS,
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
            if gates[term] is not None:
                at = offsets(group, sample, index, width, strides[2 + term], KINDS[2 + term])
                kept *= tl.load(gates[term] + at, inside).to(tl.float32)
            stream += kept
        at = offsets(group, sample, index, width, strides[1], KINDS[1])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)

    @triton.jit
    def _tensor_at(entry, like, ALIGNED: tl.constexpr):
        """The tensor whose address a table's entry holds, of ``like``'s dtype."""
        tensor = tl.load(entry).to(like.dtype)
        return tl.multiple_of(tensor, 16) if ALIGNED else tensor

    @triton.jit(do_not_specialize=[*COUNTS, "terms"])
    def residual_accumulate_loop_kernel(
        x,  # [groups, samples, tokens, width] with strides[0]
        table,  # int64 [terms, VALUES + 1 or 2]: addresses of the values, the gate or 0, the weights
        gate,  # any one of the gates, for its dtype, or None; all have strides[2]
        values,  # those of any one term, for their dtypes; all have strides[3:VALUES + 3]
        out,  # strides[1]
        terms,
        weight_stride,
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
        STAGES: tl.constexpr,
    ):
        COLUMNS: tl.constexpr = VALUES + 1 + FORECAST
        group, sample, index = place(samples, blocks, WIDE, BLOCK)
        inside = index < total
        stream = tl.load(x + offsets(group, sample, index, width, strides[0], KINDS[0]), inside).to(tl.float32)
        for term in tl.range(0, terms, num_stages=STAGES):
            row = table + term * COLUMNS
            at = offsets(group, sample, index, width, strides[3], KINDS[3])
            branch = tl.load(_tensor_at(row, values[0], ALIGNED) + at, inside).to(tl.float32)
            if FORECAST:
                weights = tl.load(row + VALUES + 1).to(tl.pointer_type(tl.float32))
                branch *= tl.load(weights)
                for number in tl.static_range(1, VALUES):
                    at = offsets(group, sample, index, width, strides[3 + number], KINDS[3 + number])
                    value = tl.load(_tensor_at(row + number, values[number], ALIGNED) + at, inside).to(tl.float32)
                    branch += value * tl.load(weights + number * weight_stride)
                branch = branch.to(values[0].dtype.element_ty).to(tl.float32)
            if gate is not None:
                at = offsets(group, sample, index, width, strides[2], KINDS[2])
                tensor = _tensor_at(row + VALUES, gate, ALIGNED)
                if ALL_GATED:
                    factor = tl.load(tensor + at, inside).to(tl.float32)
                else:
                    gated = index < total * (tl.load(row + VALUES) != 0).to(index.dtype)
                    factor = tl.load(tensor + at, gated, 1.0).to(tl.float32)
                branch *= factor
            stream += branch
        at = offsets(group, sample, index, width, strides[1], KINDS[1])
        tl.store(out + at, stream.to(out.dtype.element_ty), inside)
