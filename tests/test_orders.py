"""Reads that forecast: trajectories against the oracle's polynomials, and what a cache holds when."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import runpy

import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Stack, capture, inputs
from helpers.cases import Branch, Case, random_rows, randomize, run_trajectory
from helpers.digits import digits_model
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.tolerances import EXACT, SUMS, Tolerance, assert_as_exact, assert_close, assert_trajectories_close
from smoothcache_fx import Schedule, ScheduleError
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.forecast import FORECAST
from smoothcache_fx.passes.guard import guard, insert_guards, run_guarded
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize, variant_inputs
from smoothcache_fx.passes.verify import check_graph
from smoothcache_fx.schedules.coefficients import difference_coefficients, forecast_coefficients

STEPS = 10
# What is forecast is what the cache holds: where a norm follows a branch, the norm's output.
#: Weights are larger than one and of both signs, which enlarges the rounding errors of what they weigh.
ENLARGED = {"eager": Tolerance(1e-5, 1e-5), "aot_eager": Tolerance(1e-5, 1e-5), "inductor": Tolerance(1e-4, 1e-4)}
POST_NORM = {"attn": "norm1", "mlp": "norm2"}
TIMES = tuple(1.0 - (step / STEPS) ** 1.5 for step in range(STEPS))


def held(case: Case) -> dict[str, Branch]:
    if case.name != "post_norm":
        return dict(case.branches)
    renamed = {}
    for name, branch in case.branches.items():
        parent, _, last = branch.module.rpartition(".")
        renamed[name] = dataclasses.replace(branch, module=f"{parent}.{POST_NORM[last]}")
    return renamed


#: Half a unit in the last place of one, which is what rounding to the dtype can cost.
HISTORY = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
#: Of trajectories whose history holds differences, against full precision: rounded differences times their weights.
ROUNDED = {"float16": Tolerance(1e-3, 1e-3), "bfloat16": Tolerance(8e-3, 8e-3)}


def check(
    case: Case, order: int, backend: str, dtype: torch.dtype = torch.float32, times=None, history_dtype=None
) -> nn.Module:
    _, rows = random_rows(list(case.branches), STEPS, seed=order)
    orders = {site: (index + order) % 3 for index, site in enumerate(rows)} if order > 2 else dict.fromkeys(rows, order)
    tolerance = ENLARGED[backend] if history_dtype is None else ROUNDED[history_dtype]
    schedule = Schedule(STEPS, rows, order=order if order < 3 else orders, times=times, history_dtype=history_dtype)
    compiled = smoothcache.compile(case.build(0, dtype), schedule, backend=backend)
    with Oracle(case.build(0, dtype), held(case), rows, orders, times) as oracle:
        for seed in (1, 2):
            run = {"steps": STEPS, "seed": seed, "dtype": dtype}
            expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
            actual = run_trajectory(case, compiled, **run)
            if dtype is torch.float32:
                assert_trajectories_close(actual, expected, tolerance, f"{case.name}, seed {seed}")
                continue
            # A ring's values are added in the order of their slots: the float32 sum may be rounded otherwise.
            with Oracle(case.build(0, torch.float32), held(case), rows, orders, times) as precise:
                exact = run_trajectory(case, precise.model, around=precise.step, **{**run, "dtype": torch.float32})
            assert_as_exact(actual, expected, exact, f"{case.name}, seed {seed}")
    report = smoothcache.report(compiled)
    assert not report.forced
    assert report.variants == len(set(zip(*rows.values(), strict=True))), "weights are inputs: no variant more"
    return compiled


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_trajectories_equal_the_oracles(case):
    """Of sites of all orders side by side."""
    check(case, 3, "eager")


@pytest.mark.parametrize("times", [None, TIMES], ids=["steps", "times"])
@pytest.mark.parametrize("order", [1, 2])
def test_one_order_for_all(order, times):
    check(CASES["joint"], order, "eager", times=times)


def test_the_order_matters():
    """Else the tests above would pass without any forecast."""
    case = CASES["adaln_zero"]
    rows = {site: [1, 1, 1, 0, 0, 1, 0, 0, 1, 0] for site in case.branches}
    runs = []
    for order in (0, 1, 2):
        compiled = smoothcache.compile(case.build(), Schedule(STEPS, rows, order=order), backend="eager")
        runs.append(run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=torch.float32)[-1])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (runs[one] - runs[other]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_other_inner_compilers(backend):
    check(CASES["adaln_zero"], 2, backend)


def test_in_bfloat16_the_sum_is_in_float32():
    case = CASES["adaln_zero"]
    compiled = check(case, 2, "eager", torch.bfloat16)
    (program,) = compiled.forward.session.programs
    sums = [n for graph in program.builder.graphs.values() for n in graph.graph.nodes if FORECAST in n.meta]
    assert {node.meta["val"].dtype for node in sums if "mul" in node.name} == {torch.float32}


@pytest.fixture
def guarded():
    (program,) = capture(randomize(Stack(2), 0).eval(), *inputs())
    return program, insert_guards(program.builder.captured, program.builder.sites, 2)


@pytest.mark.parametrize("history_dtype", [None, torch.float16], ids=str)
def test_the_guarded_graph_is_the_variants_reference(guarded, history_dtype):
    """Caches and outputs of four steps of one variant each, from the same history."""
    program, graph = guarded
    if history_dtype is not None:
        graph = insert_guards(program.builder.captured, program.builder.sites, 2, history_dtype)
    check_graph(graph, like=program.builder.captured, stage="guarded")
    fakes = [node.meta["val"] for node in placeholders(graph.graph)]
    caches = [
        torch.randn(fake.shape).to(fake.dtype)
        for node, fake in zip(placeholders(graph.graph), fakes, strict=True)
        if "smoothcache_cache" in node.meta
    ]
    assert len(caches) == 3 * 4
    assert [cache.dtype for cache in caches[:3]] == [torch.float32] + 2 * [history_dtype or torch.float32]
    weights = torch.randn(len(caches))
    values = [torch.randn(fake.shape) for fake in fakes[: len(placeholders(program.builder.captured.graph))]]
    for mask in ([True, False, True, False], [False] * 4, [True] * 4, [False, True, True, True]):
        compute = {i for i, computed in enumerate(mask) if computed}
        variant = specialize(graph, compute, orders=[2] * 4)
        check_graph(variant, like=program.builder.captured, stage="variant")
        mine = [cache.clone() for cache in caches]
        everything = [*values, *mine, weights]
        (output,) = variant(*(everything[i] for i in variant_inputs(variant)))
        (expected,) = run_guarded(graph, values, caches, mask, weights)
        torch.testing.assert_close(output, expected)
        for one, other in zip(mine, caches, strict=True):
            torch.testing.assert_close(one, other)


def test_a_lower_order_leaves_nothing_of_the_higher(guarded):
    program, graph = guarded
    plain = insert_guards(program.builder.captured, program.builder.sites)
    for compute in ((), (0, 2), (0, 1, 2, 3)):
        low, expected = specialize(graph, compute), specialize(plain, compute)
        assert [str(node.target) for node in low.graph.nodes if node.op == "call_function"] == [
            str(node.target) for node in expected.graph.nodes if node.op == "call_function"
        ]
        assert len(placeholders(low.graph)) == len(placeholders(expected.graph))
        assert count_flops(specialize(graph, compute, orders=[1] * 4).graph) == count_flops(expected.graph)


def steps_of(model, values, count):
    with torch.no_grad():
        return [model(*values) for _ in range(count)]


ROWS = {"attn": [1, 1, 0, 1, 0, 0], "ffn": [1, 0, 1, 0, 0, 1]}


def test_nothing_of_another_trajectory_comes_through():
    """Not even not-a-number, of which a weight of zero makes not-a-number."""
    model = smoothcache.compile(randomize(Stack(2), 0).eval(), Schedule(6, ROWS, order=2), backend="eager")
    x, c = inputs()
    expected = steps_of(model, (x, c), 6)
    assert all(output.isnan().any() for output in steps_of(model, (torch.full_like(x, torch.nan), c), 6))
    for output, before in zip(steps_of(model, (x, c), 6), expected, strict=True):
        assert_close(output, before, EXACT)


def test_what_is_missed_lowers_the_degree():
    """After a change of shapes half-way: everything is computed once, and the degree begins at 0 again."""
    model = smoothcache.compile(randomize(Stack(2), 0).eval(), Schedule(6, ROWS, order=2), backend="eager")
    fresh = copy.deepcopy(smoothcache.remove(model))
    smoothcache.compile(model, Schedule(6, ROWS, order=2), backend="eager")
    small, large = inputs(2, 6), inputs(2, 9)
    steps_of(model, small, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(*large), fresh(*large))
    repeated = steps_of(model, large, 1)[0]
    assert smoothcache.report(model).forced == {"no value in this trajectory yet, at step 4": 4}
    assert not repeated.isnan().any()


def test_coefficients_are_made_once(monkeypatch):
    model = smoothcache.compile(randomize(Stack(2), 0).eval(), Schedule(6, ROWS, order=2), backend="eager")
    steps_of(model, inputs(), 6)
    (program,) = model.forward.session.programs
    made = []
    monkeypatch.setattr(program.builder, "coefficients", lambda values: made.append(values))
    steps_of(model, inputs(), 12)
    assert not made
    (binding,) = program.bindings
    assert len(binding._coefficients) == 5, "the steps that reuse something"


def test_memory_is_told_before_it_is_taken():
    model = randomize(Stack(2), 0).eval()
    schedule = Schedule(6, ROWS, order={"attn": 2, "blocks.1.mlp": 1})
    predicted = smoothcache.explain(model, *inputs(), schedule=schedule).prediction
    smoothcache.compile(model, schedule)  # Inductor narrows products: so does the prediction
    steps_of(model, inputs(), 6)
    report = smoothcache.report(model)
    assert predicted.cache_bytes == report.cache_bytes
    one = smoothcache.explain(smoothcache.remove(model), *inputs()).sites[0].cache_bytes
    assert report.cache_bytes == one * (2 * 3 + 1 + 2)
    assert predicted.variants == report.variants and predicted.mac_ratio == pytest.approx(report.mac_ratio)


def test_dumped_graphs_run(tmp_path):
    model = smoothcache.compile(randomize(Stack(1), 0).eval(), Schedule(6, ROWS, order=1), backend="eager")
    steps_of(model, inputs(), 6)
    smoothcache.dump(model, tmp_path)
    text = (tmp_path / "graph_0" / "guarded.py").read_text()
    assert "slot 1 of its ring" in text and "a cache's share in a forecast" in text
    (program,) = model.forward.session.programs
    for index, (mask, graph) in enumerate(program.builder.graphs.items()):
        module = runpy.run_path(str(tmp_path / "graph_0" / f"variant_{index}.py"))["Graph"]()
        torch.manual_seed(0)
        values = [torch.randn(node.meta["val"].shape) for node in placeholders(graph.graph)]
        again = [value.clone() for value in values]
        torch.testing.assert_close(module(*values), graph(*again), msg=str(mask))
    assert json.loads((tmp_path / "sites.json").read_text())["graphs"][0]["variants"]


def test_an_order_for_nothing_is_refused():
    model = smoothcache.compile(
        randomize(Stack(1), 0).eval(), Schedule(6, ROWS, order={"*.nothing": 1}), backend="eager"
    )
    with pytest.raises(ScheduleError, match="'[*].nothing', but the model has no such site"):
        steps_of(model, inputs(), 1)


@pytest.mark.parametrize("times", [None, TIMES], ids=["steps", "times"])
@pytest.mark.parametrize("history_dtype", HISTORY)
@pytest.mark.parametrize("order", [1, 2])
def test_a_history_of_differences(order, history_dtype, times):
    check(CASES["adaln_zero"], order, "eager", times=times, history_dtype=history_dtype)


def test_a_history_of_differences_under_another_inner_compiler():
    """Of sites of all orders side by side."""
    check(CASES["joint"], 3, "aot_eager", history_dtype="float16")


@pytest.mark.parametrize(("dtype", "history_dtype"), [(torch.float32, "float16"), (torch.bfloat16, None)], ids=str)
def test_inductor_takes_forecasts_that_change_dtypes(dtype, history_dtype):
    """A variant holds no op that Inductor expects to have taken apart at capture, such as a cast or a clamp of ATen."""
    x, c = (value.to(dtype) for value in inputs())
    outputs = {}
    for backend in ("eager", "inductor"):
        schedule = Schedule(3, {"attn": [1, 1, 0], "ffn": [1, 1, 0]}, order=1, history_dtype=history_dtype)
        model = smoothcache.compile(randomize(Stack(1), 0).eval().to(dtype), schedule, backend=backend)
        outputs[backend] = torch.stack(steps_of(model, (x, c), 1) + steps_of(model, (x * 2, c), 2)).float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs["inductor"], outputs["eager"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("history_dtype", HISTORY)
@pytest.mark.parametrize("order", [1, 2])
def test_rounding_the_differences_is_all_that_a_forecast_loses(order, history_dtype):
    """Bound for each number: half a unit in the last place of each difference, times its weight."""
    dtype, steps = getattr(torch, history_dtype), (0, 1, 4, 6, 9)
    values = 5 + torch.randn(len(steps), 4, 1000).cumsum(0)
    caches = [torch.zeros(4, 1000, dtype=dtype if age else torch.float32) for age in range(order + 1)]
    for number in range(len(steps)):
        if number:  # the oldest difference is written next
            caches[1:] = [caches[-1], *caches[1:-1]]
        guard(values[number], caches[0], True, caches[1:])
        held = list(range(number, max(-1, number - order - 1), -1))
        coefficients = forecast_coefficients([steps[i] for i in held], steps[number] + 2)
        own = difference_coefficients(coefficients)
        padded = torch.tensor([*own, *[0.0] * (order + 1 - len(own))])
        actual = guard(values[number], caches[0], False, caches[1:], padded)
        exact = sum(values[i].double() * coefficient for i, coefficient in zip(held, coefficients, strict=True))
        bound = (
            2e-5
            + sum(  # and of float32's own roundings
                (values[newer] - values[older]).abs() * abs(weight) * HISTORY[history_dtype]
                for newer, older, weight in zip(held, held[1:], own[1:], strict=False)
            )
        )
        assert ((actual - exact).abs() <= bound).all()


def test_differences_beyond_float16_are_cut_off():
    """The first is the output itself, has no weight, and must not be infinite: that times 0 is NaN."""
    caches = [torch.zeros(3), *torch.zeros(2, 3, dtype=torch.float16)]
    value = torch.tensor([1e6, -1e6, 1.0])
    guard(value, caches[0], True, caches[1:])
    assert caches[1].tolist() == [65504.0, -65504.0, 1.0]
    assert torch.equal(guard(value, caches[0], False, caches[1:], torch.tensor([1.0, 0.0, 0.0])), value)


@pytest.mark.parametrize("order", [1, 2])
def test_outputs_beyond_float16_stay_finite(order):
    """Outputs of 1e6 that do not change from step to step, so each forecast is one of them; in two trajectories."""
    model = randomize(Stack(2), 0).eval()
    with torch.no_grad():
        for block in model.blocks:
            for last in (block.attn.proj, block.mlp[2]):
                last.weight.mul_(1e7)
    values = inputs()
    (expected,) = steps_of(model, values, 1)
    smoothcache.compile(model, Schedule(6, ROWS, order=order, history_dtype="float16"), backend="eager")
    for output in steps_of(model, values, 12):
        assert_close(output, expected, SUMS)
    (program,) = model.forward.session.programs
    (stream,) = program.bindings[0].streams.values()
    held = [buffer for buffer in stream.buffers if buffer is not None]
    assert all(buffer.isfinite().all() for buffer in held)
    assert max(float(buffer.abs().max()) for buffer in held) > 1e6


DEMO_ROWS = {
    "attn": [1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1],
    "ffn": [1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1],
}


@pytest.mark.parametrize(("order", "history_dtype"), [(1, "float16"), (2, "bfloat16")])
def test_on_a_trained_model_the_differences_lose_little(order, history_dtype):
    """The error in the samples that rounding adds, 20 dB below what the forecasts themselves err by, or less."""
    full, rounded = (
        sample(
            smoothcache.compile(
                digits_model(), Schedule(20, DEMO_ROWS, order=order, history_dtype=dtype), backend="eager"
            ),
            [0, 3, 5, 8],
            steps=20,
        )
        for dtype in (None, history_dtype)
    )
    own, added = (full - sample(digits_model(), [0, 3, 5, 8], steps=20)).norm(), (rounded - full).norm()
    assert 0 < added and 20 * math.log10(own / added) >= 20


@pytest.mark.parametrize(
    ("dtype", "history_dtype", "share"),
    [(torch.float32, "float16", 0.5), (torch.float64, "bfloat16", 0.25), (torch.bfloat16, "float16", 1.0)],
    ids=str,
)
def test_the_memory_of_differences(dtype, history_dtype, share):
    """Half of float32's, as predicted; outputs of 16 bits keep their dtype, and are no differences."""
    model, values = randomize(Stack(2), 0).eval().to(dtype), [value.to(dtype) for value in inputs()]
    schedule = Schedule(6, ROWS, order={"attn": 2, "blocks.1.mlp": 1}, history_dtype=history_dtype)
    explanation = smoothcache.explain(model, *values, schedule=schedule)
    smoothcache.compile(model, schedule, backend="eager")
    steps_of(model, values, 6)
    one, report = explanation.sites[0].cache_bytes, smoothcache.report(model)
    assert explanation.prediction.cache_bytes == report.cache_bytes == one * (2 + 2 * 2 * share + 1 + 1 + share)
    (program,) = model.forward.session.programs
    assert len(program.bindings[0].sites[0].differences) == (0 if share == 1 else 2)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("history_dtype", [None, "float16"])
