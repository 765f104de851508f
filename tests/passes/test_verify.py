"""The verifier catches each way in which a pass can go wrong."""

from __future__ import annotations

import pytest
import torch

from helpers.capture import Stack, capture, inputs
from smoothcache_fx.passes.guard import CACHE, guards, insert_guards
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.verify import GraphError, check_graph

aten = torch.ops.aten


@pytest.fixture
def builder():
    (program,) = capture(Stack().eval(), *inputs())
    return program.builder


def test_sound_graphs_pass(builder):
    guarded = insert_guards(builder.captured, builder.sites)
    assert check_graph(guarded, like=builder.captured, stage="guarded") is guarded
    for compute in ((), (0, 3), range(4)):
        variant = specialize(guarded, set(compute))
        assert check_graph(variant, like=builder.captured, stage="variant") is variant


def expect(graph, builder, stage, message):
    with pytest.raises(GraphError, match=message):
        check_graph(graph, like=builder.captured, stage=stage)


def test_a_guard_left_in_a_variant(builder):
    expect(builder.guarded, builder, "variant", "not resolved")


def test_a_use_that_passes_the_guard(builder):
    guarded = insert_guards(builder.captured, builder.sites)
    node = guards(guarded.graph)[0]
    user = next(iter(node.users))
    user.replace_input_with(node, node.args[0])
    expect(guarded, builder, "guarded", "is passed by")


def test_a_cache_of_another_shape(builder):
    guarded = insert_guards(builder.captured, builder.sites)
    cache = guards(guarded.graph)[0].args[1]
    with cache.meta["val"].fake_mode:
        cache.meta["val"] = cache.meta["val"].new_empty(1, 1)
    expect(guarded, builder, "guarded", "in a cache of")


@pytest.mark.parametrize("ages", [(0,), (1,)], ids=["newest", "older"])
def test_a_cache_of_another_dtype(builder, ages):
    """Older ones may have a narrower dtype, all of them the same."""
    guarded = insert_guards(builder.captured, builder.sites, 2, torch.float16)
    check_graph(guarded, like=builder.captured, stage="guarded")
    _, cache, _, older, _ = guards(guarded.graph)[0].args
    for age in ages:
        node = [cache, *older][age]
        node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    expect(guarded, builder, "guarded", "in a cache of")


def test_a_difference_from_what_is_overwritten(builder):
    guarded = insert_guards(builder.captured, builder.sites, 1, torch.float16)
    variant = specialize(guarded, {0, 1, 2, 3}, orders=[1] * 4)
    check_graph(variant, like=builder.captured, stage="variant")
    difference = next(node for node in variant.graph.nodes if node.target is aten.sub.Tensor)
    write = next(user for user in difference.args[1].users if user.target is aten.copy_.default)
    difference.prepend(write)
    expect(variant, builder, "variant", "written by")


def test_a_guard_on_the_wrong_inputs(builder):
    guarded = insert_guards(builder.captured, builder.sites)
    node = guards(guarded.graph)[0]
    node.args = (node.args[0], node.args[2], node.args[1])
    expect(guarded, builder, "guarded", "does not take a cache and a decision")


def test_a_cache_that_is_written_and_read_in_one_step(builder):
    variant = specialize(builder.guarded, {0, 1, 2, 3})
    cache = next(node for node in placeholders(variant.graph) if CACHE in node.meta)
    reader = next(node for node in variant.graph.nodes if node.target is aten.view.default)
    reader.replace_input_with(reader.args[0], cache)
    expect(variant, builder, "variant", "written by")


def test_an_output_too_few(builder):
    variant = specialize(builder.guarded, {0, 1, 2, 3})
    output = next(node for node in variant.graph.nodes if node.op == "output")
    output.args = ((),)
    expect(variant, builder, "variant", "0 outputs")


def test_an_output_of_another_shape(builder):
    variant = specialize(builder.guarded, {0, 1, 2, 3})
    output = next(node for node in variant.graph.nodes if node.op == "output")
    other = next(node for node in variant.graph.nodes if node.target is aten.addmm.default)
    output.args = ((other,),)
    expect(variant, builder, "variant", "output 0 is")


def test_an_input_behind_a_call(builder):
    variant = specialize(builder.guarded, {0, 1, 2, 3})
    output = next(node for node in variant.graph.nodes if node.op == "output")
    with variant.graph.inserting_before(output):
        variant.graph.placeholder("late")
    expect(variant, builder, "variant", "comes after the call")


def test_a_use_before_its_definition(builder):
    variant = specialize(builder.guarded, {0, 1, 2, 3})
    calls = [node for node in variant.graph.nodes if node.op == "call_function"]
    calls[0].replace_input_with(calls[0].all_input_nodes[0], calls[-1])
    expect(variant, builder, "variant", "malformed")
