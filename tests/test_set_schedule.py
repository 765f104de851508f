"""Another schedule for a compiled model: what stays, what it gives, what is refused."""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import smoothcache_fx as smoothcache
from helpers.cases import run_trajectory
from helpers.digits import digits_model
from helpers.models import CASES
from smoothcache_fx import CompiledError, Schedule, ScheduleError, StepError
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.demo.sampler import sample

ROW = (1, 0, 1, 0, 0, 1, 0, 0)
OTHER = (1, 1, 0, 1, 0, 0)


def rows(row, *kinds):
    return dict.fromkeys(kinds or ("attn", "ffn"), row)


SCHEDULES = {
    "branches": Schedule(8, rows(ROW)),
    "fewer steps": Schedule(6, rows(OTHER)),
    "attention alone": Schedule(6, rows(OTHER, "attn")),
    "order 1": Schedule(8, rows(ROW), order=1),
    "order 2": Schedule(8, rows(ROW), order=2),
    "order 2 of attention": Schedule(8, rows(ROW), order={"attn": 2}),
    "coefficients": Schedule(8, rows(ROW), order=1, coefficients=rows(((),) * 3 + ((1.5, -0.5),) + ((),) * 4)),
    "a lead": Schedule(8, rows(ROW), order=1, lead=0.5),
    "narrower history": Schedule(8, rows(ROW), order=2, history_dtype="float16"),
    "stacks": Schedule(8, rows(ROW, "stack")),
    "stacks, order 2": Schedule(6, rows(OTHER, "stack"), order=2),
    "a range": Schedule(8, {**rows(ROW, "blocks.1-2"), **rows(OTHER + (1, 0), "attn")}),
    "everything": Schedule(5),
}


def run(model, schedule, seed=3):
    case = CASES["demo"]
    return run_trajectory(case, model, steps=schedule.steps, seed=seed, dtype=torch.float32)


class Alone(dict):
    """Per schedule, the trajectory of a model that was compiled with it; made when it is asked for."""

    def __missing__(self, name):
        model = smoothcache.compile(CASES["demo"].build(0), SCHEDULES[name], backend="eager")
        return self.setdefault(name, run(model, SCHEDULES[name]))


@pytest.fixture(scope="module")
def alone():
    return Alone()


def compiled(name="branches", **options):
    model = CASES["demo"].build(0)
    return smoothcache.compile(model, SCHEDULES[name], **{"backend": "eager", **options})


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(sorted(SCHEDULES)), min_size=2, max_size=4))
def test_a_model_gives_what_one_gives_that_was_compiled_with_the_schedule(alone, names):
    model = compiled(names[0])
    for name in names:
        assert smoothcache.set_schedule(model, SCHEDULES[name]) is model
        for actual, expected in zip(run(model, SCHEDULES[name]), alone[name], strict=True):
            assert torch.equal(actual, expected), names
    smoothcache.remove(model)


def test_captured_graphs_and_common_variants_stay():
    model = compiled("order 2", backend="inductor")
    run(model, SCHEDULES["order 2"])
    session = compiled_forward(model).session
    program, captured = session.programs[0], session.captured
    variants, caches = dict(program.dispatcher.variants), smoothcache.report(model).cache_bytes
    other = Schedule(6, rows(OTHER), order=2)
    smoothcache.set_schedule(model, other)
    run(model, other)
    assert session.programs == [program] and session.captured == captured
    assert dict(program.dispatcher.variants) == variants and len(variants) == 2
    assert smoothcache.report(model).cache_bytes == caches  # the very buffers, which CUDA graphs know
    smoothcache.set_schedule(model, SCHEDULES["attention alone"])  # one variant more, in the caches of order 2
    run(model, SCHEDULES["attention alone"])
    assert set(variants) < set(program.dispatcher.variants)
    smoothcache.set_schedule(model, SCHEDULES["stacks"])
    run(model, SCHEDULES["stacks"])
    assert session.captured == captured and not set(variants) & set(program.dispatcher.variants)
    assert smoothcache.report(model).cache_bytes < caches  # those of branches are freed
    smoothcache.set_schedule(model, SCHEDULES["order 2"])
    run(model, SCHEDULES["order 2"])
    assert set(variants) < set(program.dispatcher.variants) and session.captured == captured


def test_a_report_counts_from_the_new_schedule_on():
    model = compiled()
    run(model, SCHEDULES["branches"])
    smoothcache.set_schedule(model, SCHEDULES["fewer steps"])
    assert smoothcache.report(model).calls == 0
    run(model, SCHEDULES["fewer steps"])
    report = smoothcache.report(model)
    assert (report.calls, report.steps, report.trajectories) == (6, 6, 1)
    assert all(group.computed == 3 * group.sites for group in report.groups)
    assert not report.forced


