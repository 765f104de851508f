"""What compiling costs: ``python bench/compile_time.py``.

Seconds that the compile call and the first trajectory take longer than the second one, with nothing on disk (cold) and
in another process with what the first has left there (warm): plain ``torch.compile`` of a DiT against ours, with one
schedule for both kinds of branches (two variants), as the published ones are, and with one each (four variants). Each
figure is of a process of its own, with a cache directory of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from common import summary, synchronize, write_result
from efficiency import build, trajectory

import smoothcache_fx as smoothcache
from smoothcache_fx.graphs.tables import format_table

ATTENTION, FEED_FORWARD = (1, 0, 1, 0, 1, 0, 0, 1), (1, 0, 0, 1, 1, 0, 1, 1)
#: Rows per kind; with rows of their own, every combination of computed and reused.
ROWS: dict[str, dict[str, tuple[int, ...]]] = {
    "torch.compile": {},
    "smoothcache, 2 variants": {"attn": ATTENTION, "ffn": ATTENTION},
    "smoothcache, 4 variants": {"attn": ATTENTION, "ffn": FEED_FORWARD},
}
NAMES = tuple(ROWS)
PLAIN = NAMES[0]
MARK = "RESULT "


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first trajectory, with the compile call, and of the second, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(arguments.depth, arguments.width).to(device)
    latents = torch.randn(arguments.batch, 4, 32, 32, device=device)
    labels = torch.zeros(arguments.batch, dtype=torch.long, device=device)
    steps = len(ATTENTION)
    seconds = []
    for turn in range(2):
        synchronize()
        start = time.perf_counter()
        if turn == 0 and name != PLAIN:
            smoothcache.compile(model, smoothcache.Schedule(steps, ROWS[name]), mode=arguments.mode)
        elif turn == 0:
            model.forward = torch.compile(model.forward, mode=arguments.mode)
        trajectory(model, latents, labels, steps)
        synchronize()
        seconds.append(time.perf_counter() - start)
    if name != PLAIN:
        assert f"{smoothcache.report(model).variants} variants" in name
    return {"first": seconds[0], "second": seconds[1]}


def measure_apart(name: str, cache: str) -> dict[str, Any]:
    """``measure`` in a process of its own, with this cache directory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(f"{name} failed:\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", default=None, help="torch.compile's mode, for both")
    parser.add_argument("--write", action="store_true", help="write bench/results/compile_time.json")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(MARK + json.dumps(measure(arguments.one, arguments)))
        return

    seconds: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in NAMES}
    for _ in range(arguments.rounds):
        for name in NAMES:
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    result = measure_apart(name, cache)
                    seconds[name][start].append(result["first"] - result["second"])
    results: dict[str, Any] = {name: {k: summary(values) for k, values in seconds[name].items()} for name in NAMES}
    rows = [("", "cold", "times plain", "warm", "times plain")]
    ratios: dict[str, dict[str, float]] = {}
    for name, found in results.items():
        ratios[name] = {start: found[start]["median"] / results[PLAIN][start]["median"] for start in found}
        cells = [(f"{found[start]['median']:.2f} s", f"{ratios[name][start]:.2f}") for start in ("cold", "warm")]
        rows.append((name, *cells[0], *cells[1]))
    print(format_table(rows))
    if arguments.write:
        print(write_result("compile_time", {"arguments": vars(arguments), "seconds": results, "ratios": ratios}))


if __name__ == "__main__":
    main()
