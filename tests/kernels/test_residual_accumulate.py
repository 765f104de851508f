"""``residual_accumulate``: the numbers, for any number of terms, what it refuses, and that compilers leave it whole."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from helpers.operands import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    expected,
    filled_with_nan,
    gate_shapes,
    randn,
    rounded,
    shapes,
    tensors,
)
from smoothcache_fx.kernels import _runs
from smoothcache_fx.kernels.residual_accumulate import UNROLLED, Run, launches_of, residual_accumulate
from smoothcache_fx.kernels.residual_load import residual_load


def reduced(values: list[Tensor], coefficients: Tensor | None) -> Tensor:
    """A forecast's value, worked out with NumPy: every product and sum in float32, then the first value's dtype."""
    if coefficients is None:
        return values[0]
    numbers = [np.float32(number) for number in coefficients.tolist()]
    total = sum_of([number * value.cpu().float().numpy() for number, value in zip(numbers, values, strict=True)])
    return rounded(torch.from_numpy(np.asarray(total)), values[0].dtype).to(values[0].device)


def sum_of(terms: list[np.ndarray]) -> np.ndarray:
    return functools.reduce(operator.add, terms)


def flat(values: list[list[Tensor]]) -> list[Tensor]:
    return [value for own in values for value in own]


@settings(max_examples=100)
@given(data=st.data(), shape=shapes(most=5_000), count=st.integers(1, 5), forecasts=st.booleans())
def test_any_shape_dtype_and_strides(data, shape, count, forecasts):
    x = data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES))))
    gates, values, coefficients = [], [], []
    for _ in range(count):
        gate_shape = data.draw(gate_shapes(shape))
        gates.append(None if gate_shape is None else data.draw(tensors(gate_shape, data.draw(st.sampled_from(DTYPES)))))
        length = data.draw(st.integers(0, 3)) if forecasts else 0
        coefficients.append(data.draw(tensors((length,), torch.float32)) if length else None)
        values.append([data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES)))) for _ in range(max(1, length))])
    before = x.clone(), [value.clone() for value in flat(values)]
    out = residual_accumulate(
        x, gates, flat(values), coefficients if any(w is not None for w in coefficients) else None
    )
    terms = [
        (gate, reduced(own, coefficient)) for gate, own, coefficient in zip(gates, values, coefficients, strict=True)
    ]
    assert_same_bits(out, expected(x, terms))
    assert out.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, before[0])
    assert all(map(torch.equal, flat(values), before[1]))


GATES = {
    "alike": lambda i, dtype: randn(2, 1, 123, dtype=dtype),
    "some without": lambda i, dtype: None if i % 3 == 0 else randn(2, 1, 123, dtype=dtype),
    "none": lambda i, dtype: None,
    "of all sorts": lambda i, dtype: (randn(2, 1, 123), None, randn(123, dtype=dtype), randn(2, 5, 1))[i % 4],
    "some as large as the stream": lambda i, dtype: randn(2, 5 if i % 7 == 3 else 1, 123, dtype=dtype),
}


@pytest.mark.parametrize("count", [1, UNROLLED, UNROLLED + 1, 2 * UNROLLED + 3])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_terms_is_rounded_once(dtype, gates, count):
    x = randn(2, 5, 123, dtype=dtype)
    given = [GATES[gates](i, dtype) for i in range(count)]
    caches = [randn(2, 5, 123, dtype=dtype) for _ in range(count)]
    out = residual_accumulate(x, given, caches)
    assert_same_bits(out, expected(x, list(zip(given, caches, strict=True))))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("dtype", "history"), [(d, d) for d in DTYPES] + [(torch.float32, torch.float16)], ids=str)
def test_forecasts_take_their_own_part_of_one_tensor_of_coefficients(dtype, history, order):
    x, count = randn(2, 5, 123, dtype=dtype), UNROLLED + 2
    coefficients = randn((order + 1) * count + 1)[1:].split(order + 1)
    gates = [randn(2, 1, 123, dtype=dtype) for _ in range(count)]
    values = [[randn(2, 5, 123, dtype=history if age else dtype) for age in range(order + 1)] for _ in range(count)]
    out = residual_accumulate(x, gates, flat(values), list(coefficients))
    terms = [
        (gate, reduced(own, coefficient)) for gate, own, coefficient in zip(gates, values, coefficients, strict=True)
    ]
    assert_same_bits(out, expected(x, terms))


def test_forecasts_beside_values_as_they_are():
    x, count = randn(2, 5, 123), 2 * UNROLLED
    coefficients = [randn(1 + i % 3) if i % 4 else None for i in range(count)]
    values = [[randn(2, 5, 123) for _ in range(1 if w is None else len(w))] for w in coefficients]
    gates = [randn(2, 1, 123) if i % 5 else None for i in range(count)]
    terms = [
        (gate, reduced(own, coefficient)) for gate, own, coefficient in zip(gates, values, coefficients, strict=True)
    ]
    assert_same_bits(residual_accumulate(x, gates, flat(values), coefficients), expected(x, terms))


def test_values_lie_in_memory_in_several_ways():
    """A transposed stream and transposed values beside plain ones: the run is cut where values change."""
    x, count = randn(2, 123, 5).transpose(1, 2), UNROLLED + 3
    values = [randn(2, 123, 5).transpose(1, 2) if i > 8 else randn(2, 5, 123) for i in range(count)]
    gates = [randn(2, 1, 123) for _ in range(count)]
    assert sizes(x, Run(gates, values)) == [9, 6]
    out = residual_accumulate(x, gates, values)
    assert_same_bits(out, expected(x, list(zip(gates, values, strict=True))))
    assert out.stride() == x.stride()


def test_a_run_takes_as_few_launches_as_can_be():
    x, caches = randn(2, 40, 8), [randn(2, 40, 8) for _ in range(56)]
    alike_gates = [randn(2, 1, 8) for _ in caches]
    assert sizes(x, Run(alike_gates, caches)) == [56]
    mixed = [(randn(2, 1, 8), randn(8), None, randn(2, 1, 8).half())[i % 4] for i in range(56)]
    assert sizes(x, Run(mixed, caches)) == [56], "small gates are copied to lie alike"
    large = [randn(2, 40, 8) if i == 30 else gate for i, gate in enumerate(alike_gates)]
    assert sizes(x, Run(large, caches)) == [30, 1, 25], "large ones are not"
    coefficients = [randn(2) for _ in caches]
    twice = [cache for cache in caches for _ in range(2)]
    assert sizes(x, Run(alike_gates, twice, coefficients)) == [56]
    coefficients[30] = randn(4)[::2]
    assert sizes(x, Run(alike_gates, twice, coefficients)) == [30, 1, 25], (
        "a launch has one stride for all coefficients"
    )


def sizes(x: Tensor, run: Run) -> list[int]:
    """Terms of each launch."""
    return [len(part.gates) for part in launches_of(x, run)]


def test_what_holds_for_one_tensor_is_asked_once(monkeypatch):
    """The host's time before a launch: whatever the number of terms, as many checks as there are kinds of tensors."""
    checked = []
    for name in ("check_value", "check_broadcast"):
        original = getattr(_runs, name)
        monkeypatch.setattr(
            _runs,
            name,
            lambda op, x, one, *rest, original=original: (checked.append(one), original(op, x, one, *rest)),
        )
    gates, values = [randn(2, 1, 8) for _ in range(56)], [randn(2, 5, 8) for _ in range(56)]
    residual_accumulate(randn(2, 5, 8), gates, values)
    assert len(checked) == 2
    with pytest.raises(ValueError, match=r"values\[55\] has shape \[2, 5, 1\], expected x's \[2, 5, 8\]"):
        residual_accumulate(randn(2, 5, 8), gates, [*values[:-1], randn(2, 5, 1)])


