"""The demo from the command line, with few steps and images: everything it promises is written and adds up."""

from __future__ import annotations

import json

import pytest

from smoothcache_fx import Calibration, Schedule
from smoothcache_fx.cli.main import main


def test_the_demo_writes_what_it_measured(tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["demo", "--steps", "5", "--samples", "1", "--alphas", "0.2", "0.6", "--backend", "eager"]
    arguments += ["--compute", "0.6"]
    assert main([*arguments, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    calibration = Calibration.load(folder / "calibration.json")
    assert calibration.steps == 5
    assert {int(site.count[0, 1]) for site in calibration.sites} == {10}, "ten trajectories, as the paper"
    for alpha in (0.2, 0.6):
        schedule = Schedule.load(folder / f"schedule-alpha-{alpha:g}.json")
        assert schedule == calibration.schedule(alpha=alpha)
        row = rows[f"alpha {alpha:g}"]
        assert row["computed"] == " ".join(str(sum(entry)) for entry in schedule.compute.values())
        assert row["name"] in printed and f"{row['accuracy']:.1%}" in printed
    budget = Schedule.load(folder / "schedule-compute-0.6.json")
    assert budget == calibration.schedule(compute=0.6)
    assert rows["compute 0.6"]["computed"] == "3 3" and rows["compute 0.6"]["psnr"] > 20
    assert f"{rows['compute 0.6']['psnr']:.1f}" in printed
    assert rows["alpha 0.6"]["mac_ratio"] > rows["torch.compile"]["mac_ratio"] == 1.0
    assert rows["torch.compile"]["accuracy"] > 0.9, "even five steps make digits"
    assert rows["torch.compile"]["speedup_over_compile"] == 1.0
    assert rows["eager"]["accuracy"] is None, "sampled for its time alone"
    assert {"eager", "torch.compile", "alpha 0.2", "alpha 0.6", "compute 0.6"} < set(rows), (
        "and fewer steps beside them"
    )
    assert results["real_versus_real_frechet_distance"] > 0
    for name in ("samples.png", "errors.png", "sites.png", "schedules.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.txt").read_text() in printed + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--samples", "0"], "samples must be at least 1, got 0"),
        (["demo", "--alphas", "-1"], "alpha is -1.0, expected a number of at least 0"),
    ],
)
def test_bad_arguments_are_told_without_a_traceback(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--steps", "3", "--backend", "eager", "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_help_names_the_demo(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "demo" in capsys.readouterr().out
