"""`bench/end_to_end.py` on a tiny model: what it prints and writes, its MAC ratios, and that its checks do fail."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"
OURS = ["smoothcache alpha 0.08", "smoothcache alpha 0.18", "smoothcache alpha 0.22"]
THEIRS = ["dit-smoothcache", "FirstBlockCache", "MagCache", "TaylorSeer", "PAB", "cache-dit"]
STACKS = ["smoothcache alpha 0.18 stacks", "smoothcache alpha 0.18 stacks, modules not guarded"]
NAMES = ["eager", "torch.compile", *OURS, *STACKS, *(name + end for name in THEIRS for end in ("", " + compile"))]
#: What a peer cannot be tried without.
PACKAGES = {"dit-smoothcache": "SmoothCache", "cache-dit": "cache_dit"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("end_to_end")


@pytest.fixture(scope="module")
def bench(script) -> ModuleType:
    return importlib.import_module("configurations")


@pytest.fixture(scope="module")
def run(script, tmp_path_factory) -> SimpleNamespace:
    """One run of all peers, with what it wrote."""
    folder = tmp_path_factory.mktemp("end_to_end")
    tables = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("common"), "RESULTS", folder)
        patch.setattr(script, "PICTURES", folder)
        patch.setattr(script, "table", lambda results, make=script.table: tables.append(make(results)) or tables[-1])
        patch.setattr(sys, "argv", ["end_to_end.py", "--quick", "--device", "cpu", "--backend", "eager", "--write"])
        script.main()
    written = json.loads((folder / "end_to_end_cpu.json").read_text())
    return SimpleNamespace(table=tables[0], written=written, results=written["results"]["1"], folder=folder)


@pytest.fixture
def small(bench):
    """A bench of its own, with nothing compiled yet."""
    ddim = importlib.import_module("ddim")
    model = ddim.build_dit(layers=2, heads=2, head_dim=16, size=8)
    arguments = argparse.Namespace(
        backend="eager", autotune=False, only=None, rounds=1, cold=False, modes=["default"], orders=[0]
    )
    return bench.Configurations(model, ddim.Sampler(1, 12, 8, "cpu", torch.float32), arguments)


def installed(name: str) -> bool:
    package = PACKAGES.get(name.removesuffix(" + compile"))
    return package is None or importlib.util.find_spec(package) is not None


def test_every_configuration_has_figures_or_a_reason(run):
    assert list(run.results) == NAMES
    for name, found in run.results.items():
        if not installed(name):
            assert found["refused"].startswith("not measured: No module named")
            continue
        assert "refused" not in found, f"{name}: {found}"
        seconds = found["seconds_per_image"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert found["efficiency"] == pytest.approx(found["speedup"] / found["mac_ratio"])
        assert found["peak_bytes"] is None
        assert (found["compile_seconds"] is None) == (found["mode"] == "eager")
        assert (found["cached_step_share"] is None) == (name in ("eager", "torch.compile"))
        if found["mode"] == "eager":
            assert found["graphs"] == found["recompiled"] == 0
        elif found["kind"] != "peer":  # there are peers whose hooks leave nothing to compile
            assert found["graphs"] > 0


def test_the_table_says_the_same(run):
    heading, _, *lines = run.table.splitlines()
    assert [word for word in ("s/image", "MAC ratio", "cached step", "recompiled") if word not in heading] == []
    rows = dict(zip(NAMES, lines, strict=False))
    for name, line in rows.items():
        assert line.startswith(f"{name}  "), line
        found = run.results[name]
        if "refused" in found:
            assert f"{name}: {found['refused']}" in lines
        else:
            cells = line.removeprefix(name).replace(" to ", "-").split()
            assert [cells[2], cells[3]] == [f"{found['speedup']:.3f}", f"{found['mac_ratio']:.3f}"]


def test_the_file_and_the_picture(run):
    assert run.written["machine"]["torch"] == torch.__version__
    assert set(run.written["packages"]) == {"diffusers", "dit-smoothcache", "cache-dit", "triton"}
    assert {name: sum(row) for name, row in run.written["rows"].items()} == {
        "alpha 0.08": 23,
        "alpha 0.18": 12,
        "alpha 0.22": 9,
    }
    assert (run.folder / "end_to_end_cpu.png").read_bytes().startswith(b"\x89PNG")


def implied_ratio(row: list[int], sizes: dict[str, int]) -> float:
    """MAC ratio of a schedule by the FLOPs of attention and feed-forward modules, counted module by module."""
    ddim = importlib.import_module("ddim")
    model = ddim.build_dit(**sizes)
    counter = FlopCounterMode(display=False, custom_mapping={ddim.FLASH_FOR_CPU: ddim._flash_flops})
    inputs = torch.zeros(2, 4, sizes["size"], sizes["size"]), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with counter, torch.no_grad():
        model(*inputs)
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    inside = sum(count for name, count in counts.items() if name.split(".")[-1] in ("attn1", "ff"))
    full = counter.get_total_flops()
    assert 0.5 < inside / full < 1
    return len(row) / (sum(row) + (len(row) - sum(row)) * (1 - inside / full))


def test_mac_ratios_are_as_the_schedules_imply(run, script):
    sizes = {name: script.DEFAULTS["quick"][name] for name in ("layers", "heads", "head_dim", "size")}
    for name, row in run.written["rows"].items():
        ratio = run.results[f"smoothcache {name}"]["mac_ratio"]
        # Reused steps may need less of the modulation than its whole.
        assert implied_ratio(row, sizes) * 0.999 <= ratio <= len(row) / sum(row)
        assert run.results[f"smoothcache {name}"]["cached_steps"] == len(row) - sum(row)
    row = run.written["rows"]["alpha 0.18"]
    assert (
        run.results["smoothcache alpha 0.18"]["mac_ratio"] < run.results[STACKS[0]]["mac_ratio"] <= len(row) / sum(row)
    )
    if installed("dit-smoothcache"):
        theirs = run.results["dit-smoothcache"]
        assert theirs["mac_ratio"] == pytest.approx(implied_ratio(row, sizes), rel=1e-3)
        assert theirs["cached_steps"] == len(row) - sum(row)
    for name in ("FirstBlockCache", "MagCache", "TaylorSeer"):
        assert run.results[name]["mac_ratio"] == pytest.approx(len(row) / sum(row), rel=0.25)


def test_ours_has_one_graph_and_compiles_nothing_later(run):
    for name in (*OURS, *STACKS):
        found = run.results[name]
        assert (found["graphs"], found["recompiled"], found["variants"]) == (1, 0, 2), name


def test_outputs_were_compared(run):
    """Equal where they must be, and caching makes a difference that the comparison can see."""
    pytest.importorskip("SmoothCache")
    checks = run.written["checks"]["1"]
    assert set(checks["same_as_dit_smoothcache"]) == {"uncompiled, float32", *OURS}
    assert max(checks["same_as_dit_smoothcache"].values()) < 1e-5
    assert checks["identity_to_compile"] < 1e-5
    assert checks["effect_of_caching"] > 1e-3


def altered(row: list[int]) -> list[int]:
    """The row with one computed step moved by one."""
    at = next(step for step in range(1, len(row) - 1) if row[step : step + 2] == [1, 0])
    return [*row[:at], 0, 1, *row[at + 2 :]]


def test_another_schedule_is_noticed(small, bench, monkeypatch):
    """The strong check: the paper's package with a schedule in which one step is another."""
    pytest.importorskip("SmoothCache")
    small.add("eager", "plain", "eager", lambda: bench.Peer(small.model))
    assert set(small.references()) == {"alpha 0.08", "alpha 0.18", "alpha 0.22"}
    build = bench.dit_smoothcache
    monkeypatch.setattr(bench, "dit_smoothcache", lambda model, row: build(model, altered(row)))
    with pytest.raises(bench.VerificationError, match="outputs differ"):
        small.references()


