"""``timed``, and what ``report`` says of it."""

from __future__ import annotations

import json
import time

import pytest
import torch

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from helpers.tolerances import EXACT, assert_close
from smoothcache_fx import CompiledError, Schedule

ROWS = {"attn": [1, 0, 1, 0], "ffn": [1, 0, 0, 0]}


@torch.library.custom_op("smoothcache_tests::slow", mutates_args=())
def slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.02)
    return x.clone()


@slow.register_fake
def _(x):
    return torch.empty_like(x)


class Slow(Stack):
    """Its first attention takes 20 ms, where it is computed."""

    def __init__(self):
        super().__init__(2)
        self.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: slow(output))


@pytest.fixture
def model():
    return smoothcache.compile(randomize(Slow(), 0).eval(), Schedule(4, ROWS), backend="eager")


def sample(model, trajectories):
    torch.manual_seed(0)
    with torch.no_grad():
        return [model(*inputs()) for _ in range(4 * trajectories)]


def test_each_kind_of_step_has_its_time(model):
    plain = sample(model, 1)
    assert smoothcache.report(model).times == []
    with smoothcache.timed(model):
        timed = sample(model, 3)
    for before, after in zip(plain, timed[:4], strict=True):
        assert_close(after, before, EXACT)
    report = smoothcache.report(model)
    assert {time.kind: time.calls for time in report.times} == {"computed": 3, "mixed": 3, "cached": 6}
    medians = {time.kind: time.median for time in report.times}
    assert medians["computed"] > 0.02 < medians["mixed"] and medians["cached"] < 0.02
    assert all(time.p20 <= time.median <= time.p80 for time in report.times)
    assert list(report.step_seconds) == [0, 1, 2, 3]
    assert report.step_seconds[2] > 0.02 > report.step_seconds[1]
    assert "a cached step takes" in str(report) and json.dumps(report.to_dict())
    sample(model, 1)
    assert smoothcache.report(model).times == report.times, "timed ends with its block"


def test_calls_that_compile_are_left_out(model):
    with smoothcache.timed(model):
        sample(model, 1)
    assert sum(time.calls for time in smoothcache.report(model).times) == 1, "the second step without any site"
    with smoothcache.timed(model):
        sample(model, 1)
    assert sum(time.calls for time in smoothcache.report(model).times) == 4


def test_what_is_disabled_is_not_timed(model):
    with smoothcache.timed(model), smoothcache.disabled(model):
        sample(model, 1)
    assert smoothcache.report(model).times == []


def test_it_ends_with_an_error_too(model):
    sample(model, 1)
    with pytest.raises(RuntimeError), smoothcache.timed(model):
        model(torch.randn(1, 2, 3), torch.randn(4))
    assert model.forward.run.__func__.__name__ == "_run"
    with pytest.raises(CompiledError, match="is not compiled"), smoothcache.timed(Stack().eval()):
        pass


def test_its_picture(model, tmp_path):
    with pytest.raises(CompiledError, match="nothing was timed"):
        smoothcache.report(model).plot(tmp_path / "times.png")
    sample(model, 1)
    with smoothcache.timed(model):
        sample(model, 1)
    smoothcache.report(model).plot(tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
