"""``relative_l1`` against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from smoothcache_fx.kernels import relative_l1


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    lags=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_sums_of_absolute_differences(shape, lags, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    fresh, *earlier = (torch.randn(shape, generator=generator).to(dtype) for _ in range(lags + 1))
    sums = relative_l1(fresh, earlier)
    assert sums.dtype == torch.float64 and sums.shape == (lags + 1,)
    exact = [
        fresh.double().abs().sum(),
        *((fresh.double() - other.double()).abs().sum() for other in earlier),
    ]
    torch.testing.assert_close(sums, torch.stack(exact), rtol=1e-6, atol=0)


def test_it_reads_any_strides_and_keeps_its_inputs():
    fresh = torch.randn(4, 6, 8).transpose(0, 2)[::2]
    earlier = torch.randn(4, 6, 8).transpose(0, 2)[::2]
    before = fresh.clone(), earlier.clone()
    size, distance = relative_l1(fresh, [earlier]).tolist()
    assert distance / size == pytest.approx(float((fresh - earlier).abs().sum() / fresh.abs().sum()), rel=1e-6)
    assert torch.equal(fresh, before[0]) and torch.equal(earlier, before[1])


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 3\) after \(2, 4\)"):
        relative_l1(torch.zeros(2, 3), [torch.zeros(2, 4)])


def test_nan_and_infinity_show_in_the_sums():
    assert relative_l1(torch.tensor([1.0, float("nan")]), []).isnan().all()
    assert relative_l1(torch.tensor([1.0, float("inf")]), []).isinf().all()