def test_a_store_writes_one_slot_and_moves_nothing(order, history_dtype):
    """One write a site, and one more of the difference where a history holds these; none from cache to cache."""
    case = CASES["adaln_zero"]
    rows = {site: [1, 1, 1, 0, 1, 0, 1, 0, 0, 0] for site in case.branches}
    schedule = Schedule(STEPS, rows, order=order, history_dtype=history_dtype if order else None)
    compiled = smoothcache.compile(case.build(), schedule, backend="eager")
    run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=torch.float32)
    (program,) = compiled.forward.session.programs
    full = max(program.builder.graphs.items(), key=lambda item: item[0].compute.bit_count())[1]
    writes = [node for node in full.graph.nodes if node.target is torch.ops.aten.copy_.default]
    differences = bool(order and history_dtype)
    assert len(writes) == len(case.branches) * (1 + differences)
    assert not [node for node in writes if "smoothcache_cache" in node.args[1].meta]


def test_what_reads_finds_its_caches_where_they_were():
    """As a CUDA graph must: a variant that reads has the same buffers at each call, one that stores a slot in turn."""
    case = CASES["adaln_zero"]
    row = [1, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    schedule = Schedule(STEPS, dict.fromkeys(case.branches, row), order=2)
    compiled = smoothcache.compile(case.build(), schedule, backend="eager")
    run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=torch.float32)
    (program,) = compiled.forward.session.programs
    addresses: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}

    def noting(variant, stores):
        run, first, end = variant.run, len(variant.inputs), len(variant.inputs) + len(variant.buffers)

        def call(arguments):
            addresses[stores].append(tuple(t.data_ptr() for t in arguments[first:end]))
            return run(arguments)

        return call

    for mask, variant in program.dispatcher.variants.items():
        variant.run = noting(variant, bool(mask.store))
    for seed in (1, 2):
        run_trajectory(case, compiled, steps=STEPS, seed=seed, dtype=torch.float32)
    assert len(set(addresses[False])) == 1
    stores = addresses[True]
    assert len(set(stores)) == 3 and stores[:6] == [*stores[:3], *stores[:3]], "a ring of three slots"
    assert stores[6:] == stores[:6], "the second trajectory is recorded already"
    assert len(set(addresses[False][0])) == 3 * len(set(stores[0]))
