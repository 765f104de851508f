"""``residual_accumulate``: the numbers, for any number of terms, what it refuses, and that compilers leave it whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DEVICE, DTYPES, assert_same_bits, expected, filled_with_nan, gate_shapes, randn, shapes, tensors
from smoothcache_fx.kernels import residual_accumulate, residual_load
from smoothcache_fx.kernels.residual_accumulate import TERMS_PER_LAUNCH
from torch._dynamo.testing import AotEagerAndRecordGraphs


@settings(max_examples=100)
@given(data=st.data(), shape=shapes(most=5_000), count=st.integers(1, 5))
def test_any_shape_dtype_and_strides(data, shape, count):
    x = data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES))))
    terms = []
    for _ in range(count):
        gate_shape = data.draw(gate_shapes(shape))
        gate = None if gate_shape is None else data.draw(tensors(gate_shape, data.draw(st.sampled_from(DTYPES))))
        cache = data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES))))
        terms.append((gate, cache, data.draw(st.sampled_from([1.0, 0.3, -2.0]))))
    before = x.clone(), [cache.clone() for _, cache, _ in terms]
    out = residual_accumulate(x, *map(list, zip(*terms, strict=True)))
    assert_same_bits(out, expected(x, terms))
    assert out.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, before[0])
    assert all(torch.equal(cache, old) for (_, cache, _), old in zip(terms, before[1], strict=True))


@pytest.mark.parametrize("count", [1, TERMS_PER_LAUNCH, TERMS_PER_LAUNCH + 1, 2 * TERMS_PER_LAUNCH + 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_terms_is_rounded_once(dtype, count):
    x = randn(2, 5, 123, dtype=dtype)
    gates = [(randn(2, 1, 123), None, randn(123, dtype=dtype), randn(2, 5, 1))[i % 4] for i in range(count)]
    caches = [randn(2, 5, 123, dtype=dtype) for _ in range(count)]
    out = residual_accumulate(x, gates, caches)
    assert_same_bits(out, expected(x, [(gate, cache, 1.0) for gate, cache in zip(gates, caches, strict=True)]))


def test_in_float32_it_gives_the_bits_of_one_load_after_the_other():
    x, gates, caches = randn(2, 41, 130), [randn(2, 1, 130) for _ in range(3)], [randn(2, 41, 130) for _ in range(3)]
    stream = x
    for gate, cache, scale in zip(gates, caches, (1.0, 0.5, 0.7), strict=True):
        stream = residual_load(stream, gate, cache, scale)
    assert_same_bits(residual_accumulate(x, gates, caches, [1.0, 0.5, 0.7]), stream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_is_written_whole(dtype):
    with filled_with_nan():
        caches = [randn(3, 41, 123, dtype=dtype) for _ in range(TERMS_PER_LAUNCH + 1)]
        out = residual_accumulate(randn(3, 41, 123, dtype=dtype), [randn(3, 1, 123)] * len(caches), caches)
    assert not out.isnan().any()


@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), ()])
def test_no_elements_or_no_dimensions(shape):
    x, cache = randn(*shape), randn(*shape)
    assert_same_bits(residual_accumulate(x, [None], [cache]), expected(x, [(None, cache, 1.0)]))


@pytest.mark.parametrize(
    ("gates", "caches", "scales", "message"),
    [
        ([], [], None, "got 0 gates, 0 caches and 0 scales, expected the same number of each, and one at least"),
        ([None], ["x", "x"], None, "got 1 gates, 2 caches and 2 scales"),
        ([None, None], ["x", "x"], [1.0], "got 2 gates, 2 caches and 1 scales"),
        ([None, None], ["x", (5, 8)], None, r"caches\[1\] has shape \[5, 8\], expected x's \[2, 5, 8\]"),
        ([None, (3, 1, 8)], ["x", "x"], None, r"gate has shape \[3, 1, 8\], which does not broadcast"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(gates, caches, scales, message, device):
    """Alike when it runs and when it is traced."""
    x = torch.zeros(2, 5, 8, device=device)
    made = [x if one == "x" else None if one is None else torch.zeros(one, device=device) for one in [*gates, *caches]]
    with pytest.raises(ValueError, match=f"residual_accumulate: {message}"):
        residual_accumulate(x, made[: len(gates)], made[len(gates) :], scales)


def test_another_dtype_is_refused():
    x = torch.zeros(2, 5, 8, device=DEVICE)
    with pytest.raises(TypeError, match=r"residual_accumulate: caches\[0\] is torch.float64, expected one of"):
        residual_accumulate(x, [None], [x.double()])
    with pytest.raises(TypeError, match=r"residual_accumulate: x is torch.int64, expected one of"):
        residual_accumulate(x.long(), [None], [x])


@pytest.mark.parametrize("scales", [None, [0.5, 1.0, -2.0]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, scales):
    caches = [randn(2, 5, 8, dtype=dtype) for _ in range(3)]
    gates = [None, randn(2, 1, 8), randn(8, dtype=dtype)]
    torch.library.opcheck(residual_accumulate, (randn(2, 5, 8, dtype=dtype), gates, caches, scales))


def step(x, gate, first, second):
    return torch.relu(residual_accumulate(torch.tanh(x), [gate, None], [first, second], [0.5, 1.0]))


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
