"""``choose`` on the demo's DiT, its first blocks: what it picks was measured best, within the runs it may take."""

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import smoothcache_fx as smoothcache
from helpers.digits import digits_model
from smoothcache_fx import CalibrationError, Schedule
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.measure.expectation import expectation
from smoothcache_fx.measure.metrics import metric_of
from smoothcache_fx.reports.compare import psnr

STEPS = 12
runs = []


def run(model):
    runs.append(model)
    return sample(model, torch.tensor([0, 1, 2, 3]), steps=STEPS, seed=11)


@pytest.fixture
def model():
    runs.clear()
    model = digits_model()
    model.blocks = model.blocks[:4]  # each schedule that is tried is compiled: with all of them that takes minutes
    return model


def test_the_best_of_a_budget(model):
    plain = run(model)
    runs.clear()
    choice = smoothcache.choose(
        model, run, compute=0.5, orders=(0, 1), lags=3, probes=2, trajectories=9, progress=False
    )
    assert len(runs) == choice.trajectories <= 9 and len(choice.trials) == choice.trajectories - 4
    assert all(trial.schedule.compute_fraction <= 0.5 for trial in choice.trials)
    assert choice.metric == max(trial.metric for trial in choice.trials)
    assert {"optimal", "even", "every n-th"} >= {trial.rows for trial in choice.trials}
    assert torch.equal(run(model), plain), "the model is as it was"
    cached = smoothcache.compile(copy.deepcopy(model), choice.schedule, backend="eager")
    assert psnr(plain, run(cached)) == pytest.approx(choice.metric, abs=0.01)
    lines = str(choice).splitlines()
    assert [line for line in lines if line.endswith("chosen")] and lines[
        -1
    ] == f"({choice.trajectories} runs of sample)"


def test_rows_of_taylorseer_are_tried(model):
    """Every n-th step, and the last, where the budget allows as many."""
    choice = smoothcache.choose(model, run, compute=0.42, orders=(1,), lags=3, probes=1, trajectories=6, progress=False)
    rows = {trial.rows: set(trial.schedule.compute.values()) for trial in choice.trials}
    assert rows["every n-th"] == {tuple(step in (0, 3, 6, 9, 11) for step in range(STEPS))}


def test_a_calibration_serves_several_budgets(model):
    arguments = {"orders": (0, 1), "lags": 3, "probes": 2, "trajectories": 9, "progress": False}
    first = smoothcache.choose(model, run, compute=0.5, **arguments)
    runs.clear()
    again = smoothcache.choose(
        model, run, compute=0.5, calibration=first.calibration, **(arguments | {"trajectories": 6})
    )
    assert again.trials == first.trials and len(runs) == again.trajectories == 6
    with pytest.raises(CalibrationError, match="order 2"):
        smoothcache.choose(model, run, compute=0.5, calibration=first.calibration, orders=(2,), progress=False)
    assert len(runs) == 6


def test_the_cheapest_that_is_good_enough(model):
    arguments = {"lags": 3, "probes": 2, "orders": (1,), "progress": False}
    choice = smoothcache.choose(model, run, at_least=30.0, trajectories=16, **arguments)
    assert len(runs) == choice.trajectories <= 16 and choice.metric >= 30.0
    cheaper = [t for t in choice.trials if t.schedule.compute_fraction < choice.schedule.compute_fraction]
    assert all(trial.metric < 30.0 for trial in cheaper) and choice.schedule.compute_fraction < 1


def test_everything_is_computed_where_nothing_else_is_good_enough(model):
    def metric(reference, cached):
        return 0.0

    choice = smoothcache.choose(
        model, run, at_least=0.5, metric=metric, orders=(0,), lags=3, probes=1, trajectories=8, progress=False
    )
    assert choice.schedule.compute_fraction == 1 and choice.metric == math.inf and len(choice.trials) == 5
    assert "compute everything" in str(choice)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one"),
        ({"speedup": 2.0, "seconds": 1.0}, "exactly one"),
        ({"speedup": 1.0}, "a number above 1"),
        ({"seconds": 0}, "a number above 0"),
        ({"compute": 0.5, "metric": "fid"}, "'psnr' or 'ssim' or 'lpips'"),
        ({"compute": 0.5, "at_least": 30.0}, "exactly one"),
        ({"compute": "half"}, "expected a number"),
        ({"compute": 0.5, "orders": (3,)}, "orders has"),
        ({"compute": 0.5, "trajectories": 6}, "none is left"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(model, arguments, message):
    with pytest.raises(CalibrationError, match=message):
        smoothcache.choose(model, run, progress=False, **arguments)
    assert not runs


# Budgets of time


def timed(monkeypatch, seconds_of):
    """Let runs take what a function of the schedule says, by a clock of its own; returns what was timed."""
    asked = []

    def compare(model, schedules, sample, **options):
        asked.append((dict(schedules), options))
        everything = seconds_of(Schedule(STEPS, {"attn": [1] * STEPS}))
        rows = [SimpleNamespace(name=name, seconds=seconds_of(one)) for name, one in schedules.items()]
        return SimpleNamespace(seconds=everything, rows=rows)

    monkeypatch.setattr("smoothcache_fx.measure.choose.compare", compare)
    return asked


def computed(schedule):
    return sum(next(iter(schedule.compute.values())))


ARGUMENTS = {"lags": 3, "probes": 1, "trajectories": 9, "backend": "eager", "progress": False}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({"speedup": 2.0}, 5), ({"speedup": 1.2}, 9), ({"seconds": 0.75}, 6), ({"seconds": 5.0}, 12)],
)
def test_a_time_is_met_with_as_many_steps_as_it_allows(model, monkeypatch, asked, expected):
    """A run takes 0.15 s and 0.1 s for each computed step; orders make no difference."""
    timed(monkeypatch, lambda schedule: 0.15 + 0.1 * computed(schedule))
    choice = smoothcache.choose(model, run, orders=(0, 1), **asked, **ARGUMENTS)
    assert computed(choice.schedule) <= expected and max(map(computed, (t.schedule for t in choice.trials))) == expected
    assert choice.seconds == pytest.approx(0.15 + 0.1 * computed(choice.schedule))
    assert choice.speedup == pytest.approx(1.35 / choice.seconds)
    assert f"{choice.speedup:.2f} times faster" in str(choice)


