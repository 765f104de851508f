"""``relative_l1`` against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.operands import DEVICE, DTYPES, randn, shapes, tensors
from helpers.tolerances import SUMS, assert_close
from smoothcache_fx.kernels.relative_l1 import LAGS_PER_LAUNCH, relative_l1


def exact(fresh: torch.Tensor, earlier: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([fresh.double().abs().sum(), *((fresh.double() - one.double()).abs().sum() for one in earlier)])


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    lags=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_sums_of_absolute_differences(shape, lags, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    fresh, *earlier = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(lags + 1))
    sums = relative_l1(fresh, earlier)
    assert sums.dtype == torch.float64 and sums.shape == (lags + 1,)
    assert_close(sums, exact(fresh, earlier), SUMS)


def test_it_reads_any_strides_and_keeps_its_inputs():
    fresh = randn(4, 6, 8).transpose(0, 2)[::2]
    earlier = randn(4, 6, 8).transpose(0, 2)[::2]
    before = fresh.clone(), earlier.clone()
    size, distance = relative_l1(fresh, [earlier]).tolist()
    assert distance / size == pytest.approx(float((fresh - earlier).abs().sum() / fresh.abs().sum()), rel=1e-6)
    assert torch.equal(fresh, before[0]) and torch.equal(earlier, before[1])


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 3\) after \(2, 4\)"):
        relative_l1(torch.zeros(2, 3), [torch.zeros(2, 4)])


def test_nan_and_infinity_show_in_the_sums():
    assert relative_l1(torch.tensor([1.0, float("nan")], device=DEVICE), []).isnan().all()
    assert relative_l1(torch.tensor([1.0, float("inf")], device=DEVICE), []).isinf().all()


@given(data=st.data(), shape=shapes(), lags=st.integers(0, 3))
def test_any_shape_dtype_and_strides(data, shape, lags):
    """Every tensor with its own dtype and strides, as outputs come from one step and from another."""
    fresh, *earlier = (data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES)))) for _ in range(lags + 1))
    assert_close(relative_l1(fresh, earlier), exact(fresh, earlier), SUMS)


@pytest.mark.parametrize("lags", [LAGS_PER_LAUNCH, LAGS_PER_LAUNCH + 1, 2 * LAGS_PER_LAUNCH + 3])
def test_many_lags(lags):
    fresh, *earlier = (randn(3, 123) for _ in range(lags + 1))
    assert_close(relative_l1(fresh, earlier), exact(fresh, earlier), SUMS)


def test_float32_is_enough_within_a_block():
    """A float32 sum over everything would stand still at 2**24; this one is exact."""
    fresh = torch.ones(2**18, device=DEVICE) * 2.0**7
    fresh[-1] += 1
    assert relative_l1(fresh, [torch.zeros_like(fresh)]).tolist() == [2.0**25 + 1] * 2


def test_more_dimensions_than_the_kernel_has_loops():
    fresh, earlier = randn(2, 3, 2, 3, 2, 3).permute(5, 0, 4, 1, 3, 2), randn(3, 2, 2, 3, 3, 2)
    assert_close(relative_l1(fresh, [earlier]), exact(fresh, [earlier]), SUMS)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), ()])
def test_no_elements_or_no_dimensions(shape):
    fresh, earlier = randn(*shape), randn(*shape)
    torch.testing.assert_close(relative_l1(fresh, [earlier]), exact(fresh, [earlier]))


def test_twice_is_the_same():
    fresh, earlier = randn(3, 123, 130, dtype=torch.bfloat16), randn(3, 123, 130, dtype=torch.bfloat16)
    assert torch.equal(relative_l1(fresh, [earlier]), relative_l1(fresh, [earlier]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(relative_l1, (randn(2, 5, dtype=dtype), [randn(2, 5, dtype=dtype) for _ in range(2)]))