def test_coefficients_with_gaps():
    x, count = randn(2, 5, 8), UNROLLED + 1
    coefficients = [randn(4)[::2] if i % 3 else randn(2) for i in range(count)]
    values = [[randn(2, 5, 8) for _ in range(2)] for _ in range(count)]
    terms = [(None, reduced(own, coefficient)) for own, coefficient in zip(values, coefficients, strict=True)]
    assert_same_bits(residual_accumulate(x, [None] * count, flat(values), coefficients), expected(x, terms))


def test_in_float32_it_gives_the_bits_of_one_load_after_the_other():
    x, gates, caches = randn(2, 41, 130), [randn(2, 1, 130) for _ in range(3)], [randn(2, 41, 130) for _ in range(3)]
    stream = x
    for gate, cache in zip(gates, caches, strict=True):
        stream = residual_load(stream, gate, cache)
    assert_same_bits(residual_accumulate(x, gates, caches), stream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_is_written_whole(dtype):
    with filled_with_nan():
        caches = [randn(3, 41, 123, dtype=dtype) for _ in range(UNROLLED + 1)]
        out = residual_accumulate(randn(3, 41, 123, dtype=dtype), [randn(3, 1, 123)] * len(caches), caches)
    assert not out.isnan().any()


@pytest.mark.parametrize("count", [1, UNROLLED + 1])
@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), ()])
def test_no_elements_or_no_dimensions(shape, count):
    x, cache = randn(*shape), randn(*shape)
    assert_same_bits(residual_accumulate(x, [None] * count, [cache] * count), expected(x, [(None, cache)] * count))


