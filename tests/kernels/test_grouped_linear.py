"""``grouped_linear``: the numbers, weights read where they lie, what it refuses, and that compilers leave it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from helpers.operands import DEVICE, DTYPES, INTERPRETED, filled_with_nan, randn
from smoothcache_fx.kernels.grouped_linear import grouped_linear

#: Triton's interpreter multiplies bfloat16 matrices as if their bits were whole numbers.
SOME_DTYPES = [dtype for dtype in DTYPES if not (INTERPRETED and dtype == torch.bfloat16)]
#: Relative to the norm: sums are in another order.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}


def check(inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor | None]) -> None:
    out = grouped_linear(inputs, weights, biases)
    exact = [
        F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    ]
    wanted = torch.stack(exact)
    assert out.shape == wanted.shape and out.dtype == inputs[0].dtype and out.is_contiguous()
    assert (out.double() - wanted).norm() <= TOLERANCE[out.dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
@pytest.mark.parametrize("biased", ["all", "some", "none"])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 16, 8), (2, 130, 123), (17, 64, 300), (70, 100, 64)])
def test_any_size(rows, columns, width, biased, dtype):
    inputs = [randn(rows, width, dtype=dtype) for _ in range(4)]
    weights = [randn(columns, width, dtype=dtype) for _ in range(4)]
    kept = {"all": range(4), "some": (0, 2), "none": ()}[biased]
    check(inputs, weights, [randn(columns, dtype=dtype) if i in kept else None for i in range(4)])


def test_one_input_for_all_and_slices_of_weights():
    x, parameter, bias = randn(2, 96), randn(300, 96), randn(300)
    starts = (0, 64, 200)
    check([x] * 3, [parameter[s : s + 64] for s in starts], [bias[s : s + 64] for s in starts])


def test_strides_of_all_sorts():
    inputs = [randn(8, 33).t()[:, ::2], randn(33, 4)]
    weights = [randn(4, 20).t(), randn(4, 20).t()]
    check(inputs, weights, [randn(40)[::2], None])
    check(inputs, [weights[0], randn(20, 4)], [None, None])


def test_weights_are_read_where_they_lie_now():
    """After an update in place, and after others have taken a weight's place."""
    x, weights = randn(2, 16), [torch.nn.Parameter(randn(32, 16)) for _ in range(3)]
    with torch.no_grad():
        check([x] * 3, weights, [None] * 3)
        weights[1].mul_(-3)
        check([x] * 3, weights, [None] * 3)
        weights[2].data = randn(32, 16)
        check([x] * 3, weights, [None] * 3)


def test_the_output_is_written_whole():
    with filled_with_nan():
        out = grouped_linear([randn(3, 20)] * 2, [randn(70, 20), randn(70, 20)], [None, None])
    assert not out.isnan().any()


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0)])
def test_no_elements(rows, columns):
    assert grouped_linear([randn(rows, 8)], [randn(columns, 8)], [None]).shape == (1, rows, columns)


@pytest.mark.parametrize(
    ("inputs", "weights", "biases", "message"),
    [
        ([], [], [], "got 0 inputs, 0 weights and 0 biases, expected the same number of each, and one at least"),
        ([(2, 8)], [(4, 8)] * 2, [None], "got 1 inputs, 2 weights and 1 biases"),
        ([(2, 8)], [(4, 9)], [None], r"inputs\[0\] has shape \[2, 8\] and weights\[0\] \[4, 9\], expected"),
        ([(2, 3, 8)], [(4, 8)], [None], r"inputs\[0\] has shape \[2, 3, 8\]"),
        ([(2, 8)] * 2, [(4, 8), (5, 8)], [None] * 2, r"weights\[1\] has shape \[5, 8\], expected \[4, 8\]"),
        ([(2, 8), (3, 8)], [(4, 8)] * 2, [None] * 2, r"inputs\[1\] has shape \[3, 8\], expected \[2, 8\]"),
        ([(2, 8)], [(4, 8)], [(8,)], r"biases\[0\] has shape \[8\], expected \[4\]"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(inputs, weights, biases, message, device):
    def made(shapes: list[Any]) -> list[Any]:
        return [None if shape is None else torch.zeros(shape, device=device) for shape in shapes]

    with pytest.raises(ValueError, match=f"grouped_linear: {message}"):
        grouped_linear(made(inputs), made(weights), made(biases))


def test_another_dtype_is_refused():
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(TypeError, match=r"grouped_linear: inputs\[0\] is torch.float64, expected one of"):
        grouped_linear([x.double()], [weight.double()], [None])
    with pytest.raises(ValueError, match=r"weights\[0\] is torch.float16 on .*, expected torch.float32"):
        grouped_linear([x], [weight.half()], [None])


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_opcheck(dtype):
    given = [randn(2, 8, dtype=dtype)] * 2, [randn(4, 8, dtype=dtype) for _ in range(2)], [randn(4, dtype=dtype), None]
    torch.library.opcheck(grouped_linear, given)


def step(x, *weights):
    return torch.relu(grouped_linear([torch.tanh(x)] * len(weights), list(weights), [None] * len(weights)))


def test_it_stays_whole_in_the_graph():
    backend = AotEagerAndRecordGraphs()
    given = randn(2, 8), randn(4, 8), randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(*given), step(*given))
    (graph,) = backend.fw_graphs
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.smoothcache.grouped_linear.default) == 1, graph.print_readable(False)


def test_inductor_calls_it():
    given = randn(2, 8), randn(4, 8), randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*given), step(*given))
