"""The scripts in ``bench/`` that are too big to run here do run, on small models."""

from __future__ import annotations

import copy
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import smoothcache_fx as smoothcache
from helpers.digits import digits_model
from smoothcache_fx.demo import model as randomized
from smoothcache_fx.demo import weights
from smoothcache_fx.reports.compare import psnr

BENCH = Path(__file__).parents[1] / "bench"
SIZES = {
    "paper_dit": "--layers 2 --heads 2 --batch 2 --steps 8",
    "paper_open_sora": "--depth 2 --width 144 --heads 2 --frames 3 --height 8 --columns 8 --tokens 6 --steps 8",
    "paper_stable_audio": "--layers 2 --heads 2 --latents 32 --steps 8",
}


#: Enough of each sampler to be near what they all converge to.
STEPS = {"euler": 100, "ddim": 60, "dpm": 25}


def run_script(name: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = BENCH / f"{name}.py"
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", [str(path), *options.split()])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_models(name, monkeypatch, capsys):
    """Calibrated, scheduled, compiled and sampled; the loosest schedule reuses something."""
    options = f"{SIZES[name]} --samples 1 --rounds 1 --backend eager --alphas 0.0 1.0"
    run_script(name, options, monkeypatch)
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line.startswith(("torch.", "alpha"))}
    assert set(rows) >= {"torch.compile", "alpha 0", "alpha 1"}
    ratios = [float(rows[name][4]) for name in ("alpha 0", "alpha 1")]
    assert ratios[0] == 1.0 and ratios[1] > 1.5, printed


