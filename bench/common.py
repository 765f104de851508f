"""What the benches share: interleaved timing, the machine's description, result files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from turns import turn

import smoothcache_fx as smoothcache
from smoothcache_fx.demo import DiT, load_model
from smoothcache_fx.reports.timing import synchronize

RESULTS = Path(__file__).parent / "results"
DIGITS = Path(__file__).parents[1] / "tests" / "helpers" / "digits_dit.safetensors"

#: The published schedule for DiT-XL/2 with 50 DDIM steps at alpha 0.18: 24 steps computed, equal for attn and mlp.
PUBLISHED_24_OF_50 = [int(digit) for digit in "100010010010" + "1010" * 9 + "11"]


def digits_model() -> DiT:
    """The trained DiT of handwritten digits that tests use, and that older results are of."""
    return load_model(path=DIGITS)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, ``rounds`` times each, taking turns, so that a slow spell of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup):
        for run in runs.values():
            run()
    synchronize()
    with turn():
        for _ in range(rounds):
            for name, run in runs.items():
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and spread (20th to 80th percentile), in seconds."""
    ordered = sorted(seconds)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"median": statistics.median(ordered), "p20": low, "p80": high}


def ratio_of_medians(base: list[float], other: list[float]) -> float:
    """How many times faster ``other`` is: the median over rounds of the ratio within a round."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def machine() -> dict[str, Any]:
    """Device, versions and date: what a figure means nothing without."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "smoothcache_fx": smoothcache.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _driver() -> str:
    if not (tool := shutil.which("nvidia-smi")):
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def result_path(name: str) -> Path:
    """``bench/results/<name>.json``; figures of a GPU are in ``<name>_cuda.json``, beside those of a CPU."""
    if torch.cuda.is_available() and "_cuda" not in name:
        name += "_cuda"
    return RESULTS / f"{name}.json"


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write the figures with the machine's description beside them."""
    path = result_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return path
