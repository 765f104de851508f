"""An inner compiler that fails on a variant must not end a sampling run, nor be passed over in silence."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo import register_backend
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config

import smoothcache_fx as smoothcache
from helpers.cases import run_trajectory
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.tolerances import assert_trajectories_close, tolerance
from smoothcache_fx import CompiledError, Schedule

CASE, STEPS = CASES["adaln_zero"], 7
KINDS = {"attn": [1, 0, 1, 0, 1, 0, 0], "ffn": [1, 1, 0, 0, 1, 0, 1]}
ROWS = {name: KINDS[branch.kind] for name, branch in CASE.branches.items()}
RUN = {"steps": STEPS, "seed": 1, "dtype": torch.float32}


def analyze() -> None:
    """An optional step of Inductor, which cannot do what it is there for."""
    TRIED.append(inductor_config.triton.coalesce_tiling_analysis)
    assert not TRIED[-1], "an expression that it cannot solve"


#: Whether the step was on, for each compilation.
TRIED: list[bool] = []
# A traceback then says that it lies in Inductor.
analyze.__code__ = analyze.__code__.replace(co_filename="torch/_inductor/tiling_utils.py")


@register_backend
def fails_on_reuse(gm, inputs, **options):
    """An inner compiler that takes no graph without ``copy_``: one that stores nothing."""
    if not any(node.target is torch.ops.aten.copy_.default for node in gm.graph.nodes):
        raise NotImplementedError("no stores: this backend has nothing to do")
    return gm.forward


def check(backend: str, caplog, **options: object) -> smoothcache.Report:
    with caplog.at_level(logging.WARNING, logger="smoothcache_fx"):
        model = smoothcache.compile(CASE.build(), Schedule(STEPS, KINDS), backend=backend, **options)
        actual = [output for _ in range(2) for output in run_trajectory(CASE, model, **RUN)]
    with Oracle(CASE.build(), CASE.branches, ROWS) as oracle:
        expected = [o for _ in range(2) for o in run_trajectory(CASE, oracle.model, around=oracle.step, **RUN)]
    assert_trajectories_close(actual, expected, tolerance(torch.float32, backend), backend)
    return smoothcache.report(model)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "inner compiler failed" in record.getMessage()]


def test_a_variant_that_a_backend_refuses_runs_op_by_op(caplog):
    report = check("fails_on_reuse", caplog)
    (message,) = warnings(caplog)
    assert "0 of 6 sites computed" in message and "NotImplementedError: no stores" in message
    assert message.endswith("the variant runs op by op: right, but slower")
    ((what, count),) = report.failures.items()
    assert count == 1 and f"1 variant: {what}" in str(report) and report.to_dict()["failures"] == {what: 1}
    assert report.variants == 4 and not report.forced and not report.uncompiled_calls


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_an_optional_step_that_fails_is_left_out(monkeypatch, caplog, mode):
    def compiled(gm, example_inputs, **settings):
        analyze()
        return lambda arguments: gm(*arguments)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiled)
    TRIED.clear()
    report = check("inductor", caplog, mode=mode)
    assert TRIED == [True, False] * 4, "each variant is tried once more"
    assert inductor_config.triton.coalesce_tiling_analysis, "for the variant alone"
    (message,) = warnings(caplog)
    assert "AssertionError: an expression that it cannot solve" in message
    assert message.endswith("the variant is compiled with triton.coalesce_tiling_analysis=False")
    assert sum(report.failures.values()) == 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError("none")], ids=repr)
def test_want_of_memory_is_passed_on(monkeypatch, caplog, error):
    """Run op by op the variant would want more."""

    def compiled(gm, example_inputs, **settings):
        raise error

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiled)
    with pytest.raises(type(error)):
        check("inductor", caplog)
    assert not warnings(caplog)


def test_want_of_a_compiler_is_passed_on(monkeypatch, caplog):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def compiled(gm, example_inputs, **settings):
        raise InductorError(InvalidCxxCompiler(), None) from InvalidCxxCompiler()

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiled)
    with pytest.raises(InductorError):
        check("inductor", caplog)


class WritesThroughStrides(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))

    def write(self, x):
        x = x.clone()
        x[:, :4].as_strided((2, 2), (8, 1)).add_(1)
        return x

    def forward(self, x):
        x = self.write(x)
        return x + self.ffn(x)


class Disabled(WritesThroughStrides):
    @torch.compiler.disable
    def write(self, x):
        return super().write(x)


@torch.no_grad()
def test_what_pytorch_cannot_capture_is_said_with_its_place_and_a_way_out():
    x = torch.randn(1, 4, 8)
    model = smoothcache.compile(WritesThroughStrides().eval(), Schedule.uniform(2, 2), backend="eager")
    with pytest.raises(CompiledError, match=r"WritesThroughStrides cannot be captured.*in write: .*as_strided"):
        model(x)
    smoothcache.remove(model)
    with pytest.raises(CompiledError, match=r"cannot be captured.*in write: "):
        smoothcache.explain(model, x)
    way_out = Disabled().eval()
    expected = way_out(x)
    smoothcache.compile(way_out, Schedule.uniform(2, 2), backend="eager")
    assert torch.equal(way_out(x), expected)
    way_out(x)
    assert smoothcache.report(way_out).mac_ratio == pytest.approx(2.0)
