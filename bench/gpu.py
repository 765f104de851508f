"""Everything that needs a GPU, in six minutes: ``python bench/gpu.py``.

What is promised comes first: Flux and DiT-XL/2 end to end, the host's part, the kernels of a run. Then CUDA graphs,
the other kernels, all kernels' tests on CUDA and under ``compute-sanitizer``, peers, TF32, as far as there is time;
``--only`` runs the rest another time. All benches run with ``--write``.

Parts compile side by side, as many as the processor's cores and the GPU's memory allow, and time in turns
(``turns.py``), while everything else stands still. What is not ready when the gate opens is stopped until the others
have been timed, and goes on behind them. What still runs at the end is killed: all logs and results so far are packed
into one file, and the summary names what failed, what is missing, and which targets were met.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from turns import FOLDER, NAME, preparing

ROOT = Path(__file__).parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
#: All of it, in seconds, and the share of it after which nothing is waited for.
SECONDS, GATE = 360, 0.6
#: Cores for each part that compiles: with fewer, parts are not ready when the gate opens.
CORES = 4
#: Memory that parts may hold at once, in GiB; an H100 has 78.
MEMORY = 70
DIT = ("diffusers",)
PEERS = ("diffusers", "SmoothCache", "cache_dit")
#: Most that a cached call may take of a full one, by result file, images, and configuration.
TARGETS = {
    ("end_to_end_cuda_32", "32", "smoothcache alpha 0.18"): 0.035,
    ("end_to_end_cuda_32", "32", "smoothcache alpha 0.18 order 1"): 0.06,
    ("end_to_end_cuda_32_graphs", "32", "smoothcache alpha 0.18 reduce-overhead"): 0.035,
    ("end_to_end_cuda_1", "1", "smoothcache alpha 0.18 reduce-overhead"): 0.10,
    ("flux_cuda", "1", "smoothcache"): 0.024,
}
EFFICIENCY = 0.97


@dataclass
class Part:
    """One command.

    Attributes:
        gib: the most GPU memory that it holds, in GiB.
        needs: packages that must be installed.
        environment: variables beside the usual ones.
        times: whether it times anything. What does not stands still while others do.
    """

    name: str
    command: Sequence[str]
    gib: float
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    times: bool = True

    @property
    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


def parts() -> list[Part]:
    """What there is to run, in the order of starting."""
    ours = ["--no-autotune", "--only", "smoothcache alpha 0.18", "--write"]
    modes = ["--modes", "default", "reduce-overhead", "--orders", "0", "1"]
    # What "end to end 1" verifies need not be verified at each size. Each part compiles no more than fits the gate.
    many = ["end_to_end.py", "--images", "32", "--no-autotune", "--no-verify", "--write"]
    graphs = ["--only", "smoothcache alpha 0.18 reduce-overhead", "smoothcache alpha 0.18 order 1 reduce-overhead"]
    kernels = sorted(path.stem for path in (ROOT / "bench/kernels").glob("*.py") if path.stem != "common")
    runs = ("residual_accumulate", "grouped_linear")
    workers = ["-n", str(2 * CORES)] if importlib.util.find_spec("xdist") else []
    found = [
        _bench(
            "end to end 32", [*many, "--orders", "0", "1", "--name", "32", "--only", "smoothcache alpha 0.18"], 16, DIT
        ),
        _bench("end to end 32 graphs", [*many, *modes, "--name", "32_graphs", *graphs], 20, DIT),
        _bench("flux", ["flux.py", "--rounds", "3", "--write"], 34, DIT),
        _bench("end to end 1", ["end_to_end.py", "--images", "1", *modes, "--name", "1", *ours], 6, DIT),
        _bench("host time", ["host_time.py", "--write"], 2),
        *(_kernel(name) for name in runs),
        Part("cuda graphs", [*PYTEST, "tests/test_cuda_graphs.py", "-m", "gpu"], 3, times=False),
        *(_kernel(name) for name in kernels if name not in runs),
        Part(
            "kernel tests",
            [*PYTEST, *workers, "tests/kernels", "-k", "not interpreter and not ahead_of_time"],
            3,
            times=False,
        ),
        _bench(
            "peers",
            [*many, "--rounds", "2", "--name", "peers"]
            + ["--only", "dit-smoothcache", "TaylorSeer", "MagCache", "cache-dit", "FirstBlock"],
            16,
            PEERS,
        ),
        _bench("tf32", ["end_to_end.py", "--images", "32", "--dtype", "tf32", "--rounds", "2", *ours], 12, DIT),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        tests = [
            f"tests/kernels/test_{name}.py" for name in ("residual_store", "residual_accumulate", "grouped_linear")
        ]
        # It refuses memory that grows in place.
        plain = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}
        command = [sanitizer, "--error-exitcode", "9", *PYTEST, *tests, "-k", "not any_shape and not inductor"]
        found.append(Part("compute-sanitizer", command, 4, environment=plain, times=False))
    return found


def _kernel(name: str) -> Part:
    gib = 30 if name.startswith("residual_accumulate") else 10
    return _bench(f"kernel {name}", [f"kernels/{name}.py", "--write"], gib)


def _bench(name: str, script: Sequence[str], gib: float, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, [sys.executable, f"bench/{script[0]}", *script[1:]], gib, needs)


class Run:
    """Parts under way: what waits for memory, what runs, and how the others ended."""

    def __init__(self, chosen: Sequence[Part], folder: Path, environment: Mapping[str, str], slots: int) -> None:
        self.waiting = [part for part in chosen if not part.missing]
        self.ended = {part.name: f"not run: {', '.join(part.missing)} is missing" for part in chosen if part.missing}
        self.running: dict[str, tuple[Part, subprocess.Popen[bytes]]] = {}
        self.folder = folder
        self.environment = environment
        #: Parts that may compile or test at once.
        self.slots = slots
        self.began = time.monotonic()
        self.held = False
        self.stopped: set[str] = set()
        #: The most memory that was spoken for at once, in GiB.
        self.peak = 0.0

    def wait(self, seconds: float, gate: float, memory: float) -> None:
        while (self.waiting or self.running) and (now := time.monotonic() - self.began) < seconds:
            if now > gate:
                (self.folder / "go").touch()
            self._start(memory)
            self._reap()
            self._hold()
            time.sleep(0.05)
        for part, process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.ended[part.name] = "killed: out of time"
        self.ended |= {part.name: "not run: out of time" for part in self.waiting}

    def _start(self, memory: float) -> None:
        for part in list(self.waiting):
            if self.held or self._busy() >= self.slots:
                return
            held = sum(other.gib for other, _ in self.running.values())
            # What is larger than all there is runs alone.
            if held + part.gib > memory and self.running:
                continue
            self.waiting.remove(part)
            if part.times:
                preparing(self.folder, part.name).touch()
            environment = {**self.environment, FOLDER: str(self.folder), NAME: part.name, **part.environment}
            with open(self.folder / f"{part.name.replace(' ', '-')}.log", "wb") as log:
                process = subprocess.Popen(
                    part.command if part.times else ["nice", *part.command],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.running[part.name] = part, process
            self.peak = max(self.peak, held + part.gib)

    def _busy(self) -> int:
        return sum(self._is_busy(part) for part, _ in self.running.values())

    def _is_busy(self, part: Part) -> bool:
        """Whether it compiles or tests; other parts wait for their turn or have it."""
        return not part.times or preparing(self.folder, part.name).exists()

    def _hold(self) -> None:
        """Stop tests, and benches that are not ready, from when a bench may have its turn until all have had it."""
        go = (self.folder / "go").exists() or not any(self.folder.glob("*.preparing"))
        busy = {name for name, (part, _) in self.running.items() if self._is_busy(part)}
        self.held = go and len(busy) < len(self.running)
        # A bench that became ready in the very moment in which it was stopped goes on with the next look.
        wanted = busy if self.held else set()
        for name in wanted ^ self.stopped & self.running.keys():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running[name][1].pid, signal.SIGSTOP if name in wanted else signal.SIGCONT)
        self.stopped = wanted

    def _reap(self) -> None:
        for name, (_, process) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                preparing(self.folder, name).unlink(missing_ok=True)
                status = "passed" if process.returncode == 0 else f"failed, exit status {process.returncode}"
                self.ended[name] = status
                print(f"[{time.monotonic() - self.began:5.0f} s] {name}: {status}", flush=True)


def pack(path: Path, folder: Path, since: float) -> list[Path]:
    """One file with all logs, and the results that were written since; returns these."""
    written = [result for result in sorted(RESULTS.glob("*_cuda*.json")) if result.stat().st_mtime >= since]
    with tarfile.open(path, "w:gz") as archive:
        for log in sorted(folder.glob("*.log")):
            archive.add(log, f"logs/{log.name}")
        for result in written:
            archive.add(result, f"results/{result.name}")
    return written


def judged(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each target: met, missed, or not measured."""
    lines = []
    for (name, images, configuration), most in TARGETS.items():
        row = results.get(name, {}).get("results", {}).get(images, {}).get(configuration, {})
        share, efficiency = row.get("cached_step_share"), row.get("efficiency_in_same_mode")
        label = f"{name}, {configuration}"
        if share is None or efficiency is None:
            lines.append(f"{label}: not measured")
            continue
        for what, met in (
            (f"cached call {share:.1%} of a full one, at most {most:.1%}", share <= most),
            (f"efficiency {efficiency:.3f}, at least {EFFICIENCY}", efficiency >= EFFICIENCY),
        ):
            lines.append(f"{label}: {what}: {'met' if met else 'MISSED'}")
    return lines


