"""First calls: of models in threads of their own, and of many models that share code behind a graph break."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from helpers.tolerances import COMPILED, assert_close
from smoothcache_fx import Schedule
from smoothcache_fx.capture import _torch

SCHEDULE = Schedule(4, {"attn": [1, 0, 1, 0], "ffn": [1, 0, 0, 1]})


def sample(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(like.shape, generator=generator) for like in inputs(2 + seed % 2))
    with torch.no_grad():
        for _ in range(4):
            x = x - 0.1 * model(x, c)
    return x


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_models_in_threads_of_their_own_are_captured_once_each(backend):
    models = [randomize(Stack(), seed).eval() for seed in range(3)]
    one_by_one = []
    for seed, model in enumerate(models):
        alone = smoothcache.compile(copy.deepcopy(model), SCHEDULE, backend="eager")
        one_by_one.append(sample(alone, seed))
        smoothcache.compile(model, SCHEDULE, backend=backend)
    gate = threading.Barrier(len(models), timeout=60)

    def work(seed):
        gate.wait()
        return [sample(models[seed], seed) for _ in range(3)]

    with ThreadPoolExecutor(len(models)) as threads:
        found = list(threads.map(work, range(len(models))))
    for model, outputs, expected in zip(models, found, one_by_one, strict=True):
        report = smoothcache.report(model)
        assert report.graphs == 1 and report.uncompiled_calls == 0 and not report.forced
        for output in outputs:
            assert_close(output, expected, COMPILED)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_fx_tracing_in_another_thread_is_waited_for(elsewhere, monkeypatch):
    """Dynamo refuses calls while FX traces, in whatever thread; each compilation does, under Dynamo's lock."""
    model = smoothcache.compile(randomize(Stack(), 0).eval(), SCHEDULE, backend="eager")
    sample(model, 0)
    tracing = threading.Event()

    def trace():
        with _torch.compile_lock, monkeypatch.context() as patch:
            patch.setattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", True)
            tracing.set()
            time.sleep(0.5)

    if elsewhere:
        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(trace)
            assert tracing.wait(60)
            sample(model, 0)
            done.result()
        assert smoothcache.report(model).uncompiled_calls == 0
    else:
        monkeypatch.setattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", True)
        with pytest.raises(RuntimeError, match="symbolically trace"):
            sample(model, 0)


class Broken(nn.Module):
    """Blocks called in a loop that a graph break leaves to Python: all models share the code of their forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )

    def residual(self, block, x):
        return x + block(x)

    def forward(self, x):
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = self.residual(block, x)
        return x


def test_more_models_with_a_graph_break_than_dynamo_captures_by_itself():
    count = torch._dynamo.config.recompile_limit + 2
    models = [randomize(Broken(), seed).eval() for seed in range(count)]
    for model in models:
        smoothcache.compile(model, Schedule.uniform(2, 2), backend="eager")
        for length in (4, 6):
            with torch.no_grad():
                outputs = [model(torch.randn(1, length, 8)) for _ in range(2)]
            assert all(output.shape == (1, length, 8) for output in outputs)
    for model in models:
        report = smoothcache.report(model)
        assert report.uncompiled_calls == 0 and report.mac_ratio == pytest.approx(2.0)


def test_dynamos_limits_are_restored_by_the_last_thread():
    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    entered, left = threading.Event(), threading.Event()

    def first():
        with _torch.no_recompile_limit():
            entered.wait(60)
        left.set()

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(first)
        with _torch.no_recompile_limit():
            entered.set()
            assert left.wait(60)
            assert config.recompile_limit == config.accumulated_recompile_limit == _torch.MOST_GRAPHS
        done.result()
    assert (config.recompile_limit, config.accumulated_recompile_limit) == before
