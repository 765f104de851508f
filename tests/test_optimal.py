"""Optimal schedules: programs against trying all rows, what is measured against hooks, and what is predicted."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import smoothcache_fx as smoothcache
from helpers.digits import digits_model
from helpers.tolerances import REORDERED, assert_close
from smoothcache_fx import Calibration, CalibrationError, Schedule
from smoothcache_fx.calibration.effects import Effects
from smoothcache_fx.calibration.optimal import joint_plan
from smoothcache_fx.calibration.products import Products
from smoothcache_fx.calibration.segments import best_rows, segment_costs, share
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.reports.compare import psnr, relative_l2
from smoothcache_fx.schedules.coefficients import forecast_coefficients

STEPS = 12


def run(model, labels=(0, 1, 2, 3), steps=STEPS, seed=11):
    return sample(model, torch.tensor(labels), steps=steps, seed=seed)


@pytest.fixture(scope="module")
def model():
    return digits_model()


@pytest.fixture(scope="module")
def calibration(model):
    measured = smoothcache.calibrate(model, run, lags=3, order=2, progress=False)
    return smoothcache.measure_sensitivity(model, run, measured, probes=4, groups=True, progress=False)


def segments(row):
    """Each computed step with those before it, newest first, and how many are reused after it."""
    computed = [step for step, decision in enumerate(row) if decision]
    ends = [*computed[1:], len(row)]
    return [(computed[i::-1], ends[i] - computed[i] - 1) for i in range(len(computed))]


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 2), st.booleans(), st.integers(0, 999))
def test_rows_are_the_best_of_all(steps, lags, order, keep_last, seed):
    table = {}

    def cost(computed):
        if computed not in table:
            table[computed] = np.random.default_rng([seed, *computed]).integers(0, 50, lags).astype(float)
        return table[computed]

    total, rows = best_rows(segment_costs(steps, lags, order, cost), keep_last)
    best = np.full(steps + 1, np.inf)
    for row in itertools.product((False, True), repeat=steps):
        parts = segments(row)
        if row[0] and (row[-1] or not keep_last) and all(reused <= lags for _, reused in parts):
            price = sum(cost(tuple(seen[: order + 1]))[reused - 1] for seen, reused in parts if reused)
            best[sum(row)] = min(best[sum(row)], price)
    assert total.tolist() == best.tolist()
    for count, row in enumerate(rows):
        assert bool(row) == np.isfinite(best[count]) and (not row or sum(row) == count)
        if row:
            parts = segments(row)
            assert sum(cost(tuple(seen[: order + 1]))[n - 1] for seen, n in parts if n) == best[count]


@given(st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=1, max_size=3), st.data())
def test_a_budget_is_shared_as_is_best_of_all(curves, data):
    flops = data.draw(st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=len(curves), max_size=len(curves)))
    budget = data.draw(st.floats(0.3, 1.0))
    named = {str(i): np.array([np.inf, *curve], float) for i, curve in enumerate(curves)}
    prices = dict(zip(named, flops, strict=True))
    allowed = {
        counts: sum(curve[n] for curve, n in zip(named.values(), counts, strict=True))
        for counts in itertools.product(range(1, 5), repeat=len(named))
        if sum(n * f for n, f in zip(counts, flops, strict=True)) / (4 * sum(flops)) <= budget
    }
    if not allowed:
        with pytest.raises(CalibrationError, match="the least is"):
            share(named, prices, budget)
        return
    counts = tuple(share(named, prices, budget).values())
    assert allowed[counts] == min(allowed.values())


def test_products_give_a_forecasts_error(model, calibration):
    """Against the outputs themselves, kept by a hook: every element is looked at, as there are few."""
    kept = []
    hook = model.blocks[3].attn.register_forward_hook(lambda module, inputs, output: kept.append(output.double()))
    run(model)
    hook.remove()
    site = next(site for site in calibration.sites if site.name == "blocks.3.attn")
    matrix = site.products.matrix()
    assert np.isfinite(matrix[8, :9]).all()
    places, read = [8, 7, 4, 1], np.array([1.0, *(-w for w in forecast_coefficients([7, 4, 1], 8))])
    error = sum(w * kept[place] for w, place in zip(read, places, strict=True)).square().mean().item()
    predicted = read @ matrix[np.ix_(places, places)] @ read
    # 4096 of 8 * 16 * 160 elements, drawn at random.
    assert predicted == pytest.approx(error, rel=0.15)


def test_effects_are_what_reads_change_of_the_output(model, calibration):
    """Against hooks on all branches that replay what they gave lag steps before; norms to within the sketch's 9%."""
    kept, calls = {}, []
    branches = [getattr(block, name) for block in model.blocks for name in ("attn", "mlp")]

    def keep(module, inputs, output):
        kept.setdefault(module, []).append(output)

    keeping = model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    hooks = [branch.register_forward_hook(keep) for branch in branches]
    run(model)
    keeping.remove()
    for hook in hooks:
        hook.remove()
    for step, lag in ((1, 1), (6, 2), (9, 5)):
        hooks = [
            branch.register_forward_hook(lambda module, inputs, output, at=step - lag: kept[module][at])
            for branch in branches
        ]
        with torch.no_grad():
            read = model(*calls[step])
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            change = (read - model(*calls[step])).square().mean().sqrt().item()
        assert calibration.effects.size(lag)[step] == pytest.approx(change, rel=0.25)


