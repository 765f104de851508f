"""``residual_norm``: the stream's bits, the norm's numbers, what it refuses, and that compilers leave it whole."""

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
    expected,
    filled_with_nan,
    gate_shapes,
    outside,
    randn,
    shapes,
    tensors,
)
from smoothcache_fx.kernels._norms import WIDEST
from smoothcache_fx.kernels.residual_norm import residual_norm
from smoothcache_fx.kernels.residual_store import residual_store

EPS = 1e-5


@settings(max_examples=150)
@given(
    data=st.data(),
    outer=shapes(most=40),
    width=st.sampled_from([5, 16, 64, 123, 130, 1030]),
    rms=st.booleans(),
    stored=st.booleans(),
)
def test_any_shape_dtype_and_strides(data, outer, width, rms, stored):
    shape = (*outer[:3], width)
    x_dtype, y_dtype, other_dtype = (data.draw(st.sampled_from(DTYPES)) for _ in range(3))
    x, y = data.draw(tensors(shape, x_dtype)), data.draw(tensors(shape, y_dtype))
    spread = [data.draw(gate_shapes(shape)) for _ in range(5)]
    gate, *spread = (None if one is None else data.draw(tensors(one, other_dtype)) for one in spread)
    cache = data.draw(tensors(shape, y_dtype, fill=float("nan"))) if stored else None
    out, h = residual_norm(x, gate, y, cache, *spread, EPS, rms)
    assert_same_bits(out, expected(x, [(gate, y)]))
    assert out.stride() == h.stride() == torch.empty_like(x).stride()
    assert_normed(h, out, spread, rms, EPS)
    if stored:
        assert_same_bits(cache, y)
        assert outside(cache).isnan().all(), "written outside of the cache"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1152, 3072, 5120])
def test_widths_of_known_models(width, dtype):
    x, y = randn(2, 3, width, dtype=dtype), randn(2, 3, width, dtype=dtype)
    gate, modulation, shift = (randn(2, 1, width, dtype=dtype) for _ in range(3))
    caches = torch.empty_like(y), torch.empty_like(y)
    out, h = residual_norm(x, gate, y, caches[0], None, None, modulation, shift, EPS)
    assert_same_bits(out, residual_store(x, gate, y, caches[1]))
    assert_normed(h, out, [None, None, modulation, shift], rms=False, eps=EPS)


def test_a_mean_that_is_large_beside_the_deviation():
    """The variance is of what is left once the mean is off, not a difference of large sums."""
    x, y = torch.full((1, 2, 1152), 1000.0, device=DEVICE), randn(1, 2, 1152)
    out, h = residual_norm(x, None, y, None, None, None, None, None, EPS)
    exact = out.double() - out.double().mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()
    # The mean is rounded to float32: 3e-5 at 1000.
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_written_whole(dtype):
    x, y = randn(3, 41, 123, dtype=dtype), randn(3, 41, 123, dtype=dtype)
    cache = torch.full_like(y, float("nan"))
    with filled_with_nan():
        out, h = residual_norm(x, None, y, cache, None, None, None, None, EPS)
    assert not any(one.isnan().any() for one in (out, h, cache))


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, gate, y, cache, weight, bias, modulation, shift"""
    streams = randn(2, 5, 8, dtype=dtype), randn(2, 5, 8), torch.zeros(2, 5, 8, device=DEVICE)
    return [streams[0], randn(2, 1, 8), *streams[1:], randn(8), randn(8), randn(2, 1, 8), randn(2, 1, 8)]


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (), r"x has shape \[\], expected rows of 1 to"),
        (0, (2, 5, 0), r"x has shape \[2, 5, 0\], expected rows of 1 to"),
        (0, (1, WIDEST + 1), r"x has shape \[1, 8193\], expected rows of 1 to 8192"),
        (2, (5, 8), r"y has shape \[5, 8\], expected x's"),
        (3, (2, 5, 9), r"cache is torch.float32 \[2, 5, 9\]"),
        (4, (9,), r"weight has shape \[9\], which does not broadcast"),
        (5, (3, 8), r"bias has shape \[3, 8\], which does not broadcast"),
        (6, (3, 1, 8), r"modulation has shape \[3, 1, 8\], which does not broadcast"),
        (7, (1, 2, 5, 8), r"shift has shape \[1, 2, 5, 8\], which does not broadcast"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(position, shape, message, device):
    """Alike when it runs and when it is traced."""
    given = [one.to(device) for one in operands()]
    given[position] = torch.zeros(shape, device=device)
    with pytest.raises(ValueError, match=f"residual_norm: {message}"):
        residual_norm(*given, EPS)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("left_out", [(), (1, 4, 5), (1, 3, 4, 5, 6, 7)], ids=["all", "no gate and affine", "load"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, left_out, rms):
    given = [None if position in left_out else one for position, one in enumerate(operands(dtype))]
    torch.library.opcheck(residual_norm, (*given, EPS, rms))


def step(x, gate, y, cache, modulation, shift):
    out, h = residual_norm(x, gate, torch.tanh(y), cache, None, None, modulation, shift, EPS)
    return out + torch.relu(h) + cache


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_stays_whole_in_the_graph(backend):
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(step, backend=recorded if backend == "aot_eager" else backend, fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        x, gate, y, cache, _, _, modulation, shift = operands()
        want_cache = cache.clone()
        with torch.no_grad():
            want = step(x, gate, y, want_cache, modulation, shift)
            torch.testing.assert_close(compiled(x, gate, y, cache, modulation, shift), want)
        torch.testing.assert_close(cache, want_cache)
        assert cache.any()
    for graph in recorded.fw_graphs:
        op = torch.ops.smoothcache.residual_norm.default
        assert sum(op in (node.target, *node.args) for node in graph.graph.nodes) == 1, graph.print_readable(False)
