"""The clock: which step, stream and trajectory a call is, and when a sampler does not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothcache_fx import StepError
from smoothcache_fx.runtime.calls import Call, TimestepReader
from smoothcache_fx.runtime.clock import Clock
from smoothcache_fx.runtime.scheduler_clock import DenoiserClock, SchedulerClock


def ticks(clock, timesteps):
    seen = []
    for timestep in timesteps:
        moment = clock.tick(timestep)
        seen.append((moment.trajectory, moment.step, moment.stream))
    return seen


@given(steps=st.integers(1, 9), calls=st.integers(1, 3), trajectories=st.integers(1, 3))
def test_counts_without_timesteps(steps, calls, trajectories):
    clock = Clock(steps, calls)
    expected = [(n, s, c) for n in range(trajectories) for s in range(steps) for c in range(calls)]
    assert ticks(clock, [None] * len(expected)) == expected
    assert (clock.trajectories, clock.steps_begun) == (trajectories, trajectories * steps)


@given(steps=st.integers(2, 9), calls=st.integers(1, 3), falling=st.booleans())
def test_counts_with_timesteps(steps, calls, falling):
    run = [s for s in range(steps) for _ in range(calls)]
    times = [steps - t if falling else t for t in run] * 2
    assert ticks(Clock(steps, calls), map(float, times))[-1] == (1, steps - 1, calls - 1)


def test_a_sampler_with_fewer_steps_is_told_both_numbers(caplog):
    clock = Clock(5)
    ticks(clock, [3.0, 2.0, 1.0])
    assert not caplog.records
    assert ticks(clock, [3.0, 2.5]) == [(1, 0, 0), (1, 1, 0)], "the next trajectory starts clean"
    assert "the sampler began anew after 3 steps, but the schedule has 5 steps" in caplog.text


def test_other_timesteps_than_those_of_the_last_trajectory_are_told_at_the_first_of_them(caplog):
    clock = Clock(4)
    ticks(clock, [4.0, 3.0, 2.0, 1.0, 4.0])
    assert not caplog.records
    ticks(clock, [2.0])
    assert "step 1 of 4 is at timestep 2, where the last whole trajectory had 3" in caplog.text
    assert ticks(clock, [4.0, 3.0, 2.0, 1.0]) == [(2, 0, 0), (2, 1, 0), (2, 2, 0), (2, 3, 0)]
    assert len(caplog.records) == 2, "each is told once"


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_other_timesteps_than_the_schedules_are_told(caplog, scale):
    """Models are given the scheduler's timesteps or those over 1000."""
    clock = Clock(3, timesteps=[900.0, 600.0, 300.0])
    ticks(clock, [900.0 * scale, 600.0 * scale, 300.0 * scale])
    assert not caplog.records
    ticks(clock, [900.0 * scale, 500.0 * scale])
    assert "step 1 of 3 is at timestep" in caplog.text and "where the schedule was made for 600" in caplog.text


def test_a_sampler_with_more_steps_is_told_both_numbers():
    clock = Clock(3)
    assert ticks(clock, [5.0, 4.0, 3.0, 2.0])[-1] == (1, 0, 0), "it may be the first of another trajectory"
    with pytest.raises(StepError, match="schedule's 3 steps: it goes on after 3 steps"):
        clock.tick(1.0)
    assert ticks(clock, [5.0, 4.0]) == [(2, 0, 0), (2, 1, 0)], "after the error the next call starts clean"


@pytest.mark.parametrize("first", [4.0, 3.0, 2.0])
def test_inversion_then_sampling(first):
    """The direction turns, with or without a gap in the timesteps, or with one timestep twice."""
    times = [1.0, 2.0, 3.0, first, first - 1.0, first - 2.0]
    clock = Clock(3)
    assert [step for _, step, _ in ticks(clock, times)] == [0, 1, 2] * 2 and clock.trajectories == 2


