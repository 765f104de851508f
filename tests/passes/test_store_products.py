"""Products that write their caches: which do, that outputs and caches stay the same, and what Inductor makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import smoothcache_fx as smoothcache
from helpers.capture import Block, Stack, capture, capture_case, inputs
from helpers.cases import randomize
from helpers.models import CASES
from helpers.tolerances import EXACT, assert_close
from smoothcache_fx import Schedule
from smoothcache_fx.capture._inductor import code_path
from smoothcache_fx.capture.cuda_graphs import may_run_twice
from smoothcache_fx.capture.inner import inner_compiler
from smoothcache_fx.capture.program import Program
from smoothcache_fx.passes.facts import aten, packet
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.guard import CACHE, guards, insert_guards
from smoothcache_fx.passes.mutation import read_and_written
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.store_products import store_products
from smoothcache_fx.passes.verify import check_graph

matmul_store = torch.ops.smoothcache.matmul_store


def computed(program, order: int = 0, history_dtype: torch.dtype | None = None) -> tuple[GraphModule, GraphModule]:
    """The variant that computes everything, before and after."""
    builder = program.builder
    sites = range(len(builder.sites))
    guarded = insert_guards(builder.captured, builder.sites, order, history_dtype)
    before = specialize(guarded, set(sites), orders=[order] * len(builder.sites))
    return before, check_graph(store_products(before), like=builder.captured, stage="variant")


def ops(graph: GraphModule) -> Counter:
    return Counter(packet(node) for node in graph.graph.nodes)


def run(graph: GraphModule) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and what the caches hold then; the same inputs for all graphs."""
    values = []
    for node in placeholders(graph.graph):
        value, generator = node.meta["val"], torch.Generator().manual_seed(sum(map(ord, node.name)))
        made = torch.randn(value.shape, generator=generator)
        values.append(made.to(value.dtype) if value.is_floating_point() else torch.zeros_like(made, dtype=value.dtype))
    outputs = graph(*values)
    return list(outputs), [v for v, n in zip(values, placeholders(graph.graph), strict=True) if CACHE in n.meta]


@pytest.mark.parametrize(
    ("name", "copied"),
    # Of a slice that has gaps PyTorch makes a product first and adds the bias to it: SD3's joint attention.
    [("diffusers_dit", 0), ("diffusers_pixart", 0), ("diffusers_flux", 0), ("diffusers_sd3", 5), ("adaln_zero", 0)],
)
def test_products_write_their_caches(name, copied):
    (program,) = capture_case(CASES[name])
    for order in (0, 1):
        check_products_write(program, copied, order)


def check_products_write(program: Program, copied: int, order: int) -> None:
    before, after = computed(program, order)
    assert ops(before)[aten.copy_] == len(guards(program.builder.guarded.graph))
    assert ops(after)[aten.copy_] == copied
    assert ops(after)[matmul_store] == ops(before)[aten.copy_] - copied
    assert count_flops(after.graph) == count_flops(before.graph)
    for expected, actual in zip(run(before), run(after), strict=True):
        assert_close(actual, expected, EXACT)


def test_the_difference_to_the_last_value_is_taken_before_the_cache_is_written():
    (program,) = capture_case(CASES["diffusers_dit"])
    before, after = computed(program, 1, torch.bfloat16)
    assert not ops(after)[matmul_store] and after is before


def test_cuda_graphs_need_not_restore_what_is_read_behind_the_write():
    """A variant may be run twice at once; what it writes first and then reads is the same both times."""
    (program,) = capture_case(CASES["diffusers_dit"])
    before, after = computed(program)
    caches = [i for i, node in enumerate(placeholders(after.graph)) if CACHE in node.meta]
    assert ops(after)[matmul_store] and may_run_twice(after, caches)
    assert read_and_written(after) == read_and_written(before) == []


class Returns(Block):
    """A block that returns what its feed-forward adds, too."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.norm1(x))
        branch = self.mlp(self.norm2(x))
        return x + branch, branch.flatten()


def test_what_the_caller_gets_is_no_cache():
    (program,) = capture(randomize(Returns(), 0).eval(), *inputs())
    before, after = computed(program)
    assert ops(before)[aten.copy_] == 2
    assert ops(after)[matmul_store] == ops(after)[aten.copy_] == 1


def test_a_branch_without_bias():
    block = Block()
    block.mlp[2] = nn.Linear(64, 16, bias=False)
    (program,) = capture(randomize(block, 0).eval(), *inputs())
    before, after = computed(program)
    assert ops(after)[matmul_store] == 2
    for expected, actual in zip(run(before), run(after), strict=True):
        assert_close(actual, expected, EXACT)


def test_inductor_calls_the_library_with_the_cache_as_output():
    model, plain = (randomize(Stack(), 0).eval() for _ in range(2))
    smoothcache.compile(model, Schedule(4, {"attn": [1, 0, 1, 0], "ffn": [1, 0, 1, 0]}))
    given = [inputs() for _ in range(4)]
    with torch.no_grad():
        first, expected = model(*given[0]), plain(*given[0])
        for x, c in given[1:]:
            model(x, c)
    torch.testing.assert_close(first, expected)
    (program,) = model.forward.session.programs
    sites = len(program.builder.sites)
    variants = program.dispatcher.variants.items()
    (code,) = [Path(code_path(one.run)).read_text() for mask, one in variants if mask.compute]
    assert code.count("out=cache_") == sites


@pytest.mark.parametrize(
    ("mode", "options", "taken"),
    [
        (None, None, True),
        ("reduce-overhead", None, True),
        ("max-autotune", None, False),
        (None, {"max_autotune_gemm": True}, False),
        (None, {"cpp_wrapper": True}, False),
    ],
)
def test_products_that_inductor_tunes_are_left_to_it(mode, options, taken):
    assert inner_compiler("inductor", mode, options, None).stores_products is taken


@pytest.mark.parametrize("bias", [True, False])
def test_the_op(bias):
    left, right = torch.randn(6, 4), torch.randn(4, 5)
    cache = torch.full((6, 5), float("nan"))
    added = torch.randn(5) if bias else None
    torch.library.opcheck(matmul_store.default, (left, right, added, cache))
    matmul_store(left, right, added, cache)
    expected = torch.addmm(added, left, right) if bias else left @ right
    assert_close(cache, expected, EXACT)


def test_the_op_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"left has shape \[2, 3, 4\].*flatten"):
        matmul_store(torch.ones(2, 3, 4), torch.ones(4, 5), None, torch.ones(6, 5))
    with pytest.raises(ValueError, match=r"cache is torch.float64.*expected the product's rows and columns in"):
        matmul_store(torch.ones(6, 4), torch.ones(4, 5), None, torch.ones(6, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"cache has shape \[5, 6\], expected the product's \[6, 5\]"):
        matmul_store(torch.ones(6, 4), torch.ones(4, 5), None, torch.ones(5, 6))
