"""Linears that only make gates, grouped: how many launches are left, and that every output stays the same."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import smoothcache_fx as smoothcache
from helpers.capture import capture_case
from helpers.cases import Case, run_trajectory
from helpers.models import CASES, LABELS, SIZES
from helpers.oracle import Oracle
from helpers.tolerances import FUSED_KERNELS, REORDERED, Tolerance, assert_close, assert_trajectories_close
from smoothcache_fx import Schedule
from smoothcache_fx.capture import variants as build
from smoothcache_fx.passes.facts import aten, packet
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.fuse import fuse
from smoothcache_fx.passes.group import LEAST_MEMBERS, MOST_ROWS, group_linears
from smoothcache_fx.passes.lowering import lowering_for
from smoothcache_fx.passes.merge_equal import merge_equal
from smoothcache_fx.passes.names import WEIGHT
from smoothcache_fx.passes.narrow import narrow
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.verify import check_graph

grouped = torch.ops.smoothcache.grouped_linear
DEPTH = 4
DIT = dataclasses.replace(
    CASES["diffusers_dit"],
    make=lambda: DiTTransformer2DModel(
        **SIZES, num_layers=DEPTH, sample_size=8, patch_size=2, num_embeds_ada_norm=LABELS
    ),
)


def variant_of(case: Case, compute: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, backend: str = "eager"):
    """A variant as it is before linears are grouped, and after."""
    (program,) = capture_case(case, dtype, backend)
    builder = program.builder
    before = fuse(narrow(specialize(builder.guarded, set(compute))), lowering_for("cuda", fuses_by_itself=True))
    return before, check_graph(group_linears(merge_equal(before)), like=builder.captured, stage="variant")


def ops(graph: GraphModule) -> Counter:
    return Counter(packet(node) for node in graph.graph.nodes)


def values_of(graph: GraphModule) -> list[Tensor]:
    """The same for inputs of one name."""
    values = []
    for node in placeholders(graph.graph):
        value, generator = node.meta["val"], torch.Generator().manual_seed(sum(map(ord, node.name)))
        made = 0.3 * torch.randn(value.shape, generator=generator)
        values.append(
            made.to(value.dtype) if value.is_floating_point() else torch.zeros(value.shape, dtype=value.dtype)
        )
    return values


def check_equal(before: GraphModule, after: GraphModule) -> None:
    for expected, actual in zip(before(*values_of(before)), after(*values_of(after)), strict=True):
        assert_close(actual, expected, REORDERED)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_each_block_of_a_dit_embeds_the_timestep_for_itself(backend):
    before, after = variant_of(DIT, backend=backend)
    assert ops(before)[aten.sin] == DEPTH + 1 and ops(after)[aten.sin] == 1
    assert ops(before)[aten.addmm] == 2 * (DEPTH + 1) + 2 * DEPTH + 2
    # Two levels of the embedding and one of gates; the last layer's modulation and projection are left.
    groups = [node for node in after.graph.nodes if packet(node) is grouped]
    assert [len(node.args[0]) for node in groups] == [DEPTH, DEPTH, 2 * DEPTH]
    assert ops(after)[aten.addmm] == 2
    assert count_flops(after.graph) == count_flops(merge_equal(before).graph) < count_flops(before.graph)
    activation = aten.silu if backend == "eager" else aten.neg
    assert ops(before)[activation] == 2 * (DEPTH + 1) and ops(after)[activation] == 2
    check_equal(before, after)


@pytest.mark.parametrize(
    ("name", "members"),
    [("diffusers_pixart", []), ("diffusers_sd3", [6]), ("diffusers_flux", [10]), ("adaln_zero", [6])],
)
def test_other_models(name, members):
    """PixArt's blocks share one modulation. The others have one linear a gate; Flux's make those of both streams."""
    before, after = variant_of(CASES[name])
    groups = [node for node in after.graph.nodes if packet(node) is grouped]
    assert [len(node.args[0]) for node in groups] == members
    check_equal(before, after)


@pytest.mark.parametrize("compute", [(0,), (1, 2), (0, 3, 5), (7,)])
def test_variants_that_compute_some(compute):
    before, after = variant_of(DIT, compute)
    assert ops(after)[grouped] >= 3
    check_equal(before, after)
    assert all(map(torch.equal, values_of(before), values_of(before)))


def test_in_bfloat16():
    before, after = variant_of(DIT, dtype=torch.bfloat16)
    assert ops(after)[grouped] == 3
    for expected, actual in zip(before(*values_of(before)), after(*values_of(after)), strict=True):
        assert torch.equal(actual, expected), "plain PyTorch does the same products one by one"


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_trajectory_is_the_oracles(monkeypatch, backend):
    """With all that CUDA and Inductor get, run op by op, and compiled: Inductor must know every op that is left."""
    monkeypatch.setattr(build, "lowering_for", lambda device, fuses_by_itself: lowering_for("cuda", True))
    steps, rows = 6, {"attn": [1, 0, 1, 0, 0, 1], "ffn": [1, 0, 0, 1, 0, 1]}
    branches = {
        f"transformer_blocks.{i}.{name}": dataclasses.replace(branch, module=f"transformer_blocks.{i}.{name}")
        for i in range(DEPTH)
        for name, branch in (
            ("attn1", DIT.branches["transformer_blocks.0.attn1"]),
            ("ff", DIT.branches["transformer_blocks.0.ff"]),
        )
    }
    model = smoothcache.compile(DIT.build(), Schedule(steps, rows), backend=backend)
    run = {"steps": steps, "seed": 1, "dtype": torch.float32}
    actual = run_trajectory(DIT, model, **run)
    with Oracle(DIT.build(), branches, {name: rows[b.kind] for name, b in branches.items()}) as oracle:
        expected = run_trajectory(DIT, oracle.model, around=oracle.step, **run)
    # Inductor's own sums of four blocks differ by a little more, with everything computed too.
    allowed = FUSED_KERNELS[torch.float32] if backend == "eager" else Tolerance(1e-4, 1e-4)
    assert_trajectories_close(actual, expected, allowed, "dit")
    (program,) = model.forward.session.programs
    counts = {mask.compute.bit_count(): ops(graph)[grouped] for mask, graph in program.builder.graphs.items()}
    assert not smoothcache.report(model).failures
    assert counts.pop(2 * DEPTH) == 0 and counts and all(counts.values())


# Any graph of linears


def traced(step, x: Tensor, parameters: list[Tensor]) -> GraphModule:
    graph = make_fx(step, tracing_mode="fake")(x, *parameters)
    for number, node in enumerate(placeholders(graph.graph)[1:]):
        node.meta[WEIGHT] = f"layers.{number}.weight"
    return graph


def check_step(step, x: Tensor, parameters: list[Tensor]) -> GraphModule:
    graph = traced(step, x, parameters)
    after = group_linears(merge_equal(graph))
    after.graph.lint()
    assert_close(after(x, *parameters), graph(x, *parameters), REORDERED)
    return after


WIDTH = 8
UNARY = (F.silu, torch.tanh, lambda x: x * 0.5, lambda x: F.gelu(x, approximate="tanh"), lambda x: x + 1)


@settings(max_examples=80)
@given(data=st.data(), rows=st.integers(1, 3), count=st.integers(1, 12))
def test_any_net_of_linears(data, rows, count):
    """Each takes the input, or one or two earlier ones' outputs; a few outputs are returned."""
    plan = []
    for number in range(count):
        sources = data.draw(st.lists(st.integers(-1, number - 1), min_size=1, max_size=2))
        plan.append((sources, data.draw(st.sampled_from(range(len(UNARY))))))
    returned = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(rows, WIDTH, generator=generator)
    parameters = [torch.randn(WIDTH, WIDTH, generator=generator) / 3 for _ in range(count)]

    def step(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor] = []
        for (sources, which), weight in zip(plan, weights, strict=True):
            given = [x if source < 0 else values[source] for source in sources]
            values.append(UNARY[which](torch.mm(sum(given[1:], given[0]), weight.t())))
        return tuple(values[i] for i in returned)

    check_step(step, x, parameters)


