"""Norms behind residual adds taken into the kernels: which, and that what comes out is the same norm."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.capture import Attention, Stack, capture, inputs
from helpers.cases import randomize
from smoothcache_fx.capture.variants import GraphBuilder
from smoothcache_fx.passes.facts import aten, packet, through_views
from smoothcache_fx.passes.fuse import fuse
from smoothcache_fx.passes.fuse_norms import fuse_norms
from smoothcache_fx.passes.guard import CACHE, insert_guards
from smoothcache_fx.passes.lowering import lowering_for
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.passes.verify import check_graph

norm_op = torch.ops.smoothcache.residual_norm
run_op = torch.ops.smoothcache.residual_accumulate
run_norm_op = torch.ops.smoothcache.residual_accumulate_norm


def passes(model: nn.Module, mask: tuple[bool, ...], dtype: torch.dtype = torch.float32, *args: Tensor):
    """The captured graph, and a variant before and after the pass."""
    arguments = [argument.to(dtype) for argument in args or inputs()]
    (program,) = capture(randomize(model, 0).eval().to(dtype), *arguments)
    return lowered(program.builder, mask)


@functools.cache
def captured_stack() -> GraphBuilder:
    (program,) = capture(randomize(Stack(), 0).eval(), *inputs())
    return program.builder


def lowered(builder: GraphBuilder, mask: tuple[bool, ...]):
    compute = {i for i, computed in enumerate(mask) if computed}
    variant = fuse(specialize(builder.guarded, compute), lowering_for("cuda", fuses_by_itself=False))
    return builder.captured, variant, check_graph(fuse_norms(variant), like=builder.captured, stage="variant")


def norms(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if packet(node) in (norm_op, run_norm_op)]


def check_close(before: torch.fx.GraphModule, after: torch.fx.GraphModule, dtype: torch.dtype = torch.float32) -> None:
    """Outputs, and what lies in the caches afterwards, are as near as sums over rows in another order are."""
    generator = torch.Generator().manual_seed(0)
    given = [node.meta["val"] for node in placeholders(before.graph)]
    values = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in given]
    others = [value.clone() for value in values]
    assert len(others) == len(placeholders(after.graph))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for expected, actual in zip((*before(*values), *values), (*after(*others), *others), strict=True):
        error = torch.linalg.vector_norm(actual.double() - expected.double())
        assert error <= tolerance * torch.linalg.vector_norm(expected.double())


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=4)))
def test_every_variant_of_a_stack(mask):
    """Every norm but the model's first is behind a residual add, or behind a run of them."""
    _, before, after = lowered(captured_stack(), mask)
    check_close(before, after)
    behind_one = sum(mask[i] and (mask[i - 1] or i == 1 or mask[i - 2]) for i in range(1, 4))
    behind_runs = sum(mask[1:]) - behind_one
    found = norms(after)
    assert [packet(node) for node in found].count(norm_op) == behind_one and len(found) == behind_one + behind_runs
    assert all(node.args[6] is not None and node.args[7] is not None for node in found)
    assert sum(packet(node) is aten.native_layer_norm for node in after.graph.nodes) == mask[0]


