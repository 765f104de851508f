"""Modulations without their dead rows: how much work is left, and that every output stays the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.capture import Block, capture, inputs
from helpers.models import CASES
from helpers.tolerances import REORDERED, assert_close
from smoothcache_fx.passes.facts import MATMULS, packet
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.narrow import narrow
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.verify import check_graph

BATCH, WIDTH = 2, 16


def variant_of(model: nn.Module, mask: tuple[bool, ...] = (), *args: Tensor, backend: str = "eager", **options: object):
    (program,) = capture(model.eval(), *(args or inputs(BATCH, 6, WIDTH)), backend=backend, **options)
    builder = program.builder
    return builder.captured, specialize(builder.guarded, {i for i, computed in enumerate(mask) if computed})


def check_equal(before: torch.fx.GraphModule, after: torch.fx.GraphModule) -> None:
    """Outputs and caches are the same but for the kernels' order of summation."""
    names = {node.name for node in placeholders(before.graph)}
    assert {node.name for node in placeholders(after.graph)} == names
    values = []
    for graph in (before, after):
        generator = torch.Generator().manual_seed(0)
        shapes = [(node.meta["val"].shape, node.meta["val"].dtype) for node in placeholders(graph.graph)]
        values.append([torch.randn([int(s) for s in shape], generator=generator).to(dtype) for shape, dtype in shapes])
    for expected, actual in zip(before(*values[0]), after(*values[1]), strict=True):
        assert_close(actual, expected, REORDERED)
    for expected, actual in zip(*values, strict=True):
        assert_close(actual, expected, REORDERED)


def products(graph: torch.fx.GraphModule) -> list[list[int]]:
    return [list(node.meta["val"].shape) for node in graph.graph.nodes if packet(node) in MATMULS]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=2)))
def test_adaln_has_the_rows_of_computed_branches_and_of_gates(mask, backend, monkeypatch):
    # Only the captured graph is looked at: Inductor's back half is left out.
    monkeypatch.setattr("smoothcache_fx.capture._inductor.compile", lambda gm, *rest: lambda a: gm(*a))
    captured, variant = variant_of(Block(WIDTH), mask, backend=backend)
    after = check_graph(narrow(variant), like=captured, stage="variant")
    dead = sum(2 for computed in mask if not computed)
    assert count_flops(variant.graph) - count_flops(after.graph) == 2 * BATCH * WIDTH * WIDTH * dead
    if mask == (True, True):
        assert after is variant, "nothing is dead"
    if mask == (False, False):
        assert products(after) == [[BATCH, WIDTH], [BATCH, WIDTH]]
    if backend == "eager":
        check_equal(variant, after)
    assert narrow(after) is after, "nothing is left to do"


class Modulated(nn.Module):
    """A modulation of ``parts`` of which ``read`` are used, by the given views."""

    def __init__(self, parts: int, read: tuple[int, ...], bias: bool = True, form: str = "chunk") -> None:
        super().__init__()
        self.parts, self.read, self.form = parts, read, form
        self.linear = nn.Linear(WIDTH, parts * WIDTH, bias=bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        wide = self.linear(c)
        if self.form == "unsqueeze":
            wide = wide.unsqueeze(1)
        elif self.form == "view":
            wide = wide.view(len(c), 1, -1)
        elif self.form == "cast":
            wide = wide.double().float()
        if self.form == "slice":
            pieces = [wide[:, i * WIDTH : (i + 1) * WIDTH] for i in range(self.parts)]
        else:
            pieces = wide.chunk(self.parts, dim=-1)
        total = sum(pieces[i] * (i + 1) for i in self.read)
        return x + (total if total.ndim == 3 else total[:, None])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_parts_by_any_views(data):
    parts = data.draw(st.integers(1, 8))
    read = tuple(sorted(data.draw(st.sets(st.integers(0, parts - 1), min_size=1))))
    form = data.draw(st.sampled_from(["chunk", "unsqueeze", "view", "cast", "slice"]))
    torch._dynamo.reset()
    _, variant = variant_of(Modulated(parts, read, bias=data.draw(st.booleans()), form=form))
    after = narrow(variant)
    saved = parts - len(read) if (parts - len(read)) * 8 >= parts else 0
    assert count_flops(variant.graph) - count_flops(after.graph) == 2 * BATCH * WIDTH * WIDTH * saved
    check_equal(variant, after)
    runs = 1 + sum(b - a > 1 for a, b in itertools.pairwise(read))
    assert len(products(after)) == (runs if saved else 1)


def test_what_is_read_in_any_other_way_is_left_whole():
    class Read(Modulated):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            wide = self.linear(c)
            first, *_ = wide.chunk(self.parts, dim=-1)
            return x + first[:, None] * wide.mean()

    class Rows(Modulated):
        """Slices of the batch, not of the columns."""

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + self.linear(c)[:1, None, :WIDTH].cos()

    for model in (Read(6, (0,)), Rows(6, (0,))):
        _, variant = variant_of(model)
        assert narrow(variant) is variant


def test_joint_blocks():
    """Reused joint attention needs the gates of both streams, and nothing else of their modulations."""
    case = CASES["joint"]
    latents, (conditioning,) = case.inputs(1, torch.float32)
    arguments = (latents, torch.ones(len(latents)), *conditioning.values())
    captured, variant = variant_of(case.build(), (False,) * 6, *arguments)
    after = check_graph(narrow(variant), like=captured, stage="variant")
    check_equal(variant, after)
    wide = [shape for shape in products(variant) if shape[-1] == 6 * 32]
    assert len(wide) == 4 and not [shape for shape in products(after) if shape[-1] == 6 * 32]


def test_bfloat16_and_symbolic_sizes():
    model = Block(WIDTH).to(torch.bfloat16)
    x, c = (value.bfloat16() for value in inputs(BATCH, 6, WIDTH))
    _, variant = variant_of(model, (False, False), x, c)
    assert products(narrow(variant)) == [[BATCH, WIDTH]] * 2
    for value in (x, c):
        torch._dynamo.mark_dynamic(value, 0)
    captured, variant = variant_of(model, (False, False), x, c)
    after = check_graph(narrow(variant), like=captured, stage="variant")
    shapes = [node.meta["val"].shape for node in after.graph.nodes if packet(node) in MATMULS]
    assert [shape[1] for shape in shapes] == [WIDTH] * 2 and all(isinstance(s[0], torch.SymInt) for s in shapes)
