"""The schedule that a newcomer gets, ``calibrate(...)`` and ``schedule(compute=...)``: never behind every n-th step."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

import smoothcache_fx as smoothcache
from helpers.digits import digits_model
from pipelines.build import CASES
from pipelines.build import run as run_pipeline
from smoothcache_fx import Calibration, Schedule
from smoothcache_fx.calibration.effects import Effects
from smoothcache_fx.calibration.site_errors import SiteErrors
from smoothcache_fx.demo.model import DiT, randomize
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.reports.compare import as_vector, psnr
from smoothcache_fx.schedules.clusters import clustered, joined, variants_of

STEPS = 20
#: What the same arithmetic in another order may change of a PSNR, in dB.
ROUNDING = 0.05


def digits():
    return digits_model(), lambda model: sample(model, [0, 1, 2, 3], steps=STEPS, seed=1)


def bare():
    model = DiT(image_size=8, patch_size=2, channels=4, width=64, depth=4, heads=4, num_classes=10)
    return randomize(model, 0).eval(), lambda model: sample(model, [0, 1], steps=STEPS, seed=1)


def pipeline(name):
    return CASES[name].make(), lambda pipe: run_pipeline(CASES[name], pipe, STEPS)


MODELS = {
    "digits": digits,
    "bare": bare,
    "sd3": lambda: pipeline("sd3"),
    "flux": lambda: pipeline("flux_true_cfg"),
    "dit": lambda: pipeline("dit_ddim"),
}


@pytest.mark.parametrize("name", MODELS)
def test_never_behind_every_nth_step(name):
    model, run = MODELS[name]()
    calibration = smoothcache.calibrate(model, run, progress=False)
    reference = as_vector(run(model))

    def quality(schedule):
        smoothcache.compile(model, schedule, backend="eager")
        try:
            return psnr(reference, as_vector(run(model)))
        finally:
            smoothcache.remove(model)

    for interval in (2, 3):
        regular = Schedule.uniform(STEPS, interval)
        best = calibration.schedule(compute=math.ceil(STEPS / interval) / STEPS)
        assert best.variants == 2 and len(set(best.compute.values())) == 1
        assert best.compute_fraction <= math.ceil(STEPS / interval) / STEPS
        assert quality(best) >= quality(regular) - ROUNDING, interval


def test_the_demo_model_is_forecast_and_far_ahead():
    model, run = digits()
    calibration = smoothcache.calibrate(model, run, progress=False)
    best = calibration.schedule(compute=0.5)
    reference = run(model)
    found = []
    for schedule in (best, Schedule.uniform(STEPS, 2), calibration.schedule(compute=0.5, solver="greedy")):
        smoothcache.compile(model, schedule, backend="eager")
        found.append(psnr(reference, run(model)))
        smoothcache.remove(model)
    assert best.order == 1 and found[0] > max(found[1:]) + 6


def test_without_effects_it_goes_by_errors():
    """A calibration for the paper's rule is enough for a joint row of order 0."""
    model, run = pipeline("dit_ddim")
    plain = smoothcache.calibrate(model, run, order=None, progress=False)
    assert plain.effects is None
    schedule = plain.schedule(compute=0.5)
    assert schedule.order == 0 and schedule.variants == 2 and schedule.compute_fraction <= 0.5
    loaded = dataclasses.replace(smoothcache.calibrate(model, run, progress=False), effects=None)
    assert loaded.schedule(compute=0.5) == schedule


def test_where_forecasts_reach_over_a_change_of_the_batch():
    """Guidance that is switched off half-way: no output of before can be read, and forecasts lack a second one."""
    model, run = digits()
    calibration = smoothcache.calibrate(model, run, progress=False)
    sketch, half = calibration.effects.sketch.copy(), STEPS // 2
    for step in range(half, STEPS):
        sketch[step, step - half + 1 :] = np.nan
    changed = dataclasses.replace(calibration, effects=Effects(sketch, calibration.effects.weight))
    least = 0.3  # five steps at order 0, the first of each half among them; forecasts need more
    with pytest.raises(smoothcache.CalibrationError, match="the least is"):
        changed.schedule(compute=least, order=1)
    schedule = changed.schedule(compute=least)
    row = next(iter(schedule.compute.values()))
    assert schedule.order == 0 and row[half] and schedule.compute_fraction <= least
    chosen = smoothcache.choose(
        model, run, compute=least, orders=(0, 1), calibration=changed, trajectories=3, progress=False
    )
    assert chosen.trials and chosen.schedule.compute_fraction <= least


def of_groups(flops) -> Calibration:
    """Errors of groups that are random, and rise with the lag."""
    sites = []
    for number, (group, weight) in enumerate(flops.items()):
        site = SiteErrors.empty(group, group, "ffn", weight, lags=3, steps=24)
        generator = np.random.default_rng(number)
        for step in range(1, 24):
            size = generator.uniform(0.02, 0.2)
            for lag in range(1, min(3, step) + 1):
                site.add(lag, step, size * lag)
        sites.append(site)
    return Calibration(24, 3, sites)


