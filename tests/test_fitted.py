"""Forecasts with coefficients that are given or fitted: what is run, what is fitted, and what is refused."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import smoothcache_fx as smoothcache
from helpers.cases import run_trajectory
from helpers.digits import digits_model
from helpers.models import CASES
from helpers.stack_oracle import StackOracle
from helpers.tolerances import COARSE, REORDERED, assert_close, assert_trajectories_close
from smoothcache_fx import CalibrationError, Schedule, ScheduleError
from smoothcache_fx.calibration.effects import Effects
from smoothcache_fx.calibration.fitted import FIT_INDEPENDENT, fitted_together, least_squares
from smoothcache_fx.calibration.products import group_matrix
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.schedules.coefficients import difference_coefficients, forecast_coefficients

ROW = (1, 1, 0, 1, 0, 0, 1, 0)
STEPS = len(ROW)
#: At step 2 only two outputs are there yet. They need not add up to 1.
GIVEN = ((), (), (1.5, -0.4), (), (2.0, -1.5, 0.4), (0.5, 0.3, 0.1), (), (1.2, -0.2, 0.1))


def fitted(selector: str, **more) -> Schedule:
    return Schedule(STEPS, {selector: ROW}, order=2, coefficients={selector: GIVEN}, **more)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_given_coefficients_are_what_is_read(backend):
    case = CASES["diffusers_sd3"]
    model = smoothcache.compile(case.build(0), fitted("transformer_blocks.0-2"), backend=backend)
    run = {"steps": STEPS, "seed": 1, "dtype": torch.float32}
    actual = run_trajectory(case, model, **run)
    smoothcache.remove(model)
    name = "transformer_blocks.0-2"
    with StackOracle(model, {name: ROW}, 2, coefficients={name: GIVEN}) as oracle:
        expected = run_trajectory(case, model, around=oracle.step, **run)
    assert_trajectories_close(actual, expected, REORDERED, backend)
    with StackOracle(model, {name: ROW}, 2) as oracle:
        polynomial = run_trajectory(case, model, around=oracle.step, **run)
    assert max(float((a - b).abs().max()) for a, b in zip(actual, polynomial, strict=True)) > 0.1


def test_a_history_of_differences_takes_any_coefficients():
    case = CASES["diffusers_dit"]
    outputs = []
    for dtype in (None, "float16"):
        model = smoothcache.compile(case.build(0), fitted("stack", history_dtype=dtype), backend="eager")
        outputs.append(run_trajectory(case, model, steps=STEPS, seed=1, dtype=torch.float32))
    for whole, differences in zip(*outputs, strict=True):
        assert_close(differences, whole, COARSE)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.lists(st.floats(-9, 9), min_size=4, max_size=4))
def test_differences_weigh_as_values_do(coefficients, values):
    values = values[: len(coefficients)]
    differences = [values[0], *(values[i - 1] - values[i] for i in range(1, len(values)))]
    converted = difference_coefficients(coefficients)
    assert np.dot(converted, differences) == pytest.approx(np.dot(coefficients, values), abs=1e-9)


def test_where_a_step_was_missed_the_polynomial_is_read():
    site = type("Site", (), {"name": "a.0.attn", "group": "a.*.attn", "kind": "attn"})
    schedule = fitted("attn")
    assert schedule.history_for(site, 4) == (3, 1, 0)
    assert schedule.forecast(site, 4, (3, 1, 0)) == GIVEN[4]
    assert schedule.forecast(site, 4, (3, 1)) == forecast_coefficients((3, 1), 4)
    assert schedule.forecast(site, 4, (3, 2, 1)) == forecast_coefficients((3, 2, 1), 4)
    assert schedule.forecast(site, 2, (1, 0)) == GIVEN[2]


def test_coefficients_go_through_a_file_and_copies(tmp_path):
    schedule = fitted("attn")
    schedule.save(tmp_path / "s.json")
    loaded = Schedule.load(tmp_path / "s.json")
    assert loaded == schedule == copy.deepcopy(schedule) and hash(loaded) == hash(schedule)
    assert loaded.coefficients == {"attn": GIVEN} and loaded != Schedule(STEPS, {"attn": ROW}, order=2)
    assert "with fitted coefficients" in str(loaded) and "coefficients=" in repr(loaded)


@pytest.mark.parametrize(
    "coefficients, message",
    [
        ([1.0], "coefficients is a list"),
        ({"attn": [(1.0,)] * 3}, "are of 3 steps, expected 8"),
        ({"attn": [(1.0, 2.0, 3.0, 4.0)] * STEPS}, "at step 0 are .*, expected at most 3 finite numbers"),
        ({"attn": [(float("nan"),)] * STEPS}, "finite numbers"),
        ({"attn": [1.0] * STEPS}, "finite numbers"),
        ({"attn": "none"}, "expected numbers for each of 8 steps"),
    ],
)
def test_bad_coefficients(coefficients, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(STEPS, {"attn": ROW}, order=2, coefficients=coefficients)


def error(products, weights):
    parts = np.array([-1.0, *weights])
    return float(parts @ products @ parts)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0, 1))
def test_fitted_weights_err_no_more_than_where_they_start(seed, count, shrinkage):
    generator = np.random.default_rng(seed)
    outputs = generator.normal(size=(count + 1, 32)) * generator.uniform(0.1, 2, size=(count + 1, 1))
    products, start = outputs @ outputs.T, generator.normal(size=count)
    weights = least_squares(products, start, shrinkage)
    assert error(products, weights) <= error(products, start) + 1e-9
    exact = np.linalg.lstsq(outputs[1:].T, outputs[0], rcond=None)[0]
    np.testing.assert_allclose(least_squares(products, start, 0.0), exact, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(least_squares(products, start, 1e12), start, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def calibrated():
    model = digits_model()

    def run(model):
        return sample(model, torch.arange(4), steps=12)

    return model, run, smoothcache.calibrate(model, run, lags=4, order=2, grain="stack", steps=12, progress=False)


def test_what_is_fitted_moves_the_sample_less_than_polynomials(calibrated):
    _, _, calibration = calibrated
    row = Schedule.uniform(12, 4).compute["attn"]
    plain = Schedule(12, {"blocks.0-11": row}, order=2)
    schedule = calibration.fit(plain)
    assert schedule.compute == plain.compute and schedule.order == 2
    fits = schedule.coefficients["blocks.0-11"]
    for step, coefficients in enumerate(fits):
        assert len(coefficients) == (0 if row[step] or step < 5 else min(3, 1 + step // 4))
        assert sum(coefficients) == pytest.approx(1) or not coefficients
    errors = [moved(calibration.effects, np.ones(12), fits, schedule, FIT_INDEPENDENT)]
    for order in (0, 1, 2):
        other = Schedule(12, plain.compute, order=order)
        errors.append(moved(calibration.effects, np.ones(12), [()] * 12, other, FIT_INDEPENDENT))
    assert 0 < errors[0] < min(errors[1:])


SITE = SimpleNamespace(name="blocks.0-11", group="blocks.0-11", kind="stack")


def moved(effects: Effects, importance, coefficients, schedule: Schedule, independent: float) -> float:
    """By how much the reused steps move the output, squared: together, and each by itself."""
    each = np.zeros((schedule.steps, effects.sketch.shape[-1]))
    for step, computed in enumerate(schedule.row_for(SITE)):
        history = [] if computed else list(schedule.history_for(SITE, step))
        given = coefficients[step] or schedule.polynomial(step, history) if history else ()
        for at, coefficient in zip(history, given, strict=True):
            each[step] += importance[step] * coefficient * effects.sketch[step, step - at]
    together = each.sum(0)
    return (1 - independent) * float(together @ together) + independent * float((each**2).sum())


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]), st.floats(0.05, 1))
@settings(max_examples=30, deadline=None)
def test_no_other_coefficients_move_the_sample_less(seed, order, independent):
    """Of those that add up to 1, without shrinkage: any change of them along the way makes the objective larger."""
    generator = np.random.default_rng(seed)
    sketch = generator.normal(size=(STEPS, STEPS, 16)).astype(np.float32)
    effects, importance = Effects(sketch, 1.0), generator.uniform(0.5, 2, STEPS)
    schedule = Schedule(STEPS, {"stack": ROW}, order=order)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("smoothcache_fx.calibration.fitted.FARTHEST", math.inf)
        found = fitted_together(effects, importance, schedule, SITE, independent)

    def objective(coefficients) -> float:
        return moved(effects, importance, coefficients, schedule, independent)

    least = objective(found)
    assert least <= objective([()] * STEPS) + 1e-9
    for step in range(STEPS):
        assert bool(found[step]) == (not ROW[step])
        if found[step]:
            change = generator.normal(size=len(found[step])) * 1e-2
            changed = [*found]
            changed[step] = tuple(np.array(found[step]) + change - change.mean())
            assert sum(changed[step]) == pytest.approx(1) and objective(changed) > least


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]), st.floats(0, 6))
@settings(max_examples=30, deadline=None)
def test_coefficients_stay_near_the_polynomials(seed, order, magnitudes):
    """Where steps count for very different amounts, those of little account must not make good for the others."""
    generator = np.random.default_rng(seed)
    effects = Effects(generator.normal(size=(STEPS, STEPS, 16)).astype(np.float32), 1.0)
    schedule = Schedule(STEPS, {"stack": ROW}, order=order)
    importance = 10 ** generator.uniform(-magnitudes, 0, STEPS)
    for step, coefficients in enumerate(fitted_together(effects, importance, schedule, SITE)):
        if len(coefficients) > 1:
            start = np.array(schedule.polynomial(step, schedule.history_for(SITE, step)))
            assert np.abs(np.array(coefficients) - start).sum() <= 3.001 * np.abs(start).sum()


def test_what_was_not_measured_keeps_the_polynomial():
    sketch = np.random.default_rng(0).normal(size=(STEPS, STEPS, 16)).astype(np.float32)
    sketch[4, 3] = np.nan
    found = fitted_together(Effects(sketch, 1.0), np.ones(STEPS), Schedule(STEPS, {"stack": ROW}, order=2), SITE)
    assert [bool(coefficients) for coefficients in found] == [False, False, True, False, False, True, False, True]
    near = fitted_together(Effects(sketch[:, :2], 1.0), np.ones(STEPS), Schedule(STEPS, {"stack": ROW}, order=1), SITE)
    assert not any(near)


def test_groups_with_rows_of_their_own_are_fitted_by_their_outputs():
    model = digits_model()
    calibration = smoothcache.calibrate(
        model, lambda model: sample(model, torch.arange(2), steps=8), lags=3, order=1, steps=8, progress=False
    )
    rows = {"blocks.*.attn": Schedule.uniform(8, 2).compute["attn"], "blocks.*.mlp": (1, 1, 0, 0, 1, 1, 0, 0)}
    schedule = calibration.fit(Schedule(8, rows, order=1))
    attention, feed_forward = (schedule.coefficients[group] for group in rows)
    assert attention[3] != feed_forward[3] and attention[3] and feed_forward[3]
    # The mean over the group's sites, each by its own size.
    products = group_matrix([site.products for site in calibration.sites if site.group == "blocks.*.mlp"])
    products = products[np.ix_([3, 1, 0], [3, 1, 0])]
    np.testing.assert_allclose(feed_forward[3], least_squares(products, np.array(forecast_coefficients([1, 0], 3))))


def test_a_schedule_is_planned_with_fits_and_choose_tries_them(calibrated):
    model, run, calibration = calibrated
    schedule = calibration.schedule(compute=0.4, order="fit")
    assert schedule.coefficients and schedule.order == 2 and schedule.compute_fraction <= 0.4
    planned = [calibration.schedule(compute=0.4, order=order) for order in (0, 1, 2)]
    fits = [calibration.fit(Schedule(12, plan.compute, order=2)) for plan in planned]
    assert schedule.compute in [plan.compute for plan in planned]
    assert calibration.predicted_error(schedule) <= 1.1 * min(map(calibration.predicted_error, fits))
    choice = smoothcache.choose(model, run, compute=0.4, orders=(1, "fit"), calibration=calibration, progress=False)
    assert {trial.schedule.coefficients is not None for trial in choice.trials} == {True, False}
    assert " fit " in str(choice)


def test_what_cannot_be_fitted(calibrated):
    model, run, calibration = calibrated
    with pytest.raises(CalibrationError, match="has 8 steps, the calibration 12"):
        calibration.fit(Schedule(8, {"stack": (1, 0) * 4}, order=1))
    with pytest.raises(CalibrationError, match="order 0"):
        calibration.fit(Schedule.uniform(12, 2))
    with pytest.raises(CalibrationError, match="expected 0, 1, 2 or 'fit'"):
        calibration.schedule(compute=0.5, order="fitted")
    bare = smoothcache.calibrate(model, run, order=None, grain="stack", steps=12, progress=False)
    with pytest.raises(CalibrationError, match="made without order"):
        bare.fit(Schedule(12, {"stack": (1, 0) * 6}, order=1))
    with pytest.raises(CalibrationError, match="no data for forecasts of order 1"):
        bare.schedule(compute=0.5, order="fit")