def test_a_first_frame_that_stays_clean_is_no_repeated_timestep():
    """Timesteps by frame, of which that of the image that a video begins with is 0 at each step."""
    clock, reader = Clock(3), TimestepReader(lambda x, timestep: x)
    for _ in range(2):
        for step in range(3):
            call = Call("Model", reader, (0, torch.tensor([[0.0, 3.0 - step, 3.0 - step]])), {})
            assert clock.enter(call).step == step
    clock.enter(call)
    with pytest.raises(StepError, match="twice in a row"):
        clock.enter(call)


def test_two_calls_at_one_timestep_need_to_be_told_how_many_make_a_step():
    clock = Clock(3)
    clock.tick(5.0)
    with pytest.raises(StepError, match=r"the model was called twice in a row at timestep 5\. .* calls_per_step=2"):
        clock.tick(5.0)
    assert ticks(Clock(3, 2), [5.0, 5.0, 4.0]) == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert ticks(Clock(3, 1), [5.0, 5.0, 4.0]) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]


def test_more_calls_than_steps_after_an_explicit_begin():
    clock = Clock(2)
    clock.begin()
    ticks(clock, [None, None])
    with pytest.raises(StepError, match="goes on after 2 steps"):
        clock.tick(None)


def test_begin_ends_a_trajectory_half_way():
    clock = Clock(5)
    ticks(clock, [5.0, 4.0])
    clock.begin()
    assert ticks(clock, [5.0, 4.0]) == [(1, 0, 0), (1, 1, 0)]


def test_a_failed_call_ends_the_trajectory():
    clock = Clock(5)
    ticks(clock, [5.0, 4.0])
    clock.abandon()
    assert ticks(clock, [5.0]) == [(1, 0, 0)]


def test_going_back_a_little_is_no_new_trajectory():
    """Resampling (RePaint) goes back to noisier steps within a trajectory."""
    clock = Clock(6)
    clock.begin()
    assert ticks(clock, [9.0, 7.0, 5.0, 7.0, 5.0, 3.0])[-1] == (0, 5, 0)


def test_a_constant_timestep_says_nothing():
    assert ticks(Clock(2, 1), [1.0] * 4) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


# Two samplers share a bare model.


@settings(max_examples=500)
@given(
    steps=st.integers(2, 6),
    shifts=st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([1.0, 2.0, 3.0])),
    order=st.lists(st.booleans(), min_size=12, max_size=12),
    whole_before=st.booleans(),
)
def test_no_call_reads_what_another_sampler_has_cached(steps, shifts, order, whole_before):
    """Each runs a trajectory of the schedule's steps, in turns that nobody has told the clock of."""
    clock = Clock(steps)
    runs = [
        [shift * sigma / (1 + (shift - 1) * sigma) for sigma in (1.0 - step / steps for step in range(steps))]
        for shift in shifts
    ]
    if whole_before:
        ticks(clock, runs[0])
    timesteps = list(map(iter, runs))
    writers: dict[int, int] = {}
    for which in map(int, order):
        timestep = next(timesteps[which], None)
        if timestep is None:
            continue
        try:
            moment = clock.tick(timestep)
        except StepError:
            return  # refused
        if moment.step and moment.trajectory in writers:
            assert writers[moment.trajectory] == which, "the other sampler's"
        writers[moment.trajectory] = which


def test_a_second_thread_is_refused_while_a_trajectory_is_under_way():
    clock = Clock(3)
    ticks(clock, [3.0, 2.0])
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(StepError, match="during another thread's trajectory, after 2 of its calls"):
            other.submit(clock.tick, 2.0).result()
        assert ticks(clock, [3.0, 2.0, 1.0])[-1] == (1, 2, 0)
        assert other.submit(ticks, clock, [3.0, 2.0, 1.0]).result()[-1] == (2, 2, 0)


def test_without_steps_a_trajectory_is_as_long_as_it_turns_out():
    assert ticks(Clock(None), [3.0, 2.0, 1.0, 3.0, 2.0]) == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((0, torch.tensor([7, 7])), {}, 7.0),
        ((0,), {"timestep": 0.5}, 0.5),
        ((0, torch.tensor(3.0)), {}, 3.0),
        ((0, None), {}, None),
        ((0,), {}, None),
        ((0, torch.tensor([], dtype=torch.float32)), {}, None),
        ((0, torch.empty(1, device="meta")), {}, None),
    ],
)
def test_reading_a_timestep(args, kwargs, expected):
    def forward(x, timestep=None): ...

    assert TimestepReader(forward).read(args, kwargs) == expected


