"""The kernels' benches: they verify before they time, need a GPU to time, and work out their figures rightly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench" / "kernels"
OPS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "common")


@pytest.fixture
def common(monkeypatch) -> ModuleType:
    """``bench/kernels/common.py``, as the benches import it; they import each other's constants from there, too."""
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("common", BENCH / "common.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "common", module)
    spec.loader.exec_module(module)
    return module


def bench(op: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{op}", BENCH / f"{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_kernel_has_a_bench():
    assert OPS == [
        "grouped_linear",
        "relative_l1",
        "residual_accumulate",
        "residual_accumulate_norm",
        "residual_forecast",
        "residual_load",
        "residual_norm",
        "residual_store",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_they_verify_on_any_machine(op, dtype, common, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [op, "--check", "--dtype", dtype])
    common.main(op, "", bench(op).build)
    assert capsys.readouterr().out.count(f" in {dtype} is right on ") == len(common.SMALL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_they_fail(op):
    done = subprocess.run([sys.executable, str(BENCH / f"{op}.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert f"{op}: a CUDA GPU is needed" in done.stderr


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_is_found(op, common):
    case = bench(op).build(common.SMALL[0], torch.float32, "cpu")
    right = case.kernel

    def wrong():
        results = right()
        (results if isinstance(results, torch.Tensor) else results[-1]).mul_(1 + 1e-5)
        return results

    case.kernel = wrong
    with pytest.raises(RuntimeError, match="smoothcache is wrong: .* relative error 1e-05 over"):
        case.verify(torch.float32)


def test_a_cache_that_is_not_written_is_found(common):
    case = bench("residual_store").build(common.SMALL[0], torch.float32, "cpu")
    case.kernel = case.reference
    case.expression = case.compiled = lambda x, gate, y, cache: x + gate * y
    with pytest.raises(RuntimeError, match="eager is wrong: .* relative error nan"):
        case.verify(torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_figures(op, common, monkeypatch, tmp_path, capsys):
    """All of it but the clock: with known times, the shares and what is written."""
    times = iter([100e-6, 400e-6, 200e-6, 90e-6] * len(common.SMALL))
    beside = common._beside
    outer = beside("common")

    def build(shape, dtype, device):
        case = bench(op).build(shape, dtype, "cpu")
        # Dynamo would look for the GPU.
        case.verify = lambda dtype: None
        return case

    monkeypatch.setattr(outer, "RESULTS", tmp_path)
    monkeypatch.setattr(outer, "machine", dict)
    monkeypatch.setattr(common, "_beside", lambda name: outer if name == "common" else beside(name))
    monkeypatch.setattr(common, "SHAPES", common.SMALL)
    monkeypatch.setattr(common, "time_on_gpu", lambda run: dict.fromkeys(("median", "p20", "p80"), next(times)))
    monkeypatch.setattr(
        common,
        "time_copy",
        lambda size: {"median": size / 3e12} if size == 2 * common.GIB else common.time_on_gpu(None),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", [op, "--write", "--dtype", "float32"])
    common.main(op, "", build)

    result = json.loads((tmp_path / f"kernels_{op}_cuda.json").read_text())
    assert [row["shape"] for row in result["rows"]] == [list(shape.size) for shape in common.SMALL]
    for row, shape in zip(result["rows"], common.SMALL, strict=True):
        assert row["bytes"] == least_bytes(op, *shape.size)
        assert row["share_of_copy"] == pytest.approx({"smoothcache": 0.9, "eager": 0.225, "inductor": 0.45})
        assert row["share_of_large_copy"]["smoothcache"] == pytest.approx(row["bytes"] / 100e-6 / 3e12)
    assert "90.0%" in capsys.readouterr().out


def least_bytes(op: str, batch: int, tokens: int, width: int) -> int:
    """In float32, each tensor once: streams of all tokens and gates per sample, or 28 square weights."""
    if op == "grouped_linear":
        return 4 * 28 * width * (width + 1 + batch)
    streams, gates = {
        "residual_store": (4, 1),
        "residual_load": (3, 1),
        "residual_accumulate": (2 + 56, 56),
        "residual_accumulate_norm": (2 + 56, 56 + 2),
        "residual_forecast": (2 + 3, 1),
        "residual_norm": (5, 3),
        "relative_l1": (4, 0),
    }[op]
    return 4 * batch * width * (streams * tokens + gates)
