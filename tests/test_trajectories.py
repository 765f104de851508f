"""Compiled trajectories against the oracle's, for every model, dtype and backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from helpers.cases import Case, group_of, random_rows, run_trajectory
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.tolerances import (
    ROUNDING,
    assert_as_exact,
    assert_trajectories_close,
    excess,
    rounding_ratios,
    tolerance,
    worst,
)
from smoothcache_fx import Schedule

STEPS = 8
DTYPES = [torch.float32, torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def schedule_for(case: Case) -> tuple[Schedule, dict[str, list[int]]]:
    return random_rows(list(case.branches), STEPS, seed=list(CASES).index(case.name))


def distinct_masks(rows: dict[str, list[int]]) -> int:
    return len(set(zip(*rows.values(), strict=True)))


def explain(case: Case, model: nn.Module) -> smoothcache.Explanation:
    """``smoothcache.explain`` for the inputs of the case."""
    latents, (conditioning,) = case.inputs(1, torch.float32)
    found = []

    class Explained(nn.Module):
        def __call__(self, *args, **kwargs):
            found.append(smoothcache.explain(model, *args, **kwargs))
            raise StopIteration

    with pytest.raises(StopIteration):
        case.call(Explained(), latents, 1.0, conditioning)
    return found[0]


@each_case
def test_the_sites_are_found_under_their_names(case):
    sites = explain(case, case.build()).sites
    assert {site.name: (site.kind, len(site.shapes)) for site in sites} == {
        name: (branch.kind, branch.outputs) for name, branch in case.branches.items()
    }
    assert len(sites) == len(case.branches), "a name occurs twice"
    assert {site.name: site.group for site in sites} == {name: group_of(name) for name in case.branches}


@each_case
def test_trajectories_equal_the_oracles(case):
    """Two trajectories of different noise, one after the other, at every step; and what was decided."""
    check_trajectories(case, torch.float32, "eager")


@pytest.mark.parametrize("name", ["adaln_zero", "cross_attention", "joint", "post_norm", "tied"])
def test_trajectories_equal_the_oracles_in_bfloat16(name):
    check_trajectories(CASES[name], torch.bfloat16, "aot_eager")


@pytest.mark.parametrize(
    "dtype, backend",
    [(torch.float32, "aot_eager"), (torch.bfloat16, "aot_eager")],
    ids=["float32-aot_eager", "bfloat16-aot_eager"],
)
@each_case
def test_trajectories_equal_the_oracles_under_compilers(case, dtype, backend):
    check_trajectories(case, dtype, backend)


def check_trajectories(case: Case, dtype: torch.dtype, backend: str) -> None:
    schedule, rows = schedule_for(case)
    compiled = smoothcache.compile(case.build(0, dtype), schedule, backend=backend)
    with Oracle(case.build(0, dtype), case.branches, rows) as oracle:
        for seed in (1, 2):
            run = {"steps": STEPS, "seed": seed, "dtype": dtype}
            expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
            actual = run_trajectory(case, compiled, **run)
            assert_trajectories_close(
                actual, expected, tolerance(dtype, backend), f"{case.name}, trajectory {seed}, {schedule!r}"
            )
    report = smoothcache.report(compiled)
    computed, sites = Counter(), Counter(map(group_of, rows))
    for site, runs in oracle.calls.items():
        computed[group_of(site)] += runs
    assert {g.group: g.computed for g in report.groups} == computed
    assert {g.group: g.computed + g.reused for g in report.groups} == {
        group: 2 * STEPS * count for group, count in sites.items()
    }
    assert not report.forced
    assert report.variants == distinct_masks(rows)


def test_trajectories_equal_the_oracles_under_inductor():
    check_trajectories(CASES["adaln_zero"], torch.float32, "inductor")


def oracle_trajectory(case: Case, rows: dict[str, list[int]], dtype: torch.dtype) -> list[Tensor]:
    with Oracle(case.build(0, dtype), case.branches, rows) as oracle:
        return run_trajectory(case, oracle.model, steps=STEPS, seed=1, dtype=dtype, around=oracle.step)


def test_bfloat16_under_inductor_is_as_exact_as_the_oracle():
    """And with one wrong decision it would not be."""
    case = CASES["cross_attention"]
    schedule, rows = schedule_for(case)
    exact, expected = (oracle_trajectory(case, rows, dtype) for dtype in (torch.float32, torch.bfloat16))
    compiled = smoothcache.compile(case.build(0, torch.bfloat16), schedule)
    for _ in range(2):
        actual = run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=torch.bfloat16)
        assert_as_exact(actual, expected, exact, repr(schedule))
    for site, row in rows.items():
        step = row.index(0)
        wrong = {**rows, site: [*row[:step], 1, *row[step + 1 :]]}
        ratios = rounding_ratios(oracle_trajectory(case, wrong, torch.bfloat16), expected, exact)
        assert max(ratios) > 2 * ROUNDING, site


@each_dtype
@each_case
def test_an_all_compute_schedule_is_the_plain_model_bit_for_bit(case, dtype):
    plain, model = case.build(0, dtype), case.build(0, dtype)
    smoothcache.compile(model, Schedule(2, {site: [1, 1] for site in case.branches}), backend="eager")
    run = {"steps": 2, "seed": 1, "dtype": dtype}
    assert all(map(torch.equal, run_trajectory(case, model, **run), run_trajectory(case, plain, **run)))
    smoothcache.remove(model)
    assert all(map(torch.equal, run_trajectory(case, model, **run), run_trajectory(case, plain, **run)))


def ops_run(call: Callable[[], object]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return Counter(event.name.removeprefix("aten::") for event in profile.events())


def products_with_weights(ops: Counter[str]) -> int:
    return ops["addmm"] + ops["mm"]


@each_case
def test_a_step_that_reuses_everything_runs_no_product_of_a_branch(case):
    """Counted on what really runs: products with weights drop by exactly the branches' own; no attention."""
    model = case.build()
    latents, (conditioning,) = case.inputs(1, torch.float32)
    with torch.no_grad():
        plain = ops_run(lambda: case.call(model, latents, 0.5, conditioning))
        smoothcache.compile(model, Schedule(3, dict.fromkeys(case.branches, (1, 0, 0))), backend="eager")
        case.call(model, latents, 1.0, conditioning)
        case.call(model, latents, 0.7, conditioning)
        reused = ops_run(lambda: case.call(model, latents, 0.5, conditioning))
    attention = [op for op in plain if "scaled_dot_product" in op]
    assert attention and not any(reused[op] for op in attention)
    assert reused["gelu"] + reused["silu"] < plain["gelu"] + plain["silu"]
    own = sum(branch.matmuls for branch in case.branches.values()) + case.shared_matmuls
    assert products_with_weights(plain) - products_with_weights(reused) == own


