"""``choose`` on the demo's DiT, its first blocks: what it picks was measured best, within the runs it may take."""

import copy
import math

import pytest
import torch

import smoothcache_fx as smoothcache
from smoothcache_fx import CalibrationError
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.demo.weights import load_model
from smoothcache_fx.reports.compare import psnr

STEPS = 12
runs = []


def run(model):
    runs.append(model)
    return sample(model, torch.tensor([0, 1, 2, 3]), steps=STEPS, seed=11)


@pytest.fixture
def model():
    runs.clear()
    model = load_model("cpu")
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