class Ending(nn.Module):
    """A stack, and the norm and modulation of a last layer that nothing else shares the stream with, or something."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.stack = Stack()
        self.norm = nn.LayerNorm(16, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(16, 32)
        self.shared = shared

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.stack(x, c)
        scale, shift = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        return h + x.sum() if self.shared else h


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("order", [0, 1])
def test_the_last_norm_is_in_the_runs_pass(order, dtype, shared):
    """And the stream is written only where something else reads it."""
    (program,) = capture(randomize(Ending(shared), 0).eval().to(dtype), *(one.to(dtype) for one in inputs()))
    captured, sites = program.builder.captured, program.builder.sites
    variant = specialize(insert_guards(captured, sites, order), set(), orders=[order] * len(sites))
    before = fuse(variant, lowering_for("cuda", fuses_by_itself=False))
    after = check_graph(fuse_norms(before), like=captured, stage="variant")
    (node,) = norms(after)
    assert packet(node) is run_norm_op and node.args[-1] is shared
    assert len(node.args[1]) == len(sites) and len(node.args[2]) == len(sites) * (1 + order)
    assert (node.args[3] is None) == (order == 0)
    assert not any(packet(node) in (aten.native_layer_norm, run_op) for node in after.graph.nodes)
    check_close(before, after, dtype)


class RMS(nn.Module):
    """As Llama, and after it most who write it by hand, have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        value = x.float()
        return self.weight * (value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class FP32LayerNorm(nn.LayerNorm):
    """As Wan has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).type_as(
            x
        )


class NormedBlock(nn.Module):
    """A DiT block, and behind the feed-forward another norm whose place in the stream can be chosen."""

    def __init__(self, norm: nn.Module, modulated: bool = True) -> None:
        super().__init__()
        self.modulated = modulated
        self.attn = Attention(16, 2)
        self.norm = norm
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.modulation = nn.Linear(16, 48)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(x)
        gate, scale, shift = self.modulation(c).unsqueeze(1).chunk(3, dim=-1)
        h = self.norm(x)
        if self.modulated:
            h = h * (1 + scale) + shift
        return x + gate * self.mlp(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(
    ("make", "rms", "weight", "bias"),
    [
        (lambda: nn.LayerNorm(16, elementwise_affine=False, eps=1e-6), False, False, False),
        (lambda: nn.LayerNorm(16, eps=1e-6), False, True, True),
        (lambda: nn.LayerNorm(16, bias=False, eps=1e-6), False, True, False),
        (lambda: FP32LayerNorm(16, eps=1e-6), False, True, True),
        (lambda: nn.RMSNorm(16, eps=1e-6), True, True, False),
        (lambda: nn.RMSNorm(16, elementwise_affine=False, eps=1e-6), True, False, False),
        (lambda: RMS(16), True, True, False),
    ],
    ids=["plain", "affine", "weight", "fp32", "rms", "rms without weight", "rms by hand"],
)
@pytest.mark.parametrize("computed", [True, False])
def test_norms_as_models_have_them(make, rms, weight, bias, modulated, dtype, computed):
    _, before, after = passes(NormedBlock(make(), modulated), (computed, True), dtype)
    check_close(before, after, dtype)
    (node,) = norms(after)
    _, gate, y, cache, *operands, eps, is_rms = node.args
    assert [operand is not None for operand in operands] == [weight, bias, modulated, modulated]
    assert is_rms == rms and eps == pytest.approx(1e-6)
    assert gate is None and (cache is not None) == computed == (CACHE not in through_views(y).meta)
    assert not any(packet(node) in (aten.native_layer_norm, aten.rsqrt) for node in after.graph.nodes)


def test_a_norm_of_diffusers():
    from diffusers.models.normalization import RMSNorm

    _, before, after = passes(NormedBlock(RMSNorm(16, 1e-6)), (True, True), torch.bfloat16)
    check_close(before, after, torch.bfloat16)
    assert len(norms(after)) == 1


class Elsewhere(NormedBlock):
    """What the norm's parts are used for beside it; each keeps the norm out of the kernel."""

    def __init__(self, use: str) -> None:
        super().__init__(nn.LayerNorm(16))
        self.use = use

    def forward(self, x: Tensor, c: Tensor) -> object:
        x = x + self.attn(x)
        early = x.mean(1) if self.use == "before the operands are known" else c
        gate, scale, shift = self.modulation(early).unsqueeze(1).chunk(3, dim=-1)
        h = torch.native_layer_norm(x, [16], None, None, 1e-5)
        more = h[1] if self.use == "the mean" else c
        if self.use == "over two dimensions":
            h = torch.native_layer_norm(x, [6, 16], None, None, 1e-5)
        modulated = h[0].double() * (1 + scale) + shift if self.use == "in float64" else h[0] * (1 + scale) + shift
        return x + gate * self.mlp(modulated.to(x.dtype)), more


@pytest.mark.parametrize("use", ["before the operands are known", "the mean", "over two dimensions"])
def test_a_norm_that_the_kernel_cannot_replace_is_left(use):
    _, before, after = passes(Elsewhere(use), (True, True))
    assert not norms(after) and any(packet(node) is aten.native_layer_norm for node in after.graph.nodes)
    check_close(before, after)


def test_what_is_left_in_another_dtype_ends_the_kernel():
    _, before, after = passes(Elsewhere("in float64"), (True, True))
    (node,) = norms(after)
    assert node.args[4:8] == (None,) * 4
    check_close(before, after)


def test_rows_that_are_too_wide_are_left(monkeypatch):
    monkeypatch.setattr(sys.modules["smoothcache_fx.passes.fuse_norms"], "WIDEST", 8)
    _, _, after = passes(Stack(), (True,) * 4)
    assert not norms(after)