def guided(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Two calls a step with different conditioning: ours, and the oracle's."""
    schedule, rows = schedule_for(case)
    compiled = smoothcache.compile(case.build(0, dtype), schedule, backend="eager", calls_per_step=2)
    actual, expected = [], []
    with Oracle(case.build(0, dtype), case.branches, rows) as oracle:
        for seed in (1, 2):
            run = {"steps": STEPS, "seed": seed, "dtype": dtype, "streams": 2}
            expected += run_trajectory(case, oracle.model, around=oracle.step, **run)
            actual += run_trajectory(case, compiled, **run)
    return actual, expected


@pytest.mark.parametrize("name", ["adaln_zero", "cross_attention", "joint", "tied", "demo", "diffusers_pixart"])
def test_two_calls_a_step_keep_separate_caches(name):
    actual, expected = guided(CASES[name])
    assert_trajectories_close(actual, expected, tolerance(torch.float32), name)


def test_a_shared_cache_of_two_calls_would_be_seen():
    case = CASES["adaln_zero"]
    _, rows = schedule_for(case)
    with Oracle(case.build(), case.branches, rows) as oracle:
        run = {"steps": STEPS, "seed": 1, "dtype": torch.float32, "streams": 2}
        separate = run_trajectory(case, oracle.model, around=oracle.step, **run)
        shared = run_trajectory(case, oracle.model, around=lambda step, stream: oracle.step(step), **run)
    assert worst(shared, separate, tolerance(torch.float32)) > 1000


@each_dtype
def test_a_wrong_decision_would_be_seen(dtype):
    """One entry of the schedule is changed for the compiled model alone: from there on it is far off."""
    case = CASES["adaln_zero"]
    _, rows = schedule_for(case)
    expected = oracle_trajectory(case, rows, dtype)
    row = rows["blocks.2.mlp"]
    step = row.index(0)
    wrong = {**rows, "blocks.2.mlp": [*row[:step], 1, *row[step + 1 :]]}
    compiled = smoothcache.compile(case.build(0, dtype), Schedule(STEPS, wrong), backend="eager")
    actual = run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=dtype)
    assert_trajectories_close(actual[:step], expected[:step], tolerance(dtype), "before the step")
    assert excess(actual[step], expected[step], tolerance(dtype)) > 1000


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode], ids=["enable_grad", "inference_mode"])
def test_trajectories_are_the_same_in_every_grad_mode(mode):
    case = CASES["cross_attention"]
    schedule, rows = schedule_for(case)
    compiled = smoothcache.compile(case.build(), schedule, backend="eager")
    expected = oracle_trajectory(case, rows, torch.float32)
    for _ in range(2):
        actual = run_trajectory(
            case, compiled, steps=STEPS, seed=1, dtype=torch.float32, around=lambda step, stream: mode()
        )
        assert not any(output.requires_grad for output in actual)
        assert_trajectories_close(actual, expected, tolerance(torch.float32), str(mode))
    assert smoothcache.report(compiled).graphs == 1


