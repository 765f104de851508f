"""The kernels compiled for GPUs that are not there: access widths from PTX, spills from ``ptxas``, 64-bit indices."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch

from helpers.aot import CAPABILITIES, Hopper, Recorder, compile_launch, record, triton
from smoothcache_fx.kernels._norms import WIDEST
from smoothcache_fx.kernels._triton import INTERPRETED
from smoothcache_fx.kernels.relative_l1 import LAGS_PER_LAUNCH
from smoothcache_fx.kernels.residual_accumulate import UNROLLED, Run

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

BFLOAT16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
DIT = (2, 256, 1152)
#: x, y or cache, and gate.
DTYPES = [
    (BFLOAT16, BFLOAT16, BFLOAT16),
    (HALF, HALF, HALF),
    (FLOAT, FLOAT, FLOAT),
    (BFLOAT16, BFLOAT16, FLOAT),
    (FLOAT, BFLOAT16, FLOAT),
]
#: Reads and writes of tensors like ``y``, besides one read of ``x`` and one write of the output.
BRANCHES = {"residual_store": (1, 1), "residual_load": (1, 0), "residual_accumulate": (UNROLLED, 0)}


def module(op: str):
    return importlib.import_module(f"smoothcache_fx.kernels.{op}")


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(op: str, x: torch.Tensor, gate: torch.Tensor | None, y: torch.Tensor) -> Recorder:
    """What the op would launch for these operands."""
    kernel = module(op)
    runs: dict[str, Callable[[], object]] = {
        "residual_store": partial(kernel._launch, x, gate, y, y),
        "residual_load": partial(kernel._launch, x, gate, y),
        "residual_accumulate": lambda: kernel._launch_unrolled(
            x, Run([gate] * UNROLLED, [y] * UNROLLED), torch.empty_like(x)
        ),
    }
    return record(kernel, f"{op}_kernel", runs[op])


def bits_per_thread(op: str, x: torch.dtype, y: torch.dtype, gate: torch.dtype | None) -> tuple[int, int]:
    """Bits that a thread must load and store for its eight elements."""
    reads, writes = BRANCHES[op]
    gates = 0 if gate is None else reads * gate.itemsize
    return 64 * (x.itemsize + reads * y.itemsize + gates), 64 * (x.itemsize + writes * y.itemsize)


def check_128_bits(op: str, recorder: Recorder, capability: int, *dtypes: torch.dtype | None) -> None:
    artefact = compile_launch(recorder, capability)
    assert {bits for _, bits in artefact.accesses} == {128}, artefact.accesses
    moved = tuple(sum(bits for kind, bits in artefact.accesses if kind == one) for one in ("ld", "st"))
    assert moved == bits_per_thread(op, *dtypes), "a tensor is read or written more than once"
    assert artefact.spilled_bytes() == (0, 0)
    assert "fma.rn.f32" not in artefact.ptx and ".ftz" not in artefact.ptx, "not the arithmetic of the reference"
    if len({dtype for dtype in dtypes[:2]}) == 1:
        assert not artefact.uses_shared_memory


@pytest.mark.parametrize("gate", [(2, 1, 1152), None], ids=str)
@pytest.mark.parametrize("op", BRANCHES)
def test_this_is_what_a_launch_compiles(op, gate, monkeypatch):
    """Triton's own launcher, up to the launch, compiles the same code."""
    operands = torch.empty(DIT, dtype=BFLOAT16), None if gate is None else torch.empty(gate), torch.empty(DIT)
    recorder = launch(op, *operands)
    (one,) = recorder.launches
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    compiled = recorder.kernel.warmup(*one.arguments, grid=one.grid, **one.keywords)
    assert compile_launch(recorder, 90).ptx == compiled.asm["ptx"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(one).split(".")[1] for one in dtypes))
@pytest.mark.parametrize("op", BRANCHES)
def test_aligned_operands_are_accessed_128_bits_at_a_time(op, dtypes, capability):
    x, y, gate = dtypes
    recorder = launch(op, meta(DIT, x), meta((2, 1, 1152), gate), meta(DIT, y))
    check_128_bits(op, recorder, capability, *dtypes)


@pytest.mark.parametrize("gate", [None, (1152,), (1, 1, 1152), DIT], ids=str)
@pytest.mark.parametrize("op", BRANCHES)
def test_other_gates(op, gate):
    gates = None if gate is None else meta(gate, BFLOAT16)
    recorder = launch(op, meta(DIT, BFLOAT16), gates, meta(DIT, BFLOAT16))
    check_128_bits(op, recorder, 90, BFLOAT16, BFLOAT16, None if gate is None else BFLOAT16)


