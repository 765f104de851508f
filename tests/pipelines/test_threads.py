"""Requests in threads of their own share a denoiser: each has its pipeline, its scheduler and its caches."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.tolerances import REORDERED, excess
from smoothcache_fx import Schedule

from .build import CASES, run, sd3
from .eager_cache import cached_by_hand
from .test_runs import difference

SD3 = CASES["sd3"]
STEPS = 6
SCHEDULE = Schedule(STEPS, {"attn": [1, 0, 1, 0, 0, 1], "ffn": [1, 1, 0, 0, 1, 0]})


def test_two_requests_at_once_are_cached_as_one_after_the_other():
    first, second = sd3(), sd3()
    second.transformer = first.transformer
    for pipe in (first, second):
        smoothcache.compile(pipe, SCHEDULE, backend="eager")
    expected = [run(SD3, first, STEPS, seed=1), run(SD3, second, STEPS, seed=2)]
    bytes_of_one = smoothcache.report(first).cache_bytes
    gate = threading.Barrier(2, timeout=60)

    def meet(pipe, step, timestep, values):
        gate.wait()
        return values

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            requests = [
                threads.submit(run, SD3, pipe, STEPS, seed=seed, callback_on_step_end=meet)
                for pipe, seed in ((first, 1), (second, 2))
            ]
            for request, one_by_one in zip(requests, expected, strict=True):
                assert difference(request.result(), one_by_one) <= 1e-5
    report = smoothcache.report(first)
    assert report.steps == 6 * STEPS and not report.forced
    assert report.cache_bytes == 2 * bytes_of_one, "a lane for each of two requests at a time"


def test_first_calls_at_once_are_one_capture():
    pipes = [sd3() for _ in range(3)]
    for pipe in pipes[1:]:
        pipe.transformer = pipes[0].transformer
    for pipe in pipes:
        smoothcache.compile(pipe, SCHEDULE, backend="eager")
    gate = threading.Barrier(3, timeout=60)

    def request(seed):
        gate.wait()
        return run(SD3, pipes[seed], STEPS, seed=seed)

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(request, range(3)))
    report = smoothcache.report(pipes[0])
    assert report.graphs == 1 and not report.forced
    for seed, (pipe, output) in enumerate(zip(pipes, found, strict=True)):
        assert difference(run(SD3, pipe, STEPS, seed=seed), output) <= 1e-5


class Meeting(nn.Module):
    """Lets the other thread in between a call's start and its graph."""

    def __init__(self):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.gate = threading.Barrier(2, timeout=60)

    @torch.compiler.disable
    def meet(self):
        if threading.current_thread() is not threading.main_thread():
            self.gate.wait()

    def forward(self, x, timestep):
        x = x * 1.0
        self.meet()
        return x + self.ffn(x)


class Pipe:
    def __init__(self, transformer):
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        self.components = {"transformer": transformer, "scheduler": self.scheduler}


@pytest.mark.parametrize("own_threads", [True, False])
def test_a_call_never_reads_another_requests_cache(own_threads):
    """Whether the runs are begun by the threads that make their calls, or by one that makes none."""
    torch.manual_seed(0)
    model = Meeting().eval()
    pipes = [Pipe(model), Pipe(model)]
    for pipe in pipes:
        smoothcache.compile(pipe, Schedule(3, {"ffn": [1, 0, 0]}), backend="eager")
    inputs = torch.randn(2, 3, 1, 4, 8)

    def request(which):
        pipe = pipes[which]
        if own_threads:
            pipe.scheduler.set_timesteps(3)
        outputs = []
        with torch.no_grad():
            for x, timestep in zip(inputs[which], pipe.scheduler.timesteps, strict=True):
                outputs.append(model(x, timestep.expand(1)))
                pipe.scheduler.step(x, timestep, x)
        return outputs

    pipes[0].scheduler.set_timesteps(3)
    request(0)  # the first call runs the model several times: two threads would not meet
    if not own_threads:
        for pipe in pipes:
            pipe.scheduler.set_timesteps(3)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(request, range(2)))
    for given, outputs in zip(inputs, found, strict=True):
        with torch.no_grad():
            branches = [model.ffn(x) for x in given]
        for step, (x, output) in enumerate(zip(given, outputs, strict=True)):
            own = branches[: step + 1] if own_threads else branches[step : step + 1]
            assert any(excess(output, x + branch, REORDERED) <= 1 for branch in own)


def test_a_run_inside_of_another_is_not_taken_for_it():
    """A callback samples with another pipeline of the same denoiser before the first one goes on."""
    first, second = sd3(), sd3()
    second.transformer = first.transformer
    plain = run(SD3, second, STEPS, seed=2)
    # The caches go to the run inside, so the one around it computes all at its next step.
    with cached_by_hand(SD3, first, {"attn": [1, 0, 1, 1, 0, 1], "ffn": [1, 1, 0, 1, 1, 0]}):
        expected_outer = run(SD3, first, STEPS, seed=1)
    for pipe in (first, second):
        smoothcache.compile(pipe, SCHEDULE, backend="eager")
    expected = run(SD3, first, STEPS, seed=1)
    assert difference(expected, expected_outer) >= 1e-3
    cached = run(SD3, second, STEPS, seed=2)
    inner = []

    def sample_inside(pipe, step, timestep, values):
        if step == 2:
            inner.append(run(SD3, second, STEPS, seed=2))
        return values

    outer = run(SD3, first, STEPS, seed=1, callback_on_step_end=sample_inside)
    assert min(difference(inner[0], cached), difference(inner[0], plain)) <= 1e-5
    assert difference(outer, expected_outer) <= 1e-5
    assert difference(run(SD3, first, STEPS, seed=1), expected) <= 1e-5
