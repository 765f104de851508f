"""Hooks of accelerate and diffusers on submodules, for offloading and casting: they break the graph where they run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from pipelines.build import CASES, run, sd3
from pipelines.eager_cache import cached_by_hand
from pipelines.test_runs import difference
from smoothcache_fx import Schedule

STEPS = 6
SD3 = CASES["sd3"]
ROWS = {"attn": [1, 0, 1, 0, 0, 1], "ffn": [1, 1, 0, 0, 1, 0]}


class Mlps(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, x, timestep):
        x = x + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = x + block(x)
        return x


@torch.no_grad()
def sample_mlps(model, steps=6):
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        x = x - 0.1 * model(x, torch.full((2,), 1000.0 - 100.0 * step))
    return x


@pytest.mark.parametrize("first", [True, False], ids=["before_compile", "after_a_run"])
def test_hooks_on_submodules_leave_the_branches_cached(first, caplog):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = Mlps().eval()
    plain = sample_mlps(model)
    schedule = Schedule(6, {"ffn": [1, 0, 0, 1, 0, 0]})
    if first:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        smoothcache.compile(model, schedule, backend="eager")
    else:
        smoothcache.compile(model, schedule, backend="eager")
    cached = sample_mlps(model)
    if not first:
        assert "captures it" not in caplog.text
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        sample_mlps(model)
        assert "captures it from the start" in caplog.text
    again = sample_mlps(model)
    if not first:
        torch.testing.assert_close(again, cached)
    assert not torch.allclose(again, plain, atol=1e-4)
    report = smoothcache.report(model)
    assert report.uncompiled_calls <= 2 and report.groups[0].reused >= 8, str(report)


@pytest.mark.parametrize("when", ["before", "after a run"])
def test_group_offloading_of_blocks(when):
    """Hooks around the blocks break the graph at each: all run the same code, more often than Dynamo captures it."""
    pipe = sd3()
    with cached_by_hand(SD3, pipe, ROWS):
        expected = run(SD3, pipe, STEPS)
    cpu = torch.device("cpu")
    offload = {"onload_device": cpu, "offload_device": cpu, "offload_type": "block_level", "num_blocks_per_group": 1}
    if when == "before":
        pipe.transformer.enable_group_offload(**offload)
    smoothcache.compile(pipe, Schedule(STEPS, ROWS), backend="eager")
    if when == "after a run":
        run(SD3, pipe, STEPS)
        pipe.transformer.enable_group_offload(**offload)
        run(SD3, pipe, STEPS)  # what has changed is seen at its first call
    for _ in range(2):
        assert difference(run(SD3, pipe, STEPS), expected) <= 1e-5
    assert smoothcache.report(pipe).uncompiled_calls == 0


def sequential_offload(pipe):
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


def leaf_offload(pipe):
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("dit_ddim", sequential_offload),
        ("dit_ddim", layerwise_casting),
        ("sd3", layerwise_casting),
        ("sd3", leaf_offload),
        ("flux_true_cfg", leaf_offload),
    ],
)
def test_hooks_on_each_layer(name, hooks, caplog):
    """All branches are cached, attention too, whose block calls the hooked linears itself.

    Offloading gives a linear new parameters at each call; names tell where it is.
    """
    case, twin = CASES[name], CASES[name].make()
    rows = {kind: [1, 0, 1, 0, 0, 1] for kind in case.branches}
    if hooks is layerwise_casting:
        hooks(twin)
    with cached_by_hand(case, twin, rows):
        expected = run(case, twin, STEPS)
    pipe = case.make()
    hooks(pipe)
    smoothcache.compile(pipe, Schedule(STEPS, rows), backend="eager")
    for _ in range(2):
        assert difference(run(case, pipe, STEPS), expected) <= 1e-5
    report = smoothcache.report(pipe)
    assert report.uncompiled_calls <= 1 and all(group.reused for group in report.groups)
    assert "uncached" not in caplog.text
