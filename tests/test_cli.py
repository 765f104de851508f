"""The command line: each command end to end, and what it says of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from helpers.capture import Stack, inputs
from helpers.cases import randomize
from pipelines.build import dit as dit_pipeline
from smoothcache_fx import Calibration, Schedule, calibrate
from smoothcache_fx.cli import machine
from smoothcache_fx.cli import models as cli_models
from smoothcache_fx.cli.main import main, parser
from smoothcache_fx.importers import learning_to_cache

FACTORIES = """
    import torch
    from torch import nn
    from helpers.capture import Stack, inputs
    from helpers.cases import randomize

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
    assert len(found["sites"]) == 4 and found["prediction"]["variants"] == 2
    assert main([*command, "--plot", str(tmp_path / "costs.png")]) == 0
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")
    assert main(["explain", f"{factories}:{factory}", "--plot", str(tmp_path / "none.png")]) == 1
    assert "give --schedule too" in capsys.readouterr().err


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
    assert main(["schedule", "--interval", "3", "--steps", "8", "--order", "1", "-o", "lines.json"]) == 0
    assert Schedule.load("lines.json") == replace(Schedule.uniform(8, 3), order=1)
    assert main(["plot", "c.json", "-o", "errors.png", "--alphas", "0.5"]) == 0
    assert main(["plot", "c.json", "--sites", "--lag", "2", "-o", "sites.png"]) == 0
    assert main(["plot", "fora.json", "--sites", "-o", "none.png"]) == 1
    assert "--sites draws one calibration file" in capsys.readouterr().err
    assert main(["plot", "alpha.json", "fora.json", "-o", "schedules.svg"]) == 0
    command = ["compare", "factories:sampler", "alpha.json", "fora.json", "--backend", "eager"]
    assert main([*command, "--plot", "frontier.png"]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["alpha", "fora"]
    for name in ("errors.png", "sites.png", "frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "schedules.svg").read_text()


def test_convert(tmp_path, capsys):
    published = {"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 1]}
    (tmp_path / "theirs.json").write_text(json.dumps(published))
    assert main(["convert", str(tmp_path / "theirs.json"), str(tmp_path / "ours.json")]) == 0
    assert Schedule.load(tmp_path / "ours.json") == Schedule.load(tmp_path / "theirs.json")
    assert str(Schedule.load(tmp_path / "ours.json")) in capsys.readouterr().out


def save_router(path) -> None:
    """A router of Learning-to-Cache for 6 steps and 2 blocks."""
    torch.save({"routers": {f"{index}.prob": 3.0 * torch.randn(4) for index in range(6)}}, path)


@pytest.mark.parametrize("name", ["router.pt", "router.pth", "router"])
def test_convert_reads_routers_of_learning_to_cache(name, tmp_path, capsys):
    source, target = tmp_path / name, tmp_path / "ours.json"
    save_router(source)
    assert main(["convert", str(source), str(target)]) == 0
    assert Schedule.load(target) == learning_to_cache(source)
    assert str(Schedule.load(target)) in capsys.readouterr().out
    names = ("layers.{block}.a", "layers.{block}.f")
    assert main(["convert", str(source), str(target), "--threshold", "0.9", "--names", *names]) == 0
    assert Schedule.load(target) == learning_to_cache(source, threshold=0.9, names=names)
    assert Schedule.load(target) != learning_to_cache(source, names=names)


def test_convert_tells_what_is_wrong_with_a_router(tmp_path, capsys):
    save_router(tmp_path / "router.pt")
    torch.save({"0.prob": torch.zeros(4)}, tmp_path / "uvit.pth")
    Schedule.uniform(4, 2).save(tmp_path / "ours.json")
    for arguments, message in (
        (["uvit.pth", "x.json"], "U-ViT"),
        (["router.pt", "x.json", "--threshold", "2"], "threshold is 2.0, expected a number from 0 to 1"),
        (["router.pt", "x.json", "--names", "attn", "mlp"], "each with {block}"),
        (["ours.json", "x.json", "--threshold", "0.1"], "--threshold is for a router of Learning-to-Cache"),
        (["ours.json", "x.json", "--threshold", "0.1", "--names", "a", "b"], "--threshold and --names are for a"),
        (["none.pt", "x.json"], "cannot read the router"),
    ):
        assert (
            main(["convert", *(str(tmp_path / a) if a.endswith(("json", "pt", "pth")) else a for a in arguments)]) == 1
        )
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


# A class of diffusers, without weights

DIT = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.12.0",
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
DIT_INPUTS = ["hidden_states=2x4x8x8", "timestep=2:int64", "class_labels=2:int64"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "transformer" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(DIT))
    return path


def explain_dit(config, *more, inputs=DIT_INPUTS) -> list[str]:
    given = [part for text in inputs for part in ("--input", text)]
    return ["explain", "DiTTransformer2DModel", "--config", str(config), *given, *more]


def test_explain_a_class_of_diffusers_without_weights(config, tmp_path, capsys):
    Schedule.uniform(4, 2).save(tmp_path / "schedule.json")
    command = explain_dit(config, "--schedule", str(tmp_path / "schedule.json"))
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "DiTTransformer2DModel: 6 sites in 1 graph" in text and "2 variants" in text
    assert main([*explain_dit(config.parent), "--json"]) == 0, "the folder does as well"
    whole = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in whole["sites"]][:2] == ["transformer_blocks.0.attn1", "transformer_blocks.0.ff"]
    # Two matmuls of 16 by 64 for each of 32 tokens.
    assert whole["sites"][1]["flops"] == 2 * 32 * 2 * 16 * 64
    assert main([*explain_dit(config), "--json", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["cache_bytes"] == whole["cache_bytes"] // 2


def test_the_model_is_built_without_memory_and_in_eval_mode(config):
    model = cli_models.from_diffusers("DiTTransformer2DModel", config, torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert {b.device.type for b in model.buffers()} <= {"meta"}
    assert len(model.transformer_blocks) == 3 and not model.training
    shapes = dict(map(cli_models.shape_given, ("hidden_states=2x4", "timestep=scalar:int64", "class_labels=7:bool")))
    inputs = cli_models.meta_inputs(model, shapes, {"return_dict": False}, torch.bfloat16)
    assert {name: (tuple(x.shape), x.dtype, x.device.type) for name, x in inputs.items() if name in shapes} == {
        "hidden_states": ((2, 4), torch.bfloat16, "meta"),
        "timestep": ((), torch.int64, "meta"),
        "class_labels": ((7,), torch.bool, "meta"),
    }
    assert inputs["return_dict"] is False
    whole = cli_models.from_diffusers("FluxTransformer2DModel", None, torch.float32)
    assert sum(p.numel() for p in whole.parameters()) > 10**10, "the class's own defaults"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            {"inputs": DIT_INPUTS[1:]},
            ["forward needs hidden_states: give", "hidden_states (required), timestep (given)"],
        ),
        ({"inputs": [*DIT_INPUTS, "text=2x8"]}, ["has no text: give", "class_labels (given), cross_attention_kwargs"]),
        (
            {"inputs": DIT_INPUTS[:1]},
            ["cannot be called with these inputs: AttributeError", "(given), timestep, class"],
        ),
        (
            {"inputs": ["hidden_states=2x5x8x8", *DIT_INPUTS[1:]]},
            ["cannot be called with these inputs: RuntimeError: "],
        ),
    ],
)
def test_inputs_that_do_not_fit_the_class(arguments, messages, config, capsys):
    assert main(explain_dit(config, **arguments)) == 1
    told = capsys.readouterr().err
    assert all(message in told for message in messages) and "Dynamo" not in told, told


def test_values_that_are_no_tensors(config, capsys):
    assert main([*explain_dit(config), "--value", "return_dict=false", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 6


def test_classes_and_configs_that_do_not_work(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.json").write_text("num_layers: 3")
    (tmp_path / "list.json").write_text("[3]")
    (tmp_path / "wrong.json").write_text('{"norm_type": "none"}')
    for arguments, message in (
        (["FluxTransformer3DModel"], "has no model 'FluxTransformer3DModel', but FluxTransformer2DModel"),
        (["DDIMScheduler"], "has no model 'DDIMScheduler'"),
        (["LatteTransformer3DModel"], "cannot be built: TypeError: "),
        (["LatteTransformer3DModel"], "give the model's own with --config"),
        (["DiTTransformer2DModel", "--config", "none.json"], "none.json"),
        (["DiTTransformer2DModel", "--config", str(tmp_path / "text.json")], "it is not JSON"),
        (["DiTTransformer2DModel", "--config", str(tmp_path / "list.json")], "it holds list, expected an object"),
        (["DiTTransformer2DModel", "--config", str(tmp_path / "wrong.json")], "wrong.json that of a DiTTransformer2DM"),
        (["a.py:build", "--dtype", "float16"], "are for a class of diffusers, not a.py:build"),
        (["DiTTransformer2DModel", "--dtype", "int64"], "floating point"),
    ):
        assert main(["explain", *arguments]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(explain_dit(config)) == 1
    assert 'pip install "smoothcache_fx[diffusers]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input", "hidden_states"],
        ["--input", "hidden_states=2y4"],
        ["--input", "hidden_states=2x-4"],
        ["--input", "=2x4"],
        ["--input", "x=2:"],
        ["--input", "x=2:float33"],
        ["--input", "x=2:Tensor"],
        ["--value", "height=tall"],
        ["--value", "3"],
        ["--dtype", "half precision"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", "DiTTransformer2DModel", *arguments])
    assert stop.value.code == 2 and f"error: argument {arguments[0]}: " in capsys.readouterr().err


# Progress


def test_progress_goes_to_stderr(factories, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_models, "PROGRESS_SECONDS", 0.001)
    target = str(tmp_path / "c.json")
    assert main(["calibrate", f"{factories}:sampler", "--steps", "8", "-o", target, "--progress"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"(before the first call|step [1-8], trajectory 1), \d+ s", line) for line in told), told
    assert any(line.startswith("step") for line in told)
    Schedule.uniform(8, 2).save(tmp_path / "half.json")
    command = ["compare", f"{factories}:sampler", str(tmp_path / "half.json"), "--backend", "eager", "--json"]
    assert main([*command, "--progress"]) == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["rows"][0]["name"] == "half"
    pattern = r"(before the first call|(uncached|half): step [1-8], trajectory [1-4]), \d+ s"
    assert all(re.fullmatch(pattern, line) for line in told.splitlines()), told
    assert "uncached: step" in told and "half: step" in told
    for quiet in ([], ["--no-progress"]):
        assert main([*command, *quiet]) == 0
        assert not capsys.readouterr().err


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli_models, "PROGRESS_SECONDS", 0.001)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli_models.progress(torch.nn.Linear(1, 1), None):
        time.sleep(0.05)
    told = capsys.readouterr().err
    assert told.startswith("\rbefore the first call, 0 s\x1b[K") and "\n" not in told
    assert told.endswith("\r\x1b[K"), "it is gone at the end"
    with cli_models.progress(torch.nn.Linear(1, 1), False):
        time.sleep(0.01)
    assert not capsys.readouterr().err


def test_progress_of_a_pipeline_and_of_a_model_called_by_its_forward(monkeypatch, capsys):
    monkeypatch.setattr(cli_models, "PROGRESS_SECONDS", 0.001)
    pipe = dit_pipeline()
    pipe.transformer.register_forward_hook(lambda *_: time.sleep(0.05))  # long enough for the other thread to look
    with cli_models.progress(pipe, True):
        calibrate(pipe, lambda pipe: pipe([0], num_inference_steps=5, output_type="latent"), progress=False)
    told = capsys.readouterr().err
    assert {line.partition(",")[0] for line in told.splitlines()} >= {f"step {step}" for step in range(1, 6)}
    model = randomize(Stack(1), 0).eval()
    with cli_models.progress(model, True):
        calibrate(model, lambda model: [model.forward(*inputs()) for _ in range(3)], steps=3, progress=False)
        time.sleep(0.05)
    assert "trajectory 1" in capsys.readouterr().err


def test_doctor_without_its_self_test(capsys):
    code = main(["doctor", "--no-self-test"])
    text = capsys.readouterr().out
    assert code == int("missing " in text)
    assert f"torch: {torch.__version__}" in text and "C++ compiler" in text and "self-test" not in text
    assert all(line.startswith("- ") for line in text.splitlines() if "(only for " in line), "not there, and not needed"
    main(["doctor", "--no-self-test", "--json"])
    assert {finding["what"] for finding in json.loads(capsys.readouterr().out)} >= {"torch", "triton", "Graphviz"}


def test_doctor_names_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine._inductor, "cpp_compiler", lambda: None)
    monkeypatch.setattr(machine._inductor, "cache_directory", lambda: str(tmp_path / "none"))
    assert main(["doctor", "--no-self-test"]) == 1
    text = capsys.readouterr().out
    assert "missing C++ compiler: none (Inductor needs one: install g++ or clang++" in text
    assert "set TORCHINDUCTOR_CACHE_DIR" in text


def test_optimal_schedules(factories, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "factories:sampler", "--steps", "8", "--order", "1"]
    assert main([*command, "-o", "c.json", "--probes", "2"]) == 0
    calibration = Calibration.load("c.json")
    assert calibration.effects is not None and "*" in calibration.sensitivity
    assert main([*command, "-o", "unprobed.json", "--probes", "0"]) == 0
    assert not Calibration.load("unprobed.json").sensitivity
    command = ["schedule", "c.json", "--compute", "0.5", "--solver", "optimal", "-o", "s.json"]
    assert main([*command, "--order", "1", "--history-dtype", "bfloat16"]) == 0
    best = calibration.schedule(compute=0.5, solver="optimal", order=1)
    assert Schedule.load("s.json") == replace(best, history_dtype="bfloat16")
    assert main([*command, "--rows", "site"]) == 0
    assert Schedule.load("s.json") == calibration.schedule(compute=0.5, solver="optimal", rows="site")
    capsys.readouterr()
    command = ["choose", "factories:sampler", "--steps", "8", "--orders", "0", "1", "--lags", "3", "--probes", "1"]
    assert main([*command, "--compute", "0.5", "--trajectories", "6", "-o", "best.json"]) == 0
    assert "(6 runs of sample)" in capsys.readouterr().out
    assert 0 < Schedule.load("best.json").compute_fraction <= 0.5


def test_the_self_test():
    assert str(machine.run_self_test()).startswith("ok      self-test: compiled and cached on ")


def test_the_self_test_tells_what_fails(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("g++: not found\nand more")

    monkeypatch.setattr(machine, "compile", fail)
    finding = machine.run_self_test()
    assert finding.missing and "RuntimeError: g++: not found" in str(finding)
    monkeypatch.setattr(machine, "compile", lambda model, schedule: None)
    monkeypatch.setattr(machine, "report", lambda model: type("Report", (), {"groups": []}))
    assert "0 of 2 branches were reused" in str(machine.run_self_test())


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
        (["schedule", "--interval", "2", "--steps", "4", "--solver", "optimal"], "--interval says the rows itself"),
        (["schedule", "{factories}", "--alpha", "0.1"], "is no calibration file"),
        (["calibrate", "{factories}:sampler", "--paper", "--probes", "2", "-o", "c.json"], "leave out --paper"),
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
        *("demo", "explain", "calibrate", "schedule", "choose", "convert", "plot", "compare", "diff", "doctor"),
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
