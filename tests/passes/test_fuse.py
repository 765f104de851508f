"""Residual adds lowered to kernels: which, and that every sum stays the same."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from helpers.capture import Block, Stack, capture, inputs
from helpers.cases import random_rows, run_trajectory
from helpers.inline_dits import InlineDiT
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.structures import AddcmulBlock
from helpers.tolerances import (
    COARSE,
    FUSED_KERNELS,
    SAME_KERNELS,
    assert_as_exact,
    assert_close,
    assert_trajectories_close,
)
from smoothcache_fx.capture import variants as build
from smoothcache_fx.capture.variants import GraphBuilder
from smoothcache_fx.passes import pipeline
from smoothcache_fx.passes.facts import packet
from smoothcache_fx.passes.forecast import FORECAST
from smoothcache_fx.passes.fuse import fuse
from smoothcache_fx.passes.guard import insert_guards
from smoothcache_fx.passes.lowering import Lowering, lowering_for
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.verify import check_graph

ops = torch.ops.smoothcache
#: As on CUDA under a compiler that does not fuse, and under Inductor.
ALL, RUNS = lowering_for("cuda", fuses_by_itself=False), lowering_for("cuda", fuses_by_itself=True)
KERNELS = (
    ops.residual_store,
    ops.residual_load,
    ops.residual_accumulate,
    ops.residual_forecast,
    ops.residual_norm,
)


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower variants as on CUDA; on a CPU the ops run as plain PyTorch."""
    monkeypatch.setattr(build, "lowering_for", lambda device, fuses_by_itself: lowering_for("cuda", fuses_by_itself))


@functools.cache
def captured_stack() -> GraphBuilder:
    (program,) = capture(Stack().eval(), *inputs())
    return program.builder


def variant_of(model: nn.Module | None, mask: tuple[bool, ...], *args: Tensor):
    """What the model was captured as, and the variant for a mask; None is a stack of two blocks."""
    if model is None:
        builder = captured_stack()
    else:
        (program,) = capture(model.eval(), *(args or inputs()))
        builder = program.builder
    compute = {i for i, computed in enumerate(mask) if computed}
    return builder, specialize(builder.guarded, compute)


def kernels(graph: torch.fx.GraphModule) -> dict[str, int]:
    found = Counter(packet(node) for node in graph.graph.nodes)
    return {str(kernel).partition(".")[2]: found[kernel] for kernel in KERNELS if found[kernel]}


def values_of(graph: torch.fx.GraphModule) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(node.meta["val"].shape, generator=generator).to(node.meta["val"].dtype)
        for node in placeholders(graph.graph)
    ]


def check_equal(before: torch.fx.GraphModule, after: torch.fx.GraphModule) -> None:
    """Outputs and caches are the same, bit for bit."""
    arguments, others = values_of(before), values_of(after)
    for expected, actual in zip(before(*arguments), after(*others), strict=True):
        assert torch.equal(actual, expected)
    assert all(map(torch.equal, others, arguments))


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=4)))
def test_every_variant_of_a_stack(mask):
    builder, variant = variant_of(None, mask)
    fused = check_graph(fuse(variant, ALL), like=builder.captured, stage="variant")
    check_equal(variant, fused)
    runs = [len(list(group)) for computed, group in itertools.groupby(mask) if not computed]
    assert kernels(fused) == {
        name: count
        for name, count in (
            ("residual_store", sum(mask)),
            ("residual_load", runs.count(1)),
            ("residual_accumulate", sum(length > 1 for length in runs)),
        )
        if count
    }
    ends = [node for node in fused.graph.nodes if packet(node) is ops.residual_accumulate]
    assert sorted(len(node.args[2]) for node in ends) == sorted(length for length in runs if length > 1)


def test_a_computed_branch_that_nothing_stores_is_left_alone():
    builder, _ = variant_of(Stack(), (True,) * 4)
    variant = specialize(builder.guarded, {0, 1, 2, 3}, store={2})
    fused = fuse(variant, ALL)
    assert kernels(fused) == {"residual_store": 1}
    check_equal(variant, fused)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecasts_of_both_orders(order, dtype):
    """Of a graph made for order 2: two reused branches, one of them a line, and one that stores its history on."""
    model = Stack().eval().to(dtype)
    (program,) = capture(model, *(value.to(dtype) for value in inputs()))
    guarded = insert_guards(program.builder.captured, program.builder.sites, 2)
    variant = specialize(guarded, {0}, orders=[2, order, 1, 0])
    fused = check_graph(fuse(variant, ALL), like=program.builder.captured, stage="variant")
    assert kernels(fused) == {"residual_store": 1, "residual_accumulate": 1}
    (run,) = [node for node in fused.graph.nodes if packet(node) is ops.residual_accumulate]
    assert [len(weight.meta["val"]) if weight else 1 for weight in run.args[3]] == [1 + order, 2, 1]
    assert not [node for node in fused.graph.nodes if FORECAST in node.meta]
    if dtype is torch.float32:
        check_equal(variant, fused)
    else:  # one rounding less
        for expected, actual in zip(variant(*values_of(variant)), fused(*values_of(fused)), strict=True):
            assert_close(actual, expected, COARSE)


