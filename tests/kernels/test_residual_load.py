"""``residual_load``: the numbers, what it refuses, and that compilers leave it whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import AotEagerAndRecordGraphs

from helpers.operands import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    expected,
    filled_with_nan,
    gate_shapes,
    randn,
    shapes,
    tensors,
)
from smoothcache_fx.kernels.residual_load import residual_load
from smoothcache_fx.kernels.residual_store import residual_store


@settings(max_examples=150)
@given(data=st.data(), shape=shapes())
def test_any_shape_dtype_and_strides(data, shape):
    x_dtype, cache_dtype, gate_dtype = (data.draw(st.sampled_from(DTYPES)) for _ in range(3))
    x, cache = data.draw(tensors(shape, x_dtype)), data.draw(tensors(shape, cache_dtype))
    gate_shape = data.draw(gate_shapes(shape))
    gate = None if gate_shape is None else data.draw(tensors(gate_shape, gate_dtype))
    before = [one.clone() for one in (x, cache)]
    out = residual_load(x, gate, cache)
    assert_same_bits(out, expected(x, [(gate, cache)]))
    assert out.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, before[0]) and torch.equal(cache, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_gives_the_bits_that_the_store_gave(dtype):
    """So the step that stores and the step that loads differ in nothing but where the branch comes from."""
    x, gate, y = randn(2, 41, 130, dtype=dtype), randn(2, 1, 130), randn(2, 41, 130, dtype=dtype)
    cache = torch.empty_like(y)
    stored = residual_store(x, gate, y, cache)
    assert_same_bits(residual_load(x, gate, cache), stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_is_written_whole(dtype):
    with filled_with_nan():
        out = residual_load(randn(3, 41, 123, dtype=dtype), randn(3, 1, 123), randn(3, 41, 123, dtype=dtype))
    assert not out.isnan().any()


@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), ()])
def test_no_elements_or_no_dimensions(shape):
    x, cache = randn(*shape), randn(*shape)
    assert_same_bits(residual_load(x, None, cache), expected(x, [(None, cache)]))


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, gate, cache"""
    return [randn(2, 5, 8, dtype=dtype), randn(2, 1, 8), randn(2, 5, 8)]


@pytest.mark.parametrize(
    ("position", "operand", "error", "message"),
    [
        (0, torch.zeros(2, 5, 8, dtype=torch.float64), TypeError, "x is torch.float64, expected one of torch.float32"),
        (2, torch.zeros(2, 5, 8, dtype=torch.int32), TypeError, "cache is torch.int32, expected one of"),
        (2, torch.zeros(2, 5, 1), ValueError, r"cache has shape \[2, 5, 1\], expected x's \[2, 5, 8\]"),
        (1, torch.zeros(2, 5, 4), ValueError, r"gate has shape \[2, 5, 4\], which does not broadcast"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(position, operand, error, message, device):
    """Alike when it runs and when it is traced."""
    given = [one.to(device) for one in operands()]
    given[position] = operand.to(device)
    with pytest.raises(error, match=f"residual_load: {message}"):
        residual_load(*given)


@pytest.mark.parametrize(("position", "name"), [(1, "gate"), (2, "cache")])
def test_another_device_is_refused(position, name):
    given = operands()
    given[position] = given[position].to("meta")
    with pytest.raises(ValueError, match=f"residual_load: {name} is on meta, expected x's device {DEVICE}"):
        residual_load(*given)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, gate):
    x, gates, cache = operands(dtype)
    torch.library.opcheck(residual_load, (x, gates if gate else None, cache))


def step(x, gate, cache):
    return torch.relu(residual_load(torch.tanh(x), gate, cache))


def test_it_stays_whole_in_the_graph():
    backend = AotEagerAndRecordGraphs()
    given = operands(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(*given), step(*given))
    (graph,) = backend.fw_graphs
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.smoothcache.residual_load.default) == 1, graph.print_readable(False)


def test_inductor_calls_it():
    given = operands(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*given), step(*given))
