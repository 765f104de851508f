"""What the ops over runs of reused branches share: their checks, which terms one loop takes, and the loop.

A run's terms come as flat lists, as ``torch.library`` hands them on. There may be well over a hundred tensors, and all
of this is done on the host before each launch: so what holds for one tensor is asked once for all that are like it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .operands import check_broadcast, check_coefficients, check_stream, check_value, forecast_reference, product

#: A gate of at least this share of the stream is read where it lies, and not copied to lie as its neighbours do.
SMALL_GATE = 1 / 8
Gates = Sequence[Tensor | None]
Coefficients = Sequence[Tensor | None] | None


class Kinds(NamedTuple):
    """Tensors told apart by dtype, shape, strides and device.

    Attributes:
        numbers: which kind each tensor is of; None for None.
        firsts: where the first of each kind is.
    """

    numbers: list[int | None]
    firsts: list[int]


@dataclass
class Run:
    """Terms that follow on each other, ``gate * value`` or ``gate * forecast``.

    Attributes:
        gates: one a term, or None for it.
        values: term by term: one, or as many as the term has coefficients.
        coefficients: one a term where it is a forecast, else None for it; None where no term is.
    """

    gates: Gates
    values: Sequence[Tensor]
    coefficients: Coefficients = None

    @functools.cached_property
    def gate_kinds(self) -> Kinds:
        return _kinds(self.gates)

    @functools.cached_property
    def value_kinds(self) -> Kinds:
        return _kinds(self.values)

    @functools.cached_property
    def coefficient_kinds(self) -> Kinds:
        return _kinds(self.coefficients or [None] * len(self.gates))


@dataclass
class Part(Run):
    """Terms that one loop takes: they have equally many values, of one dtype each, which lie alike; and so the rest."""

    @property
    def count(self) -> int:
        """Values of a term."""
        return len(self.values) // len(self.gates)

    @property
    def gate(self) -> Tensor | None:
        """The first gate there is."""
        return next((gate for gate in self.gates if gate is not None), None)

    @property
    def all_gated(self) -> bool:
        return all(gate is not None for gate in self.gates)

    @property
    def coefficient_stride(self) -> int:
        return 1 if self.coefficients is None else self.coefficients[0].stride(0)

    @property
    def is_aligned(self) -> bool:
        """Whether values and gates may be read 128 bits at a time."""
        addresses = [one.data_ptr() for one in (*self.values, *self.gates) if one is not None]
        return functools.reduce(operator.or_, addresses) % 16 == 0

    def addresses(self) -> list[Tensor | None]:
        """A row per term: its values, its gate, its coefficients."""
        columns = [*(self.values[number :: self.count] for number in range(self.count)), self.gates]
        columns += [] if self.coefficients is None else [self.coefficients]
        return [one for row in zip(*columns, strict=True) for one in row]


def accumulate_reference(x: Tensor, run: Run) -> Tensor:
    """The stream behind a run, in float32."""
    stream, first = x.float(), 0
    for gate, coefficient in zip(run.gates, run.coefficients or [None] * len(run.gates), strict=True):
        own = run.values[first : first + (1 if coefficient is None else coefficient.numel())]
        first += len(own)
        stream = stream + product(gate, own[0] if coefficient is None else forecast_reference(own, coefficient))
    return stream


def check_run(op: str, x: Tensor, run: Run, traced: bool = False) -> None:
    """What the ops say of ``x`` and a run.

    Args:
        traced: whether sizes may be symbolic. No two tensors are compared then, lest that be taken for a condition.
    """
    check_stream(op, x)
    gates, values, coefficients = run.gates, run.values, run.coefficients
    if coefficients is not None and len(coefficients) != len(gates):
        raise ValueError(
            f"{op}: got {len(gates)} gates and {len(coefficients)} coefficients, expected the same number of "
            "each: give None for a term without"
        )
    for number in range(len(coefficients or ())) if traced else run.coefficient_kinds.firsts:
        if coefficients[number] is not None:
            check_coefficients(op, x, coefficients[number], f"coefficients[{number}]")
    expected = len(gates) if coefficients is None else sum(1 if one is None else one.numel() for one in coefficients)
    if not gates or len(values) != expected:
        raise ValueError(
            f"{op}: got {len(gates)} gates and {len(values)} values, expected at least one gate and {expected} values: "
            "one a gate, or as many as its coefficients; give None for a branch without a gate"
        )
    for number in range(len(values)) if traced else run.value_kinds.firsts:
        check_value(op, x, values[number], f"values[{number}]")
    for number in range(len(gates)) if traced else run.gate_kinds.firsts:
        check_broadcast(op, x, gates[number], "gate")


def alike(x: Tensor, run: Run) -> Run:
    """The run with its gates in one dtype and lying alike, as far as that takes copies of small tensors alone."""
    numbers, firsts = run.gate_kinds
    kinds = [run.gates[first] for first in firsts]
    if len({_spread(x, gate) for gate in kinds}) <= 1 or any(gate.numel() > SMALL_GATE * x.numel() for gate in kinds):
        return run
    dtype = functools.reduce(torch.promote_types, (gate.dtype for gate in kinds))
    shape = torch.broadcast_shapes(*(gate.shape for gate in kinds))
    stacked = iter(torch.stack([gate.to(dtype).expand(shape) for gate in run.gates if gate is not None]))
    return Run([None if number is None else next(stacked) for number in numbers], run.values, run.coefficients)


def parts_of(x: Tensor, run: Run) -> list[Part]:
    """The run in as few parts as loops take."""
    values, (gate_numbers, firsts) = run.value_kinds.numbers, run.gate_kinds
    spread = [_spread(x, run.gates[first]) for first in firsts]
    parts: list[Part] = []
    last = last_gate = None
    start = 0
    for term, (number, coefficient) in enumerate(zip(gate_numbers, run.coefficient_kinds.numbers, strict=True)):
        end = start + (1 if coefficient is None else run.coefficients[term].numel())
        kind, gate = (coefficient, values[start:end]), None if number is None else spread[number]
        if kind != last or (gate != last_gate and None not in (gate, last_gate)):
            parts.append(Part([], [], None if coefficient is None else []))
            last, last_gate = kind, None
        last_gate = last_gate or gate
        parts[-1].gates.append(run.gates[term])
        parts[-1].values.extend(run.values[start:end])
        if coefficient is not None:
            parts[-1].coefficients.append(run.coefficients[term])
        start = end
    return parts


def _kinds(tensors: Sequence[Tensor | None]) -> Kinds:
    kinds: list[object] = []
    numbers: list[int | None] = []
    firsts: list[int] = []
    for position, tensor in enumerate(tensors):
        if tensor is None:
            numbers.append(None)
            continue
        kind = tensor.dtype, tensor.shape, tensor.stride(), tensor.device
        # There are few, and to compare takes less time than to hash.
        try:
            numbers.append(kinds.index(kind))
        except ValueError:
            numbers.append(len(kinds))
            kinds.append(kind)
            firsts.append(position)
    return Kinds(numbers, firsts)


def _spread(x: Tensor, gate: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """What gates must have in common to be read alike."""
    return gate.dtype, gate.expand(x.shape).stride()


if triton is not None:

    @triton.jit
    def _tensor_at(entry, like, ALIGNED: tl.constexpr):
        """The tensor whose address a table's entry holds, of ``like``'s dtype."""
        tensor = tl.load(entry).to(like.dtype)
        return tl.multiple_of(tensor, 16) if ALIGNED else tensor

    @triton.jit
    def add_terms(
        stream,  # float32
        table,  # int64 [terms, VALUES + 1 or 2]: addresses of the values, the gate or 0, the coefficients
        terms,
        gate,  # any one of the gates, for its dtype, or None
        gate_at,  # offsets from any gate
        values,  # those of any one term, for their dtypes
        values_at,  # offsets, a tuple
        coefficient_stride,
        index,  # what lies below total is read
        total,
        VALUES: tl.constexpr,
        FORECAST: tl.constexpr,
        ALL_GATED: tl.constexpr,
        ALIGNED: tl.constexpr,
        AT_ONCE: tl.constexpr,
    ):
        """``stream + sum_i gates[i] * sum_k coefficients[i][k] * value_ik``."""
        COLUMNS: tl.constexpr = VALUES + 1 + FORECAST
        inside = index < total
        for term in tl.range(0, terms, num_stages=1, loop_unroll_factor=AT_ONCE):
            row = table + term * COLUMNS
            branch = tl.load(_tensor_at(row, values[0], ALIGNED) + values_at[0], inside, 0.0).to(tl.float32)
            if FORECAST:
                coefficients = tl.load(row + VALUES + 1).to(tl.pointer_type(tl.float32))
                branch *= tl.load(coefficients)
                for number in tl.static_range(1, VALUES):
                    value = tl.load(_tensor_at(row + number, values[number], ALIGNED) + values_at[number], inside, 0.0)
                    branch += value.to(tl.float32) * tl.load(coefficients + number * coefficient_stride)
                branch = branch.to(values[0].dtype.element_ty).to(tl.float32)
            if gate is not None:
                tensor = _tensor_at(row + VALUES, gate, ALIGNED)
                if ALL_GATED:
                    factor = tl.load(tensor + gate_at, inside, 0.0).to(tl.float32)
                else:
                    gated = index < total * (tl.load(row + VALUES) != 0).to(index.dtype)
                    factor = tl.load(tensor + gate_at, gated, 1.0).to(tl.float32)
                branch *= factor
            stream += branch
        return stream

else:
    add_terms = None