def test_calibrating_changes_nothing_of_what_is_sampled(model):
    plain, seen = run(model), []
    state = torch.random.get_rng_state()
    smoothcache.calibrate(model, lambda model: seen.append(run(model)), lags=2, order=1, progress=False)
    assert torch.equal(seen[0], plain) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(STEPS, {"attn": [1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1], "ffn": [1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0]}),
        Schedule(
            STEPS,
            {"attn": [1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1], "ffn": [1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0]},
            order=2,
        ),
    ],
    ids=["order 0", "order 2"],
)
def test_a_followed_schedule_gives_the_compiled_models_trajectory(model, schedule):
    seen = []
    smoothcache.calibrate(
        model, lambda model: seen.append(run(model)), lags=2, order=0, schedule=schedule, progress=False
    )
    compiled = copy.deepcopy(model)
    smoothcache.compile(compiled, schedule, backend="eager")
    # A ring's values are added in the order of their slots, a calibration's newest first.
    assert_close(seen[0], run(compiled), REORDERED)
    assert not torch.allclose(seen[0], run(model), rtol=1e-3, atol=1e-3)


def test_a_followed_schedule_must_have_the_samplers_steps(model):
    for steps in (STEPS - 1, STEPS + 1):
        schedule = Schedule.uniform(steps, 2, kinds=("attn",))
        with pytest.raises(CalibrationError, match=f"the schedule to be followed.* {steps}"):
            smoothcache.calibrate(model, run, schedule=schedule, progress=False)
    with pytest.raises(CalibrationError, match="expected a Schedule"):
        smoothcache.calibrate(model, run, schedule="fast", progress=False)
    with pytest.raises(CalibrationError, match="made a str of a calibration"):
        smoothcache.calibrate(model, run, schedule=lambda calibration: "fast", progress=False)


@pytest.mark.parametrize(
    "budget",
    [{"alpha": 0.12}, {"compute": 0.5}, {"compute": 0.5, "solver": "optimal", "order": 1}],
    ids=["alpha", "compute", "optimal"],
)
def test_calibration_is_repeated_until_the_schedule_stays_the_same(model, budget):
    made = []

    def plan(calibration):
        made.append((calibration, calibration.schedule(**budget)))
        return made[-1][1]

    arguments = {"lags": 3, "order": budget.get("order"), "progress": False}
    found = smoothcache.calibrate(model, run, schedule=plan, **arguments)
    *before, (last, again) = made
    assert found is last and again in [schedule for _, schedule in before]
    followed = smoothcache.calibrate(model, run, schedule=before[-1][1], **arguments)
    for site, same in zip(found.sites, followed.sites, strict=True):
        np.testing.assert_array_equal(site.mean, same.mean)