@pytest.mark.parametrize("right", [True, False])
def test_each_of_our_schedules_is_compared(small, bench, right):
    pytest.importorskip("SmoothCache")
    small.limit = bench.ROUNDING
    small.checks["same_as_dit_smoothcache"] = {}
    reference = small.sampler.outputs(bench.dit_smoothcache(bench.twin(small.model), small.row))
    if right:
        small.add_ours("ours", "default", bench.schedule_of(small.row), reference)
        assert small.checks["same_as_dit_smoothcache"]["ours"] < 1e-5
    else:
        with pytest.raises(bench.VerificationError, match="ours, and dit-smoothcache"):
            small.add_ours("ours", "default", bench.schedule_of(altered(small.row)), reference)


def test_a_difference_without_caching_is_noticed(small, bench, monkeypatch):
    small.limit = bench.ROUNDING
    plain = small.sampler.outputs(bench.Peer(small.model))
    small.check_identity(plain)
    make = bench.schedule_of
    monkeypatch.setattr(bench, "schedule_of", lambda row, *more: make([*row[:-2], 0, 1], *more))
    with pytest.raises(bench.VerificationError, match="everything computed"):
        small.check_identity(plain)


def test_what_is_not_finite_is_noticed(small, bench):
    def broken(hidden_states: torch.Tensor, **arguments: object) -> tuple[torch.Tensor]:
        return (torch.full((2, 8, 8, 8), float("nan")),)

    with pytest.raises(bench.VerificationError, match="not finite"):
        small.add("torch.compile", "plain", "default", lambda: bench.Peer(broken))


