"""``residual_accumulate_norm``: the stream's bits, the norm's numbers, what it refuses, and that compilers keep it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from helpers.operands import (
    DEVICE,
    DTYPES,
    assert_normed,
    assert_same_bits,
    filled_with_nan,
    gate_shapes,
    randn,
    tensors,
)
from smoothcache_fx.kernels._norms import WIDEST
from smoothcache_fx.kernels.residual_accumulate import residual_accumulate
from smoothcache_fx.kernels.residual_accumulate_norm import residual_accumulate_norm

EPS = 1e-5


@settings(max_examples=30)
@given(
    data=st.data(),
    outer=st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]),
    width=st.sampled_from([5, 16, 123, 130, 1030]),
    rms=st.booleans(),
    keep=st.booleans(),
    alike=st.booleans(),
)
def test_any_shape_dtype_and_strides(data, outer, width, rms, keep, alike):
    """Terms that one loop takes, and terms of which each differs from the last in some way."""
    shape = (*outer, width)
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in range(3)]
    x, count = data.draw(tensors(shape, dtypes[0])), data.draw(st.integers(1, 4))
    order = data.draw(st.integers(0, 2))
    gates, values, coefficients = [], [], []
    for number in range(count):
        if not (alike and gates):
            gate = data.draw(gate_shapes(shape))
            gate = None if gate is None else data.draw(tensors(gate, data.draw(st.sampled_from(DTYPES))))
            own = [data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES)))) for _ in range(order + 1)]
        gates.append(gate if number % 3 else None)
        values += own
        coefficients.append(data.draw(tensors((order + 1,), torch.float32)) if order else None)
    spread = [data.draw(gate_shapes(shape)) for _ in range(4)]
    spread = [None if one is None else data.draw(tensors(one, dtypes[1])) for one in spread]
    run = x, gates, values, coefficients if order else None
    out, h = residual_accumulate_norm(*run, *spread, EPS, rms, keep)
    expected = residual_accumulate(*run)
    assert h.stride() == torch.empty_like(x).stride()
    assert_normed(h, expected, spread, rms, EPS)
    if keep:
        assert_same_bits(out, expected)
        assert out.stride() == h.stride()
    else:
        assert out.shape == (0,) and out.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("width", [1152, 3072])
def test_long_runs_at_widths_of_known_models(width, order, dtype):
    x, gates = randn(1, 2, width, dtype=dtype), [randn(1, 1, width, dtype=dtype) for _ in range(20)]
    values = [randn(1, 2, width, dtype=dtype) for _ in range(20 * (order + 1))]
    coefficients = list(randn(20 * (order + 1)).split(order + 1)) if order else None
    modulation, shift = randn(1, 1, width, dtype=dtype), randn(1, 1, width, dtype=dtype)
    out, h = residual_accumulate_norm(x, gates, values, coefficients, None, None, modulation, shift, EPS)
    assert_same_bits(out, residual_accumulate(x, gates, values, coefficients))
    assert_normed(h, out, [None, None, modulation, shift], False, EPS)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_written_whole(dtype, keep):
    x, values = randn(3, 2, 123, dtype=dtype), [randn(3, 2, 123, dtype=dtype) for _ in range(3)]
    with filled_with_nan():
        outputs = residual_accumulate_norm(x, [None] * 3, values, None, None, None, None, None, EPS, keep=keep)
    assert not any(one.isnan().any() for one in outputs)


def test_no_rows():
    x = randn(2, 0, 8)
    out, h = residual_accumulate_norm(x, [None], [x], None, None, None, None, None, EPS)
    assert out.shape == h.shape == x.shape


def operands(dtype: torch.dtype = torch.float32) -> list[object]:
    """x, gates, values, coefficients, weight, bias, modulation, shift"""
    values = [randn(2, 5, 8, dtype=dtype) for _ in range(3)]
    run = [randn(2, 5, 8, dtype=dtype), [randn(2, 1, 8), None], values, [randn(2), None]]
    return [*run, randn(8), randn(8), randn(2, 1, 8), randn(2, 1, 8)]


@pytest.mark.parametrize(
    ("position", "operand", "message"),
    [
        (0, (), r"x has shape \[\], expected rows of 1 to"),
        (0, (1, WIDEST + 1), r"x has shape \[1, 8193\], expected rows of 1 to 8192"),
        (1, [None, None, None], "got 3 gates and 2 coefficients"),
        (2, [(2, 5, 8), (2, 5, 9), (2, 5, 8)], r"values\[1\] has shape \[2, 5, 9\], expected x's"),
        (3, None, "got 2 gates and 3 values"),
        (4, (9,), r"weight has shape \[9\], which does not broadcast"),
        (7, (1, 2, 5, 8), r"shift has shape \[1, 2, 5, 8\], which does not broadcast"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(position, operand, message, device):
    """Alike when it runs and when it is traced."""

    def moved(given: object) -> object:
        if isinstance(given, list):
            return [moved(one) for one in given]
        if isinstance(given, tuple):
            return torch.zeros(given, device=device)
        return None if given is None else given.to(device)

    given = operands()
    given[position] = operand
    if position == 0:
        given[1:4] = [None], [operand], None
    with pytest.raises(ValueError, match=f"residual_accumulate_norm: {message}"):
        residual_accumulate_norm(*map(moved, given), EPS)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, rms, keep):
    torch.library.opcheck(residual_accumulate_norm, (*operands(dtype), EPS, rms, keep))


def step(x, gate, first, second, modulation, shift):
    run = torch.tanh(x), [gate, None], [first, second], None
    out, h = residual_accumulate_norm(*run, None, None, modulation, shift, EPS)
    return out + torch.relu(h)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_stays_whole_in_the_graph(backend):
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(step, backend=recorded if backend == "aot_eager" else backend, fullgraph=True)
    given: list[Tensor] = [randn(2, 5, 8), randn(2, 1, 8), randn(2, 5, 8), randn(2, 5, 8), randn(8), randn(2, 1, 8)]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), step(*given))
    for graph in recorded.fw_graphs:
        targets = [node.target for node in graph.graph.nodes]
        op = torch.ops.smoothcache.residual_accumulate_norm.default
        assert targets.count(op) == 1, graph.print_readable(False)
