"""The kernels' tests once more, on the Triton kernels under Triton's interpreter.

It is chosen by an environment variable when kernels are defined, hence a process of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smoothcache_fx.kernels import _triton

HERE = Path(__file__).parent
X = torch.zeros(2, 8)
ops = torch.ops.smoothcache
CALLS = {
    "grouped_linear": lambda: ops.grouped_linear([X], [X], [None]),
    "residual_store": lambda: ops.residual_store(X, None, X, torch.empty_like(X)),
    "residual_load": lambda: ops.residual_load(X, None, X),
    "residual_accumulate": lambda: ops.residual_accumulate(X, [None], [X]),
    "residual_accumulate_norm": lambda: ops.residual_accumulate_norm(X, [None], [X], *[None] * 5, 1e-6),
    "residual_forecast": lambda: ops.residual_forecast(X, None, [X, X], torch.ones(2)),
    "residual_norm": lambda: ops.residual_norm(X, None, X, None, None, None, None, None, 1e-6),
    "relative_l1": lambda: ops.relative_l1(X, [X]),
}


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed: there is no interpreter")
@pytest.mark.skipif(_triton.INTERPRETED, reason="this run is itself under the interpreter")
@pytest.mark.parametrize("op", CALLS)
def test_the_kernels_pass_the_same_tests(op):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"test_{op}.py")]
    # Other plugins have no part in this.
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = os.environ | settings
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed: there are no kernels")
@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("op", CALLS)
def test_cpu_tensors_go_to_the_kernels_under_the_interpreter_only(op, interpreted, monkeypatch):
    from helpers.aot import record

    monkeypatch.setattr(_triton, "INTERPRETED", interpreted)
    module = importlib.import_module(f"smoothcache_fx.kernels.{op}")
    recorder = record(module, f"{op}_kernel", CALLS[op])
    assert len(recorder.launches) == int(interpreted)
