"""Systems that Triton has no release for: the package imports, and the ops run as plain PyTorch."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # what an import of it then raises is what a missing package raises
import torch
from smoothcache_fx.kernels import _triton
ops = torch.ops.smoothcache
assert _triton.triton is None and not _triton.runs_triton(torch.zeros(1))
x, y, cache = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.zeros(2, 5, 8)
out = ops.residual_store(x, None, y, cache)
assert torch.equal(out, x + y) and torch.equal(cache, y)
assert torch.equal(ops.residual_load(x, None, cache), out)
assert torch.equal(ops.residual_accumulate(x, [None], [cache]), out)
assert torch.equal(ops.residual_accumulate_norm(x, [None], [cache], *[None] * 5, 1e-6)[0], out)
assert torch.equal(ops.residual_forecast(x, None, [cache, y], torch.tensor([1.0, 0.0])), out)
assert torch.equal(ops.residual_norm(x, None, y, None, None, None, None, None, 1e-6)[0], out)
assert ops.relative_l1(x, [y]).shape == (2,)
"""


def test_the_ops_run_without_triton():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
