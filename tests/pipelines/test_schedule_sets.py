"""Pipelines with several schedules: each run takes the one for its number of steps, or one that is made for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

import smoothcache_fx as smoothcache
from smoothcache_fx import CompiledError, Schedule, ScheduleError, StepError
from smoothcache_fx.compiled.forward import compiled_forwards

from .build import CASES, run, sd3

ROWS = {4: (1, 0, 1, 0), 6: (1, 0, 0, 1, 0, 1), 7: (1, 1, 0, 1, 0, 0, 1)}


def schedules(order=0):
    return {steps: Schedule(steps, {"attn": row, "ffn": row}, order=order) for steps, row in ROWS.items()}


@pytest.fixture(scope="module")
def calibration():
    """Of the DiT pipeline, by its own scheduler, eight steps, with sensitivities."""
    case = CASES["dit_ddim"]
    pipe = case.make()
    found = smoothcache.calibrate(pipe, lambda p: run(case, p, 8), lags=5, order=1, progress=False)
    return smoothcache.measure_sensitivity(pipe, lambda p: run(case, p, 8), found, probes=2, progress=False)


@pytest.mark.parametrize("name", ["dit_ddim", "sd3", "wan_2_2"])
def test_each_run_takes_the_schedule_for_its_steps(name):
    case, found = CASES[name], schedules()
    expected = {}
    for steps, schedule in found.items():
        pipe = smoothcache.compile(case.make(), schedule, backend="eager")
        expected[steps] = run(case, pipe, steps)
    pipe = smoothcache.compile(case.make(), found, backend="eager")
    for steps in (6, 4, 6, 7, 4):
        assert torch.equal(run(case, pipe, steps), expected[steps])
        assert smoothcache.report(pipe).steps == steps
        assert name == "wan_2_2" or not smoothcache.report(pipe).forced  # where a denoiser begins, it computes
    with pytest.raises(StepError, match=r"set to 5 timesteps, and there are schedules for 4, 6, 7"):
        run(case, pipe, 5)
    assert torch.equal(run(case, pipe, 4), expected[4])
    with smoothcache.disabled(pipe):
        run(case, pipe, 5)
    captured = [forward.session.captured for forward in compiled_forwards(pipe).values()]
    smoothcache.set_schedule(pipe, {5: Schedule.uniform(5, 2)})
    run(case, pipe, 5)
    assert [forward.session.captured for forward in compiled_forwards(pipe).values()] == captured
    with pytest.raises(StepError, match="schedules for 5"):
        run(case, pipe, 4)
    smoothcache.set_schedule(pipe, found[4])
    assert torch.equal(run(case, pipe, 4), expected[4])
    with pytest.raises(StepError, match="4 steps"):
        run(case, pipe, 6)
    smoothcache.remove(pipe)
    run(case, pipe, 5)


def test_a_calibration_makes_schedules_when_they_are_needed(calibration):
    case = CASES["dit_ddim"]
    assert calibration.noise_levels is not None and calibration.timesteps is not None
    plain = {steps: run(case, case.make(), steps) for steps in (6, 8, 12)}
    pipe = smoothcache.compile(case.make(), calibration, quality="fast", backend="eager")
    shares = {}
    for quality in ("fast", "high", "lossless"):
        smoothcache.set_schedule(pipe, calibration, quality=quality)
        for steps in (8, 6, 12, 8):
            image = run(case, pipe, steps)
            report = smoothcache.report(pipe)
            shares[quality, steps] = 1 / report.mac_ratio
            assert report.steps == steps and not report.forced
            if quality == "lossless":
                assert torch.equal(image, plain[steps])
    assert all(shares["lossless", steps] == 1 for steps in plain)
    assert shares["fast", 12] <= shares["high", 12] < 1
    (forward,) = compiled_forwards(pipe).values()
    assert forward.session.captured == 1
    with pytest.raises(smoothcache.CalibrationError, match="too few"):
        run(case, pipe, 1)
    run(case, pipe, 6)


def test_another_scheduler_gets_a_schedule_for_its_noise_levels(calibration):
    case = CASES["dit_ddim"]
    pipe = case.make()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    smoothcache.compile(pipe, calibration, backend="eager")
    run(case, pipe, 10)
    made = compiled_forwards(pipe)["transformer"].session.schedule
    assert made.steps == 10 and made.timesteps == pytest.approx(pipe.scheduler.timesteps.tolist())
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=False)
    run(case, pipe, 10)
    other = compiled_forwards(pipe)["transformer"].session.schedule
    assert other.timesteps == pytest.approx(pipe.scheduler.timesteps.tolist()) and other != made


def test_two_pipelines_share_a_set():
    case, found = CASES["dit_ddim"], schedules()
    first = case.make()
    second = type(first)(**{**first.components, "scheduler": type(first.scheduler).from_config(first.scheduler.config)})
    second.set_progress_bar_config(disable=True)
    smoothcache.compile(first, found, backend="eager")
    smoothcache.compile(second, dict(found), backend="eager")
    images = {(pipe is first, steps): run(case, pipe, steps) for pipe in (first, second) for steps in (4, 6)}
    assert torch.equal(images[True, 4], images[False, 4]) and torch.equal(images[True, 6], images[False, 6])
    third = type(first)(**{**first.components, "scheduler": type(first.scheduler).from_config(first.scheduler.config)})
    with pytest.raises(CompiledError, match="another schedule"):
        smoothcache.compile(third, found[4], backend="eager")


def test_a_run_of_another_length_waits_for_the_one_of_another_thread():
    case, found = CASES["sd3"], schedules()
    first, second = sd3(), sd3()
    alone = run(case, smoothcache.compile(sd3(), found[6], backend="eager"), 6)
    second.transformer = first.transformer
    for pipe in (first, second):
        smoothcache.compile(pipe, found, backend="eager")
    begun, go_on = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, values):
        begun.set()
        assert go_on.wait(60)
        return values

    with ThreadPoolExecutor(1) as thread:
        request = thread.submit(run, case, first, 6, callback_on_step_end=wait)
        assert begun.wait(60)
        with pytest.raises(StepError, match="another thread's run is at step 1 of 6"):
            run(case, second, 4)
        with pytest.raises(StepError, match="another thread's run"):
            smoothcache.set_schedule(second, found[4])
        go_on.set()
        assert torch.equal(request.result(), alone)
    run(case, second, 4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ScheduleError, "a set without schedules"),
        ({5: Schedule(4)}, ScheduleError, r"for 5 steps has 4"),
        ({4: [1, 0, 1, 0]}, TypeError, "got list"),
        ([Schedule(4)], TypeError, "got list"),
    ],
)
def test_what_is_no_set_is_refused(given, error, message):
    pipe = CASES["dit_ddim"].make()
    with pytest.raises(error, match=message):
        smoothcache.compile(pipe, given)
    smoothcache.compile(pipe, Schedule(4), backend="eager")
    with pytest.raises(error, match=message):
        smoothcache.set_schedule(pipe, given)
    run(CASES["dit_ddim"], pipe, 4)


def test_a_bare_model_takes_one_schedule_or_a_calibrations_own(calibration):
    model = CASES["dit_ddim"].make().transformer
    with pytest.raises(TypeError, match="a set of schedules is for pipelines"):
        smoothcache.compile(model, schedules())
    smoothcache.compile(model, calibration, quality="fast", backend="eager")
    assert compiled_forwards(model)[""].session.schedule == calibration.schedule(quality="fast")
    with pytest.raises(ScheduleError, match="expected 'lossless'"):
        smoothcache.set_schedule(model, calibration, quality="ultra")


def test_a_denoiser_of_a_pipeline_has_the_pipelines_schedule():
    pipe = smoothcache.compile(CASES["dit_ddim"].make(), Schedule(4), backend="eager")
    with pytest.raises(CompiledError, match=r"set_schedule\(pipeline"):
        smoothcache.set_schedule(pipe.transformer, Schedule(4))
