"""The command line: each command end to end, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from smoothcache_fx import Calibration, Schedule, doctor
from smoothcache_fx.cli import main, parser

FACTORIES = """
    import torch
    from torch import nn
    from capture import Stack, inputs
    from cases import randomize

    def build():
        return randomize(Stack(2), 0).eval(), inputs()

    def by_name():
        x, c = inputs()
        return randomize(Stack(2), 0).eval(), {"x": x, "c": c}

    @torch.no_grad()
    def sample(model):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 6, 16, generator=generator)
        for step in range(8):
            x = x - model(x, torch.full((2, 16), 1 - step / 8)) / 8
        return x

    def sampler():
        return build()[0], sample

    def alone():
        return build()[0]

    number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """The path of a file with factories; what importing it leaves behind is taken away."""
    path = tmp_path / "factories.py"
    path.write_text(textwrap.dedent(FACTORIES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop("factories", None)


@pytest.mark.parametrize("factory", ["build", "by_name"])
def test_explain(factories, factory, tmp_path, capsys):
    Schedule.uniform(4, 2).save(tmp_path / "schedule.json")
    command = ["explain", f"{factories}:{factory}", "--schedule", str(tmp_path / "schedule.json")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Stack: 4 sites in 1 graph" in text and "2 variants, MAC ratio" in text
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == 4 and found["variants"] == 2


def test_calibrate_schedule_plot_and_compare(factories, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "factories:sampler", "--steps", "8", "-o", "c.json"]) == 0
    calibration = Calibration.load("c.json")
    assert calibration.steps == 8 and str(calibration) in capsys.readouterr().out
    assert main(["schedule", "c.json", "--alpha", "0.5", "-o", "alpha.json"]) == 0
    assert Schedule.load("alpha.json") == calibration.schedule(alpha=0.5)
    assert main(["schedule", "c.json", "--compute", "0.6", "-o", "budget.json"]) == 0
    assert Schedule.load("budget.json") == calibration.schedule(compute=0.6)
    assert main(["schedule", "--interval", "3", "--steps", "8", "-o", "fora.json"]) == 0
    assert Schedule.load("fora.json") == Schedule.uniform(8, 3)
    capsys.readouterr()
    assert main(["schedule", "c.json", "--alpha", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 8
    assert main(["plot", "c.json", "-o", "errors.png", "--alphas", "0.5"]) == 0
    assert main(["plot", "alpha.json", "fora.json", "-o", "schedules.svg"]) == 0
    command = ["compare", "factories:sampler", "alpha.json", "fora.json", "--backend", "eager"]
    assert main([*command, "--plot", "frontier.png"]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["alpha", "fora"]
    for name in ("errors.png", "frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "schedules.svg").read_text()


def test_convert(tmp_path, capsys):
    published = {"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 1]}
    (tmp_path / "theirs.json").write_text(json.dumps(published))
    assert main(["convert", str(tmp_path / "theirs.json"), str(tmp_path / "ours.json")]) == 0
    assert Schedule.load(tmp_path / "ours.json") == Schedule.load(tmp_path / "theirs.json")
    assert str(Schedule.load(tmp_path / "ours.json")) in capsys.readouterr().out


def test_doctor_without_its_self_test(capsys):
    code = main(["doctor", "--no-self-test"])
    text = capsys.readouterr().out
    assert code == int("missing " in text)
    assert f"torch: {torch.__version__}" in text and "C++ compiler" in text and "self-test" not in text
    main(["doctor", "--no-self-test", "--json"])
    assert {finding["what"] for finding in json.loads(capsys.readouterr().out)} >= {"torch", "triton", "Graphviz"}


def test_doctor_names_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor._inductor, "cpp_compiler", lambda: None)
    monkeypatch.setattr(doctor._inductor, "cache_directory", lambda: str(tmp_path / "none"))
    assert main(["doctor", "--no-self-test"]) == 1
    text = capsys.readouterr().out
    assert "missing C++ compiler: none (Inductor needs one: install g++ or clang++" in text
    assert "set TORCHINDUCTOR_CACHE_DIR" in text


@pytest.mark.slow
def test_the_self_test():
    assert str(doctor.run_self_test()).startswith("ok      self-test: compiled and cached on ")


def test_the_self_test_tells_what_fails(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("g++: not found\nand more")

    monkeypatch.setattr(doctor, "compile", fail)
    finding = doctor.run_self_test()
    assert finding.missing and "RuntimeError: g++: not found" in str(finding)
    monkeypatch.setattr(doctor, "compile", lambda model, schedule: None)
    monkeypatch.setattr(doctor, "report", lambda model: type("Report", (), {"groups": []}))
    assert "0 of 2 branches were reused" in str(doctor.run_self_test())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nothing"], "expected MODULE:FACTORY"),
        (["explain", "none.py:build"], "there is no file none.py"),
        (["explain", "no_such_module:build"], "No module named 'no_such_module'"),
        (["explain", "{factories}:none"], "has no function called 'none'"),
        (["explain", "{factories}:number"], "has no function called 'number'"),
        (["explain", "{factories}:alone"], "returned Stack, expected a tuple of two: a model and its inputs"),
        (["explain", "{factories}:sampler"], "gave function as inputs, expected a tuple or a dict"),
        (["schedule", "--alpha", "0.1"], "need a calibration file"),
        (["schedule", "--interval", "2"], "--interval needs --steps"),
        (["schedule", "{factories}", "--alpha", "0.1"], "is no calibration file"),
        (["convert", "none.json", "ours.json"], "cannot read the schedule file 'none.json'"),
        (["plot", "{factories}", "-o", "x.png"], "is no schedule file"),
    ],
)
def test_bad_input_is_told_without_a_traceback(arguments, message, factories, capsys):
    arguments = [argument.format(factories=factories) for argument in arguments]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(Exception, match=r".*"):
        main(["--debug", *arguments])


def test_every_command_has_help_with_an_example(capsys):
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    assert set(commands.choices) == {
        *("demo", "explain", "calibrate", "schedule", "convert", "plot", "compare", "diff", "doctor"),
    }
    for name in commands.choices:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and f"example: smoothcache {name}" in capsys.readouterr().out


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "smoothcache_fx", "schedule", "--interval", "2", "--steps", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "2/4" in done.stdout, done.stderr
