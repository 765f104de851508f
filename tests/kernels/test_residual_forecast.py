"""``residual_forecast``: the numbers, what it refuses, that compilers leave it whole, and what a GPU would run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.operands import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    expected,
    filled_with_nan,
    gate_shapes,
    randn,
    shapes,
    tensors,
)
from smoothcache_fx.kernels import residual_forecast as module
from smoothcache_fx.kernels._triton import INTERPRETED
from smoothcache_fx.kernels.residual_forecast import residual_forecast
from smoothcache_fx.kernels.residual_load import residual_load
from smoothcache_fx.passes.forecast import forecast

#: A line's and a parabola's at a step ahead; 1 and 0 stand for themselves.
COEFFICIENTS = {2: [1.5, -0.5], 3: [1.875, -1.25, 0.375]}


def branch_of(values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The weighted sum in float32, rounded to the first one's dtype. Minus zero is what adds nothing to any number."""
    return expected(torch.full_like(values[0], -0.0), list(zip(coefficients, values, strict=True)))


def coefficients_of(numbers: Sequence[float], start: int = 0, step: int = 1) -> Tensor:
    """A part of a larger tensor, what lies around it being NaN."""
    storage = torch.full((start + step * len(numbers) + 1,), float("nan"), device=DEVICE)
    part = storage[start : start + step * len(numbers) : step]
    part.copy_(torch.tensor(numbers))
    return part


@settings(max_examples=150)
@given(data=st.data(), shape=shapes(), count=st.integers(2, 3))
def test_any_shape_dtype_and_strides(data, shape, count):
    x_dtype, value_dtype, older_dtype, gate_dtype = (data.draw(st.sampled_from(DTYPES)) for _ in range(4))
    x, *values = [data.draw(tensors(shape, dtype)) for dtype in (x_dtype, value_dtype, *[older_dtype] * (count - 1))]
    gate_shape = data.draw(gate_shapes(shape))
    gate = None if gate_shape is None else data.draw(tensors(gate_shape, gate_dtype))
    numbers = data.draw(st.lists(st.floats(-3, 3, width=32), min_size=count, max_size=count))
    coefficients = coefficients_of(numbers, data.draw(st.integers(0, 5)), data.draw(st.sampled_from([1, 1, 2])))
    before = [one.clone() for one in (x, *values)]
    out = residual_forecast(x, gate, values, coefficients)
    assert_same_bits(out, expected(x, [(gate, branch_of(values, coefficients))]))
    assert out.stride() == torch.empty_like(x).stride()
    assert all(torch.equal(one, old) for one, old in zip((x, *values), before, strict=True))


