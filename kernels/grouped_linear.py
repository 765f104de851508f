"""Linears of one shape with a weight each, in one launch: what makes the gates of all blocks from their conditioning.

Few rows meet many weights, so reading the weights sets the pace. On an H100 28 products ``[2, 1152] x [1152, 2304]`` in
bfloat16 took 170 us one after the other and 73 us as one batched product of weights that lay side by side. Weights
are not copied to lie so: they are read where they lie, by a table of addresses that is made anew each time
(``_addresses.py``). So an update in place, a LoRA that is fused or other weights at the same name are never missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._addresses import address_table
from ._triton import runs_triton, tl, triton
from .operands import DTYPES

#: Columns of a program's tile: 18 tiles of a weight with 1152 rows, so that three members fill a GPU's processors.
BLOCK_N = 64
#: Bytes of a row that a program has in its tile at once, and tiles under way: 60 KiB of shared memory for 16 rows.
ROW_BYTES = 256
STAGES = 3


def grouped_linear_reference(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """``grouped_linear`` in plain PyTorch."""
    return torch.stack(
        [
            torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]
    )


def _check(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    op = "grouped_linear"
    if not inputs or not len(inputs) == len(weights) == len(biases):
        raise ValueError(
            f"{op}: got {len(inputs)} inputs, {len(weights)} weights and {len(biases)} biases, expected the same "
            "number of each, and one at least: give None for a member without a bias"
        )
    first, like = inputs[0], weights[0]
    if first.dtype not in DTYPES:
        raise TypeError(
            f"{op}: inputs[0] is {first.dtype}, expected one of {', '.join(map(str, DTYPES))}: cast it first"
        )
    if first.dim() != 2 or like.dim() != 2 or first.shape[1] != like.shape[1]:
        raise ValueError(
            f"{op}: inputs[0] has shape {list(first.shape)} and weights[0] {list(like.shape)}, expected [rows, width] "
            "and [columns, width]"
        )
    shapes = {"inputs": first.shape, "weights": like.shape, "biases": like.shape[:1]}
    for name, tensors in (("inputs", inputs), ("weights", weights), ("biases", biases)):
        for number, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{op}: {name}[{number}] has shape {list(tensor.shape)}, expected {list(shapes[name])}, as the "
                    "first member's: put members of other shapes in a group of their own"
                )
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"{op}: {name}[{number}] is {tensor.dtype} on {tensor.device}, expected {first.dtype} on "
                    f"{first.device}, as inputs[0] is"
                )


@torch.library.custom_op(
    "smoothcache::grouped_linear",
    mutates_args=(),
    schema="(Tensor[] inputs, Tensor[] weights, Tensor?[] biases) -> Tensor",
)
def grouped_linear(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """``out[i] = inputs[i] @ weights[i].T + biases[i]`` for all members at once.

    One Triton launch on CUDA (and a tiny one before it), the plain reference elsewhere.

    Args:
        inputs: ``[rows, width]`` each, in float32, float16 or bfloat16; one tensor may stand for several members.
        weights: ``[columns, width]`` each, as ``nn.Linear`` keeps them; a slice of a weight's rows will do.
        biases: ``[columns]`` each, or None. All tensors have one dtype and device.

    Returns:
        ``[members, rows, columns]``, contiguous, in the inputs' dtype. Products are summed in float32, or as
        ``torch.backends.cuda.matmul.allow_tf32`` says for float32 inputs, and rounded once after the bias is added.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, dtypes, devices or numbers of tensors that do not fit together.
    """
    _check(inputs, weights, biases)
    if runs_triton(inputs[0]):
        return _launch(inputs, weights, biases)
    return grouped_linear_reference(inputs, weights, biases)


@grouped_linear.register_fake
def _(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    _check(inputs, weights, biases)
    return inputs[0].new_empty(len(inputs), inputs[0].shape[0], weights[0].shape[0])


@register_flop_formula(torch.ops.smoothcache.grouped_linear)
def _flops(
    inputs: Sequence[Sequence[int]], *arguments: object, out_shape: Sequence[int] | None = None, **more: object
) -> int:
    return 2 * math.prod(out_shape or ()) * inputs[0][-1]


def _launch(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    if len({x.stride() for x in inputs}) > 1:
        inputs = [x.contiguous() for x in inputs]
    if len({weight.stride() for weight in weights}) > 1:
        return grouped_linear_reference(inputs, weights, biases)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    first, weight = inputs[0], weights[0]
    (rows, width), columns = first.shape, weight.shape[0]
    out = first.new_empty(len(inputs), rows, columns)
    if not out.numel():
        return out
    # A tile of 32 rows of float32 would spill registers on sm_80.
    block_m = min(64 if first.element_size() == 2 else 16, max(16, triton.next_power_of_2(rows)))
    addresses = [one for member in zip(inputs, weights, biases, strict=True) for one in member]
    table = address_table(addresses, first.device)
    exact = first.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    grid = (triton.cdiv(columns, BLOCK_N), len(inputs), triton.cdiv(rows, block_m))
    with torch.cuda.device_of(first):
        grouped_linear_kernel[grid](
            table, first, out, rows, columns, width, *first.stride(), *weight.stride(),
            BIASED=any(bias is not None for bias in biases),
            ALIGNED=all(one is None or one.data_ptr() % 16 == 0 for one in addresses),
            PRECISION="ieee" if exact else "tf32",
            BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=ROW_BYTES // first.element_size(), STAGES=STAGES, num_warps=4,
        )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _member(entry, like, ALIGNED: tl.constexpr):
        """The tensor whose address a table's entry holds, of ``like``'s dtype."""
        tensor = tl.load(entry).to(like.dtype)
        return tl.multiple_of(tensor, 16) if ALIGNED else tensor

    @triton.jit(do_not_specialize=["rows"])
    def grouped_linear_kernel(
        table,  # int64 [members, 3]: addresses of input, weight and bias; 0 for none
        like,  # any of the inputs, for the dtype
        out,  # [members, rows, columns], contiguous
        rows,
        columns,
        width,
        x_row,  # inputs [rows, width], weights [columns, width]: strides in elements
        x_column,
        weight_row,
        weight_column,
        BIASED: tl.constexpr,
        ALIGNED: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        member = tl.program_id(1)
        row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        x = _member(table + member * 3, like, ALIGNED)
        weight = _member(table + member * 3 + 1, like, ALIGNED)
        # Rows of a weight may lie far apart.
        lefts = x + row.to(tl.int64)[:, None] * x_row + inner[None, :] * x_column
        rights = weight + column.to(tl.int64)[None, :] * weight_row + inner[:, None] * weight_column
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            left = tl.load(lefts + start * x_column, (row < rows)[:, None] & (start + inner < width)[None, :], 0.0)
            inside = (column < columns)[None, :] & (start + inner < width)[:, None]
            right = tl.load(rights + start * weight_column, inside, 0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        if BIASED:
            bias = _member(table + member * 3 + 2, like, ALIGNED)
            # Without a bias no column is inside.
            end = columns * (tl.load(table + member * 3 + 2) != 0).to(tl.int32)
            total += tl.load(bias + column, column < end, 0.0).to(tl.float32)[None, :]
        at = (member.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])