@pytest.mark.parametrize(("kind", "refused"), [("peer", True), ("smoothcache", False)])
def test_later_trajectories_must_be_the_first(small, bench, kind, refused):
    """A cache that is not reset between trajectories skips what it has computed before, and looks fast."""
    calls = []

    def forgetful(*arguments: object, **more: object) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        outputs = small.model(*arguments, **more)
        return tuple(1.5 * output if len(calls) > small.sampler.steps else output for output in outputs)

    small.limit = bench.ROUNDING
    entry = small.add("forgetful", kind, "eager", lambda: bench.Peer(forgetful))
    if refused:
        small.check_last(entry)
        assert entry.peer is None and "a later trajectory differs from the first by 0.5" in entry.refused
    else:
        with pytest.raises(bench.VerificationError, match="forgetful: a later trajectory differs"):
            small.check_last(entry)
    plain = small.add("plain", "peer", "eager", lambda: bench.Peer(small.model))
    small.check_last(plain)
    assert plain.peer is not None


def test_a_peer_that_refuses_is_told_with_its_reason(small, bench, script, monkeypatch):
    def no_package(task: object) -> object:
        raise ModuleNotFoundError("No module named 'that_cache'")

    def fails_later(task: object) -> object:
        def forward(*arguments: object, **more: object) -> None:
            raise TypeError("this cache takes no labels\nand more")

        return lambda model: bench.Peer(forward)

    monkeypatch.setattr(bench, "PEERS", {"missing": no_package, "failing": fails_later})
    for name in bench.PEERS:
        small.add_peer(name)
    assert {entry.name: entry.refused for entry in small.entries} == {
        "missing": "not measured: No module named 'that_cache'",
        "missing + compile": "not measured: No module named 'that_cache'",
        "failing": "TypeError: this cache takes no labels",
        "failing + compile": "refused uncompiled already",
    }
    results = {entry.name: small.result(entry, {}) for entry in small.entries}
    assert "failing: TypeError: this cache takes no labels" in script.table(results)


def test_the_rows(bench):
    """Published where they are; 18 of 50 has the paper's MAC ratio for alpha 0.22, 365.59 to 131.81."""
    rows = bench.rows_for(50)
    assert {name: sum(row) for name, row in rows.items()} == {"alpha 0.08": 46, "alpha 0.18": 24, "alpha 0.22": 18}
    assert rows["alpha 0.18"] == bench.PUBLISHED_24_OF_50
    assert 50 / 18 == pytest.approx(365.59 / 131.81, rel=0.003)
    for row in [*rows.values(), *bench.rows_for(25).values()]:
        assert row[0] == row[-1] == 1
        assert max(len(reused) for reused in "".join(map(str, row)).split("1")) <= 3
    with pytest.raises(ValueError, match="between 2 and 10"):
        bench.even_row(10, 11)


def test_the_search_for_a_threshold(bench):
    nearest = importlib.import_module("peers").nearest
    assert nearest(lambda threshold: 2.0 if threshold > 0.3 else 1.0, 2.0, 1e-3, 3.0) > 0.3
    assert nearest(lambda threshold: 1.0 + threshold, 2.0, 1e-3, 1e3) == pytest.approx(1.0, rel=0.05)
    with pytest.raises(ValueError, match="no threshold gives a MAC ratio near 2"):
        nearest(lambda threshold: 1.0, 2.0, 1e-3, 3.0)
