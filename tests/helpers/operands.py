"""Operands of any shape, dtype and strides, and what the residual ops must make of them, worked out with NumPy.

The same tests run on the plain references (on CPU), on the Triton kernels under their interpreter (in a process of its
own, see ``test_interpreter.py``) and on a GPU where there is one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from smoothcache_fx.kernels._triton import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Powers of two, odd sizes, more than a block's 1024 elements, and more than one warp's.
SIZES = [1, 2, 3, 5, 16, 64, 123, 130, 1030]
#: Of a norm: half a unit in the last place, and what a row's sums may be off. Triton's interpreter cuts bfloat16 off.
NORM_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
#: A gate, and a branch or cache.
Term = tuple[Tensor | None, Tensor]


@st.composite
def shapes(draw: Any, most: int = 2_500) -> tuple[int, ...]:
    """Of one to four dimensions and up to ``most`` elements."""
    sizes: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        left = most // math.prod(sizes)
        sizes.append(draw(st.sampled_from([size for size in SIZES if size <= left])))
    return tuple(sizes)


@st.composite
def gate_shapes(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """None, or a shape that broadcasts to ``shape``."""
    if draw(st.booleans()):
        return None
    kept = [size if draw(st.booleans()) else 1 for size in shape]
    return tuple(kept[draw(st.integers(0, len(shape))) :])


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, fill: float | None = None) -> Tensor:
    """Normal values, or all ``fill``, contiguous or in a larger storage: permuted, offset, with gaps."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else range(len(shape))
    gaps = [draw(st.sampled_from([(0, 1), (0, 1), (3, 1), (1, 2)])) for _ in shape]
    storage = torch.randn([shape[dim] * gaps[dim][1] + gaps[dim][0] for dim in order], generator=generator)
    if fill is not None:
        storage.fill_(fill)
    view = storage.to(dtype).to(DEVICE).permute([list(order).index(dim) for dim in range(len(shape))])
    for dim, (start, step) in enumerate(gaps):
        view = view.narrow(dim, start, shape[dim] * step)[(slice(None),) * dim + (slice(None, None, step),)]
    assert view.shape == shape
    return view


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def expected(x: Tensor, terms: Sequence[Term]) -> Tensor:
    """``x + sum gate * y``, rounded to float32 each time, and to ``x``'s dtype at the end."""
    total = _float32(x)
    for gate, y in terms:
        total = total + (_float32(y) if gate is None else _float32(gate) * _float32(y))
    assert total.dtype == np.float32
    return rounded(torch.from_numpy(np.asarray(total)), x.dtype).to(x.device)


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    if INTERPRETED and dtype == torch.bfloat16:
        # Triton's interpreter cuts bfloat16 off, where devices round to the nearest.
        value = (value.contiguous().view(torch.int32) & -0x10000).view(torch.float32)
    return value.to(dtype)


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    differs = _bits(actual) != _bits(wanted)
    assert not differs.any(), f"{int(differs.sum())} of {differs.numel()}: {actual[differs]} for {wanted[differs]}"


def assert_normed(h: Tensor, out: Tensor, spread: Sequence[Tensor | None], rms: bool, eps: float) -> None:
    """``h`` is ``(norm(out) * weight + bias) * (1 + modulation) + shift``, in float64."""
    weight, bias, modulation, shift = (None if one is None else one.double() for one in spread)
    value = out.double()
    if not rms:
        value = value - value.mean(-1, keepdim=True)
    value = value / (value.square().mean(-1, keepdim=True) + eps).sqrt()
    # A float32 sum is as exact as its largest term.
    largest = torch.ones_like(value) * value.abs()
    for factor, term in ((weight, bias), (None if modulation is None else 1 + modulation, shift)):
        value, largest = (value, largest) if factor is None else (value * factor, largest * factor.abs())
        value, largest = (value, largest) if term is None else (value + term, largest + term.abs())
    assert h.dtype == out.dtype and h.shape == out.shape
    over = (h.double() - value).abs() / (
        NORM_TOLERANCES[h.dtype] * value.abs() + NORM_TOLERANCES[torch.float32] * (largest + 1)
    )
    assert not over.numel() or over.max() <= 1, f"{float(over.max()):.3g} times the tolerance off"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """New tensors are full of NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
            assert torch.empty(1000, device=DEVICE).isnan().all()
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def outside(view: Tensor) -> Tensor:
    """What of the view's storage does not belong to it."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    left = torch.ones(storage.shape, dtype=torch.bool, device=view.device)
    left.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return storage[left]
