"""``residual_store``: the numbers, the bits that are kept, what it refuses, and that compilers leave it whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from helpers.operands import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    expected,
    filled_with_nan,
    gate_shapes,
    outside,
    randn,
    shapes,
    tensors,
)
from smoothcache_fx.kernels import residual_store as module
from smoothcache_fx.kernels._triton import INTERPRETED, runs_triton
from smoothcache_fx.kernels.residual_store import residual_store


@settings(max_examples=150)
@given(data=st.data(), shape=shapes())
def test_any_shape_dtype_and_strides(data, shape):
    x_dtype, y_dtype, gate_dtype = (data.draw(st.sampled_from(DTYPES)) for _ in range(3))
    x, y = data.draw(tensors(shape, x_dtype)), data.draw(tensors(shape, y_dtype))
    gate_shape = data.draw(gate_shapes(shape))
    gate = None if gate_shape is None else data.draw(tensors(gate_shape, gate_dtype))
    cache = data.draw(tensors(shape, y_dtype, fill=float("nan")))
    before = [one.clone() for one in (x, y)]
    out = residual_store(x, gate, y, cache)
    assert_same_bits(out, expected(x, [(gate, y)]))
    assert out.stride() == torch.empty_like(x).stride()
    assert_same_bits(cache, y)
    assert outside(cache).isnan().all(), "written outside of the cache"
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_the_branch_is_kept(dtype):
    """Infinities, signed zeros, denormals and payloads of NaNs too."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        y = (patterns * 2**16 + 12345).view(dtype)
    else:
        y = patterns.to(torch.int16).view(dtype)
    y = y.to(DEVICE)
    cache = torch.zeros_like(y)
    residual_store(torch.zeros_like(y), None, y, cache)
    assert_same_bits(cache, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_written_whole(dtype):
    x, gate, y = randn(3, 41, 123, dtype=dtype), randn(3, 1, 123), randn(3, 41, 123, dtype=dtype)
    cache = torch.full_like(y, float("nan"))
    with filled_with_nan():
        out = residual_store(x, gate, y, cache)
    assert not out.isnan().any() and not cache.isnan().any()


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter cuts bfloat16 off where devices round")
def test_one_rounding_at_the_end():
    """(1 + 2**-7)**2 + 2**-8 lies over the middle of two bfloat16 values; the product rounded first lies on it."""
    x, y, gate = (torch.tensor([value], device=DEVICE).bfloat16() for value in (2.0**-8, 1 + 2.0**-7, 1 + 2.0**-7))
    out = residual_store(x, gate, y, torch.empty_like(y))
    assert out.item() == 1 + 2.0**-6 + 2.0**-7
    assert (x + gate * y).item() == 1 + 2.0**-6


@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), ()])
def test_no_elements_or_no_dimensions(shape):
    x, y = randn(*shape), randn(*shape)
    cache = torch.full_like(y, float("nan"))
    assert_same_bits(residual_store(x, None, y, cache), expected(x, [(None, y)]))
    assert_same_bits(cache, y)


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, gate, y, cache"""
    return [randn(2, 5, 8, dtype=dtype), randn(2, 1, 8), randn(2, 5, 8), torch.zeros(2, 5, 8, device=DEVICE)]


@pytest.mark.parametrize(
    ("position", "operand", "error", "message"),
    [
        (0, torch.zeros(2, 5, 8, dtype=torch.float64), TypeError, "x is torch.float64, expected one of torch.float32"),
        (2, torch.zeros(2, 5, 8, dtype=torch.int32), TypeError, "y is torch.int32, expected one of"),
        (2, torch.zeros(5, 8), ValueError, r"y has shape \[5, 8\], expected x's \[2, 5, 8\]"),
        (1, torch.zeros(2, 1, 8, dtype=torch.bool), TypeError, "gate is torch.bool, expected one of"),
        (1, torch.zeros(3, 1, 8), ValueError, r"gate has shape \[3, 1, 8\], which does not broadcast"),
        (1, torch.zeros(1, 2, 1, 8), ValueError, r"gate has shape \[1, 2, 1, 8\], which does not broadcast"),
        (3, torch.zeros(2, 5, 8, dtype=torch.float16), ValueError, "cache is torch.float16 .*, expected one like y"),
        (3, torch.zeros(2, 5, 9), ValueError, r"cache is torch.float32 \[2, 5, 9\]"),
        (3, torch.zeros(1, 1, 8).expand(2, 5, 8), ValueError, "cache is expanded"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(position, operand, error, message, device):
    """Alike when it runs and when it is traced."""
    given = [one.to(device) for one in operands()]
    given[position] = torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device=device)
    with pytest.raises(error, match=f"residual_store: {message}"):
        residual_store(*given)


@pytest.mark.parametrize(("position", "name"), [(1, "gate"), (2, "y"), (3, "cache")])
def test_another_device_is_refused(position, name):
    given = operands()
    given[position] = given[position].to("meta")
    with pytest.raises(ValueError, match=f"residual_store: {name} is .*on meta, expected"):
        residual_store(*given)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, gate):
    x, gates, y, cache = operands(dtype)
    torch.library.opcheck(residual_store, (x, gates if gate else None, y, cache))


def step(x, gate, y, cache):
    return torch.relu(residual_store(x, gate, torch.tanh(y), cache)) + cache


def check_compiled(compiled) -> None:
    """Two calls with other values in the same buffer."""
    for seed in range(2):
        torch.manual_seed(seed)
        x, gate, y, cache = operands(torch.bfloat16)
        want_cache = cache.clone()
        want = step(x, gate, y, want_cache)
        torch.testing.assert_close(compiled(x, gate, y, cache), want)
        torch.testing.assert_close(cache, want_cache)
        assert cache.any()


def test_it_stays_whole_in_the_graph():
    backend = AotEagerAndRecordGraphs()
    with torch.no_grad():
        check_compiled(torch.compile(step, backend=backend, fullgraph=True))
    (graph,) = backend.fw_graphs
    op = torch.ops.smoothcache.residual_store.default
    assert sum(op in (node.target, *node.args) for node in graph.graph.nodes) == 1, graph.print_readable(False)


def test_inductor_calls_it():
    with torch.no_grad():
        check_compiled(torch.compile(step, backend="inductor", fullgraph=True))


def test_compiled_code_stores_into_the_callers_own_buffer(monkeypatch):
    """No copy of the cache is made and copied back; CUDA graphs rest on this, too."""
    name = "_launch" if runs_triton(randn(1)) else "residual_store_reference"
    original, addresses = getattr(module, name), []

    def recorded(x, gate, y, cache):
        addresses.append(cache.data_ptr())
        return original(x, gate, y, cache)

    monkeypatch.setattr(module, name, recorded)
    x, gate, y, cache = operands()
    compiled = torch.compile(lambda x, gate, y, cache: residual_store(x, gate, y.tanh(), cache).relu())
    with torch.no_grad():
        for _ in range(2):
            compiled(x, gate, y, cache)
    assert addresses == [cache.data_ptr()] * 2
    torch.testing.assert_close(cache, y.tanh())


def test_shapes_may_be_symbolic():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 123):
        x, gate, y, cache = randn(2, tokens, 8), randn(2, 1, 8), randn(2, tokens, 8), randn(2, tokens, 8)
        want_cache = cache.clone()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, gate, y, cache), step(x, gate, y, want_cache))
        torch.testing.assert_close(cache, want_cache)
    assert counter.frame_count == 1