def test_orders_whose_steps_take_longer_compute_fewer(model, monkeypatch):
    timed(monkeypatch, lambda schedule: 0.1 + 0.1 * computed(schedule) + 0.03 * schedule.highest_order * STEPS)
    choice = smoothcache.choose(model, run, speedup=1.5, orders=(0, 1), **ARGUMENTS | {"trajectories": 15})
    most = {order: max(computed(t.schedule) for t in choice.trials if t.schedule.order == order) for order in (0, 1)}
    assert most == {0: 7, 1: 4}


def test_what_misses_its_time_computes_fewer_steps(model, monkeypatch, caplog):
    """Rows with gaps of their own take longer than the regular ones that were timed first."""
    asked = timed(
        monkeypatch,
        lambda schedule: 0.1 + 0.1 * computed(schedule) + (0.15 if computed(schedule) not in (3, 6, 12) else 0.0),
    )
    choice = smoothcache.choose(model, run, speedup=2.5, orders=(0,), **ARGUMENTS | {"trajectories": 15})
    assert choice.speedup >= 2.5 * 0.97 and len(asked) == 3 and not caplog.messages
    caplog.clear()
    choice = smoothcache.choose(model, run, speedup=2.5, orders=(0,), **ARGUMENTS | {"trajectories": 4})
    assert choice.speedup < 2.5 * 0.97 and "longer than asked for" in caplog.text


def test_a_time_that_nothing_meets_says_what_can_be_had(model, monkeypatch):
    timed(monkeypatch, lambda schedule: 0.6 + 0.05 * computed(schedule))
    with pytest.raises(
        CalibrationError, match=r"no schedule takes 0\.4 s or less.*1\.2 and the fastest.*0\.75, 1\.60 times"
    ):
        smoothcache.choose(model, run, speedup=3.0, orders=(0,), **ARGUMENTS)
    model.eval()
    assert not hasattr(model.forward, "session")


def test_a_real_clock(model):
    choice = smoothcache.choose(model, run, speedup=1.3, orders=(0,), lags=3, probes=1, backend="eager", progress=False)
    assert choice.speedup > 1 and choice.seconds > 0


def test_what_other_samples_are_expected_to_be(model):
    choice = smoothcache.choose(model, run, compute=0.5, orders=(1,), lags=3, probes=1, trajectories=5, progress=False)
    expected = choice.expected
    assert expected.samples == 4 and expected.low < expected.mean < expected.high
    plain = run(model)
    cached = run(smoothcache.compile(copy.deepcopy(model), choice.schedule, backend="eager"))
    values = [psnr(*pair) for pair in zip(plain, cached, strict=True)]
    assert expected.mean == pytest.approx(sum(values) / 4, abs=0.01)
    assert expected.forked == sum(value < 25 for value in values) / 4
    assert "for other samples" in str(choice)


def test_expectations_of_all_that_samples_may_be():
    batch = torch.rand(3, 1, 4, 4)
    far = batch.clone()
    far[1] = 1 - far[1]
    pictures = [[Image.fromarray((255 * image[0].numpy()).astype("uint8")) for image in each] for each in (batch, far)]
    for pair in ((batch, far), (batch.numpy(), far.numpy()), (list(batch), list(far)), pictures):
        found = expectation(*pair)
        assert found.samples == 3 and found.forked == pytest.approx(1 / 3)
    one = expectation(batch[0, 0, 0], far[0, 0, 0])
    assert one.samples == 1 and math.isnan(one.low) and one.mean == 120
    assert expectation("words", "other words") is None


def test_metrics_by_name(model):
    choice = smoothcache.choose(
        model, run, at_least=0.9, metric="ssim", orders=(1,), lags=3, probes=1, trajectories=8, progress=False
    )
    assert 0.9 <= choice.metric <= 1
    images = torch.rand(2, 3, 16, 16)
    assert metric_of("ssim")(images, images) == pytest.approx(1)
    assert metric_of("ssim")(images, images.flip(0)) < 0.5
    assert metric_of("ssim")(images.permute(0, 2, 3, 1).numpy(), images.permute(0, 2, 3, 1).numpy()) == pytest.approx(1)
    with pytest.raises(CalibrationError, match="expected images of 1, 3 or 4 channels"):
        metric_of("ssim")(torch.rand(2, 5, 16, 16), torch.rand(2, 5, 16, 16))


def test_a_metric_whose_package_is_missing_says_which(monkeypatch):
    for name, module, package in (("lpips", "lpips", "pip install lpips"), ("ssim", "skimage.metrics", "scikit-image")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=package):
            metric_of(name)