@pytest.mark.parametrize("count", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_gives_the_bits_of_the_graphs_forecast(dtype, count):
    """That is, of the nodes which ``passes.forecast`` puts before a residual add."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    x, gate = randn(2, 41, 130), randn(2, 1, 130)
    values, coefficients = (
        [randn(2, 41, 130, dtype=dtype) for _ in range(count)],
        coefficients_of(COEFFICIENTS[count], 3),
    )
    out = residual_forecast(x, gate, values, coefficients)
    assert_same_bits(out, residual_load(x, gate, forecast(values, coefficients)))


@pytest.mark.parametrize("count", COEFFICIENTS)
@pytest.mark.parametrize("older", DTYPES, ids=str)
def test_of_differences_too(older, count):
    """A last output in float32 and differences in any dtype."""
    x, gate, newest = randn(2, 41, 130, dtype=torch.bfloat16), randn(2, 1, 130), randn(2, 41, 130)
    values = [newest, *(randn(2, 41, 130, dtype=older) for _ in range(count - 1))]
    coefficients = coefficients_of([1.0, 0.875, -0.375][:count], 3)
    out = residual_forecast(x, gate, values, coefficients)
    assert_same_bits(out, expected(x, [(gate, forecast(values, coefficients))]))


@pytest.mark.parametrize("count", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_coefficients_1_and_0_it_gives_the_bits_of_a_load(dtype, count):
    x, gate = randn(2, 41, 130, dtype=dtype), randn(2, 1, 130)
    values = [randn(2, 41, 130, dtype=dtype) for _ in range(count)]
    coefficients = torch.eye(count, device=DEVICE)
    for number, value in enumerate(values):
        out = residual_forecast(x, gate, values, coefficients[number])
        assert_same_bits(out, residual_load(x, gate, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_is_written_whole(dtype):
    with filled_with_nan():
        values, coefficients = [randn(3, 41, 123, dtype=dtype) for _ in range(2)], coefficients_of(COEFFICIENTS[2])
        out = residual_forecast(randn(3, 41, 123, dtype=dtype), randn(3, 1, 123), values, coefficients)
    assert not out.isnan().any()


@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), ()])
def test_no_elements_or_no_dimensions(shape):
    x, values, coefficients = randn(*shape), [randn(*shape), randn(*shape)], coefficients_of(COEFFICIENTS[2])
    out = residual_forecast(x, None, values, coefficients)
    assert_same_bits(out, expected(x, [(None, branch_of(values, coefficients))]))


def operands(dtype: torch.dtype = torch.float32, count: int = 2) -> list[Tensor]:
    """x, gate, values, coefficients"""
    values = [randn(2, 5, 8, dtype=dtype) for _ in range(count)]
    return [randn(2, 5, 8, dtype=dtype), randn(2, 1, 8), *values, coefficients_of(COEFFICIENTS[count], 3)]


@pytest.mark.parametrize(
    ("position", "operand", "error", "message"),
    [
        (0, torch.zeros(2, 5, 8, dtype=torch.float64), TypeError, "x is torch.float64, expected one of torch.float32"),
        (1, torch.zeros(2, 5, 4), ValueError, r"gate has shape \[2, 5, 4\], which does not broadcast"),
        (2, torch.zeros(2, 5, 8, dtype=torch.int32), TypeError, r"values\[0\] is torch.int32, expected one of"),
        (2, torch.zeros(2, 5, 1), ValueError, r"values\[0\] has shape \[2, 5, 1\], expected x's \[2, 5, 8\]"),
        (3, torch.zeros(5, 8), ValueError, r"values\[1\] has shape \[5, 8\], expected x's \[2, 5, 8\]"),
        (3, torch.zeros(2, 5, 8, dtype=torch.float64), TypeError, r"values\[1\] is torch.float64, expected one of"),
        (4, torch.zeros(2).half(), TypeError, "coefficients is torch.float16, expected torch.float32"),
        (4, torch.zeros(3), ValueError, r"coefficients has shape \[3\], expected \[2\]"),
        (4, torch.zeros(2, 1), ValueError, r"coefficients has shape \[2, 1\], expected \[2\]"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_what_does_not_fit_is_refused(position, operand, error, message, device):
    """Alike when it runs and when it is traced."""
    given = [one.to(device) for one in operands()]
    given[position] = operand.to(device)
    x, gate, *values, coefficients = given
    with pytest.raises(error, match=f"residual_forecast: {message}"):
        residual_forecast(x, gate, values, coefficients)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_other_numbers_of_values_are_refused(count):
    x = randn(2, 5, 8)
    with pytest.raises(ValueError, match=f"residual_forecast: got {count} values, expected 2 or 3: use residual_load"):
        residual_forecast(x, None, [x] * count, torch.ones(count, device=DEVICE))


@pytest.mark.parametrize(("position", "name"), [(1, "gate"), (3, r"values\[1\]"), (4, "coefficients")])
def test_another_device_is_refused(position, name):
    given = operands()
    given[position] = given[position].to("meta")
    x, gate, *values, coefficients = given
    with pytest.raises(ValueError, match=f"residual_forecast: {name} is on meta, expected x's device {DEVICE}"):
        residual_forecast(x, gate, values, coefficients)


@pytest.mark.parametrize("count", COEFFICIENTS)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, gate, count):
    x, gates, *values, coefficients = operands(dtype, count)
    torch.library.opcheck(residual_forecast, (x, gates if gate else None, values, coefficients))


def test_opcheck_of_mixed_dtypes():
    x, gate, newest, *older, coefficients = operands(count=3)
    values = [newest, *(value.half() for value in older)]
    torch.library.opcheck(residual_forecast, (x, gate, values, coefficients))


def test_fake_tensors_show_what_a_run_gives():
    x, gate, *values, coefficients = operands(torch.bfloat16)
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    out = residual_forecast(x, gate, values, coefficients)
    with FakeTensorMode() as mode:
        x, gate, coefficients, *values = (mode.from_tensor(one) for one in (x, gate, coefficients, *values))
        fake = residual_forecast(x, gate, values, coefficients)
    assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (out.shape, out.dtype, out.device, out.stride())


def step(x, gate, first, second, coefficients):
    return torch.relu(residual_forecast(torch.tanh(x), gate, [first, second], coefficients[2:4]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_stays_whole_in_the_graph(backend):
    """One graph for all coefficients: they are read when it runs."""
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(step, backend=recorded if backend == "aot_eager" else backend, fullgraph=True)
    given = operands(torch.bfloat16)[:-1]
    for stance, numbers in (("default", [1.5, -0.5]), ("fail_on_recompile", [1.0, 0.0])):
        coefficients = coefficients_of([0.0, 0.0, *numbers])
        with torch.no_grad(), torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled(*given, coefficients), step(*given, coefficients))
    for graph in recorded.fw_graphs:
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(torch.ops.smoothcache.residual_forecast.default) == 1, graph.print_readable(False)


# Ahead of time, with the helpers of test_ahead_of_time.py, which are there where Triton is.
compiles = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
BFLOAT16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
DIT = (2, 256, 1152)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    x: Tensor,
    gate: Tensor | None,
    value: Tensor,
    count: int,
    coefficients: Tensor | None = None,
    older: Tensor | None = None,
):
    """What the op would launch for these operands; ``older`` stands for all values but the first."""
    from helpers.aot import record

    coefficients = meta((count,), FLOAT) if coefficients is None else coefficients
    values = [value, *[value if older is None else older] * (count - 1)]
    return record(module, "residual_forecast_kernel", lambda: module._launch(x, gate, values, coefficients))


def check_128_bits(recorder, capability: int, count: int, x: torch.dtype, value: torch.dtype, gate: torch.dtype | None):
    from helpers.aot import compile_launch

    artefact = compile_launch(recorder, capability)
    assert [access for access in artefact.accesses if access[1] != 128] == [("ld", 32)] * count, "coefficients only"
    # A thread has eight elements.
    moved = tuple(sum(bits for kind, bits in artefact.accesses if kind == one) for one in ("ld", "st"))
    read = x.itemsize + count * value.itemsize + (0 if gate is None else gate.itemsize)
    assert moved == (64 * read + 32 * count, 64 * x.itemsize), "a tensor is read or written more than once"
    assert artefact.spilled_bytes() == (0, 0)
    assert "fma.rn.f32" not in artefact.ptx and ".ftz" not in artefact.ptx, "not the arithmetic of the reference"
    if (x, value) == (FLOAT, BFLOAT16):
        assert "cvt.rn.bf16" in artefact.ptx, "the forecast is not rounded to the values' dtype"
    if x == value:
        assert not artefact.uses_shared_memory


@compiles
@pytest.mark.parametrize("count", COEFFICIENTS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (BFLOAT16, BFLOAT16, BFLOAT16),
        (HALF, HALF, HALF),
        (FLOAT, FLOAT, FLOAT),
        (BFLOAT16, BFLOAT16, FLOAT),
        (FLOAT, BFLOAT16, FLOAT),
    ],
    ids=lambda dtypes: "-".join(str(one).split(".")[1] for one in dtypes),
)
def test_ahead_of_time_aligned_operands_are_accessed_128_bits_at_a_time(dtypes, count):
    from helpers.aot import CAPABILITIES

    x, value, gate = dtypes
    recorder = launch(meta(DIT, x), meta((2, 1, 1152), gate), meta(DIT, value), count)
    for capability in CAPABILITIES:
        check_128_bits(recorder, capability, count, *dtypes)


@compiles
@pytest.mark.parametrize("older", [HALF, BFLOAT16], ids=str)
def test_ahead_of_time_differences_are_read_in_their_dtype(older):
    """And in 128 bits at a time, though a thread's elements of the newest value take two of these."""
    from helpers.aot import CAPABILITIES, compile_launch

    recorder = launch(meta(DIT, FLOAT), meta((2, 1, 1152), FLOAT), meta(DIT, FLOAT), 3, older=meta(DIT, older))
    for capability in CAPABILITIES:
        artefact = compile_launch(recorder, capability)
        assert [access for access in artefact.accesses if access[1] != 128] == [("ld", 32)] * 3, "coefficients only"
        read = sum(bits for kind, bits in artefact.accesses if kind == "ld")
        assert read == 64 * (3 * FLOAT.itemsize + 2 * older.itemsize) + 32 * 3
        assert artefact.spilled_bytes() == (0, 0)
        assert "fma.rn.f32" not in artefact.ptx and ".ftz" not in artefact.ptx, "not the arithmetic of the reference"


@compiles
@pytest.mark.parametrize("gate", [None, (1152,), (1, 1, 1152), DIT], ids=str)
def test_ahead_of_time_other_gates(gate):
    gates = None if gate is None else meta(gate, BFLOAT16)
    recorder = launch(meta(DIT, BFLOAT16), gates, meta(DIT, BFLOAT16), 3)
    check_128_bits(recorder, 90, 3, BFLOAT16, BFLOAT16, None if gate is None else BFLOAT16)


@compiles
def test_ahead_of_time_part_of_the_tokens():
    """A view as joint attention hands it on: its samples lie apart, its rows do not."""
    part = meta((2, 333, 1152), BFLOAT16)[:, 77:]
    check_128_bits(launch(meta(DIT, BFLOAT16), meta((2, 1, 1152), BFLOAT16), part, 3), 90, 3, *(BFLOAT16,) * 3)


@compiles
def test_ahead_of_time_unaligned_operands_are_not():
    """So the test of alignment can fail: addresses at odd places, or rows of odd width."""
    from helpers.aot import compile_launch

    aligned = launch(meta(DIT, BFLOAT16), meta((2, 1, 1152), BFLOAT16), meta(DIT, BFLOAT16), 3)
    odd = launch(meta((2, 257, 123), BFLOAT16), meta((2, 1, 123), BFLOAT16), meta((2, 257, 123), BFLOAT16), 3)
    for artefact in (compile_launch(aligned, 90, aligned=False), compile_launch(odd, 90)):
        assert max(bits for _, bits in artefact.accesses) < 128, artefact.accesses
        assert artefact.spilled_bytes() == (0, 0)


@compiles
@pytest.mark.parametrize("rows", [2**31 // 5120, 2**31 // 5120 + 1])
def test_ahead_of_time_indices_have_64_bits_past_2_to_the_31(rows):
    """Read from the IR: the numbers of the elements."""
    from helpers.aot import compile_launch

    x = meta((rows, 5120), BFLOAT16)
    recorder = launch(x, meta((5120,), BFLOAT16), x, 3)
    (one,) = recorder.launches
    wide = x.numel() > 2**31 - 1
    assert one.keywords["WIDE"] is wide and one.grid[0] * 1024 >= x.numel()
    artefact = compile_launch(recorder, 90)
    divided = [line for line in artefact.ttir.splitlines() if "arith.remsi" in line and "tensor<1024x" in line]
    assert divided and all(f"tensor<1024xi{64 if wide else 32}>" in line for line in divided)
    check_128_bits(recorder, 90, 3, *(BFLOAT16,) * 3)


@compiles
def test_ahead_of_time_samples_have_64_bit_bases():
    """A batch past 2**31 elements, each sample below it."""
    from helpers.aot import compile_launch

    x = meta((64, 32760, 5120), BFLOAT16)
    recorder = launch(x, meta((64, 1, 5120), BFLOAT16), x, 3)
    bases = [
        line for line in compile_launch(recorder, 90).ttir.splitlines() if "arith.muli" in line and ": i64" in line
    ]
    assert bases, "no 64-bit product of a sample's number with its elements"
    check_128_bits(recorder, 90, 3, *(BFLOAT16,) * 3)


@compiles
@pytest.mark.parametrize("gate", [(2, 1, 1152), None], ids=str)
def test_ahead_of_time_this_is_what_a_launch_compiles(gate, monkeypatch):
    """Triton's own launcher, up to the launch, compiles the same code, and but once for all sites' coefficients."""
    from helpers.aot import Hopper, compile_launch, triton

    x, gates, storage = torch.empty(DIT, dtype=BFLOAT16), None if gate is None else torch.empty(gate), torch.empty(6)
    recorders = [launch(x, gates, torch.empty(DIT), 2, storage[start : start + 2]) for start in (0, 2)]
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    ((first,), (second,)) = (recorder.launches for recorder in recorders)
    kernel = recorders[0].kernel
    compiled = [kernel.warmup(*one.arguments, grid=one.grid, **one.keywords) for one in (first, second)]
    assert compile_launch(recorders[0], 90).ptx == compiled[0].asm["ptx"]
    assert compiled[1] is compiled[0]
