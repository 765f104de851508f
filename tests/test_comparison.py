"""``compare``: its figures, worked out another way, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from helpers.oracle import ModuleCall, Oracle
from pipelines.build import CASES, run
from smoothcache_fx import CompiledError, Schedule, ScheduleError, SmoothCacheError
from smoothcache_fx.reports.compare import psnr, relative_l2

STEPS = 6
ROW = [1, 0, 0, 1, 0, 1]
SCHEDULES = {
    "all": Schedule(STEPS, {"attn": [1] * STEPS, "ffn": [1] * STEPS}),
    "half": Schedule(STEPS, {"attn": ROW, "ffn": ROW}),
    "first": Schedule(STEPS, {"attn": [1, 0, 0, 0, 0, 0], "ffn": [1, 0, 0, 0, 0, 0]}),
}


@pytest.fixture
def model():
    return randomize(Stack(2), 0).eval()


@torch.no_grad()
def sample(model) -> torch.Tensor:
    torch.manual_seed(1)
    x, c = inputs()
    for step in range(STEPS):
        x = x + model(x, c * (1 - step / STEPS)) / STEPS
    return x


def test_the_figures(model):
    found = smoothcache.compare(
        model, SCHEDULES, sample, backend="eager", metrics={"largest": lambda a, b: (a - b).abs().max()}
    )
    assert [row.name for row in found.rows] == list(SCHEDULES)
    everything, half, first = found.rows
    plain = sample(model)
    assert everything.psnr == math.inf and everything.relative_l2 == 0 and everything.mac_ratio == 1
    assert everything.trajectory == (0.0,) * STEPS
    names = [f"blocks.{index}.{branch}" for index in range(2) for branch in ("attn", "mlp")]
    rows = dict.fromkeys(names, ROW)
    reference, outputs = randomize(Stack(2), 0).eval(), []
    with Oracle(reference, {name: ModuleCall(name) for name in names}, rows) as oracle:
        calls = iter(range(STEPS))

        def cached(*arguments):
            with oracle.step(next(calls)):
                outputs.append(reference(*arguments))
            return outputs[-1]

        expected = sample(cached)
    error = torch.linalg.vector_norm(expected - plain) / torch.linalg.vector_norm(plain)
    assert half.relative_l2 == pytest.approx(float(error), rel=1e-4)
    assert half.cosine == pytest.approx(
        float(torch.cosine_similarity(expected.flatten(), plain.flatten(), dim=0)), rel=1e-5
    )
    assert half.psnr == pytest.approx(psnr(plain.double(), expected.double()), abs=1e-3)
    assert half.metrics["largest"] == pytest.approx(float((expected - plain).abs().max()), rel=1e-4)
    assert len(half.trajectory) == STEPS and half.trajectory[0] == 0 and half.trajectory[1] > 0
    assert first.mac_ratio > half.mac_ratio > 1.2 and first.psnr < half.psnr
    assert found.seconds > 0 and all(row.seconds > 0 and row.speedup > 0 and row.spread >= 0 for row in found.rows)


class Timings:
    """A clock by which each call of ``sample`` takes what is listed, in turn."""

    def __init__(self, seconds) -> None:
        self.readings = [0.0]
        for value in seconds:
            self.readings += [self.readings[-1] + value, self.readings[-1] + value]

    def __call__(self) -> float:
        return self.readings.pop(0)


def test_schedules_take_turns_and_rounds_that_differ_are_unreliable(model, monkeypatch):
    turns = []

    def noted(model):
        turns.append(model.forward.session.schedule)
        return sample(model)

    seconds = [3.0, 1.5, 1.0, 2.0, 2.0, 4.0, 3.0, 1.5, 1.0]  # in the second round `first` is slow
    monkeypatch.setattr("smoothcache_fx.reports.compare.perf_counter", Timings([*seconds, 2.0, 1.0]))
    schedules = {name: SCHEDULES[name] for name in ("half", "first")}
    found = smoothcache.compare(model, schedules, noted, backend="eager")
    everything = Schedule.uniform(STEPS, 1)
    around = [everything, *schedules.values()]
    assert turns == [*around, *around, *reversed(around), *around]
    half, first = found.rows
    assert (half.speedup, half.spread, half.reliable) == (2.0, 0.0, True)
    assert (first.speedup, first.spread, first.reliable) == (3.0, pytest.approx(0.5), False)
    assert "unreliable speed-ups: first (" in str(found) and "50%" in str(found)
    once = smoothcache.compare(model, schedules["half"], sample, backend="eager", rounds=1)
    assert math.isnan(once.rows[0].spread) and "unreliable" in str(once)


def test_pipelines_take_turns():
    case = CASES["wan_2_2"]
    pipe = case.make()
    sites = {kind: [1, 0, 1, 0] for kind in ("attn", "cross_attn", "ffn")}
    schedules = {"half": Schedule(4, sites), "forecast": Schedule(4, sites, order=1)}
    found = smoothcache.compare(pipe, schedules, lambda pipe: run(case, pipe, 4), backend="eager", rounds=2)
    for row in found.rows:
        smoothcache.compile(pipe, schedules[row.name], backend="eager")
        cached = run(case, pipe, 4)
        smoothcache.remove(pipe)
        assert row.relative_l2 == pytest.approx(relative_l2(run(case, pipe, 4), cached), rel=1e-3)
    assert all("forward" not in part.__dict__ for part in (pipe.transformer, pipe.transformer_2))
    assert type(pipe.scheduler).__name__ == type(case.make().scheduler).__name__


def test_the_model_is_as_it_was(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    smoothcache.compare(model, SCHEDULES["half"], sample, backend="eager")
    assert "forward" not in model.__dict__ and not model._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(CompiledError):
        smoothcache.report(model)

    def fail(model):
        sample(model)
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        smoothcache.compare(model, SCHEDULES["half"], fail, backend="eager")
    assert "forward" not in model.__dict__ and not model._forward_hooks


def test_psnr():
    reference = torch.tensor([0.0, 1.0, 2.0])
    assert psnr(reference, reference) == math.inf
    assert psnr(reference, reference + 0.2) == pytest.approx(20.0)
    assert psnr(torch.ones(3), torch.zeros(3)) == -math.inf


def test_a_pipeline_and_its_images():
    case = CASES["dit_ddim"]
    pipe = case.make()
    sites = {kind: [1, 0, 1, 0] for kind in ("attn", "ffn")}
    found = smoothcache.compare(pipe, Schedule(4, sites), lambda pipe: run(case, pipe, 4), backend="eager")
    (row,) = found.rows
    assert row.name == "schedule" and 10 < row.psnr < 200 and row.mac_ratio > 1.2 and len(row.trajectory) == 4
    assert found.model == type(pipe).__name__


def test_what_is_printed_written_and_drawn(model, tmp_path):
    found = smoothcache.compare(model, SCHEDULES, sample, backend="eager", metrics={"one": lambda a, b: 1})
    lines = str(found).splitlines()
    assert "speed-up" in lines[1] and lines[1].endswith("one") and lines[3].startswith("uncached")
    assert [line.split()[0] for line in lines[4:7]] == list(SCHEDULES) and "inf" in lines[4]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["rows"][0]["psnr"] is None and data["rows"][1]["psnr"] == found.rows[1].psnr
    found.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    alone = smoothcache.compare(model, SCHEDULES["all"], sample, backend="eager")
    with pytest.raises(ValueError, match="no point to draw"):
        alone.plot(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("schedules", "options", "error", "message"),
    [
        ({}, {}, TypeError, "expected a Schedule, or several by name"),
        ([SCHEDULES["half"]], {}, TypeError, "expected a Schedule"),
        ({"a": SCHEDULES["half"], "b": Schedule(3, {})}, {}, ValueError, r"a: 6, b: 3"),
        (SCHEDULES, {"rounds": 0}, ValueError, "rounds is 0"),
        (Schedule(STEPS, {"encoder.*": ROW}), {}, ScheduleError, "has no such site"),
    ],
)
def test_refused(model, schedules, options, error, message):
    with pytest.raises(error, match=message):
        smoothcache.compare(model, schedules, sample, backend="eager", **options)
    assert "forward" not in model.__dict__


def test_samples_that_cannot_be_compared(model):
    def unseeded(model):
        with torch.no_grad():
            return [model(*inputs()) for _ in range(STEPS)]

    with pytest.raises(SmoothCacheError, match="returned something else when it was called again"):
        smoothcache.compare(model, SCHEDULES["half"], unseeded, backend="eager")

    def nothing(model):
        sample(model)

    with pytest.raises(SmoothCacheError, match="must return the samples: .* got NoneType"):
        smoothcache.compare(model, SCHEDULES["half"], nothing, backend="eager")
