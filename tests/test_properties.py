"""What must hold for every DiT, every schedule and every way to misuse them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from helpers.cases import Branch, Case, group_of, randomize, run_trajectory
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.random_dits import architectures, random_case
from helpers.tolerances import SAME_KERNELS, assert_trajectories_close, excess
from smoothcache_fx import CompiledError, NoSitesError, Schedule, ScheduleError, SmoothCacheError, StepError

Rows = dict[str, list[int]]
#: As the profile says (conftest.py); an example here compiles a model, so it takes part of a second.
EXAMPLES = settings().max_examples
ALLOWED = SAME_KERNELS[torch.float32]


def rows(steps: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1).map(lambda tail: [1, *tail])


@st.composite
def schedules(draw: st.DrawFn, branches: Mapping[str, Branch]) -> tuple[Schedule, Rows]:
    """A schedule that selects by kind, group and name, and the row that each site must follow by it."""
    steps = draw(st.integers(2, 6))
    kinds = {branch.kind for branch in branches.values()}
    selectors = [*sorted(kinds), *dict.fromkeys(map(group_of, branches)), *branches]
    chosen = draw(st.lists(st.sampled_from(selectors), unique=True, max_size=5))
    compute = {selector: draw(rows(steps)) for selector in chosen}
    always = [1] * steps
    followed = {
        name: compute.get(name, compute.get(group_of(name), compute.get(branch.kind, always)))
        for name, branch in branches.items()
    }
    return Schedule(steps, compute), followed


@settings(max_examples=EXAMPLES * 3 // 10)
@given(data=st.data(), architecture=architectures, streams=st.integers(1, 2))
def test_every_dit_follows_every_schedule(architecture, streams, data):
    case = random_case(architecture)
    schedule, followed = data.draw(schedules(case.branches), label="schedule")
    check(case, schedule, followed, streams)


def check(case: Case, schedule: Schedule, followed: Rows, streams: int = 1) -> None:
    torch._dynamo.reset()
    model = randomize(case.make(), 0)
    compiled = smoothcache.compile(model, schedule, backend="eager", calls_per_step=streams)
    with Oracle(randomize(case.make(), 0), case.branches, followed) as oracle:
        for seed in (1, 2):
            run = {"steps": schedule.steps, "seed": seed, "dtype": torch.float32, "streams": streams}
            expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
            actual = run_trajectory(case, compiled, **run)
            assert_trajectories_close(actual, expected, ALLOWED, f"trajectory {seed}")
    report = smoothcache.report(compiled)
    names: dict[str, list[str]] = {}
    for name in case.branches:
        names.setdefault(group_of(name), []).append(name)
    assert {g.group: (g.kind, g.sites, g.computed) for g in report.groups} == {
        group: (case.branches[sites[0]].kind, len(sites), sum(oracle.calls[site] for site in sites))
        for group, sites in names.items()
    }
    assert not report.forced
    assert report.variants == len(set(zip(*followed.values(), strict=True)))


# Misuse of a schedule


def spoil_length(row: list[int]) -> list[int]:
    return [*row, 1]


def spoil_first(row: list[int]) -> list[int]:
    return [0, *row[1:]]


def spoil_value(row: list[int]) -> list[int]:
    return [*row[:-1], 2]


@given(
    row=st.integers(2, 8).flatmap(rows),
    spoil=st.sampled_from([spoil_length, spoil_first, spoil_value]),
    others=st.lists(st.sampled_from(["attn", "ffn", "blocks.*.mlp"]), unique=True),
)
def test_a_malformed_row_is_a_schedule_error(row, spoil, others):
    good = {selector: row for selector in others}
    Schedule(len(row), good)
    with pytest.raises(ScheduleError, match="spoiled"):
        Schedule(len(row), {**good, "spoiled": spoil(row)})


UNKNOWN = ["blocks.*.nothing", "blocks.99.attn", "transformer_blocks.*", "nothing"]


@pytest.mark.parametrize("selector", UNKNOWN)
def test_an_unknown_selector_lists_the_groups_of_the_model(selector):
    case = CASES["adaln_zero"]
    schedule = Schedule(2, {"blocks.*.attn": [1, 0], selector: [1, 0]})
    model = smoothcache.compile(case.build(), schedule, backend="eager")
    for _ in range(2):
        with pytest.raises(ScheduleError) as raised:
            run_trajectory(case, model, steps=2, seed=1, dtype=torch.float32)
        assert repr(selector) in str(raised.value)
        for name, branch in case.branches.items():
            assert f"{group_of(name)} ({branch.kind})" in str(raised.value)


def test_kinds_that_the_model_lacks_are_allowed():
    case = CASES["adaln_zero"]
    check(
        case,
        Schedule(2, {"attn": [1, 0], "cross_attn": [1, 0]}),
        {name: [1, 0] if branch.kind == "attn" else [1, 1] for name, branch in case.branches.items()},
    )


def test_contradictory_globs_are_a_schedule_error():
    case = CASES["adaln_zero"]
    schedule = Schedule(2, {"blocks.?.attn": [1, 0], "blocks.0.att?": [1, 1]})
    model = smoothcache.compile(case.build(), schedule, backend="eager")
    with pytest.raises(ScheduleError, match="blocks.0.attn"):
        run_trajectory(case, model, steps=2, seed=1, dtype=torch.float32)


# Misuse of a model


@pytest.mark.parametrize("function", [smoothcache.remove, smoothcache.reset, smoothcache.report])
def test_what_needs_a_compiled_model_says_so(function):
    with pytest.raises(CompiledError, match=r"^\w+ is not compiled: call smoothcache.compile"):
        function(CASES["adaln_zero"].build())
    with (
        pytest.raises(CompiledError, match="not compiled"),
        smoothcache.disabled(CASES["adaln_zero"].build()),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"schedule": {"attn": [1, 0]}}, TypeError),
        ({"calls_per_step": 0}, ValueError),
        ({"calls_per_step": 1.5}, ValueError),
        ({"backend": None}, TypeError),
        ({"mode": "default", "options": {"x": 1}}, ValueError),
    ],
)
def test_arguments_of_compile_are_checked(arguments, error):
    model = CASES["adaln_zero"].build()
    with pytest.raises(error):
        smoothcache.compile(model, **{"schedule": Schedule(2, {"attn": [1, 0]}), **arguments})
    assert "forward" not in vars(model)


def test_many_models_of_one_class_are_compiled_and_cached():
    """Dynamo keeps its code by the class's forward, and gives up on a function after eight versions of it."""
    case = CASES["ungated"]
    schedule = Schedule(2, {"attn": [1, 0], "ffn": [1, 0]})
    followed = {name: [1, 0] for name in case.branches}
    for seed in range(12):
        model = smoothcache.compile(case.build(seed), schedule, backend="eager")
        with Oracle(case.build(seed), case.branches, followed) as oracle:
            run = {"steps": 2, "seed": seed, "dtype": torch.float32}
            expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
            assert_trajectories_close(run_trajectory(case, model, **run), expected, ALLOWED, f"model {seed}")
        assert all(group.reused == group.sites for group in smoothcache.report(model).groups)
        if seed % 2:
            smoothcache.remove(model)


