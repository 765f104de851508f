"""What runs at each call: items picked by position, plans, and rings of histories beside a list that is kept whole."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tolerances import DOUBLES, assert_close
from smoothcache_fx.runtime.binding import Binding
from smoothcache_fx.runtime.variant import Mask, SiteInfo, Variant, make_plan, picker
from smoothcache_fx.schedules.coefficients import forecast_coefficients

ITEMS = list(range(40))


@given(st.lists(st.integers(0, 39), max_size=40, unique=True), st.booleans())
def test_items_at_any_positions(positions, in_order):
    positions = sorted(positions) if in_order else positions
    for items in (ITEMS, tuple(ITEMS)):
        assert picker(positions)(items) == tuple(items[i] for i in positions)


def test_items_in_a_few_runs():
    for positions in ([], [3], [0, 1, 2, 3], [*range(5), *range(9, 30)], list(range(0, 40, 2)), [7, 6, 5]):
        assert picker(positions)(ITEMS) == tuple(positions)


def test_a_mask_is_looked_up_by_what_it_says():
    assert Mask(3, 1, (1, 0)) == Mask(3, 1, (1, 0)) and hash(Mask(3, 1, (1, 0))) == hash(Mask(3, 1, (1, 0)))
    assert len({Mask(3, 1), Mask(3, 3), Mask(1, 1), Mask(3, 1, (0, 1))}) == 4


class Builder:
    """Buffers of one number each, and coefficients as they are."""

    def allocate(self, buffer: int, inputs: object) -> torch.Tensor:
        return torch.full((1,), float("nan"), dtype=torch.float64)

    def coefficients(self, values: list[float]) -> list[float]:
        return list(values)


def site(index: int, most: int, differences: bool) -> SiteInfo:
    first = index * (most + 1)
    buffers = tuple(range(first, first + most + 1))
    held = frozenset(buffers[1:]) if differences else frozenset()
    return SiteInfo(f"blocks.{index}", "blocks.*", "attn", buffers, most + 1, 1, 8, 8, held)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rings_hold_what_a_list_of_all_values_says(data):
    """Random rows, orders, missed steps and failures; every read is the polynomial through the last stored values."""
    count, steps, most = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9)), data.draw(st.integers(1, 2))
    orders = [data.draw(st.integers(0, most)) for _ in range(count)]
    if not any(orders):
        orders[0] = most
    differences = data.draw(st.booleans())
    rows = [[True, *(data.draw(st.booleans()) for _ in range(steps - 1))] for _ in range(count)]
    binding = Binding(
        [site(i, most, differences) for i in range(count)], make_plan(rows, steps, orders), count * (most + 1)
    )
    builder, variants = Builder(), {}
    stream = binding.stream("cond", ())
    for trajectory in range(data.draw(st.integers(1, 3))):
        stored: list[list[tuple[int, float]]] = [[] for _ in range(count)]
        for step in range(steps):
            if step and data.draw(st.integers(0, 7)) == 0:
                continue  # the stream is absent
            mask = binding.decide(stream, trajectory, step)
            if mask not in variants:
                taken = [
                    buffer
                    for i, info in enumerate(binding.sites)
                    for slot, buffer in enumerate(info.buffers[: orders[i] + 1])
                    if not mask.compute >> i & 1 or (mask.store >> i & 1 and slot <= (differences and orders[i] > 0))
                ]
                variants[mask] = Variant(lambda arguments: [], (), tuple(taken), takes_coefficients=True, flops=0)
            variant = variants[mask]
            given_buffers = dict(
                zip(variant.buffers, binding.arguments(stream, variant, mask, builder, []), strict=True)
            )
            coefficients = binding.coefficients(stream, step, builder)
            for i, info in enumerate(binding.sites):
                if mask.compute >> i & 1:
                    if not mask.store >> i & 1:
                        continue
                    value, newest = float(torch.randn(())), given_buffers[info.buffers[0]]
                    if differences and orders[i]:
                        given_buffers[info.buffers[1]].copy_(value - newest)
                    newest.fill_(value)
                    stored[i].insert(0, (step, value))
                else:
                    read = (
                        sum(given_buffers[b] * coefficients[b] for b in info.buffers[: orders[i] + 1])
                        if orders[i]
                        else None
                    )
                    last = stored[i][: orders[i] + 1]
                    own = forecast_coefficients([at for at, _ in last], step)
                    wanted = sum(coefficient * value for coefficient, (_, value) in zip(own, last, strict=True))
                    actual = given_buffers[info.buffers[0]] if read is None else read
                    assert_close(float(actual), wanted, DOUBLES)
            binding.commit(stream, mask, step)
    assert not stream.heads or set(map(type, stream.heads)) == {int}
