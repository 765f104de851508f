"""Calibrations at other steps than they were made with: positions, interpolation, schedules, what is refused."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import smoothcache_fx as smoothcache
from helpers.digits import digits_model
from smoothcache_fx import Calibration, CalibrationError
from smoothcache_fx.calibration.effects import Effects
from smoothcache_fx.calibration.noise_levels import noise_levels_of
from smoothcache_fx.calibration.products import Products
from smoothcache_fx.calibration.segments import reach
from smoothcache_fx.calibration.site_errors import SiteErrors
from smoothcache_fx.calibration.transfer import positions, resampled
from smoothcache_fx.demo.sampler import sample

LAGS = 5


def output(position: np.ndarray) -> np.ndarray:
    """A site's output along the trajectory, as a smooth function of the position in [0, 1]: [n, 6]."""
    phases = np.arange(1, 7) / 3
    return np.stack([np.sin(phases * (1 + 2 * position)) + 2 for phases in phases], axis=-1)


def calibration_at(at: np.ndarray, lags: int = LAGS, order: int = 2, **more) -> Calibration:
    """What would be measured at these positions of one site with that output, on which the model's depends linearly."""
    y, steps, farthest = output(at), len(at), reach(lags, order)
    site = SiteErrors.empty("blocks.0.attn", "blocks.*.attn", "attn", 1.0, lags=lags, steps=steps)
    site.products = Products.empty(steps, farthest)
    sketch = np.full((steps, farthest + 1, y.shape[1]), np.nan, np.float32)
    for step in range(steps):
        for lag in range(min(farthest, step) + 1):
            site.products.add(step, lag, float(y[step] @ y[step - lag]))
            sketch[step, lag] = y[step - lag] - y[step]
            if 0 < lag <= lags:
                site.add(lag, step, float(np.abs(y[step] - y[step - lag]).sum() / np.abs(y[step]).sum()))
    return Calibration(steps, lags, [site], effects=Effects(sketch, 1.0), **more)


@pytest.mark.parametrize("steps", [13, 20, 37, 50, 73, 100])
def test_measurements_at_other_steps_are_those_that_would_be_made_there(steps):
    at = np.linspace(0, 1, 50)
    moved = calibration_at(at, timesteps=(1000 * at).tolist()).transfer(timesteps=1000 * np.linspace(0, 1, steps))
    made = calibration_at(np.linspace(0, 1, steps), lags=moved.lags)
    assert moved.steps == steps
    mine, theirs = (each.sites[0] for each in (moved, made))
    known = np.isfinite(mine.mean)
    assert known[:, moved.lags :].mean() > 0.95  # all but what lies beyond the first step
    np.testing.assert_allclose(mine.mean[known], theirs.mean[known], rtol=0.05)
    products = np.isfinite(mine.products.mean)
    np.testing.assert_allclose(mine.products.mean[products], theirs.products.mean[products], rtol=0.01)
    effects = np.isfinite(moved.effects.sketch).all(-1)
    error = np.linalg.norm((moved.effects.sketch - made.effects.sketch)[effects], axis=-1)
    assert (error <= 0.25 * np.linalg.norm(made.effects.sketch[effects], axis=-1) + 1e-4).all()


@pytest.mark.parametrize("steps", [20, 30, 100])
@pytest.mark.parametrize("order", [0, 1, 2, "fit"])
def test_schedules_of_a_transfer_are_as_good_as_those_of_a_calibration_made_there(steps, order):
    source = calibration_at(np.linspace(0, 1, 50), lags=5)
    fresh = calibration_at(np.linspace(0, 1, steps), lags=10)
    schedule = source.schedule(compute=0.4, order=order, steps=steps)
    assert schedule.steps == steps and schedule.compute_fraction <= 0.4
    own = source.transfer(steps).lags
    best = calibration_at(np.linspace(0, 1, steps), lags=own).schedule(compute=0.4, order=order)
    everything = fresh.predicted_error(smoothcache.Schedule.uniform(steps, 3, kinds=("attn",)))
    assert fresh.predicted_error(schedule) <= fresh.predicted_error(best) + 0.2 * everything


def test_the_same_steps_give_the_same_measurements():
    calibration = calibration_at(np.linspace(0, 1, 30), timesteps=np.linspace(999, 19, 30).tolist())
    same = calibration.transfer(timesteps=calibration.timesteps)
    assert same == calibration
    assert calibration.transfer(30).effects == calibration.effects


def test_forecasts_between_calibrated_steps_do_not_look_exact():
    """A straight line between two steps would make every forecast of order 1 within it right."""
    fine = calibration_at(np.linspace(0, 1, 20), lags=3).transfer(77)
    measured = calibration_at(np.linspace(0, 1, 77), lags=fine.lags)
    row = [step < 2 or step % 2 == 0 for step in range(77)]
    schedule = smoothcache.Schedule(77, {"attn": row}, order=1)
    assert 0.1 * measured.predicted_error(schedule) < fine.predicted_error(schedule)
    assert fine.predicted_error(schedule) < 3 * measured.predicted_error(schedule)