def published(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model that a script builds without options, on the meta device."""
    seen = []

    def stop(model: nn.Module, *rest: object) -> None:
        seen.append(model)
        raise StopIteration

    monkeypatch.setattr(randomized, "randomize", stop)
    with torch.device("meta"), pytest.raises(StopIteration):
        run_script(name, "", monkeypatch)
    return seen[0]


def test_dits_work_is_as_published(monkeypatch):
    """118.64 billion multiply-adds for DiT-XL/2 at 256x256 (Peebles and Xie, arXiv 2212.09748, table 4)."""
    model = published("paper_dit", monkeypatch)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 2 == pytest.approx(118.64e9, rel=0.002)


def test_stable_audio_has_as_many_parameters_as_published(monkeypatch):
    model = published("paper_stable_audio", monkeypatch)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1057e6, rel=0.01)


def test_stdit3_has_the_published_blocks(monkeypatch):
    model = published("paper_open_sora", monkeypatch)
    blocks = [child for child in model.modules() if isinstance(child, nn.ModuleList)]
    assert [len(children) for children in blocks] == [28, 28]
    assert {child.in_features for child in model.modules() if isinstance(child, nn.Linear)} >= {1152, 4608, 4096}


def test_narrowing_of_the_published_dit(monkeypatch, capsys):
    """Of two samples; one takes 118.64 GMACs (Peebles and Xie, table 1), its embeddings not counted."""
    run_script("narrowing", "--only DiT-XL/2", monkeypatch)
    full, reused, narrowed = (float(x) for x in re.findall(r"([\d.]+) GFLOP", capsys.readouterr().out))
    assert full == pytest.approx(2 * 2 * 118.64, rel=0.01)
    assert narrowed < 0.5 * reused < 0.005 * full


def test_the_default_plan_beside_every_nth_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_recipe.py", "--models", "bare DiT, Euler", "--steps", "4"])
    monkeypatch.syspath_prepend(str(BENCH))
    runpy.run_path(str(BENCH / "first_recipe.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(re.findall(r"^bare DiT, Euler +4  [234]  ", printed, re.MULTILINE)) == 3
    behind = re.findall(r"'psnr_\w+': (-?[\d.]+)", printed)
    assert len(behind) == 2 and max(map(float, behind)) < 1.0


def test_transfers_beside_calibrations_made_there(monkeypatch, capsys, tmp_path):
    model = digits_model()
    model.blocks = model.blocks[:1]
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("transfer")
    monkeypatch.setattr(module, "TARGETS", (("ddim", 30, 1.5), ("dpm", 30, 3.0)))
    monkeypatch.setattr(module, "digits_model", lambda: model)
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--samples", "2", "--folder", str(tmp_path), "--write"])
    module.main()
    written = json.loads((tmp_path / "transfer.json").read_text())
    assert [(run["sampler"], run["guidance"], run["order"]) for run in written["runs"]] == [
        (name, guidance, order) for name, guidance in (("ddim", 1.5), ("dpm", 3.0)) for order in (None, "fit")
    ]
    assert all(run[kind] > 20 for run in written["runs"] for kind in ("fresh", "transferred"))
    assert "lost in the median over 2 transfers" in capsys.readouterr().out


def test_forecasts_that_aim_ahead(monkeypatch, capsys, tmp_path):
    model = digits_model()
    model.blocks = model.blocks[:1]
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("lead")
    monkeypatch.setattr(module, "load_model", lambda: model)
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    options = "--samplers euler dpm --samples 2 --intervals 2 --write"
    monkeypatch.setattr(sys, "argv", ["lead.py", *options.split()])
    module.main()
    rows = json.loads((tmp_path / "lead.json").read_text())["rows"]
    assert [(row["sampler"], row["order"], row["lead"]) for row in rows if row["interval"] == 2] == [
        (name, order, lead) for name in ("euler", "dpm") for order in (1, 2) for lead in (0, 0.25, 0.5)
    ]
    assert all(row["converged"] > 20 for row in rows) and "to converged" in capsys.readouterr().out


def test_what_is_used_of_torch_cuda_exists():
    """Most of it runs on a GPU alone: a misspelt name would be found there."""
    for folder in ("bench", "smoothcache_fx", "passes", "kernels", "tests"):
        for path in (BENCH.parent / folder).rglob("*.py"):
            for name in re.findall(r"\btorch\.cuda\.(\w+)", path.read_text()):
                assert hasattr(torch.cuda, name), f"{path} uses torch.cuda.{name}"


def test_the_frontier_of_quality(monkeypatch, capsys, tmp_path):
    """Lines through the last outputs are nearer to the uncached sample than the outputs, at the same arithmetic."""
    model = weights.load_model()
    model.blocks = model.blocks[:1]  # tracing all of them two dozen times takes minutes
    monkeypatch.setattr(weights, "load_model", lambda device: copy.deepcopy(model))
    monkeypatch.syspath_prepend(str(BENCH))
    for module in map(importlib.import_module, ("common", "quality_tables")):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(importlib.import_module("quality_tables"), "PICTURES", tmp_path)
    size = "--steps 20 --paired 4 --images 68 --intervals 3 --shares 0.41 --calibrated 2 --lags 4 --trajectories 3"
    size += " --all-judged 0.4"
    compiled = {}

    def compile_once(model, schedule, **settings):
        """Pairs, sets and times of one schedule share a copy: compiling more takes minutes."""
        if repr(schedule) not in compiled:
            compiled[repr(schedule)] = compile_anew(model, schedule, **settings)
        return compiled[repr(schedule)]

    compile_anew = smoothcache.compile
    monkeypatch.setattr(smoothcache, "compile", compile_once)

    def figures() -> dict[str, float]:
        run_script("quality", f"{size} --folder {tmp_path} --write", monkeypatch)
        rows = re.findall(r"^(.+?)  +([\d.]+)  +([\d.]+) \+- [\d.]+ \(", capsys.readouterr().out, re.MULTILINE)
        return {method: float(decibels) for method, _, decibels in rows}

    found = figures()
    lines = {f"{name}, {order}" for name in ("optimal", "TaylorSeer") for order in ("order 1", "order 2")}
    either = {"every n-th step", "every n-th step, fit", "optimal, order 0", "optimal, fit", *lines}
    narrow = {f"chosen, history in {dtype}" for dtype in ("float16", "bfloat16")}
    branches = {"fewer steps", "alpha", "alpha, order 1", "alpha, order 2", "chosen", "chosen, converged", *narrow}
    assert set(found) == either | {f"stacks, {name}" for name in either} | branches
    for grain in ("", "stacks, "):
        assert found[f"{grain}TaylorSeer, order 1"] > found[f"{grain}every n-th step"] + 3
        assert found[f"{grain}every n-th step, fit"] > min(60, found[f"{grain}TaylorSeer, order 2"]) - 1.5
    assert found["chosen"] > found["every n-th step"] + 6
    times = f"{size} --folder {tmp_path} --times --backend eager --write"
    run_script("quality", times, monkeypatch)
    capsys.readouterr()
    with monkeypatch.context() as context:
        context.setattr(smoothcache, "compile", None)  # nothing is sampled or timed again
        (tmp_path / "points.json").unlink()  # plans are stored with the results
        assert figures() == found
        run_script("quality", times, monkeypatch)
        with pytest.raises(SystemExit, match="remove it to measure anew"):
            run_script("quality", times.replace("--paired 4", "--paired 2"), monkeypatch)
        path = tmp_path / "quality_euler.json"
        result = json.loads(path.read_text())
        other = result["rows"][-1] | {"budget": 0.9}
        path.write_text(json.dumps(result | {"rows": [*result["rows"], other]}))
        (tmp_path / "times.json").unlink()
        some = "--methods chosen alpha --write"
        run_script("quality", f"{size} --folder {tmp_path} {some} --add", monkeypatch)
        for wrong in (some, f"{some} --add --paired 2", f"--folder {tmp_path} --methods best"):
            with pytest.raises(SystemExit):
                run_script("quality", f"{size} {wrong}", monkeypatch)
    *written, kept = json.loads(path.read_text())["rows"]
    assert kept == other and written == result["rows"]
    rows = {row["method"]: row for row in written}
    assert len(rows) == len(written)  # eight steps are one budget, 0.40
    assert all({name for name in rows if figure not in rows[name]} == narrow for figure in ("frechet", "seconds"))
    assert rows["chosen"]["far_set"] <= rows["every n-th step"]["far_set"] <= 68
    assert rows["chosen"]["share_of_time"] < rows["uncached"]["share_of_time"] == 1
    assert "4, eager, " in (tmp_path / "quality.md").read_text()
    assert all((tmp_path / f"{name}.png").exists() for name in ("quality", "quality_samplers", "grains"))


def test_the_samplers_of_quality_agree(monkeypatch):
    """All follow one flow: with enough steps they end in the same samples."""
    monkeypatch.syspath_prepend(str(BENCH))
    samplers = importlib.import_module("quality_samplers").SAMPLERS
    model, labels = digits_model(), torch.tensor([3, 8])
    images = {name: samplers[name].run(model, labels, steps, 5) for name, steps in STEPS.items()}
    assert set(STEPS) == set(samplers)
    assert psnr(images["euler"], images["dpm"]) > 35 and psnr(images["euler"], images["ddim"]) > 35
