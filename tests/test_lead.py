"""Forecasts that aim ahead of their step: what they read, what is predicted of them, and how near samples come."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import smoothcache_fx as smoothcache
from helpers.cases import run_trajectory
from helpers.digits import digits_model
from helpers.models import CASES
from helpers.stack_oracle import StackOracle
from helpers.tolerances import REORDERED, assert_trajectories_close
from smoothcache_fx import Calibration, CalibrationError, Schedule, ScheduleError
from smoothcache_fx.calibration.effects import Effects
from smoothcache_fx.calibration.site_errors import SiteErrors
from smoothcache_fx.cli.main import main
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.measure.metrics import over_samples
from smoothcache_fx.reports.compare import psnr

STEPS = 12
ROW = [step % 3 == 0 for step in range(STEPS)]


@settings(max_examples=50, deadline=None)
@given(
    order=st.integers(1, 2),
    lead=st.floats(0.01, 1),
    gaps=st.lists(st.floats(0.1, 3), min_size=STEPS, max_size=STEPS),
    rising=st.booleans(),
)
def test_a_polynomial_is_read_where_the_forecast_aims(order, lead, gaps, rising):
    times = np.cumsum(gaps) * (1 if rising else -1)
    schedule = Schedule(STEPS, {"attn": ROW}, order=order, times=times.tolist(), lead=lead)
    for step, computed in ((5, (3, 0, 1)), (STEPS - 1, (9, 6, 3))):
        computed = computed[: order + 1]
        following = min(step + 1, STEPS - 1)
        at = times[step] + lead * (times[following] - times[following - 1])
        values = [times[each] ** order for each in computed]
        assert np.dot(schedule.polynomial(step, computed), values) == pytest.approx(at**order, rel=1e-6, abs=1e-6)


def test_a_lead_goes_through_files_and_copies(tmp_path):
    schedule = Schedule(STEPS, {"attn": ROW}, order=1, lead=0.5)
    schedule.save(tmp_path / "schedule.json")
    for other in (
        Schedule.load(tmp_path / "schedule.json"),
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
    ):
        assert other == schedule and hash(other) == hash(schedule) and other.lead == 0.5
    assert schedule != dataclasses.replace(schedule, lead=0.0)
    assert "0.5 of a step ahead" in str(schedule) and "lead=0.5" in repr(schedule)
    assert "lead" not in repr(Schedule(STEPS, {"attn": ROW}, order=1))


@pytest.mark.parametrize(
    ("order", "lead", "message"),
    [
        (1, -0.1, "lead is -0.1, expected a number from 0 to 1"),
        (1, 1.5, "lead is 1.5"),
        (1, "half", "lead is 'half'"),
        (1, float("nan"), "lead is nan"),
        (0, 0.5, "order is 0, so that nothing is forecast"),
    ],
)
def test_a_lead_that_cannot_be(order, lead, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(STEPS, {"attn": ROW}, order=order, lead=lead)


def linear(slope: float = 1.0) -> Calibration:
    """Of a model whose output goes along a line: reading i steps back is i slopes off."""
    lags = np.arange(STEPS)
    sketch = np.zeros((STEPS, STEPS, 4), np.float32)
    sketch[..., 0] = np.where(lags[None] <= lags[:, None], -slope * lags[None], np.nan)
    sketch[..., 1:] = np.where(np.isnan(sketch[..., :1]), np.nan, 0.0)
    site = SiteErrors.empty("blocks.0.attn", "blocks.*.attn", "attn", 1.0, lags=3, steps=STEPS)
    for step in range(STEPS):
        for lag in range(1, min(3, step) + 1):
            site.add(lag, step, 0.1)
    return Calibration(STEPS, 3, [site], effects=Effects(sketch, 1.0))


def test_errors_are_predicted_to_what_a_forecast_aims_at():
    calibration = linear()
    schedules = {lead: Schedule(STEPS, {"attn": ROW}, order=1, lead=lead) for lead in (0.0, 0.5, 1.0)}
    known = [calibration.predicted_error(schedule) for schedule in schedules.values()]
    # The second and third step have one output to read; later ones lie on the line through two, wherever they aim.
    assert known == pytest.approx([1 + 2, 1.5 + 2.5, 2 + 3], rel=1e-5)


@pytest.mark.parametrize("lead", [0.25, 1.0])
def test_what_is_read_is_what_an_eager_cache_reads(lead):
    case, name = CASES["diffusers_sd3"], "transformer_blocks.0-2"
    run = {"steps": STEPS, "seed": 1, "dtype": torch.float32}
    model = smoothcache.compile(case.build(0), Schedule(STEPS, {name: ROW}, order=1, lead=lead), backend="eager")
    actual = run_trajectory(case, model, **run)
    smoothcache.remove(model)
    # From the third computed step on, of two outputs three steps apart.
    ahead = [(step % 3 + lead) / 3 for step in range(STEPS)]
    lines = [() if step < 3 or ROW[step] else (1 + ahead[step], -ahead[step]) for step in range(STEPS)]
    with StackOracle(model, {name: ROW}, 1, coefficients={name: lines}) as oracle:
        expected = run_trajectory(case, model, around=oracle.step, **run)
    assert_trajectories_close(actual, expected, REORDERED, "eager")
    with StackOracle(model, {name: ROW}, 1) as oracle:
        at_the_step = run_trajectory(case, model, around=oracle.step, **run)
    assert max(float((a - b).abs().max()) for a, b in zip(actual, at_the_step, strict=True)) > 0.01


@pytest.fixture(scope="module")
def digits():
    return digits_model()


def euler(steps: int):
    return lambda model: sample(model, torch.arange(6), steps=steps, seed=3)


def test_samples_come_nearer_to_converged_ones(digits):
    steps = 30
    converged = euler(4 * steps)(digits)
    row = [step % 2 == 0 for step in range(steps)]
    schedule = Schedule(steps, dict.fromkeys(("attn", "ffn"), row), order=2)
    model = smoothcache.compile(copy.deepcopy(digits), schedule, backend="eager")
    plain = psnr(converged, euler(steps)(model))
    graphs = smoothcache.report(model).graphs
    smoothcache.set_schedule(model, dataclasses.replace(schedule, lead=0.5))
    led = psnr(converged, euler(steps)(model))
    assert led > plain + 0.5, f"{led:.1f} dB, {plain:.1f} dB at the step"
    assert smoothcache.report(model).graphs == graphs


@pytest.fixture(scope="module")
def calibration(digits):
    return smoothcache.calibrate(digits, euler(12), lags=4, order=2, grain="stack", progress=False)


def test_schedules_for_converged_samples(calibration):
    plain, led = (calibration.schedule(compute=0.5, order=1, target=target) for target in ("uncached", "converged"))
    assert plain.lead == 0 and led == dataclasses.replace(plain, lead=0.5)
    assert calibration.schedule(compute=0.5, order=0, target="converged").lead == 0, "there is nothing to forecast"
    fitted = calibration.schedule(compute=0.5, order="fit", target="converged")
    assert fitted.lead == 0.5 and fitted.coefficients
    assert calibration.predicted_error(fitted) <= calibration.predicted_error(
        dataclasses.replace(fitted, coefficients=None)
    )
    with pytest.raises(CalibrationError, match="target is 'best', expected 'uncached' or 'converged'"):
        calibration.schedule(compute=0.5, target="best")


def test_schedules_for_converged_samples_by_command(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    made, file = ["schedule", "--order", "1", "--target", "converged"], str(tmp_path / "schedule.json")
    assert main([*made, str(tmp_path / "calibration.json"), "--compute", "0.5", "-o", file]) == 0
    assert Schedule.load(file) == calibration.schedule(compute=0.5, order=1, target="converged")
    assert main([*made, "--interval", "3", "--steps", "12", "-o", file]) == 0
    assert Schedule.load(file) == dataclasses.replace(Schedule.uniform(12, 3), order=1, lead=0.5)


def test_what_is_fitted_alone_has_no_lead():
    alone = dataclasses.replace(linear(), effects=None)
    with pytest.raises(CalibrationError, match="made without order"):
        alone.fit(Schedule(STEPS, {"attn": ROW}, order=1, lead=0.5))


def test_rows_of_their_own_are_not_fitted_ahead(digits):
    calibration = smoothcache.calibrate(digits, euler(12), lags=3, order=1, progress=False)
    rows = {"attn": ROW, "ffn": [step % 2 == 0 for step in range(STEPS)]}
    with pytest.raises(
        CalibrationError, match="aim 0.5 of a step ahead: these are fitted where all groups share a row"
    ):
        calibration.fit(Schedule(STEPS, rows, order=1, lead=0.5))
    assert calibration.fit(Schedule(STEPS, rows, order=1)).coefficients


def test_choose_finds_what_comes_nearest_to_a_target(digits):
    model = copy.deepcopy(digits)
    model.blocks = model.blocks[:4]
    targets = []

    def target(model):
        targets.append(euler(48)(model))
        return targets[0]

    settings = {"compute": 0.5, "orders": (0, 2), "lags": 3, "probes": 1, "trajectories": 14, "progress": False}
    choice = smoothcache.choose(model, euler(12), target=target, over="median", **settings)
    assert len(targets) == 1
    assert {trial.schedule.lead for trial in choice.trials} == {0.0, 0.25, 0.5}
    assert choice.schedule.lead and "2 +0." in str(choice)
    assert choice.metric == max(trial.metric for trial in choice.trials)
    assert choice.expected.median == pytest.approx(choice.metric, abs=0.01)
    for wrong, message in (({"over": "worst"}, "over is 'worst'"), ({"target": "converged"}, "expected a function")):
        with pytest.raises((CalibrationError, TypeError), match=message):
            smoothcache.choose(model, euler(12), **(settings | wrong))


def test_what_a_metric_is_of():
    uncached = torch.zeros(3, 1, 8, 8)
    cached = uncached + torch.tensor([0.0, 0.01, 1.0]).view(3, 1, 1, 1)
    seen = []

    def worst(uncached, cached):
        seen.append(cached.shape)
        return -float((uncached - cached).abs().max())

    values = {over: over_samples(worst, over)(uncached, cached) for over in ("pooled", "mean", "median")}
    assert values == pytest.approx({"pooled": -1.0, "mean": -1.01 / 3, "median": -0.01})
    assert seen == [cached.shape, *[torch.Size((1, 1, 8, 8))] * 6]
    pictures = [Image.fromarray(np.full((8, 8), shade, np.uint8)) for shade in (0, 100)]
    assert over_samples(lambda a, b: float(np.mean(b[0])), "mean")(pictures, pictures) == 50
    with pytest.raises(CalibrationError, match="without tensors, arrays or images"):
        over_samples(worst, "mean")({"text": "a"}, {"text": "b"})