def test_a_schedule_that_never_stays_the_same_is_left_with_a_warning(model, caplog):
    ways = iter(Schedule.uniform(STEPS, interval, kinds=("attn",)) for interval in (2, 3, 4, 5))
    runs = []

    def seen(model):
        runs.append(run(model, labels=(0,)))

    smoothcache.calibrate(model, seen, schedule=lambda calibration: next(ways), rounds=2, progress=False)
    assert len(runs) == 3 and len({tuple(image.flatten().tolist()) for image in runs}) == 3
    assert "still changes after 2 rounds" in caplog.text
    with pytest.raises(CalibrationError, match="rounds is 0"):
        smoothcache.calibrate(model, run, schedule=lambda calibration: next(ways), rounds=0, progress=False)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_is_predicted_is_what_comes_out(model, calibration, order):
    """Relative L2 distance of final samples, of the calibration's own seeds."""
    reference = run(model)
    for row in ([1, 0, 0] * 4, [1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1]):
        schedule = Schedule(STEPS, {"attn": row, "ffn": row}, order=order)
        compiled = copy.deepcopy(model)
        smoothcache.compile(compiled, schedule, backend="eager")
        actual = relative_l2(reference, run(compiled))
        assert actual / 2 < calibration.predicted_error(schedule) < actual * 2


@pytest.mark.parametrize("rows", ["joint", "group", "site"])
@pytest.mark.parametrize("order", [0, 1])
def test_optimal_schedules_keep_to_the_budget(calibration, rows, order):
    for compute in (0.4, 0.5, 0.75):
        schedule = calibration.schedule(compute=compute, solver="optimal", order=order, rows=rows)
        assert schedule.compute_fraction <= compute and schedule.order == order
        assert compute - schedule.compute_fraction < (0.09 if rows == "joint" else 0.05)
        assert len(schedule.compute) == (24 if rows == "site" else 2)
    last = calibration.schedule(compute=0.5, solver="optimal", order=order, rows=rows, keep_last=True)
    assert all(row[-1] for row in last.compute.values())


def test_an_optimal_schedule_is_predicted_to_be_best(calibration):
    for order, count in ((0, 6), (1, 5), (2, 4)):
        plan = joint_plan(calibration, order, None)
        (row,) = set(calibration.schedule(compute=count / STEPS, solver="optimal", order=order).compute.values())
        evenly = [round(i * STEPS / count) for i in range(count)]
        for others in (evenly, [0, *(step + 1 for step in evenly[1:])]):
            assert plan.error(row) <= plan.error([step in others for step in range(STEPS)])


def test_the_longest_reuse(model, calibration):
    """Two of twelve steps: what three lags cannot, eight can, and it is as far off as predicted."""
    with pytest.raises(CalibrationError):
        calibration.schedule(compute=2 / STEPS, solver="optimal", order=1)
    longer = smoothcache.calibrate(model, run, lags=8, order=1, progress=False)
    longer = smoothcache.measure_sensitivity(model, run, longer, probes=4, progress=False)
    for count in (2, 3):
        schedule = longer.schedule(compute=count / STEPS, solver="optimal", order=1)
        (row,) = set(schedule.compute.values())
        assert sum(row) == count and 3 < max(reused for _, reused in segments(row)) <= 8
        compiled = copy.deepcopy(model)
        smoothcache.compile(compiled, schedule, backend="eager")
        actual = relative_l2(run(model), run(compiled))
        assert actual / 2 < longer.predicted_error(schedule) < actual * 2


def test_an_optimal_schedule_is_nearer_to_the_uncached_sample(model, calibration):
    """Than the paper's rule at no less compute, on seeds that the calibration has not seen."""
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    reference = run(model, labels, seed=5)

    def quality(schedule):
        compiled = copy.deepcopy(model)
        smoothcache.compile(compiled, schedule, backend="eager")
        return psnr(reference, run(compiled, labels, seed=5))

    greedy = calibration.schedule(compute=0.5, solver="greedy")
    optimal = calibration.schedule(compute=greedy.compute_fraction, solver="optimal", order=1)
    assert quality(optimal) > quality(greedy) + 1


def test_times_change_the_plan_and_its_prediction(calibration):
    times = [1.0 / (1 + step) for step in range(STEPS)]
    schedule = calibration.schedule(compute=0.4, solver="optimal", order=1, times=times)
    assert schedule.times == tuple(times)
    even = Schedule(STEPS, schedule.compute, order=1)
    assert calibration.predicted_error(schedule) != calibration.predicted_error(even)


def test_files_keep_all(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == calibration and loaded.sensitivity.keys() == {"*", *calibration.groups}
    schedules = [each.schedule(compute=0.4, solver="optimal", order=2) for each in (calibration, loaded)]
    assert schedules[0] == schedules[1]


def test_merging_adds_effects_and_products(model, calibration):
    other = smoothcache.calibrate(model, lambda model: run(model, seed=12), lags=3, order=2, progress=False)
    both = calibration.merge(other)
    squares = [one.effects.size(1)[1:] ** 2 for one in (calibration, other, both)]
    assert np.allclose(squares[2], (squares[0] + squares[1]) / 2, rtol=0.4)
    assert both.sites[0].products.count[5, 2] == 2
    means = [one.sites[0].products.mean[5, 2] for one in (calibration, other, both)]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2)
    assert both.sensitivity.keys() == calibration.sensitivity.keys()


