"""A diagonal that is filled in place becomes ops that AOTAutograd can make functional; nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from smoothcache_fx.passes.replace_writes import replace_writes


def captured(step, *given):
    """Dynamo's graph of a function, as the pass leaves it, with how many ops it has replaced."""
    graphs = []

    def backend(gm, _):
        graphs.append((replace_writes(gm.graph), gm))
        gm.recompile()
        gm.graph.lint()
        return gm.forward

    torch._dynamo.reset()
    torch.compile(step, backend=backend)(*given)
    ((replaced, gm),) = graphs
    return replaced, gm


def of_a_view(x):
    x = x.clone()
    x[1:, 1:].fill_diagonal_(7.0)
    return x


def used_afterwards(x):
    return x.clone().fill_diagonal_(7.0) + 1


def by_function(x):
    return torch.Tensor.fill_diagonal_(x.clone(), 7.0) * 2


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (6, 2)])
@pytest.mark.parametrize("step", [of_a_view, used_afterwards, by_function])
def test_the_same_is_written(step, shape):
    x = torch.randn(shape)
    replaced, gm = captured(step, x)
    assert replaced == 1
    (output,) = gm(x)
    assert torch.equal(output, step(x))


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda x: x.clone().fill_diagonal_(7.0, wrap=True), id="wraps by keyword"),
        pytest.param(lambda x: x.clone().fill_diagonal_(7.0, True), id="wraps"),
        pytest.param(lambda x: x.expand(6, 6, 6).clone().fill_diagonal_(7.0), id="three dimensions"),
        pytest.param(lambda x: x.clone().fill_(7.0), id="another op"),
    ],
)
def test_what_is_left_as_it_is(step):
    x = torch.randn(6, 6)
    replaced, gm = captured(step, x)
    assert replaced == 0
    (output,) = gm(x)
    assert torch.equal(output, step(x))