def test_forecasts_from_differences():
    """Through the views of each block's output; the store takes the difference before the kernel writes."""
    (program,) = capture(Stack().eval(), *inputs())
    guarded = insert_guards(program.builder.captured, program.builder.sites, 2, torch.float16)
    variant = check_graph(specialize(guarded, {0}, orders=[2] * 4), like=program.builder.captured, stage="variant")
    fused = check_graph(fuse(variant, ALL), like=program.builder.captured, stage="variant")
    assert kernels(fused) == {"residual_store": 1, "residual_accumulate": 1}
    (run,) = [node for node in fused.graph.nodes if packet(node) is ops.residual_accumulate]
    dtypes = [value.meta["val"].dtype for value in run.args[2]]
    assert dtypes == [torch.float32, torch.float16, torch.float16] * 3
    check_equal(variant, fused)


def test_two_streams_have_a_run_each():
    case = CASES["joint"]
    latents, (conditioning,) = case.inputs(1, torch.float32)
    (program,) = capture(case.build(), latents, torch.ones(len(latents)), **conditioning)
    variant = specialize(program.builder.guarded, set())
    fused = fuse(variant, ALL)
    # Two blocks with two branches each: a run in the image's stream and one in the text's.
    ends = [node for node in fused.graph.nodes if packet(node) is ops.residual_accumulate]
    assert [len(node.args[2]) for node in ends] == [4, 4]
    check_equal(variant, fused)


def test_gates_by_addcmul():
    model = InlineDiT(AddcmulBlock())
    case = CASES["adaln_zero"]
    latents, (conditioning,) = case.inputs(1, torch.float32)
    arguments = (latents, torch.ones(len(latents)), *conditioning.values())
    for mask, expected in (((False, False), {"residual_accumulate": 1}), ((True, True), {"residual_store": 2})):
        _, variant = variant_of(model, mask, *arguments)
        fused = fuse(variant, ALL)
        assert kernels(fused) == expected
        for ours, theirs in zip(fused(*values_of(fused)), variant(*values_of(variant)), strict=True):
            torch.testing.assert_close(ours, theirs)