def test_a_chain_has_a_level_for_each():
    def step(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = torch.mm(x, weight.t())
        return x

    assert ops(check_step(step, torch.randn(2, WIDTH), [torch.randn(WIDTH, WIDTH) for _ in range(5)]))[grouped] == 0


@pytest.mark.parametrize(("rows", "count"), [(MOST_ROWS + 1, 4), (2, LEAST_MEMBERS - 1)])
def test_where_it_does_not_pay(rows, count):
    def step(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [torch.mm(x, weight.t()) for weight in weights]

    parameters = [torch.randn(WIDTH, WIDTH) for _ in range(count)]
    graph = traced(step, torch.randn(rows, WIDTH), parameters)
    assert group_linears(graph) is graph


def test_what_draws_random_numbers_keeps_its_place():
    def step(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [torch.mm(x + torch.rand_like(x), weight.t()) for weight in weights]

    graph = traced(step, torch.randn(2, WIDTH), [torch.randn(WIDTH, WIDTH) for _ in range(4)])
    assert group_linears(merge_equal(graph)) is graph


def test_equal_calls_are_merged_and_others_are_not():
    def step(x: Tensor) -> tuple[Tensor, ...]:
        return x.sin() + x.sin(), x * 1 + x * 1.0, torch.rand_like(x) - torch.rand_like(x), x.cos(), x.cos()

    graph = make_fx(step, tracing_mode="fake")(torch.randn(3))
    found = ops(merge_equal(graph))
    assert found[aten.sin] == 1 and found[aten.mul] == 2 and found[aten.rand_like] == 2 and found[aten.cos] == 2