def unpacked(wheels: Path, into: Path) -> str:
    """A folder of packages to import from: ``wheels`` itself and whatever wheels are in it, unpacked."""
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return os.pathsep.join(map(str, (into, wheels.resolve())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="parts whose names begin with one of these"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default: {SECONDS})")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.tar.gz"), help="the file to pack into")
    parser.add_argument("--wheels", type=Path, help="a folder with packages or wheels, where there is no network")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(CORES)}
    environment["OMP_NUM_THREADS"] = str(CORES)
    # One cache for all: twins of a model share their kernels.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    if arguments.wheels:
        packages = unpacked(arguments.wheels, scratch / "packages")
        sys.path[:0] = packages.split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, environment.get("PYTHONPATH"))))
    chosen = [part for part in parts() if not arguments.only or part.name.startswith(tuple(arguments.only))]
    if arguments.list:
        for part in chosen:
            lacks = f"  (missing: {', '.join(part.missing)})" if part.missing else ""
            print(f"{part.gib:3.0f} GiB  {part.name}: {' '.join(part.command)}{lacks}")
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: these figures are of a GPU or of nothing")
    since = time.time()
    logs = scratch / "turns"
    logs.mkdir()
    run = Run(chosen, logs, environment, max(2, (os.cpu_count() or 2) // CORES))
    run.wait(arguments.seconds, GATE * arguments.seconds, MEMORY)
    written = pack(arguments.out, logs, since)
    print(f"\n{len(written)} results and all logs are in {arguments.out}")
    for line in judged({path.stem: json.loads(path.read_text()) for path in written}):
        print(line)
    failed = [f"{name} ({status})" for name, status in run.ended.items() if status != "passed"]
    if failed:
        sys.exit(f"not passed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