class Sampler(RuleBasedStateMachine):
    """Any sequence of right and wrong calls of one model: each does what it must, or raises what it must.

    ``next`` is the step that the model's next call is; ``done`` how many calls the trajectory has had.
    """

    CASE = CASES["adaln_zero"]
    STEPS = 4
    ROWS: Sequence[Rows] = (
        {"blocks.*.attn": [1, 0, 1, 0], "blocks.*.mlp": [1, 0, 0, 1]},
        {"blocks.1.attn": [1, 0, 0, 0], "blocks.*.mlp": [1, 1, 0, 0]},
        {},
    )

    @initialize(rows=st.sampled_from(ROWS))
    def build(self, rows: Rows) -> None:
        self.model, self.plain, self.reference = (self.CASE.build() for _ in range(3))
        self.stack = contextlib.ExitStack()
        self.oracle: Oracle | None = None
        self.calls = self.done = 0
        self.compile(rows)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()
            torch._dynamo.reset()

    def call(self, model: nn.Module, t: float, seed: int, **changes: Tensor) -> Tensor:
        latents, (conditioning,) = self.CASE.inputs(seed, torch.float32)
        return self.CASE.call(model, changes.get("latents", latents), t, conditioning)

    @property
    def time(self) -> float:
        return 1 - self.done / self.STEPS

    compiled = precondition(lambda self: self.oracle is not None)
    uncompiled = precondition(lambda self: self.oracle is None)

    @uncompiled
    @rule(rows=st.sampled_from(ROWS))
    def compile(self, rows: Rows) -> None:
        assert smoothcache.compile(self.model, Schedule(self.STEPS, rows), backend="eager") is self.model
        followed = {name: rows.get(name, rows.get(group_of(name), [1] * self.STEPS)) for name in self.CASE.branches}
        self.oracle = self.stack.enter_context(Oracle(self.reference, self.CASE.branches, followed))
        self.done = 0

    @compiled
    @rule(steps=st.integers(1, STEPS - 1))
    def sample(self, steps: int) -> None:
        for _ in range(steps):
            self.done %= self.STEPS
            self.calls += 1
            with torch.no_grad(), self.oracle.step(self.done):
                expected = self.call(self.reference, self.time, self.calls)
            assert excess(self.call(self.model, self.time, self.calls), expected, ALLOWED) <= 1
            self.done += 1

    @compiled
    @rule(steps=st.integers(1, STEPS))
    def reset(self, steps: int) -> None:
        smoothcache.reset(self.model)
        self.done = 0
        self.sample(steps)

    @compiled
    @rule()
    def disable(self) -> None:
        with smoothcache.disabled(self.model), torch.no_grad():
            output = self.call(self.model, 0.3, 0)
            assert torch.equal(output, self.call(self.plain, 0.3, 0))
        self.sample(1)

    @compiled
    @rule()
    def remove(self) -> None:
        assert smoothcache.remove(self.model) is self.model
        self.stack.close()
        self.oracle = None
        with torch.no_grad():
            assert torch.equal(self.call(self.model, 0.3, 0), self.call(self.plain, 0.3, 0))
        assert self.model.state_dict().keys() == self.plain.state_dict().keys()

    @compiled
    @rule()
    def compile_twice(self) -> None:
        with pytest.raises(CompiledError, match="remove"):
            smoothcache.compile(self.model, Schedule(self.STEPS), backend="eager")

    @compiled
    @rule()
    def train(self) -> None:
        self.model.train()
        with pytest.raises(CompiledError, match="eval"):
            self.call(self.model, self.time, 0)
        self.model.eval()

    @compiled
    @rule()
    def require_gradients(self) -> None:
        latents, _ = self.CASE.inputs(0, torch.float32)
        with pytest.raises(CompiledError, match="detach"):
            self.call(self.model, self.time, 0, latents=latents.requires_grad_())

    @precondition(lambda self: self.oracle is not None and 1 < self.done < self.STEPS)
    @rule()
    def begin_anew_too_early(self) -> None:
        with torch.no_grad():
            expected = self.call(self.plain, 1.0, 0)
        assert excess(self.call(self.model, 1.0, 0), expected, ALLOWED) <= 1
        self.reset(1)  # else what comes after may be of the trajectory that was cut short

    @precondition(lambda self: self.oracle is not None and self.done == self.STEPS)
    @rule()
    def go_on_too_long(self) -> None:
        with pytest.raises(StepError, match=rf"goes on after {self.STEPS} steps"):
            for _ in range(2):  # the first may begin a trajectory in which the timesteps turn
                self.call(self.model, self.time, 0)
                self.done += 1
        self.done = 0

    @uncompiled
    @rule(selector=st.sampled_from(UNKNOWN))
    def compile_for_another_model(self, selector: str) -> None:
        smoothcache.compile(self.model, Schedule(self.STEPS, {selector: [1, 0, 0, 0]}), backend="eager")
        with pytest.raises(ScheduleError, match=r"blocks\.\*\.attn"):
            self.call(self.model, 1.0, 0)
        smoothcache.remove(self.model)

    @uncompiled
    @rule(function=st.sampled_from([smoothcache.remove, smoothcache.reset, smoothcache.report]))
    def use_uncompiled(self, function) -> None:
        with pytest.raises(CompiledError, match="not compiled"):
            function(self.model)


TestSampler = Sampler.TestCase
TestSampler.settings = settings(max_examples=EXAMPLES * 3 // 20, stateful_step_count=12)


def test_every_error_is_a_smoothcache_error():
    for error in (ScheduleError, CompiledError, StepError, NoSitesError, smoothcache.CalibrationError):
        assert issubclass(error, SmoothCacheError) and issubclass(error, ValueError)
