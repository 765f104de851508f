"""``explain`` and ``report``."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch._subclasses import FakeTensorMode

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from smoothcache_fx import CompiledError, NoSitesError, Schedule

ROWS = {"attn": [1, 0, 1, 0], "ffn": [1, 0, 0, 0]}


@pytest.fixture
def model():
    return randomize(Stack(3), 0).eval()


def test_explain_tells_groups_shapes_gates_work_and_memory(model):
    explanation = smoothcache.explain(model, *inputs(2, 6))
    groups = explanation.groups()
    assert list(groups) == ["blocks.*.attn", "blocks.*.mlp"]
    assert all(len(sites) == 3 for sites in groups.values())
    site = groups["blocks.*.mlp"][1]
    assert (site.name, site.kind, site.gates) == ("blocks.1.mlp", "ffn", (((2, 1, 16),),))
    assert site.flops == 2 * 2 * 12 * 16 * 64 and site.cache_bytes == 12 * 16 * 4
    assert explanation.cache_bytes == 6 * 12 * 16 * 4
    assert sum(s.flops for s in explanation.sites) < explanation.flops
    text = str(explanation)
    for part in (
        "Stack: 6 sites in 1 graph",
        "blocks.*.mlp",
        "[2, 1, 16]",
        "4.5 KiB of cache",
        "adds not taken",
        "neither operand is computed from the other",
    ):
        assert part in text, part


def test_explain_predicts_what_then_happens(model):
    schedule = Schedule(4, ROWS)
    explanation = smoothcache.explain(model, *inputs(), schedule=schedule)
    predicted = explanation.prediction
    smoothcache.compile(model, schedule)  # Inductor narrows products: so does the prediction
    with torch.no_grad():
        for _ in range(4):
            model(*inputs())
    report = smoothcache.report(model)
    assert predicted.variants == report.variants == 3
    assert predicted.mac_ratio == pytest.approx(report.mac_ratio)
    assert predicted.cache_bytes == explanation.cache_bytes == report.cache_bytes
    assert predicted.mac_ratio > 1.5
    assert 4 / sum(predicted.step_shares) == pytest.approx(predicted.mac_ratio)
    assert predicted.step_shares[0] == 1.0 > predicted.step_shares[2] > predicted.step_shares[1]
    assert predicted.speedup == (predicted.byte_ratio, predicted.mac_ratio)
    text = str(explanation)
    assert (
        f"predicted speed-up {predicted.byte_ratio:.2f} to {predicted.mac_ratio:.2f}" in text and "3 variants" in text
    )
    stored = json.loads(json.dumps(explanation.to_dict()))["prediction"]
    assert (stored["mac_ratio"], tuple(stored["speedup"])) == (predicted.mac_ratio, predicted.speedup)
    assert json.loads(json.dumps(report.to_dict()))["mac_ratio"] == report.mac_ratio
    for found in (explanation, report):
        assert found._repr_html_().startswith("<pre>") and "blocks.*.attn" in found._repr_html_()


def test_only_sites_that_are_reused_take_memory(model):
    explanation = smoothcache.explain(model, *inputs(), schedule=Schedule(4, {"blocks.1.attn": [1, 0, 1, 0]}))
    assert explanation.prediction.cache_bytes == explanation.sites[2].cache_bytes == explanation.cache_bytes / 6
    nothing = smoothcache.explain(model, *inputs(), schedule=Schedule(4)).prediction
    assert (nothing.variants, nothing.mac_ratio, nothing.cache_bytes) == (1, 1.0, 0)
    assert nothing.speedup == (1.0, 1.0) and nothing.step_shares == (1.0,) * 4


@torch.library.custom_op("smoothcache_tests::unrunnable", mutates_args=())
def unrunnable(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("explain has computed something")


@unrunnable.register_fake
def _(x):
    return torch.empty_like(x)


class Unrunnable(Stack):
    def forward(self, x, c):
        return super().forward(unrunnable(x), c)


def test_a_model_of_one_graph_is_not_run():
    explanation = smoothcache.explain(Unrunnable(2).eval(), *inputs())
    assert len(explanation.sites) == 4 and explanation.graphs == 1
    with pytest.raises(AssertionError, match="has computed"):
        smoothcache.explain(Unrunnable(2, broken=True).eval(), *inputs())


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_weights_and_inputs_need_no_memory(place):
    real = smoothcache.explain(Stack(2).eval(), *inputs(), schedule=Schedule(4, ROWS))
    with torch.device("meta") if place == "meta" else FakeTensorMode():
        model, given = Stack(2).eval(), [torch.randn(value.shape) for value in inputs()]
    explanation = smoothcache.explain(model, *given, schedule=Schedule(4, ROWS))
    assert explanation.sites == real.sites and explanation.flops == real.flops
    # A CPU's attention op has an output more than others'.
    assert explanation.prediction.byte_ratio == pytest.approx(real.prediction.byte_ratio, rel=1e-2)
    assert replace(explanation.prediction, byte_ratio=0) == replace(real.prediction, byte_ratio=0)


def test_explain_counts_graph_breaks_and_leaves_a_compiled_model_alone(model):
    broken = Stack(2, broken=True).eval()
    explanation = smoothcache.explain(broken, *inputs())
    assert explanation.graphs >= 1 and len(explanation.sites) == 4
    assert json.loads(json.dumps(explanation.to_dict()))["breaks"] == dict(explanation.breaks)
    assert explanation.flops == smoothcache.explain(Stack(2).eval(), *inputs()).flops
    smoothcache.compile(model, Schedule(4, ROWS), backend="eager")
    with torch.no_grad():
        model(*inputs())
    smoothcache.explain(model, *inputs())
    assert smoothcache.report(model).calls == 1


class CutBlock(torch.nn.Module):
    """A feed-forward of 64 times 16 by 32 and 32 by 16 FLOPs that a graph break cuts, and one that it leaves whole."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.more, self.less = (
            torch.nn.Linear(*sizes) for sizes in ((16, 32), (32, 16), (16, 32), (32, 16))
        )

    def forward(self, x, c):
        y = self.up(x + c.unsqueeze(1)).relu()
        torch._dynamo.graph_break()
        x = x + self.down(y)
        return x + self.less(self.more(x).relu())


