"""Real models with everything reused: one op per residual stream and run, and no residual add beside it."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule, Node

from helpers.capture import capture_case
from helpers.cases import Case
from helpers.models import CASES
from helpers.tolerances import FUSED_KERNELS, assert_as_exact, excess
from smoothcache_fx.capture.variants import GraphBuilder
from smoothcache_fx.passes.facts import aten, is_product, is_view_or_cast, packet
from smoothcache_fx.passes.forecast import FORECAST
from smoothcache_fx.passes.fuse import fuse
from smoothcache_fx.passes.guard import CACHE, insert_guards
from smoothcache_fx.passes.lowering import lowering_for
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.verify import check_graph
from zoo.catalog import CASES as ZOO

accumulate = torch.ops.smoothcache.residual_accumulate
#: Branches in each run of a stream, as the models' sources say. SD3's text stream ends unread where all is reused; its
#: image stream has three blocks of two branches. Flux has an image and a text stream of two blocks, which a cat makes
#: one stream of two single blocks. CogVideoX's last norm reads text and image together.
RUNS = {
    "diffusers_dit": [4],
    "diffusers_pixart": [6],
    "diffusers_sd3": [6],
    "diffusers_flux": [4, 4, 2],
    "WanTransformer3DModel": [6],
    "CogVideoXTransformer3DModel": [4],
    "StableAudioDiTModel": [6],
}


def case_of(name: str) -> Case:
    return CASES[name] if name in CASES else ZOO[name].case()


def all_reused(builder: GraphBuilder, order: int) -> tuple[GraphModule, GraphModule]:
    """The variant before and after residual adds are lowered as on CUDA under Inductor."""
    guarded = insert_guards(builder.captured, builder.sites, order)
    variant = specialize(guarded, set(), orders=[order] * len(builder.sites))
    return variant, check_graph(fuse(variant, lowering_for("cuda", True)), like=builder.captured, stage="variant")


def builder_of(name: str, dtype: torch.dtype) -> GraphBuilder:
    (program,) = capture_case(case_of(name), dtype)
    return program.builder


def readers(cache: Node) -> set[Node]:
    """What takes a cache, seen through views, casts, gates and the sum of a forecast."""
    found, pending = set(), list(cache.users)
    while pending:
        user = pending.pop()
        if is_view_or_cast(user) or is_product(user) or FORECAST in user.meta:
            pending += user.users
        else:
            found.add(user)
    return found


def values_of(graph: GraphModule) -> list[object]:
    generator = torch.Generator().manual_seed(0)
    values: list[object] = []
    for node in placeholders(graph.graph):
        value = node.meta["val"]
        made = torch.randn(value.shape, generator=generator) * 0.5
        values.append(
            made.to(value.dtype) if value.is_floating_point() else torch.zeros(value.shape, dtype=value.dtype)
        )
    return values


@pytest.mark.parametrize("name", RUNS)
def test_one_op_for_each_run_and_no_other_residual_add(name):
    check_both_orders(name, torch.float32)


@pytest.mark.parametrize("name", RUNS)
def test_one_op_for_each_run_in_bfloat16(name):
    """Where the stream is cast to float32 for its sums, and back."""
    check_both_orders(name, torch.bfloat16)


def check_both_orders(name: str, dtype: torch.dtype) -> None:
    builder = builder_of(name, dtype)
    for order in (0, 1):
        check_runs(name, dtype, order, *all_reused(builder, order))


def check_runs(name: str, dtype: torch.dtype, order: int, variant: GraphModule, fused: GraphModule) -> None:
    ops = [node for node in fused.graph.nodes if packet(node) is accumulate]
    assert sorted(len(op.args[1]) for op in ops) == sorted(RUNS[name])
    assert all(len(op.args[2]) == (1 + order) * len(op.args[1]) for op in ops)
    caches = [node for node in placeholders(fused.graph) if CACHE in node.meta]
    assert len(caches) == (1 + order) * sum(RUNS[name]) or name == "CogVideoXTransformer3DModel"
    assert {reader for cache in caches for reader in readers(cache)} == set(ops)
    # What the ops start from and leave is no sum with a branch: no add of two tensors of the stream's shape is between.
    for op in ops:
        stream = op.meta["val"].shape
        after = [user for user in op.users if packet(user) in (aten.add, aten.addcmul)]
        assert not [user for user in after if user.meta["val"].shape == stream and all_tensors(user)]

    ours, theirs = fused(*values_of(fused)), variant(*values_of(variant))
    for actual, expected in zip(ours, theirs, strict=True):
        if dtype is torch.float32:
            assert excess(actual, expected, FUSED_KERNELS[dtype]) <= 1


def all_tensors(node: Node) -> bool:
    return all(isinstance(arg, Node) for arg in node.args)


@pytest.mark.parametrize("name", RUNS)
def test_in_bfloat16_a_run_is_as_exact_as_one_add_after_the_other(name):
    """The op rounds the stream once, the graph after each add."""
    variant, fused = all_reused(builder_of(name, torch.bfloat16), 0)
    exact, _ = all_reused(builder_of(name, torch.float32), 0)
    values = values_of(variant)
    wide = [v.float() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]
    assert_as_exact(list(fused(*values)), list(variant(*values)), list(exact(*wide)), name)
