"""``passes.count_bytes`` against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.capture import Stack, capture, inputs
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.traffic import count_bytes


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


ELEMENTS = {"x": 2 * 6 * 16, "up": 16 * 64, "hidden": 2 * 6 * 64, "down": 64 * 16}


def test_a_feed_forward_by_hand():
    """The first product reads x and weights and writes; relu's result is written and read; the last, and the sum."""
    (program,) = capture(FeedForward().eval(), torch.randn(2, 6, 16))
    x, up, hidden, down = ELEMENTS.values()
    products = (x + up + hidden) + (hidden + down + x)
    assert count_bytes(program.builder.captured.graph) == 4 * (products + hidden + x)


@pytest.mark.parametrize("compute", [(), (0,)])
def test_a_cache_is_read_or_written_once(compute):
    (program,) = capture(FeedForward().eval(), torch.randn(2, 6, 16))
    variant = specialize(program.builder.guarded, compute)
    x = ELEMENTS["x"]
    cached = 4 * (x + x)  # the cache, and the sum
    computed = count_bytes(program.builder.captured.graph) + 4 * x
    assert count_bytes(variant.graph) == (computed if compute else cached)


def test_half_the_width_is_half_the_bytes():
    (program,) = capture(Stack(2).eval(), *inputs())
    (half,) = capture(Stack(2).eval().bfloat16(), *(value.bfloat16() for value in inputs()))
    assert count_bytes(half.builder.captured.graph) == pytest.approx(
        count_bytes(program.builder.captured.graph) / 2, rel=2e-2
    )
