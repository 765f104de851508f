"""Bad arguments of all public functions: an error before anything has run, with the argument's name."""

from __future__ import annotations

import math

import pytest
import torch

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from smoothcache_fx import Schedule, importers, plots

STEPS = 4
SCHEDULE = Schedule.uniform(STEPS, 2)
NO_NUMBER = ("nonsense", [], {}, object(), True, math.nan)
NO_COUNT = (*NO_NUMBER, -1, 0, 1.5, math.inf)
NO_FLAG = ("nonsense", [], object(), 1.5, 2)
NO_FUNCTION = ("nonsense", [], 1, object())
NO_OBJECT = ("nonsense", [], {}, 1, object())
NO_SEQUENCE = ("nonsense", None, 1, 1.5, True, object())


@pytest.fixture(scope="module")
def model():
    return randomize(Stack(), 0).eval()


def sample(model):
    with torch.no_grad():
        return [model(*inputs()) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def calibration(model):
    return smoothcache.calibrate(model, sample, steps=STEPS, progress=False)


ARGUMENTS = {
    "compile": {
        "schedule": (*NO_OBJECT, None),
        "backend": (None, 1, []),
        "mode": (1, [], True),
        "dynamic": NO_FLAG,
        "fullgraph": (*NO_FLAG, None),
        "options": ("nonsense", 1, []),
        "calls_per_step": NO_COUNT,
    },
    "calibrate": {
        "sample": (*NO_FUNCTION, None),
        "lags": (*NO_COUNT, None),
        "order": ("nonsense", [], -1, 3, 1.5, True),
        "schedule": NO_OBJECT,
        "rounds": (*NO_COUNT, None),
        "steps": NO_COUNT,
        "calls_per_step": NO_COUNT,
        "history_device": ("nonsense", -1, 1.5, []),
        "progress": (*NO_FLAG, None),
    },
    "measure_sensitivity": {
        "sample": (*NO_FUNCTION, None),
        "calibration": NO_OBJECT,
        "probes": (*NO_COUNT, None),
        "groups": (*NO_FLAG, None),
        "calls_per_step": NO_COUNT,
        "progress": (*NO_FLAG, None),
    },
    "choose": {
        "sample": (*NO_FUNCTION, None),
        "compute": NO_NUMBER,
        "metric": NO_FUNCTION,
        "orders": (*NO_SEQUENCE, [], [3], ["x"], [True]),
        "trajectories": (*NO_COUNT, None),
        "probes": (*NO_COUNT, None),
        "calibration": NO_OBJECT,
        "lags": (*NO_COUNT, None),
        "progress": (*NO_FLAG, None),
    },
    "compare": {
        "schedules": (*NO_OBJECT, None),
        "sample": (*NO_FUNCTION, None),
        "metrics": ("nonsense", 1, [], {"mine": 1}),
        "rounds": (*NO_COUNT, None),
        "calls_per_step": NO_COUNT,
    },
    "explain": {"schedule": NO_OBJECT},
    "Schedule.uniform": {"steps": NO_COUNT, "interval": (*NO_COUNT, None), "kinds": (*NO_SEQUENCE, ["x"], [1])},
    "Calibration.schedule": {
        "compute": (*NO_NUMBER, 0, 1.5, -1, math.inf),
        "solver": ("nonsense", 1, []),
        "order": ("nonsense", -1, 3, 1.5, True),
        "rows": ("nonsense", 1),
        "max_variants": (*NO_COUNT, 1),
        "times": ("nonsense", 1, [1], [0, 0, 1, 2]),
        "keep_last": NO_FLAG,
    },
    "Calibration.alpha_for": {"compute": (*NO_NUMBER, 0, 1.5), "keep_last": NO_FLAG},
    "Calibration.predicted_error": {"schedule": (*NO_OBJECT, None)},
    "Calibration.merge": {"other": (*NO_OBJECT, None)},
    "taylor_seer": {
        "steps": NO_COUNT,
        "interval": (*NO_COUNT, None),
        "order": ("nonsense", [], True, -1, 3, 1.5),
        "compute_before": (*NO_COUNT, None),
        "compute_from": (*NO_NUMBER, -1, 1.5),
        "kinds": (*NO_SEQUENCE, ["x"], [1, "x"]),
    },
    "learning_to_cache": {"names": (*NO_SEQUENCE, ["attn"])},
    "plot_errors": {"calibration": (*NO_OBJECT, None), "alphas": (*NO_SEQUENCE, ["x"]), "path": (1, None, [])},
    "plot_site_errors": {"calibration": (*NO_OBJECT, None), "lag": (*NO_COUNT, 99), "path": (1, None, [])},
    "plot_schedules": {"schedules": ("nonsense", None, 1, [], {"a": 1}), "path": (1, None, [])},
}


@pytest.fixture
def call(model, calibration, tmp_path):
    x, c = inputs()
    functions = {
        "compile": lambda **k: smoothcache.compile(model, **{"schedule": SCHEDULE, **k}),
        "calibrate": lambda **k: smoothcache.calibrate(model, **{"sample": sample, **k}),
        "measure_sensitivity": lambda **k: smoothcache.measure_sensitivity(
            model, **{"sample": sample, "calibration": calibration, **k}
        ),
        "choose": lambda **k: smoothcache.choose(model, **{"sample": sample, "compute": 0.5, "progress": False, **k}),
        "compare": lambda **k: smoothcache.compare(model, **{"schedules": SCHEDULE, "sample": sample, **k}),
        "explain": lambda **k: smoothcache.explain(model, x, c, **k),
        "Schedule.uniform": lambda **k: Schedule.uniform(**{"steps": STEPS, "interval": 2, **k}),
        "Calibration.schedule": lambda **k: calibration.schedule(**{"compute": 0.5, **k}),
        "Calibration.alpha_for": lambda **k: calibration.alpha_for(**{"compute": 0.5, **k}),
        "Calibration.predicted_error": calibration.predicted_error,
        "Calibration.merge": calibration.merge,
        "taylor_seer": lambda **k: importers.taylor_seer(**{"steps": STEPS, **k}),
        "learning_to_cache": lambda **k: importers.learning_to_cache("router.pt", **k),
        "plot_errors": lambda **k: plots.plot_errors(**{"calibration": calibration, "path": tmp_path / "a.png", **k}),
        "plot_site_errors": lambda **k: plots.plot_site_errors(
            **{"calibration": calibration, "path": tmp_path / "a.png", **k}
        ),
        "plot_schedules": lambda **k: plots.plot_schedules(
            **{"schedules": {"a": SCHEDULE}, "path": tmp_path / "a.png", **k}
        ),
    }
    return functions


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in ARGUMENTS for argument in ARGUMENTS[name]])
def test_bad_values_are_named(name, argument, call, model):
    before = dict(vars(model))
    for value in ARGUMENTS[name][argument]:
        with pytest.raises((ValueError, TypeError)) as raised:
            call[name](**{argument: value})
        known = (argument, argument.removesuffix("s"), "path", "expected")
        assert any(word in str(raised.value) for word in known), f"{value!r}: {raised.value}"
    assert vars(model) == before, "the model is not as it was"


def test_the_backend_is_refused_before_anything_is_replaced(model):
    with pytest.raises(Exception, match="Invalid backend: 'nonsense'"):
        smoothcache.compile(model, SCHEDULE, backend="nonsense")
    assert "forward" not in vars(model)
