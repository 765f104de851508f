"""What does nothing is removed, and what only looks as if it did nothing stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.capture import Stack, capture, inputs
from smoothcache_fx.passes.simplify import simplify

aten = torch.ops.aten


def traced(step, *given: Tensor) -> GraphModule:
    return make_fx(step, tracing_mode="fake")(*given)


def calls(graph: GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


X = torch.randn(2, 3, 4)
NOTHING = {
    "divided by 1.0": lambda x: x / 1.0,
    "times 1": lambda x: x * 1,
    "1.0 times": lambda x: 1.0 * x,
    "plus 0.0": lambda x: x + 0.0,
    "0 plus": lambda x: 0 + x,
    "minus 0.0": lambda x: x - 0.0,
    "plus -0.0": lambda x: x + -0.0,
    "dropout in eval": lambda x: aten.native_dropout(x, 0.5, False)[0],
    "dropout of nothing": lambda x: aten.native_dropout(x, 0.0, True)[0],
    "cast to its dtype": lambda x: torch.ops.prims.convert_element_type(x, torch.float32),
    "copied to its dtype": lambda x: aten._to_copy(x, dtype=torch.float32),
    "view of its shape": lambda x: aten.view(x, [2, 3, 4]),
    "view with -1": lambda x: aten.view(x, [2, -1, 4]),
    "permuted as it is": lambda x: aten.permute(x, [0, 1, 2]),
    "expanded to its shape": lambda x: aten.expand(x, [2, 3, 4]),
    "a slice of all": lambda x: aten.slice(x, 1, 0, 9),
    "a copy": lambda x: aten.clone(x),
    "cut and put together": lambda x: torch.cat([x[:, :1], x[:, 1:]], dim=1),
    "split and put together": lambda x: torch.cat(x.split([1, 2], dim=1), dim=-2),
}


@pytest.mark.parametrize("what", NOTHING)
def test_what_does_nothing_goes(what):
    graph = traced(lambda x: torch.tanh(NOTHING[what](torch.sin(x))), X)
    after = simplify(graph)
    assert calls(after) == ["sin", "tanh"]
    assert torch.equal(after(X), graph(X))


STAYS = {
    "divided by 2": lambda x: x / 2.0,
    "one divided by it": lambda x: aten.reciprocal(x) * 2,
    "rounded down": lambda x: aten.div(x, 1, rounding_mode="floor"),
    "plus twice nothing and x": lambda x: aten.add(x, x, alpha=2),
    "a wider dtype": lambda x: torch.ops.prims.convert_element_type(x, torch.float64),
    "dropout": lambda x: aten.native_dropout(x, 0.5, True)[0],
    "another order": lambda x: aten.permute(x, [1, 0, 2]),
    "every second": lambda x: aten.slice(x, 1, 0, 9, 2),
    "all but one": lambda x: aten.slice(x, 1, 1, 9),
    "another layout": lambda x: aten.clone(aten.permute(x, [1, 0, 2]), memory_format=torch.contiguous_format),
    "put together in another order": lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    "put together along another dimension": lambda x: torch.cat([x[:1, :, :2], x[:1, :, 2:]], dim=0),
    "not all of it": lambda x: torch.cat([x[:, :1], x[:, 1:2]], dim=1),
    "twice the same": lambda x: torch.cat([x[:, :2], x[:, :1]], dim=1),
}


@pytest.mark.parametrize("what", STAYS)
def test_what_does_something_stays(what):
    graph = traced(lambda x: torch.tanh(STAYS[what](torch.sin(x))), X)
    assert simplify(graph) is graph


@pytest.mark.parametrize("square", [aten.t.default, lambda x: aten.permute(x, [1, 0]), lambda x: x.transpose(0, 1)])
def test_a_transposed_square_of_ones_strides_stays(square):
    """Same sizes, and of one row the same strides: the values still change places."""
    graph = traced(lambda x: torch.tanh(square(torch.sin(x))), torch.randn(1, 1))
    assert calls(simplify(graph)) == calls(graph)


def test_a_number_of_another_dtype_changes_the_dtype():
    graph = traced(lambda x: (x * 1.0) + 1, torch.arange(4))
    assert calls(simplify(graph)) == ["mul", "add"]


@pytest.mark.parametrize("reader", [torch.reciprocal, torch.signbit, lambda x: 1 / x, lambda x: 1 / x.view(-1)])
def test_a_sum_with_zero_stays_where_the_sign_of_zero_shows(reader):
    graph = traced(lambda x: reader(torch.tanh(x) + 0.0), torch.tensor([-0.0, 1.0]))
    after = simplify(graph)
    assert torch.equal(after(torch.tensor([-0.0, 1.0])), reader(torch.tensor([0.0, 1.0]).tanh()))
    assert "add" in calls(after)


def test_an_output_stays_a_tensor_of_its_own():
    graph = traced(lambda x, y: (x * 1.0, torch.sin(y) / 1.0), X, X)
    assert simplify(graph) is graph


def test_a_copy_of_what_is_written_to_stays():
    def step(x: Tensor, buffer: Tensor) -> Tensor:
        before = buffer.clone()
        buffer.copy_(x)
        return before + 1

    graph = traced(step, X, X.clone())
    assert "clone" in calls(simplify(graph))


def test_symbolic_sizes_add_no_guard():
    graph = make_fx(lambda x: torch.sin(x).view(x.shape[0], 4) * 1.0 + 2, tracing_mode="symbolic")(torch.randn(3, 4))
    shape_env = next(node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder").fake_mode.shape_env
    before = len(shape_env.guards)
    after = simplify(graph)
    assert "mul" not in calls(after) and len(shape_env.guards) == before
    assert torch.equal(after(torch.ones(5, 4)), torch.sin(torch.ones(5, 4)) + 2)


class Padded(nn.Module):
    """A block whose branches end in what does nothing, as diffusers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.stack.blocks:
            x = x + self.dropout(block.attn(block.norm1(x)) / 1.0).to(x.dtype) * 1
            x = x + (block.mlp(block.norm2(x)) + 0.0).view(x.shape)
        return x


def test_sites_are_looked_for_in_the_simplified_graph():
    (program,) = capture(Padded().eval(), *inputs())
    targets = {node.target for node in program.builder.captured.graph.nodes}
    assert not {aten.div.Tensor, aten.mul.Tensor} & targets
    assert [site.kind for site in program.builder.sites] == ["attn", "ffn", "attn", "ffn"]


PIECES = list(NOTHING.values()) + [torch.sin, torch.neg, F.silu, lambda x: x * 0.5, lambda x: x[:, :2]]


@settings(max_examples=60)
@given(chosen=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8))
def test_any_chain_gives_the_same_bits(chosen):
    def step(x: Tensor) -> Tensor:
        for piece in chosen:
            x = piece(x)
        return torch.tanh(x)

    graph = traced(step, X)
    after = simplify(graph)
    assert torch.equal(after(X), graph(X))
    assert after(X).stride() == graph(X).stride()
    assert simplify(after) is after