def test_a_branch_that_a_break_cuts_in_two_is_told():
    model = CutBlock().eval()
    explanation = smoothcache.explain(model, *inputs())
    assert [site.kind for site in explanation.sites] == ["ffn"]
    assert explanation.graphs == 2 and explanation.lost_share == 0.5
    (place,) = explanation.breaks
    assert place.startswith("test_explain.py:") and "torch._dynamo.graph_break()" in place
    assert "50.0% of the FLOPs are work of blocks that lies in no site" in str(explanation)
    smoothcache.compile(model, Schedule(2, {"ffn": [1, 0]}), backend="eager")
    with torch.no_grad():
        model(*inputs())
    report = smoothcache.report(model)
    assert report.breaks == explanation.breaks and report.lost_share == 0.5
    assert "50.0%" in str(report) and place in str(report)


def test_a_break_between_branches_cuts_nothing():
    explanation = smoothcache.explain(Stack(2, broken=True).eval(), *inputs())
    assert explanation.breaks and explanation.lost_share < 0.1, "no more than the modulation"
    assert "graph breaks (" in str(explanation)
    whole = smoothcache.explain(Stack(2).eval(), *inputs())
    assert not whole.breaks and "graph break" not in str(whole)


class ToFloat32(ModelHook):
    """Stands for the hooks that move inputs to where the weights are."""

    def pre_forward(self, module, *args, **kwargs):
        return [arg.float() for arg in args], kwargs


@pytest.mark.parametrize("compiled", ["never", "before", "after"])
def test_explain_runs_inside_of_accelerates_hooks(model, compiled):
    wide = [value.double() for value in inputs()]
    if compiled == "before":
        smoothcache.compile(model, Schedule(4, ROWS), backend="eager")
    add_hook_to_module(model, ToFloat32())
    if compiled == "after":
        smoothcache.compile(model, Schedule(4, ROWS), backend="eager")
    before = dict(vars(model))
    assert len(smoothcache.explain(model, *wide).sites) == 6
    assert vars(model) == before
    assert model(*wide).shape == wide[0].shape
    if compiled != "never":
        assert smoothcache.report(model).calls == 1


def test_a_model_without_sites_tells_where_the_graph_broke():
    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x):
            y = self.up(x).relu()
            torch._dynamo.graph_break()
            return x + self.down(y)

    with pytest.raises(NoSitesError, match=r"(?s)in 2 captured.*graph broke at\n  test_explain.py:\d+"):
        smoothcache.explain(Cut().eval(), torch.randn(2, 6, 16))


def test_explain_refuses(model):
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        smoothcache.explain(None)
    with pytest.raises(CompiledError, match="training mode"):
        smoothcache.explain(copy.deepcopy(model).train(), *inputs())
    with pytest.raises(NoSitesError):
        smoothcache.explain(torch.nn.Linear(16, 16).eval(), torch.randn(2, 6, 16))


def test_report_before_and_after(model):
    smoothcache.compile(model, Schedule(4, ROWS), backend="eager")
    empty = smoothcache.report(model)
    assert (empty.calls, empty.groups, empty.variants, empty.mac_ratio) == (0, [], 0, 1.0)
    str(empty)
    with torch.no_grad():
        for _ in range(6):
            model(*inputs())
    report = smoothcache.report(model)
    counts = {group.group: (group.sites, group.computed, group.reused) for group in report.groups}
    assert counts == {"blocks.*.attn": (3, 9, 9), "blocks.*.mlp": (3, 6, 12)}
    assert (report.calls, report.steps, report.trajectories) == (6, 6, 2)
    assert len(report.compile_seconds) == report.variants == 3
    assert f"3 variants, compiled in {sum(report.compile_seconds):.1f} s" in str(report)
    assert "6 calls, 6 steps, 2 trajectories" in str(report) and "MAC ratio" in str(report)