def test_bad_requests_are_refused(model, calibration):
    plain = smoothcache.calibrate(model, run, order=None, progress=False)
    for arguments, message in (
        ({"compute": 0.5, "solver": "best"}, "solver is 'best', expected 'greedy' or 'optimal'"),
        ({"alpha": 0.1, "solver": "optimal"}, "takes compute="),
        ({"compute": 0.1, "solver": "optimal"}, "the least is"),
        ({"compute": 0.5, "solver": "optimal", "rows": "block"}, "rows is 'block'"),
    ):
        with pytest.raises(CalibrationError, match=message):
            calibration.schedule(**arguments)
    with pytest.raises(CalibrationError, match="order=1"):
        plain.schedule(compute=0.5, solver="optimal", order=1)
    with pytest.raises(CalibrationError, match="calibrate\\(..., order=1\\)"):
        smoothcache.measure_sensitivity(model, run, plain, progress=False)
    with pytest.raises(CalibrationError, match="one row and one order"):
        calibration.predicted_error(plain.schedule(alpha=0.3))
    with pytest.raises(CalibrationError, match="order is 3"):
        smoothcache.calibrate(model, run, order=3, progress=False)
    with pytest.raises(CalibrationError, match=f"took {STEPS - 2} calls of the model, expected {STEPS} each"):
        smoothcache.measure_sensitivity(model, lambda model: run(model, steps=STEPS - 2), calibration, progress=False)
    with pytest.raises(CalibrationError, match="no probe changed"):
        smoothcache.measure_sensitivity(
            model, lambda model: (run(model), torch.ones(3))[1], calibration, probes=1, progress=False
        )


def test_rows_of_groups_need_no_order_for_reuse(model):
    """What the paper's calibration measures is enough for order 0."""
    plain = smoothcache.calibrate(model, run, order=None, progress=False)
    schedule = plain.schedule(compute=0.5, solver="optimal", rows="group")
    assert schedule.compute.keys() == plain.groups.keys() and schedule.compute_fraction <= 0.5
    joint = plain.schedule(compute=0.5)
    assert len(set(joint.compute.values())) == 1 and joint.order == 0 and joint.variants == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data["effects"].update(float32="!"), "effects cannot be read"),
        (lambda data: data["effects"].update(shape=[1]), "effects"),
        (lambda data: data["sensitivity"].update({"*": [1.0]}), "impossible sensitivity"),
        (lambda data: data["sensitivity"].update(other=[1.0] * STEPS), "impossible sensitivity of 'other'"),
        (lambda data: data["sites"][0]["products"].pop("mean"), "products"),
    ],
)
def test_broken_files_are_refused(calibration, tmp_path, change, message):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(path)


def test_sketches_keep_norms():
    generator = np.random.default_rng(0)
    sketch = generator.normal(size=(5, 3, 256)).astype(np.float32)
    effects = Effects(sketch, 10.0)
    assert effects.size(2) == pytest.approx(np.linalg.norm(sketch[:, 2].astype(float), axis=-1))
    with pytest.raises(CalibrationError, match="impossible effects"):
        Effects(sketch[0], 1.0)
    with pytest.raises(CalibrationError, match="cannot merge effects"):
        effects.merge(Effects(sketch[:4], 1.0))


def test_products_of_other_shapes_are_refused():
    good = Products.empty(4, 2)
    with pytest.raises(CalibrationError, match="products"):
        Products(good.count[:2], good.mean)
    with pytest.raises(CalibrationError, match="impossible products"):
        Products(good.count + 1, np.zeros((4, 3)))
    with pytest.raises(CalibrationError, match="cannot merge products"):
        good.merge(Products.empty(4, 1))


def test_a_plan_that_reuses_for_too_long_costs_infinitely_much(calibration):
    plan = joint_plan(calibration, 1, None)
    assert plan.error([True] + [False] * 4 + [True] * 7) == np.inf
    assert np.isfinite(plan.error([True] + [False] * 3 + [True] * 8))