@pytest.mark.parametrize("op", BRANCHES)
def test_part_of_the_tokens(op):
    """A view as joint attention hands it on: its samples lie apart, its rows do not."""
    recorder = launch(op, meta(DIT, BFLOAT16), meta((2, 1, 1152), BFLOAT16), meta((2, 333, 1152), BFLOAT16)[:, 77:])
    check_128_bits(op, recorder, 90, *(BFLOAT16,) * 3)


@pytest.mark.parametrize("op", BRANCHES)
def test_unaligned_operands_are_not(op):
    """So the test of alignment can fail: addresses at odd places, or rows of odd width."""
    aligned = launch(op, meta(DIT, BFLOAT16), meta((2, 1, 1152), BFLOAT16), meta(DIT, BFLOAT16))
    odd = launch(op, meta((2, 257, 123), BFLOAT16), meta((2, 1, 123), BFLOAT16), meta((2, 257, 123), BFLOAT16))
    for artefact in (compile_launch(aligned, 90, aligned=False), compile_launch(odd, 90)):
        assert max(bits for _, bits in artefact.accesses) < 128, artefact.accesses
        assert artefact.spilled_bytes() == (0, 0)


@pytest.mark.parametrize("rows", [2**31 // 5120, 2**31 // 5120 + 1])
@pytest.mark.parametrize("op", BRANCHES)
def test_indices_have_64_bits_past_2_to_the_31(op, rows):
    """Read from the IR: the numbers of the elements, and the sums that go into the addresses."""
    x = meta((rows, 5120), BFLOAT16)
    recorder = launch(op, x, meta((5120,), BFLOAT16), x)
    (one,) = recorder.launches
    wide = x.numel() > 2**31 - 1
    assert one.keywords["WIDE"] is wide and one.grid[0] * 1024 >= x.numel()
    artefact = compile_launch(recorder, 90)
    divided = [line for line in artefact.ttir.splitlines() if "arith.remsi" in line and "tensor<1024x" in line]
    assert divided and all(f"tensor<1024xi{64 if wide else 32}>" in line for line in divided)
    assert {bits for _, bits in artefact.accesses} == {128}
    assert artefact.spilled_bytes() == (0, 0)


@pytest.mark.parametrize("op", BRANCHES)
def test_samples_have_64_bit_bases(op):
    """A batch past 2**31 elements, each sample below it."""
    x = meta((64, 32760, 5120), BFLOAT16)
    artefact = compile_launch(launch(op, x, meta((64, 1, 5120), BFLOAT16), x), 90)
    bases = re.findall(r"arith\.muli .* : i64\b", artefact.ttir)
    assert bases, "no 64-bit product of a sample's number with its elements"
    assert {bits for _, bits in artefact.accesses} == {128}


@pytest.mark.parametrize("lags", [0, 3, LAGS_PER_LAUNCH])
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF, FLOAT], ids=str)
def test_relative_l1_reads_everything_once(dtype, lags):
    kernel = module("relative_l1")
    recorder = record(kernel, "relative_l1_kernel", lambda: kernel._launch(meta(DIT, dtype), [meta(DIT, dtype)] * lags))
    for capability in CAPABILITIES:
        artefact = compile_launch(recorder, capability)
        loads = [bits for kind, bits in artefact.accesses if kind == "ld"]
        assert set(loads) == {128} and sum(loads) == (1 + lags) * 16 * 8 * dtype.itemsize
        assert [bits for kind, bits in artefact.accesses if kind == "st"] == [32] * (1 + lags)
        assert artefact.spilled_bytes() == (0, 0)


def test_relative_l1_has_64_bit_indices_past_2_to_the_31():
    kernel = module("relative_l1")
    x, apart = meta((2**31 // 5120 + 1, 5120), BFLOAT16), meta((2**31 // 5120 + 1, 5376), BFLOAT16)[:, :5120]
    recorder = record(kernel, "relative_l1_kernel", lambda: kernel._launch(x, [apart]))
    artefact = compile_launch(recorder, 90)
    assert "tensor<4096xi64>" in re.search(r"arith.remsi .*tensor.*", artefact.ttir).group()
    assert {bits for kind, bits in artefact.accesses if kind == "ld"} == {128}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF, FLOAT], ids=str)
@pytest.mark.parametrize("width", [1152, 3072, 5120, WIDEST])
def test_residual_norm_reads_its_row_once(width, dtype, capability):
    kernel = module("residual_norm")
    x, row = meta((2, 64, width), dtype), meta((2, 1, width), dtype)
    spread = {"weight": meta((width,), dtype), "bias": meta((width,), dtype), "modulation": row, "shift": row}
    recorder = record(kernel, "residual_norm_kernel", lambda: kernel._launch(x, row, x, x, spread, 1e-6, False))
    (one,) = recorder.launches
    artefact = compile_launch(recorder, capability)
    assert {bits for _, bits in artefact.accesses} == {128}, artefact.accesses
    # x, y, gate, weight, bias, modulation and shift; out, cache and h.
    per_thread = one.keywords["BLOCK"] // (32 * one.keywords["num_warps"]) * dtype.itemsize * 8
    moved = [sum(bits for kind, bits in artefact.accesses if kind == which) for which in ("ld", "st")]
    assert moved == [7 * per_thread, 3 * per_thread]
    assert artefact.spilled_bytes() == (0, 0)


