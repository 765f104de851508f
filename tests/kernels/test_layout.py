"""The loops that a launch runs through, against the tensors' own strides; and where 64-bit offsets are needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.operands import gate_shapes, shapes, tensors
from smoothcache_fx.kernels.layout import FLAT, ROWS, STRIDED, Layout, layout_of

BLOCK = 1024


def visited(at: Layout, tensor: int) -> list[int]:
    """Offsets in the order of the launch, as the kernels compute them for this kind of tensor."""
    group_stride, sample_stride, token_stride, column_stride = at.strides[tensor]
    found = []
    for group, sample, index in itertools.product(range(at.groups), range(at.samples), range(at.total)):
        row, column = divmod(index, at.width)
        within = {
            FLAT: index,
            ROWS: row * token_stride + column,
            STRIDED: row * token_stride + column * column_stride,
        }
        found.append(group * group_stride + sample * sample_stride + within[at.kinds[tensor]])
    return found


@given(data=st.data(), shape=shapes(most=600))
def test_every_element_is_visited_once_and_beside_its_like(data, shape):
    out, other = data.draw(tensors(shape, torch.float32)), data.draw(tensors(shape, torch.float32))
    gate = torch.zeros(data.draw(gate_shapes(shape)) or (1,)).expand(shape)
    at = layout_of((other, gate, out), block=4)
    assert at.programs * 4 >= out.numel()
    walks = [visited(at, tensor) for tensor in range(3)]
    places = [[sum(map(int.__mul__, where, one.stride())) for where in itertools.product(*map(range, shape))]
              for one in (other, gate, out)]  # fmt: skip
    assert sorted(zip(*walks, strict=True)) == sorted(zip(*places, strict=True))


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("gate", "sizes", "kind"),
    [
        ((2, 1, 1152), (1, 2, 256, 1152), ROWS),
        ((1152,), (1, 1, 512, 1152), ROWS),
        ((2, 256, 1152), (1, 1, 1, 2 * 256 * 1152), FLAT),
        ((2, 256, 1), (1, 1, 512, 1152), STRIDED),
        ((256, 1152), (1, 2, 1, 256 * 1152), FLAT),
    ],
)
def test_gates(gate, sizes, kind):
    x = meta(2, 256, 1152)
    at = layout_of((x, meta(*gate).expand(x.shape), x), BLOCK)
    assert (at.groups, at.samples, at.tokens, at.width) == sizes
    assert at.kinds == (FLAT, kind, FLAT) and not at.wide


def test_part_of_the_tokens_is_flat_per_sample():
    """What joint attention hands to one of its two streams."""
    y, x = meta(2, 333, 64)[:, :256], meta(2, 256, 64)
    at = layout_of((y, x), BLOCK)
    assert at.kinds == (FLAT, FLAT) and at.samples == 2 and at.total == 256 * 64


def test_64_bits_where_they_are_needed():
    rows = 2**31 // 5120
    assert not layout_of((meta(rows, 5120),), BLOCK).wide
    assert layout_of((meta(rows + 1, 5120),), BLOCK).wide
    # Samples have 64-bit bases, so a large batch of small ones needs no more.
    x = meta(64, 32760, 5120)
    gate = meta(64, 1, 5120).expand(x.shape)
    assert x.numel() > 2**31 and not layout_of((x, gate, x), BLOCK).wide
    # Few elements far from each other.
    assert layout_of((meta(2**20, 4096)[:, :1], meta(2**20, 1)), BLOCK).wide


def test_more_than_four_loops_are_refused():
    x = torch.zeros(3, 3, 3, 3, 3)
    with pytest.raises(ValueError, match=r"take 5 nested loops to run through, and 4 at most .* contiguous first"):
        layout_of((x.permute(4, 3, 2, 1, 0), x), BLOCK)