def test_a_model_without_a_timestep_argument():
    def forward(x, c): ...

    assert TimestepReader(forward).read((1, 2), {}) is None


# Clocks that follow a scheduler.


class Scheduler:
    """The least that a scheduler is."""

    def __init__(self):
        self.timesteps = torch.arange(1000, 0, -1)

    def set_timesteps(self, steps):
        self.timesteps = torch.linspace(1000, 100, steps)

    def step(self, output, timestep, sample):
        return sample - 0.1 * output


class Pipeline:
    def __init__(self):
        self.scheduler = Scheduler()


def model_call(text, timestep=0.0):
    def forward(x, timestep, text): ...

    return Call("Model", TimestepReader(forward), (), {"x": torch.zeros(1), "timestep": timestep, "text": text})


def entered(clock, text, timestep=0.0):
    moment = clock.enter(model_call(text, timestep))
    return moment.step, moment.stream


@given(calls=st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_any_number_of_calls_makes_one_step(calls):
    pipeline, shared = Pipeline(), SchedulerClock(len(calls))
    clock = DenoiserClock(shared)
    shared.attach(pipeline)
    texts = [torch.zeros(1) for _ in range(3)]
    for run in range(2):
        pipeline.scheduler.set_timesteps(len(calls))
        for step, count in enumerate(calls):
            seen = [entered(clock, texts[i]) for i in range(count)]
            assert seen == [(step, (None, i)) for i in range(count)]
            pipeline.scheduler.step(0.0, 0.0, 0.0)
        assert clock.steps_begun == (run + 1) * sum(count > 0 for count in calls)
        assert shared.unfinished == 0


@given(steps=st.lists(st.permutations(range(3)), min_size=2, max_size=6), absent=st.data())
def test_a_stream_is_known_by_a_tensor_that_stays(steps, absent):
    pipeline, shared = Pipeline(), SchedulerClock(len(steps))
    clock = DenoiserClock(shared)
    shared.attach(pipeline)
    pipeline.scheduler.set_timesteps(len(steps))
    texts = [torch.zeros(1) for _ in range(3)]
    streams = {}
    for index, order in enumerate(steps):
        for which in order:
            if index and absent.draw(st.booleans()):
                continue
            _, stream = entered(clock, texts[which])
            assert streams.setdefault(which, stream) == stream
        pipeline.scheduler.step(0.0, 0.0, 0.0)
    assert len(set(streams.values())) == 3


def test_the_scheduler_is_watched_through_a_subclass_that_comes_off_again():
    pipeline, clocks = Pipeline(), [SchedulerClock(3), SchedulerClock(3)]
    for clock in clocks:
        clock.attach(pipeline)
    assert type(pipeline.scheduler) is not Scheduler and type(pipeline.scheduler).__name__ == "Scheduler"
    with pytest.raises(StepError, match="Scheduler was set to 4 timesteps, but the schedule has 3 steps"):
        pipeline.scheduler.set_timesteps(4)
    clocks[0].detach()
    assert type(pipeline.scheduler) is not Scheduler
    clocks[1].detach()
    assert type(pipeline.scheduler) is Scheduler
    pipeline.scheduler.set_timesteps(4)


def test_two_runs_that_take_turns_are_computed_in_full():
    first, second, shared = Pipeline(), Pipeline(), SchedulerClock(3)
    clock = DenoiserClock(shared)
    for pipeline in (first, second):
        shared.attach(pipeline)
        pipeline.scheduler.set_timesteps(3)
    text = torch.zeros(1)
    entered(clock, text)
    first.scheduler.step(0.0, 0.0, 0.0)  # the second run's was next
    trajectories = set()
    for _ in range(3):
        assert entered(clock, text) == (0, None)
        trajectories.add(clock.latest.trajectory)
    assert len(trajectories) == 3, "no call finds a cache"