def test_the_sums_of_relative_l1_are_added_up_in_float64():
    x = meta((64, 256, 1152), BFLOAT16)
    kernel = module("relative_l1")
    recorder = record(kernel, "relative_l1_finish_kernel", lambda: kernel._launch(x, [x] * 3))
    (launch,) = recorder.launches
    assert launch.grid == (4,)
    artefact = compile_launch(recorder, 90)
    assert "add.rn.f64" in artefact.ptx and [kind for kind, _ in artefact.accesses].count("st") == 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("width", [1152, 5120])
def test_a_long_run_is_one_loop(width, order, capability):
    """Some iterations are written out: the loads of their values and gates are under way at once."""
    kernel = module("residual_accumulate")
    x, gate = meta((2, 256, width), BFLOAT16), meta((2, 1, width), BFLOAT16)
    weights = [meta((order + 1,), FLOAT)] * 56 if order else None
    run = Run([gate] * 56, [x] * 56 * (order + 1), weights)
    recorder = record(kernel, "residual_accumulate_loop_kernel", lambda: kernel._launch(x, run))
    artefact = compile_launch(recorder, capability)
    iterations = kernel.AT_ONCE + 1  # those that are written out, and the loop over what is left
    # Four elements of each value and of the gate, and where they lie; a forecast's weights, and where they lie.
    loads = 2 * (order + 2) + (order > 0)
    assert artefact.accesses.count(("ld", 64)) == 1 + iterations * loads
    assert artefact.accesses.count(("ld", 32)) == (iterations * (order + 1) if order else 0)
    assert artefact.accesses.count(("st", 64)) == 1 and not artefact.uses_shared_memory
    assert artefact.spilled_bytes() == (0, 0)
    assert "fma.rn.f32" not in artefact.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("width", "dtype"), [(1152, BFLOAT16), (5120, BFLOAT16), (WIDEST, FLOAT)], ids=str)
def test_a_long_run_and_its_norm_are_one_loop(width, dtype, order, capability):
    """No row is too wide for the registers, nor any forecast too long."""
    kernel = module("residual_accumulate_norm")
    x, row = meta((2, 64, width), dtype), meta((2, 1, width), dtype)
    weights = [meta((order + 1,), FLOAT)] * 56 if order else None
    spread = {"weight": None, "bias": None, "modulation": row, "shift": row}
    run = Run([row] * 56, [x] * 56 * (order + 1), weights)
    recorder = record(
        kernel, f"{kernel.OP}_kernel", lambda: kernel._launch(x, run, spread, 1e-6, rms=False, keep=False)
    )
    (one,) = recorder.launches
    artefact = compile_launch(recorder, capability)
    assert one.grid == (128,) and artefact.spilled_bytes() == (0, 0)
    threads = 32 * one.keywords["num_warps"]
    written = sum(bits for kind, bits in artefact.accesses if kind == "st")
    assert written == one.keywords["BLOCK"] // threads * dtype.itemsize * 8, "the stream is written, though unneeded"
    assert "fma.rn.f32" not in artefact.ptx


def test_a_table_of_addresses_of_any_alignment():
    kernel = module("_addresses")
    tensors = [torch.empty(3, dtype=BFLOAT16), None, torch.empty(2)]
    run = partial(kernel.address_table, tensors, torch.device("meta"))
    recorder = record(kernel, "address_table_kernel", run)
    (launch,) = recorder.launches
    assert launch.arguments[1] == (tensors[0].data_ptr(), 0, tensors[2].data_ptr())
    artefact = compile_launch(recorder, 90)
    assert artefact.accesses == [("st", 64)] * 3


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT], ids=str)
def test_grouped_linears_copy_weights_ahead_128_bits_at_a_time(dtype, rows, capability):
    kernel = module("grouped_linear")
    x, weight, bias = meta((rows, 1152), dtype), meta((1152, 1152), dtype), meta((1152,), dtype)
    run = partial(kernel._launch, [x] * 28, [weight] * 28, [bias] * 28)
    artefact = compile_launch(record(kernel, "grouped_linear_kernel", run), capability)
    copies = re.findall(r"cp\.async\.c\S+ [^;]*\], (0x\w+)", artefact.ptx)
    assert set(copies) == {"0x10"} and artefact.spilled_bytes() == (0, 0)
    assert {bits for kind, bits in artefact.accesses if kind == "st"} == {128}
    if dtype is BFLOAT16:
        assert re.search(r"(wgmma|mma|tcgen05\.mma)\.", artefact.ptx), "no tensor cores"