class CastBlock(Block):
    """The sum is in float64, which no kernel has."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (x.double() + c[:, None].double() * self.attn(x)).float()


def test_a_dtype_that_no_kernel_has_is_left_alone():
    for mask in ((True,), (False,)):
        _, variant = variant_of(CastBlock(), mask)
        fused = fuse(variant, ALL)
        assert not kernels(fused)
        check_equal(variant, fused)


def test_a_stream_that_something_else_reads_ends_a_run():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            x = self.blocks[0](x, c)
            return self.blocks[1](x, c), x.mean()

    _, variant = variant_of(Read(), (False,) * 4)
    fused = fuse(variant, ALL)
    assert kernels(fused) == {"residual_accumulate": 2}
    check_equal(variant, fused)


def test_a_forecast_that_stands_alone():
    (program,) = capture(Stack().eval(), *inputs())
    guarded = insert_guards(program.builder.captured, program.builder.sites, 1)
    variant = specialize(guarded, {0, 1, 2}, orders=[1] * 4)
    fused = check_graph(fuse(variant, ALL), like=program.builder.captured, stage="variant")
    assert kernels(fused) == {"residual_store": 3, "residual_forecast": 1}
    check_equal(variant, fused)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=4)))
def test_under_inductor_runs_alone_become_kernels(mask):
    builder, variant = variant_of(Stack(), mask)
    fused = check_graph(fuse(variant, RUNS), like=builder.captured, stage="variant")
    runs = [len(list(group)) for computed, group in itertools.groupby(mask) if not computed]
    expected = sum(length > 1 for length in runs)
    assert kernels(fused) == ({"residual_accumulate": expected} if expected else {})
    check_equal(variant, fused)


def test_what_pays_where():
    assert lowering_for("cpu", fuses_by_itself=False) is lowering_for("cpu", fuses_by_itself=True) is None
    assert ALL == Lowering(singles=True, runs=True, norms=True, groups=False)
    assert RUNS == Lowering(singles=False, runs=True, norms=False, groups=True)


def test_the_builder_asks_for_its_graphs_device_and_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "lowering_for", lambda *arguments: asked.append(arguments))
    for backend in ("eager", "inductor"):
        torch._dynamo.reset()
        capture(Stack().eval(), *inputs(), backend=backend)
    assert asked == [("cpu", False), ("cpu", True)]


class Transposed(nn.Module):
    """A patch embedding: the stream begins with tokens and width swapped in memory."""

    def __init__(self, branch_first: bool) -> None:
        super().__init__()
        self.blocks = Stack()
        self.branch_first = branch_first

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = torch.tanh(x.transpose(1, 2).contiguous().transpose(1, 2))
        for block in self.blocks.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
            attn = gate1 * block.attn(block.norm1(x) * (1 + scale1) + shift1)
            x = attn + x if self.branch_first else x + attn
            mlp = gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)
            x = mlp + x if self.branch_first else x + mlp
        return x


@pytest.mark.parametrize("branch_first", [True, False])
def test_a_stream_that_lies_in_memory_otherwise_than_its_branches(branch_first):
    builder, variant = variant_of(Transposed(branch_first), (False,) * 4)
    fused = check_graph(fuse(variant, RUNS), like=builder.captured, stage="variant")
    assert kernels(fused) == {"residual_accumulate": 1}
    (run,) = [node for node in fused.graph.nodes if packet(node) is ops.residual_accumulate]
    streams = {value.meta["val"].stride() for value in (run, run.args[0], *run.args[2])}
    assert len(streams) == 1, "the op reads and writes in one order"
    check_equal(variant, fused)
    ours, theirs = (list(graph.graph.nodes)[-1].args[0][0].meta["val"] for graph in (fused, variant))
    assert ours.stride() == theirs.stride()


#: Norms taken in, too, in float32, for all; the other ways for one of each structure.
FEW = ("adaln_zero", "joint", "post_norm", "diffusers_flux")


@pytest.mark.parametrize(
    ("name", "dtype", "norms"),
    [
        *(pytest.param(name, torch.float32, True, id=f"{name}-norms-float32") for name in CASES),
        *(pytest.param(name, torch.float32, False, id=f"{name}-adds-float32") for name in FEW),
        *(pytest.param(name, torch.bfloat16, True, id=f"{name}-norms-bfloat16") for name in FEW),
    ],
)
def test_trajectories_are_the_oracles(name, dtype, norms, monkeypatch):
    """In float32 adds are so bit for bit; in bfloat16 the kernels round once where eager PyTorch rounds twice."""
    on_cuda(monkeypatch)
    if not norms:
        monkeypatch.setattr(pipeline, "PASSES", [one for one in pipeline.PASSES if one.name != "fuse_norms"])
    case, steps = CASES[name], 6
    schedule, rows = random_rows(list(case.branches), steps, seed=3)
    run = {"steps": steps, "seed": 1, "dtype": dtype}
    model = smoothcache.compile(case.build(0, dtype), schedule, backend="eager")
    actual = run_trajectory(case, model, **run)
    with Oracle(case.build(0, dtype), case.branches, rows) as oracle:
        expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
    if dtype is torch.float32:
        assert_trajectories_close(actual, expected, (FUSED_KERNELS if norms else SAME_KERNELS)[dtype], name)
    else:
        with Oracle(case.build(0, torch.float32), case.branches, rows) as oracle:
            exact = run_trajectory(case, oracle.model, around=oracle.step, **{**run, "dtype": torch.float32})
        assert_as_exact(actual, expected, exact, name)
    (program,) = model.forward.session.programs
    assert any(kernels(graph) for graph in program.builder.graphs.values())


def test_trajectories_with_forecasts_are_the_oracles(monkeypatch):
    on_cuda(monkeypatch)
    case, steps = CASES["joint"], 8
    _, rows = random_rows(list(case.branches), steps, seed=3)
    orders = {site: index % 3 for index, site in enumerate(rows)}
    model = smoothcache.compile(case.build(), smoothcache.Schedule(steps, rows, order=orders), backend="eager")
    run = {"steps": steps, "seed": 1, "dtype": torch.float32}
    actual = run_trajectory(case, model, **run)
    with Oracle(case.build(), case.branches, rows, orders) as oracle:
        expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
    assert_trajectories_close(actual, expected, FUSED_KERNELS[torch.float32], repr(orders))
    (program,) = model.forward.session.programs
    runs = [node for g in program.builder.graphs.values() for node in g.graph.nodes if len(node.args) > 3]
    assert any(packet(node) is ops.residual_accumulate and any(node.args[3]) for node in runs)
