"""The guarded graph as the reference, and the variants made of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.capture import Block, Stack, capture, inputs
from helpers.models import CASES
from smoothcache_fx.passes.facts import MATMULS, is_attention_op, packet
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.guard import CACHE, guards, insert_guards, run_guarded
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize, variant_inputs


@pytest.fixture(scope="module")
def program():
    (program,) = capture(Stack().eval(), *inputs())
    return program


def arguments(program, model_inputs):
    """Values for the captured graph's placeholders: the model's parameters, and fresh inputs for the rest."""
    return [torch.randn(node.meta["val"].shape) for node in placeholders(program.builder.captured.graph)]


def new_caches(guarded):
    return [torch.full(n.meta["val"].shape, torch.nan) for n in placeholders(guarded.graph) if CACHE in n.meta]


def test_every_site_output_has_one_guard_and_no_use_beside_it(program):
    builder = program.builder
    found = guards(builder.guarded.graph)
    assert len(found) == sum(len(site.outputs) for site in builder.sites) == 4
    for node in found:
        value, cache, decision = node.args
        assert set(value.users) == {node}
        assert cache.op == decision.op == "placeholder"


def test_the_guarded_graph_computes_and_stores_or_reads(program):
    guarded = program.builder.guarded
    values = arguments(program, inputs())
    caches = new_caches(guarded)
    plain = program.builder.captured(*values)
    computed = run_guarded(guarded, values, caches, [True] * 4)
    assert torch.equal(computed[0], plain[0])
    assert not any(cache.isnan().any() for cache in caches)
    kept = [cache.clone() for cache in caches]
    again = run_guarded(guarded, values, caches, [False] * 4)
    assert torch.equal(again[0], plain[0]), "reading what the same inputs have stored changes nothing"
    other = arguments(program, inputs())
    run_guarded(guarded, other, caches, [True, False, False, True])
    assert [torch.equal(new, old) for new, old in zip(caches, kept, strict=True)] == [False, True, True, False]


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)))
def test_every_variant_does_what_the_guarded_graph_does(program, mask):
    guarded = program.builder.guarded
    values = arguments(program, inputs())
    start = [torch.randn_like(cache) for cache in new_caches(guarded)]
    expected_caches, actual_caches = [c.clone() for c in start], [c.clone() for c in start]
    expected = run_guarded(guarded, values, expected_caches, mask)
    variant = specialize(guarded, {i for i, compute in enumerate(mask) if compute})
    everything = [*values, *actual_caches]
    actual = variant(*[everything[i] for i in variant_inputs(variant)])
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual_caches, expected_caches))


def work(graph):
    return sum(packet(node) in MATMULS or is_attention_op(node) for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("name", CASES)
def test_flops_left_are_the_masks(name):
    """FLOPs of a variant are those of the whole graph less those of the reused sites, site by site."""
    case = CASES[name]
    latents, (conditioning,) = case.inputs(1, torch.float32)
    programs = []

    class Captured(torch.nn.Module):
        def __call__(self, *args, **kwargs):
            programs.extend(capture(case.build(), *args, **kwargs))
            raise StopIteration

    with pytest.raises(StopIteration):
        case.call(Captured(), latents, 1.0, conditioning)
    for builder in (program.builder for program in programs):
        everything = set(range(len(builder.sites)))
        for index, site in enumerate(builder.sites):
            variant = specialize(builder.guarded, everything - {index})
            assert builder.flops - count_flops(variant.graph) == site.flops > 0
            assert work(variant.graph) < work(builder.captured.graph)


def test_a_reused_branch_leaves_nothing_of_itself(program):
    """Norm, modulation, QKV and attention are gone; the gate's product and the residual add are what is left."""
    variant = specialize(program.builder.guarded, compute=())
    targets = [str(node.target) for node in variant.graph.nodes if node.op == "call_function"]
    assert not any("layer_norm" in t or "attention" in t or "gelu" in t for t in targets)
    assert sum("addmm" in t for t in targets) == 2, "one modulation a block, for its gates"
    assert sum("aten.add.Tensor" in t for t in targets) == 4
    assert not any("copy_" in t for t in targets)


def test_unused_inputs_are_dropped(program):
    whole = specialize(program.builder.guarded, compute=range(4))
    cached = specialize(program.builder.guarded, compute=())
    assert len(variant_inputs(cached)) < len(variant_inputs(whole))
    without_store = specialize(program.builder.guarded, compute=range(4), store=())
    assert not any(CACHE in node.meta for node in placeholders(without_store.graph))
    assert len(list(without_store.graph.nodes)) == len(list(program.builder.captured.graph.nodes))


def test_a_cached_value_that_is_returned_is_copied():
    """Where a graph returns the branch's output itself, the caller gets a copy and no window on the cache."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block()
            self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            return x + y, y

    (program,) = capture(Model().eval(), torch.randn(2, 6, 16))
    builder = program.builder
    variant = specialize(builder.guarded, compute=())
    (cache,) = new_caches(builder.guarded)
    cache.fill_(3.0)
    values = [*arguments(program, ()), cache]
    outputs = variant(*[values[i] for i in variant_inputs(variant)])
    returned = outputs[1]
    cache.fill_(4.0)
    assert bool((returned == 3.0).all())


def test_inserting_guards_leaves_the_captured_graph_alone(program):
    captured = program.builder.captured
    before = captured.graph.python_code("self").src
    insert_guards(captured, program.builder.sites)
    assert captured.graph.python_code("self").src == before