def test_what_was_not_measured_stays_unknown():
    calibration = calibration_at(np.linspace(0, 1, 50))
    assert calibration.transfer(20).lags == 2  # 5 of 50 steps are 2 of 20
    with pytest.raises(CalibrationError, match=r"20 steps are too few.*lie 3 of its steps.*lags=6"):
        calibration_at(np.linspace(0, 1, 50), lags=2).transfer(20)
    with pytest.raises(CalibrationError, match="too few"):
        calibration.transfer(1)


def test_sensitivities_go_with_the_length_of_a_step():
    steps = np.linspace(0, 1, 50)
    at_each = {"*": np.linspace(1.0, 2.0, 50)}
    calibration = calibration_at(steps, timesteps=steps.tolist(), sensitivity=at_each)
    half = calibration.transfer(25)
    np.testing.assert_allclose(half.sensitivity["*"], 2 * at_each["*"][::2], rtol=1e-3)
    uneven = calibration_at(steps, timesteps=steps.tolist()).transfer(timesteps=np.linspace(0, 1, 25) ** 2)
    assert uneven.sensitivity["*"][20] > 5 * uneven.sensitivity["*"][1]
    assert not calibration_at(steps).transfer(25).sensitivity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give steps, timesteps or a scheduler"),
        ({"timesteps": [3, 2, 1], "scheduler": DDIMScheduler()}, "not both"),
        ({"timesteps": [3, 2, 1], "steps": 4}, r"3 entries.*4 steps"),
        ({"timesteps": []}, "empty"),
        ({"timesteps": [1.0, 0.5, 0.7]}, "go back"),
        ({"timesteps": [0.2, 0.5, 0.7]}, "go back"),
        ({"timesteps": [900.0, 500.0, 100.0]}, "in common"),
        ({"scheduler": DDIMScheduler()}, "no timesteps yet"),
        ({"scheduler": 3}, "is a int"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_steps_that_are_none_are_refused(arguments, message):
    at = np.linspace(1, 0.02, 50)
    with pytest.raises(CalibrationError, match=message):
        calibration_at(at, timesteps=at.tolist()).transfer(**arguments)


def test_a_calibration_without_timesteps_is_transferred_by_steps_alone():
    calibration = calibration_at(np.linspace(0, 1, 50))
    assert calibration.transfer(30).steps == 30
    with pytest.raises(CalibrationError, match="knows no timesteps"):
        calibration.transfer(timesteps=[1.0, 0.5])


def test_steps_beyond_those_that_were_calibrated_are_told(caplog):
    at = np.linspace(0.8, 0.2, 30)
    with caplog.at_level(logging.WARNING):
        calibration_at(at, timesteps=at.tolist()).transfer(timesteps=np.linspace(0.81, 0.19, 20))
        assert not caplog.messages
        calibration_at(at, timesteps=at.tolist()).transfer(timesteps=np.linspace(1, 0, 30))
    assert "beyond the noise levels" in caplog.text


def schedulers():
    """Schedulers after set_timesteps, by what they are, with 40 inference steps."""
    vp = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    made = {
        "ddim": DDIMScheduler(**vp),
        "ddim trailing": DDIMScheduler(**vp, timestep_spacing="trailing"),
        "euler": EulerDiscreteScheduler(**vp),
        "euler karras": EulerDiscreteScheduler(**vp, use_karras_sigmas=True),
        "dpm": DPMSolverMultistepScheduler(**vp),
        "dpm karras": DPMSolverMultistepScheduler(**vp, use_karras_sigmas=True),
        "heun": HeunDiscreteScheduler(**vp),
        "unipc": UniPCMultistepScheduler(**vp),
    }
    for scheduler in made.values():
        scheduler.set_timesteps(40)
    return made


def test_all_schedulers_of_one_model_agree_on_the_noise_at_a_timestep():
    tables = {name: (each.timesteps.double().numpy(), noise_levels_of(each)) for name, each in schedulers().items()}
    alphas = DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double().sqrt().numpy()
    for name, (timesteps, levels) in tables.items():
        signal = np.interp(timesteps, range(1000), alphas)
        expected = np.sqrt(1 - signal**2) / (signal + np.sqrt(1 - signal**2))
        # Timesteps of multi-step solvers are rounded.
        np.testing.assert_allclose(levels, expected, atol=2e-3, err_msg=name)


def test_noise_levels_of_flows_are_their_sigmas():
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        scheduler.set_timesteps(20)
        assert noise_levels_of(scheduler) == pytest.approx(scheduler.sigmas[:20].tolist())
    edm = EDMEulerScheduler()
    edm.set_timesteps(20)
    assert noise_levels_of(edm) == pytest.approx((edm.sigmas / (1 + edm.sigmas))[:20].tolist())


@pytest.mark.parametrize("target", schedulers())
@pytest.mark.parametrize("source", ["ddim", "euler karras"])
def test_any_scheduler_finds_its_steps_in_a_calibration_by_another(source, target):
    made = schedulers()
    levels, timesteps = noise_levels_of(made[source]), made[source].timesteps.tolist()
    calibration = calibration_at(np.array(levels), timesteps=timesteps, noise_levels=levels)
    moved = calibration.transfer(scheduler=made[target])
    assert moved.steps == len(made[target].timesteps)
    assert moved.timesteps == pytest.approx(made[target].timesteps.tolist())
    assert math.isfinite(moved.predicted_error(moved.schedule(compute=0.6, order=0)))
    if source != target:  # what is one step of the target's is the same distance in noise
        exact = np.array(noise_levels_of(made[target]))
        at = positions(levels, exact)
        np.testing.assert_allclose(
            np.interp(at, range(40), levels), np.clip(exact, min(levels), max(levels)), atol=1e-6
        )


def test_a_scheduler_is_left_as_it_is():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(50)
    before = scheduler.timesteps.clone()
    levels = noise_levels_of(scheduler)
    calibration = calibration_at(np.array(levels), timesteps=before.tolist(), noise_levels=levels)
    assert calibration.transfer(30, scheduler=scheduler).steps == 30
    assert torch.equal(scheduler.timesteps, before)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_steps_give_measurements_or_an_error(before, after, lags, random):
    at = np.sort([random.random() for _ in range(before)])
    wanted = np.sort([random.uniform(at[0], at[-1]) for _ in range(after)])
    calibration = calibration_at(at, lags=lags, order=1, timesteps=at.tolist())
    try:
        moved = calibration.transfer(timesteps=wanted)
        schedule = moved.schedule(compute=0.7)
    except CalibrationError:
        return
    assert schedule.steps == after and schedule.compute_fraction <= 0.7


def test_exact_places_are_taken_as_they_are():
    values = np.random.default_rng(0).normal(size=(9, 5, 3))
    values[np.arange(9)[:, None] < np.arange(5)] = np.nan
    np.testing.assert_array_equal(resampled(values, np.arange(9.0), 4), values)
    every_second = resampled(values, np.arange(0.0, 9.0, 2.0), 2)
    np.testing.assert_array_equal(every_second[3], values[6, [0, 2, 4]])


def test_a_file_keeps_noise_levels(tmp_path):
    at = np.linspace(1, 0.02, 12)
    calibration = calibration_at(at, timesteps=at.tolist(), noise_levels=at.tolist())
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    assert Calibration.load(tmp_path / "calibration.json").noise_levels == tuple(at)


@pytest.fixture(scope="module")
def digits():
    """The shipped model's calibration, with sensitivities, on four samples of 20 steps."""
    model = digits_model()
    run = {"labels": torch.arange(4), "steps": 20, "seed": 1}
    calibration = smoothcache.calibrate(model, lambda m: sample(m, **run), lags=8, order=2, progress=False)
    found = smoothcache.measure_sensitivity(
        model, lambda m: sample(m, torch.arange(2), steps=20, seed=1), calibration, probes=3, progress=False
    )
    return model, found


def test_qualities_are_met_and_ordered(digits):
    model, calibration = digits
    schedules = {quality: calibration.schedule(quality=quality) for quality in ("lossless", "high", "medium", "fast")}
    shares = [schedule.compute_fraction for schedule in schedules.values()]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and len(set(shares)) == 4
    labels = torch.arange(6)
    plain = sample(model, labels, steps=20, seed=7)
    model = smoothcache.compile(model, schedules["lossless"], backend="eager")
    try:
        for quality, allowed in (("lossless", 0.0), ("high", 0.01), ("medium", 0.03), ("fast", 0.1)):
            smoothcache.set_schedule(model, schedules[quality])
            distance = float((sample(model, labels, steps=20, seed=7) - plain).norm() / plain.norm())
            assert distance <= 2 * allowed, (quality, distance)
        assert smoothcache.report(model).variants == 3  # all computed and nothing stored; and two of the others
    finally:
        smoothcache.remove(model)


def test_what_a_quality_needs_is_said():
    calibration = calibration_at(np.linspace(0, 1, 20), sensitivity={"*": [1e-3] * 20})
    with pytest.raises(CalibrationError, match="measure_sensitivity"):
        calibration_at(np.linspace(0, 1, 20)).schedule(quality="high")
    assert calibration_at(np.linspace(0, 1, 20)).schedule(quality="lossless").compute_fraction == 1
    with pytest.raises(CalibrationError, match="exactly one of them"):
        calibration.schedule(quality="high", compute=0.5)
    with pytest.raises(CalibrationError, match="expected 'lossless' or 'high' or 'medium' or 'fast'"):
        calibration.schedule(quality="best")
    with pytest.raises(CalibrationError, match="leave out solver and rows"):
        calibration.schedule(quality="high", rows="group")