def test_a_trajectory_that_is_under_way_begins_again(alone):
    case, model = CASES["demo"], compiled()
    with contextlib.suppress(InterruptedError):
        calls = 0

        @contextlib.contextmanager
        def stop(step, stream):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise InterruptedError
            yield

        run_trajectory(case, model, steps=8, seed=3, dtype=torch.float32, around=stop)
    smoothcache.set_schedule(model, SCHEDULES["fewer steps"])
    for actual, expected in zip(run(model, SCHEDULES["fewer steps"]), alone["fewer steps"], strict=True):
        assert torch.equal(actual, expected)


def test_with_a_limit_of_memory_stacks_are_made_anew_for_each_schedule():
    model = compiled("branches", max_cache_bytes=10**9)
    run(model, SCHEDULES["branches"])
    taken = smoothcache.report(model).cache_bytes
    smoothcache.remove(model)
    model = compiled("branches", max_cache_bytes=taken)
    for name, kinds in (("branches", {"attn", "ffn"}), ("order 2", {"stack"}), ("branches", {"attn", "ffn"})):
        smoothcache.set_schedule(model, SCHEDULES[name])
        run(model, SCHEDULES[name])
        assert {group.kind for group in smoothcache.report(model).groups} == kinds
        assert smoothcache.report(model).cache_bytes <= taken


def test_what_the_model_does_not_have_is_said_at_the_next_call_and_can_be_set_right(alone):
    model = compiled()
    run(model, SCHEDULES["branches"])
    smoothcache.set_schedule(model, Schedule(6, {"blocks.7.attn": OTHER}))
    with pytest.raises(ScheduleError, match=r"blocks\.7\.attn"):
        run(model, SCHEDULES["fewer steps"])
    smoothcache.set_schedule(model, SCHEDULES["fewer steps"])
    for actual, expected in zip(run(model, SCHEDULES["fewer steps"]), alone["fewer steps"], strict=True):
        assert torch.equal(actual, expected)


def test_the_old_number_of_steps_is_refused():
    model = compiled()
    run(model, SCHEDULES["branches"])
    smoothcache.set_schedule(model, SCHEDULES["fewer steps"])
    with pytest.raises(StepError, match="6 steps"):
        run(model, SCHEDULES["branches"])


@pytest.mark.parametrize("given", [None, 3, "fast", {"attn": ROW}])
def test_what_is_no_schedule_is_refused(given):
    model = compiled()
    with pytest.raises(TypeError, match="schedule"):
        smoothcache.set_schedule(model, given)
    run(model, SCHEDULES["branches"])


def test_a_model_that_is_not_compiled_has_no_schedule_to_set():
    with pytest.raises(CompiledError, match="not compiled"):
        smoothcache.set_schedule(CASES["demo"].build(0), SCHEDULES["branches"])
    with pytest.raises(ScheduleError, match="give a Calibration"):
        smoothcache.set_schedule(compiled(), SCHEDULES["branches"], quality="high")


def test_a_capture_with_breaks_is_made_anew_for_stacks(caplog):
    """Branches and stacks may want other ways of capture where the graph breaks."""
    case = CASES["demo"]

    def build():
        model = case.build(0)
        block = model.blocks[1]
        forward = block.forward

        def with_break(*args, **kwargs):
            torch._dynamo.graph_break()
            return forward(*args, **kwargs)

        block.forward = with_break
        return model

    expected = {}
    for name in ("branches", "stacks"):
        model = smoothcache.compile(build(), SCHEDULES[name], backend="eager")
        expected[name] = run(model, SCHEDULES[name])
    model = smoothcache.compile(build(), SCHEDULES["branches"], backend="eager")
    with caplog.at_level(logging.WARNING):
        for name in ("branches", "stacks", "branches"):
            smoothcache.set_schedule(model, SCHEDULES[name])
            for actual, wanted in zip(run(model, SCHEDULES[name]), expected[name], strict=True):
                assert torch.equal(actual, wanted)


def test_threads_that_run_one_after_the_other_follow_the_schedule_that_was_set(alone):
    model, found = compiled(), {}

    def one(name):
        smoothcache.set_schedule(model, SCHEDULES[name])
        found[name] = run(model, SCHEDULES[name])

    for name in ("fewer steps", "stacks", "order 1"):
        thread = threading.Thread(target=one, args=(name,))
        thread.start()
        thread.join()
        for actual, expected in zip(found[name], alone[name], strict=True):
            assert torch.equal(actual, expected)


def test_graphs_with_symbolic_sizes_follow_too():
    def build():
        model = digits_model()
        model.blocks = model.blocks[:2]
        return model

    model = smoothcache.compile(build(), SCHEDULES["branches"], backend="eager", dynamic=True)
    for name, samples in (("branches", 2), ("branches", 3), ("stacks, order 2", 3), ("order 2", 4), ("branches", 2)):
        schedule = SCHEDULES[name]
        smoothcache.set_schedule(model, schedule)
        actual = sample(model, torch.arange(samples), steps=schedule.steps)
        own = smoothcache.compile(build(), schedule, backend="eager")
        assert torch.equal(actual, sample(own, torch.arange(samples), steps=schedule.steps))
        assert smoothcache.report(model).graphs == 1 and not smoothcache.report(model).forced