# Graphs that depend on a length, as where a rotary table is cut: a server meets many.


class ByLength(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = {n: torch.linspace(0, 1, n)[None, :, None] for n in range(64)}
        self.ffn = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))

    def forward(self, x, timestep):
        x = x + timestep[:, None, None] / 1000 + self.tables[x.shape[1]]
        return x + self.ffn(x)


@torch.no_grad()
def sample_length(model, length, steps=4):
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))
    for step in range(steps):
        x = x - 0.1 * model(x, torch.full((2,), 1000.0 * (1 - step / steps)))
    return x


@pytest.fixture
def by_length():
    torch.manual_seed(0)
    return smoothcache.compile(ByLength().eval(), Schedule.uniform(4, 2), backend="eager")


def test_more_lengths_than_dynamo_captures_by_itself(by_length):
    lengths = range(8, 32, 2)
    assert len(lengths) > torch._dynamo.config.recompile_limit
    for length in lengths:
        sample_length(by_length, length)
    report = smoothcache.report(by_length)
    assert report.uncompiled_calls == 0 and not report.forced
    assert report.mac_ratio == pytest.approx(2.0)


def test_caches_of_other_lengths_are_freed(by_length):
    bytes_of = lambda length: 2 * length * 16 * 4
    taken = []
    for length in (40, 8, 12, 16, 20, 24, 28):
        sample_length(by_length, length)
        taken.append(smoothcache.report(by_length).cache_bytes)
    assert max(taken) <= 2 * bytes_of(40) and taken[-1] >= bytes_of(28)
    assert not smoothcache.report(by_length).forced


def test_two_lengths_in_turn_keep_their_caches(by_length):
    """CUDA graphs find them where they were."""
    places = []
    for length in (12, 16) * 3:
        sample_length(by_length, length)
        bindings = [binding for program in by_length.forward.session.programs for binding in program.bindings]
        places.append(
            {b.data_ptr() for one in bindings for s in one.streams.values() for b in s.buffers if b is not None}
        )
    assert places[2] == places[3] == places[4] == places[5] and len(places[5]) == 2