def test_groups_that_weigh_little_follow_the_one_before():
    assert clustered({"a": 50, "b": 2, "c": 46, "d": 2}) == [("a", "b"), ("c", "d")]
    assert clustered({"a": 1, "b": 99}) == [("a", "b")]
    assert clustered({"a": 0, "b": 0}) == [("a",), ("b",)]
    calibration = of_groups({"attn": 60.0, "ff": 38.0, "ff_context": 2.0})
    rows = calibration.schedule(compute=0.5, rows="group").compute
    assert rows["ff_context"] == rows["ff"] != rows["attn"]
    assert len({*rows.values()}) == 2
    paper = calibration.schedule(alpha=0.15).compute
    assert len({*paper.values()}) == 3, "the paper's rule is as it was"


@pytest.mark.parametrize(
    "request_", [{"alpha": 0.2}, {"compute": 0.5, "rows": "group"}, {"compute": 0.5, "rows": "site"}]
)
def test_no_more_variants_than_wanted(request_):
    calibration = of_groups({"a": 30.0, "b": 30.0, "c": 20.0, "d": 20.0})
    free = calibration.schedule(**request_)
    assert free.variants > 4
    for most in (2, 3, 4):
        few = calibration.schedule(**request_, max_variants=most)
        assert few.variants <= most and few.compute.keys() == free.compute.keys()
        if "compute" in request_:
            assert few.compute_fraction <= 0.5
    assert calibration.schedule(**request_, max_variants=free.variants) == free


def test_clusters_whose_rows_differ_least_are_joined():
    rows = [[True, False, True], [True, True, False], [True, True, True]]
    assert variants_of(rows) == 3
    assert joined([("a",), ("b",), ("c",)], rows) == [("a", "c"), ("b",)]


def test_how_many_variants_is_told(caplog):
    model, _ = bare()
    with caplog.at_level(logging.INFO, "smoothcache_fx"):
        smoothcache.compile(model, Schedule.uniform(STEPS, 2), backend="eager")
    assert "up to 2 variants will be compiled" in caplog.text
    smoothcache.remove(model)
    caplog.clear()
    rows = {f"blocks.{i}.attn": [1, *(step >> i & 1 for step in range(STEPS - 1))] for i in range(3)}
    smoothcache.compile(model, Schedule(STEPS, rows), backend="eager")
    assert "up to 8 variants, each of which is compiled: rows='joint' or max_variants=" in caplog.text


def test_a_schedule_that_is_behind_is_told(caplog):
    """Joint rows of the paper's rule beside every n-th step."""
    model, run = bare()
    calibration = smoothcache.calibrate(model, run, progress=False)
    told = 0
    for compute in (0.4, 0.5, 0.6):
        caplog.clear()
        schedule = calibration.schedule(compute=compute, solver="greedy", rows="joint")
        count = sum(next(iter(schedule.compute.values())))
        interval = math.ceil(STEPS / count)
        regular = dataclasses.replace(
            schedule, compute={key: [step % interval == 0 for step in range(STEPS)] for key in schedule.compute}
        )
        behind = calibration.predicted_error(regular) < 0.9 * calibration.predicted_error(schedule)
        assert ("is predicted to err less than this schedule" in caplog.text) == behind
        told += behind
    assert told


def test_rows_of_groups_that_are_behind_are_told(caplog):
    """Where each of the rows, for all groups, is predicted to be behind; and there the samples are."""
    model, run = pipeline("sd3")
    calibration = smoothcache.calibrate(model, run, progress=False)
    uncached = as_vector(run(model))
    told = {}
    for interval in (2, 3):
        caplog.clear()
        count = math.ceil(STEPS / interval)
        schedule = calibration.schedule(compute=count / STEPS, solver="greedy")
        assert len(set(schedule.compute.values())) > 1
        told[interval] = "is predicted to err less than this schedule" in caplog.text
    assert told == {2: False, 3: True}
    quality = []
    for compared in (schedule, Schedule.uniform(STEPS, 3)):
        smoothcache.compile(model, compared, backend="eager")
        quality.append(psnr(uncached, as_vector(run(model))))
        smoothcache.remove(model)
    assert quality[0] < quality[1] - 1


class Counting(torch.nn.Module):
    """A model that counts its calls in a buffer."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, t, y):
        self.count += 1
        return self.model(x, t, y) * (1 + 0.01 * self.count)


def test_buffers_are_what_they_would_be_without_calibration():
    """The model is called again to try reads out, which must not show."""

    def run(model):
        x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
        for step in range(6):
            x = x - model(x, torch.full((2,), 1 - step / 6), labels) / 6
        return x

    model, seen = Counting(bare()[0]).eval(), []
    with torch.no_grad():
        expected = run(model)
    model.count.zero_()
    calibration = smoothcache.calibrate(model, lambda model: seen.append(run(model)), progress=False)
    assert torch.equal(seen[0], expected) and model.count == 6 and calibration.effects is not None
