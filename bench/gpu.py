"""Everything that needs a GPU, in one go: ``python bench/gpu.py``.

The kernels' tests on CUDA and under ``compute-sanitizer``, CUDA graphs, and all benches with ``--write``. Each step has
a time limit of its own, 20 minutes together; what fails or runs out of time is named at the end.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x")
KERNELS = (
    "residual_store",
    "residual_load",
    "residual_accumulate",
    "residual_forecast",
    "residual_norm",
    "relative_l1",
)
XL = ("--depth", "28", "--width", "1152")


def steps() -> list[tuple[str, list[str], int]]:
    """Name, command and limit in seconds of each step, the most wanted first."""
    found = [("kernel tests", [*PYTEST, "tests/kernels", "-k", "not interpreter and not ahead_of_time"], 110)]
    found += [(f"kernel {name}", [f"bench/kernels/{name}.py", "--write"], 35) for name in KERNELS]
    found.append(("cuda graphs", [*PYTEST, "tests/test_cuda_graphs.py", "-m", "gpu"], 90))
    found.append(("end to end", ["bench/end_to_end.py", "--images", "32", "--no-autotune", "--write"], 360))
    found.append(("efficiency", ["bench/efficiency.py", *XL, "--batch", "64", "--write"], 90))
    tf32 = ["--images", "32", "--no-autotune", "--dtype", "tf32", "--only", "smoothcache alpha", "--write"]
    found.append(("tf32", ["bench/end_to_end.py", *tf32], 100))
    found.append(("host time", ["bench/host_time.py", "--write"], 40))
    found.append(("compile time", ["bench/compile_time.py", *XL, "--rounds", "1", "--write"], 120))
    if sanitizer := shutil.which("compute-sanitizer"):
        tests = [f"tests/kernels/test_{name}.py" for name in ("residual_store", "residual_accumulate")]
        found.append(("compute-sanitizer", [sanitizer, "--error-exitcode", "9", *PYTEST, *tests], 80))
    return [(name, [sys.executable, *cmd] if cmd[0].endswith(".py") else cmd, limit) for name, cmd, limit in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="steps whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="print the steps and their limits, and stop")
    arguments = parser.parse_args()
    chosen = [s for s in steps() if not arguments.only or s[0].startswith(tuple(arguments.only))]
    if arguments.list:
        for name, command, limit in chosen:
            print(f"{limit:4d} s  {name}: {' '.join(command)}")
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: these figures are of a GPU or of nothing")
    failed = []
    for name, command, limit in chosen:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = f"out of time, {limit} s"
        print(f"== {name}: {time.perf_counter() - start:.0f} s, {status or 'passed'}", flush=True)
        if status:
            failed.append(f"{name} ({status})")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
