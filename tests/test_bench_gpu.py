"""``bench/gpu.py`` with small parts in the benches' place: turns, deadlines, memory, and what is packed."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


def script(gpu, name: str, text: str, gib: float = 1.0, **options):
    text = f"import sys, time; sys.path.insert(0, {str(BENCH)!r})\nfrom turns import turn\n{text}"
    return gpu.Part(name, [sys.executable, "-c", text], gib, **options)


def run(gpu, tmp_path: Path, *parts, seconds: float = 30, gate: float = 30, memory: float = 70, slots: int = 4):
    found = gpu.Run(parts, tmp_path, dict(os.environ), slots)
    found.wait(seconds, gate, memory)
    return found


TIMED = """
time.sleep({prepare})
with turn():
    begin = time.time(); time.sleep(0.2); end = time.time()
print(begin, end)
"""


def spans(tmp_path: Path, *names: str) -> list[tuple[float, float]]:
    return sorted(tuple(map(float, (tmp_path / f"{name}.log").read_text().split())) for name in names)


def test_timings_take_turns_and_wait_for_what_prepares(gpu, tmp_path):
    began = time.time()
    parts = [script(gpu, "quick", TIMED.format(prepare=0)), script(gpu, "slow", TIMED.format(prepare=1))]
    ended = run(gpu, tmp_path, *parts, script(gpu, "test", "time.sleep(1.5)")).ended
    assert ended == dict.fromkeys(("quick", "slow", "test"), "passed")
    (first, second), (third, _) = spans(tmp_path, "quick", "slow")
    assert first >= began + 1.5, "the test has ended"
    assert third >= second, "one after the other"


def test_when_the_gate_opens_nothing_is_waited_for(gpu, tmp_path):
    parts = script(gpu, "quick", TIMED.format(prepare=0)), script(gpu, "never", "time.sleep(60)")
    ended = run(gpu, tmp_path, *parts, seconds=4, gate=1).ended
    assert ended == {"quick": "passed", "never": "killed: out of time"}


def test_what_does_not_time_stands_still_while_others_do(gpu, tmp_path):
    """And neither holds them up, nor is it lost: it goes on behind them."""
    ticking = "for i in range(25): print(time.time(), flush=True); time.sleep(0.1)"
    parts = [
        script(gpu, "bench", TIMED.format(prepare=0.5).replace("0.2", "1.5")),
        script(gpu, "tests", ticking, times=False),
    ]
    assert run(gpu, tmp_path, *parts).ended == {"bench": "passed", "tests": "passed"}
    ((begin, end),) = spans(tmp_path, "bench")
    ticks = [float(line) for line in (tmp_path / "tests.log").read_text().split()]
    assert len(ticks) == 25 and ticks[-1] > end
    # Some 15 if it went on; it takes a moment to stop it.
    assert len([tick for tick in ticks if begin < tick < end]) < 8


def test_what_is_not_ready_when_the_gate_opens_stands_still_while_others_time(gpu, tmp_path):
    """A late bench has its turn behind the others, and its preparation does not disturb them."""
    ticking = "for i in range(40): print(time.time(), flush=True); time.sleep(0.1)\nwith turn(): pass"
    parts = script(gpu, "early", TIMED.format(prepare=0).replace("0.2", "2")), script(gpu, "late", ticking)
    assert run(gpu, tmp_path, *parts, gate=1).ended == {"early": "passed", "late": "passed"}
    ((begin, end),) = spans(tmp_path, "early")
    ticks = [float(line) for line in (tmp_path / "late.log").read_text().split()]
    assert len(ticks) == 40 and ticks[0] < begin and ticks[-1] > end
    assert len([tick for tick in ticks if begin < tick < end]) < 8


def test_no_more_parts_compile_at_once_than_there_are_slots(gpu, tmp_path):
    """A part that waits for its turn leaves its slot. None starts while another times."""
    preparing = "began = time.time(); " + TIMED.strip().replace("print(", "print(began, ")
    parts = [script(gpu, f"part {i}", preparing.format(prepare=0.5 + i)) for i in range(4)]
    assert set(run(gpu, tmp_path, *parts, slots=2).ended.values()) == {"passed"}
    began, begin, _ = zip(
        *(map(float, (tmp_path / f"part-{i}.log").read_text().split()) for i in range(4)), strict=True
    )
    # The third has the first one's slot while the second prepares, the fourth the second one's.
    assert began[2] >= began[0] + 0.5 and began[3] >= began[1] + 1.5
    assert min(begin) >= began[3] + 3.5, "all were ready before the first had its turn"


def test_a_part_that_fails_does_not_hold_up_the_others(gpu, tmp_path):
    """Neither while it prepares nor while it has its turn."""
    parts = [
        script(gpu, "broken", "sys.exit(3)"),
        script(gpu, "broken in its turn", "with turn(): raise SystemExit(4)"),
        script(gpu, "fine", TIMED.format(prepare=0.5)),
        script(gpu, "absent", "", needs=("no_such_package",)),
    ]
    assert run(gpu, tmp_path, *parts).ended == {
        "broken": "failed, exit status 3",
        "broken in its turn": "failed, exit status 4",
        "fine": "passed",
        "absent": "not run: no_such_package is missing",
    }


def test_no_more_memory_is_held_at_once_than_there_is(gpu, tmp_path):
    parts = [script(gpu, f"part {i}", TIMED.format(prepare=0.1), gib=30) for i in range(4)]
    found = run(gpu, tmp_path, *parts, memory=70)
    assert found.peak == 60 and set(found.ended.values()) == {"passed"}


def test_what_does_not_fit_into_the_time_is_named(gpu, tmp_path):
    parts = script(gpu, "first", "time.sleep(60)", gib=50), script(gpu, "second", "", gib=50)
    ended = run(gpu, tmp_path, *parts, seconds=1).ended
    assert ended == {"first": "killed: out of time", "second": "not run: out of time"}


def test_a_turn_within_a_turn(gpu, tmp_path):
    assert run(gpu, tmp_path, script(gpu, "nested", "with turn():\n    with turn(): pass")).ended == {
        "nested": "passed"
    }


def test_the_real_parts_fit(gpu, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/bin/{tool}")
    parts = gpu.parts()
    assert len({part.name for part in parts}) == len(parts)
    assert max(part.gib for part in parts) <= gpu.MEMORY < 78
    assert gpu.SECONDS <= 360 and 0 < gpu.GATE < 1
    kernels = {path.stem for path in (BENCH / "kernels").glob("*.py")} - {"common"}
    assert {part.name.removeprefix("kernel ") for part in parts if part.name.startswith("kernel ")} - {
        "tests"
    } == kernels
    for part in parts:
        files = [word for word in part.command if word.startswith(("bench/", "tests/"))]
        assert files and all((BENCH.parent / file).exists() for file in files), part.command
    (sanitizer,) = [part for part in parts if part.name == "compute-sanitizer"]
    assert sanitizer.environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}


def test_results_are_packed_and_judged(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "host-time.log").write_text("73 us")
    (tmp_path / "results" / "host_time_cuda.json").write_text("{}")
    os.utime(tmp_path / "results" / "host_time_cuda.json", (1, 1))
    since = time.time() - 1
    rows = {
        "smoothcache alpha 0.18": {"cached_step_share": 0.03, "efficiency_in_same_mode": 0.95},
        "smoothcache alpha 0.18 order 1": {"cached_step_share": 0.08, "efficiency_in_same_mode": 0.98},
    }
    result = tmp_path / "results" / "end_to_end_cuda_32.json"
    result.write_text(json.dumps({"results": {"32": rows}}))
    written = gpu.pack(tmp_path / "all.tar.gz", tmp_path / "logs", since)
    assert written == [result], "what an earlier run wrote is left out"
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert archive.getnames() == ["logs/host-time.log", "results/end_to_end_cuda_32.json"]
    lines = gpu.judged({"end_to_end_cuda_32": json.loads(result.read_text())})
    assert [line.rpartition(": ")[2] for line in lines] == ["met", "MISSED", "MISSED", "met", *3 * ["not measured"]]


def test_without_a_gpu_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()


def test_flux_at_a_small_size(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", ["flux.py", "--small", "--backend", "eager", "--rounds", "1"])
    importlib.import_module("flux").main()
    assert "times faster at a MAC ratio of 2." in capsys.readouterr().out