@pytest.mark.parametrize(
    ("gates", "values", "coefficients", "message"),
    [
        ([], [], None, "got 0 gates and 0 values, expected at least one gate and 0 values"),
        ([None], ["x", "x"], None, "got 1 gates and 2 values, expected at least one gate and 1 values"),
        ([None, None], ["x", "x"], [2, None], "got 2 gates and 2 values, expected at least one gate and 3 values"),
        ([None, None], ["x", "x"], [2], "got 2 gates and 1 coefficients, expected the same number of each"),
        ([None], ["x"] * 4, [4], r"coefficients\[0\] has shape \[4\], expected \[1\] to \[3\]"),
        ([None, None], ["x", (5, 8)], None, r"values\[1\] has shape \[5, 8\], expected x's \[2, 5, 8\]"),
        ([None, (3, 1, 8)], ["x", "x"], None, r"gate has shape \[3, 1, 8\], which does not broadcast"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(gates, values, coefficients, message, device):
    """Alike when it runs and when it is traced."""

    def made(what: Any) -> Tensor | None:
        return torch.zeros(2, 5, 8, device=device) if what == "x" else what and torch.zeros(what, device=device)

    with pytest.raises(ValueError, match=f"residual_accumulate: {message}"):
        residual_accumulate(
            made("x"), list(map(made, gates)), list(map(made, values)), coefficients and list(map(made, coefficients))
        )


def test_another_dtype_is_refused():
    x = torch.zeros(2, 5, 8, device=DEVICE)
    with pytest.raises(TypeError, match=r"residual_accumulate: values\[0\] is torch.float64, expected one of"):
        residual_accumulate(x, [None], [x.double()])
    with pytest.raises(TypeError, match=r"residual_accumulate: x is torch.int64, expected one of"):
        residual_accumulate(x.long(), [None], [x])
    with pytest.raises(
        TypeError, match=r"residual_accumulate: coefficients\[0\] is torch.float16, expected torch.float32"
    ):
        residual_accumulate(x, [None], [x], [torch.ones(1, device=DEVICE).half()])


@pytest.mark.parametrize("forecasts", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, forecasts):
    coefficients = [None, randn(2), randn(3)] if forecasts else None
    values = [randn(2, 5, 8, dtype=dtype) for _ in range(6 if forecasts else 3)]
    gates = [None, randn(2, 1, 8), randn(8, dtype=dtype)]
    torch.library.opcheck(residual_accumulate, (randn(2, 5, 8, dtype=dtype), gates, values, coefficients))


def step(x, gate, first, second):
    return torch.relu(residual_accumulate(torch.tanh(x), [gate, None], [first, second]))


def operands() -> list[torch.Tensor]:
    """x, gate, two caches"""
    return [randn(2, 5, 8, dtype=torch.bfloat16), randn(2, 1, 8), randn(2, 5, 8), randn(2, 5, 8)]


def test_it_stays_whole_in_the_graph():
    backend = AotEagerAndRecordGraphs()
    given = operands()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(*given), step(*given))
    (graph,) = backend.fw_graphs
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.smoothcache.residual_accumulate.default) == 1, graph.print_readable(False)


def test_inductor_calls_it():
    given = operands()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*given), step(*given))
