"""``max_cache_bytes``: what is cached as one so that caches fit, and what is refused."""

from __future__ import annotations

import pytest
import torch

import smoothcache_fx as smoothcache
from helpers.capture import Long, Stack, inputs, stacks_of
from helpers.cases import randomize
from smoothcache_fx import Schedule, ScheduleError

#: Bytes of one cached value of the models here, [2, 6, 16] in float32.
VALUE = 2 * 6 * 16 * 4
ROWS = {"attn": (1, 0, 1, 0), "ffn": (1, 1, 0, 0)}


def compiled_within(limit, model=None, order=0, **settings):
    model = model or randomize(Stack(4), 0)
    given = (*inputs(), torch.randn(2, 6, 16)) if isinstance(model, Long) else inputs()
    schedule = Schedule(4, ROWS, order=order)
    smoothcache.compile(model, schedule, backend="eager", max_cache_bytes=limit, **settings)
    with torch.no_grad():
        for _ in range(4 * settings.get("calls_per_step", 1)):
            model(*given)
    return model


def test_branches_where_they_fit():
    model = compiled_within(8 * VALUE)
    assert not stacks_of(model) and smoothcache.report(model).cache_bytes == 8 * VALUE


def test_one_stack_where_they_do_not():
    model = compiled_within(8 * VALUE - 1)
    assert stacks_of(model) == ["blocks.0-3"] and smoothcache.report(model).cache_bytes == VALUE
    (group,) = smoothcache.report(model).groups
    assert (group.computed, group.reused) == (3, 1), "computed where one of its branches is"


def test_only_as_many_stacks_as_it_takes():
    found = compiled_within(7 * VALUE, model=randomize(Long("control"), 0))
    assert len(stacks_of(found)) == 1 and smoothcache.report(found).cache_bytes == 5 * VALUE


def test_forecasts_and_streams_count():
    assert not stacks_of(compiled_within(16 * VALUE, order=1))
    assert stacks_of(compiled_within(16 * VALUE - 1, order=1))
    model = compiled_within(16 * VALUE - 1, calls_per_step=2)
    assert stacks_of(model) and smoothcache.report(model).cache_bytes == 2 * VALUE


def test_what_does_not_fit_is_an_error_with_the_sizes():
    with pytest.raises(ScheduleError, match=r"take 6.0 KiB by branch and 768 B by stack; max_cache_bytes leaves 500 B"):
        compiled_within(500)


def test_another_size_is_planned_for_itself():
    model = compiled_within("7 KiB")
    assert not stacks_of(model)
    x, c = inputs(4, 6)
    with torch.no_grad():
        for _ in range(4):
            model(x, c)
    assert stacks_of(model) == ["blocks.0-3"]
    assert smoothcache.report(model).cache_bytes <= 7 * 1024


def test_a_stream_that_was_not_counted_is_refused():
    """Wan calls its denoiser twice a step, in two cache contexts."""
    pytest.importorskip("transformers")
    from pipelines import build

    case = build.CASES["wan"]
    rows = dict.fromkeys(("attn", "cross_attn", "ffn"), (1, 0, 1))
    pipe = build.quiet(case.make())
    smoothcache.compile(pipe, Schedule(3, rows), backend="eager")
    build.run(case, pipe, 3)
    needed = smoothcache.report(pipe).cache_bytes
    smoothcache.remove(pipe)
    smoothcache.compile(pipe, Schedule(3, rows), backend="eager", max_cache_bytes=needed)
    build.run(case, pipe, 3)
    smoothcache.remove(pipe)
    smoothcache.compile(pipe, Schedule(3, rows), backend="eager", max_cache_bytes=needed - 1)
    with pytest.raises(ScheduleError, match="2 streams of calls have their own caches"):
        build.run(case, pipe, 3)


@pytest.mark.parametrize("limit", ["2 XB", 0, -1, True, "abc", 1.5])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match="max_cache_bytes is .*, expected bytes"):
        smoothcache.compile(randomize(Stack(1), 0), Schedule(4, ROWS), max_cache_bytes=limit)


def test_explain_says_what_would_be_done():
    model, schedule = randomize(Stack(4), 0), Schedule(4, ROWS)
    found = smoothcache.explain(model, *inputs(), schedule=schedule, max_cache_bytes=VALUE)
    assert found.prediction.stacks == ("blocks.0-3",) and found.prediction.cache_bytes == VALUE
    assert "cached as one: blocks.0-3" in str(found)
    assert len(found.sites) == 8
    with pytest.raises(ValueError, match="without a schedule"):
        smoothcache.explain(model, *inputs(), max_cache_bytes=1)
