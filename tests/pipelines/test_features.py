"""What pipelines can do besides running, before and after ``compile``; and calibration of whole pipelines."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.tolerances import REORDERED
from smoothcache_fx import CalibrationError, CompiledError, Schedule
from smoothcache_fx.compiled.forward import compiled_forward

from .build import CASES, dit, run, sd3
from .eager_cache import cached_by_hand
from .test_runs import difference
from .test_schedulers import DIT, ROWS, SD3, STEPS, compiled


def expected_of(case, pipe, rows=ROWS):
    with cached_by_hand(case, pipe, rows):
        return run(case, pipe, STEPS)


def calibrate(pipe, sample, **options):
    return smoothcache.calibrate(pipe, sample, progress=False, **options)


# compile, remove, report.


def test_remove_gives_everything_back():
    pipe = CASES["wan_2_2"].make()
    models = pipe.transformer, pipe.transformer_2
    before = [dict(vars(part)) for part in (*models, pipe.scheduler)]
    kind = type(pipe.scheduler)
    smoothcache.compile(pipe, Schedule.uniform(STEPS, 2), backend="eager")
    assert all(compiled_forward(model) for model in models)
    assert smoothcache.remove(pipe) is pipe
    assert [vars(part).keys() for part in (*models, pipe.scheduler)] == [part.keys() for part in before]
    assert type(pipe.scheduler) is kind
    for call in (smoothcache.remove, smoothcache.report, smoothcache.reset):
        with pytest.raises(CompiledError, match="WanPipeline is not compiled: call smoothcache.compile"):
            call(pipe)


def test_the_report_of_two_denoisers_and_what_is_missing_where_the_second_begins():
    case = CASES["wan_2_2"]
    pipe = case.make()
    smoothcache.compile(pipe, Schedule(STEPS, {"attn": [1, 0, 0, 0, 0, 1]}), backend="eager")
    run(case, pipe, STEPS)
    report = smoothcache.report(pipe)
    counts = {group.group: (group.computed, group.reused) for group in report.groups if group.kind == "attn"}
    # One block, two calls a step; the second begins at the third step, where the schedule says reuse.
    assert counts == {"transformer: blocks.*.attn1": (2, 2), "transformer_2: blocks.*.attn1": (4, 4)}
    assert report.forced == {"no value in this trajectory yet, at step 2": 2}
    assert (report.trajectories, report.steps, report.calls) == (1, STEPS, 2 * STEPS)
    assert "transformer_2: blocks.*.attn1" in str(report) and report.mac_ratio > 1


def test_the_transformer_alone_compiles_as_before():
    pipe = dit()
    expected = expected_of(DIT, pipe)
    smoothcache.compile(pipe.transformer, Schedule(STEPS, ROWS), backend="eager")
    assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    with pytest.raises(CompiledError, match="only its transformer is, by itself"):
        smoothcache.report(pipe)
    with pytest.raises(CompiledError, match="DiTTransformer2DModel is compiled already"):
        compiled(pipe)
    smoothcache.remove(pipe.transformer)


def test_bad_input():
    pipe = dit()
    with pytest.raises(ValueError, match="calls_per_step is 2, but a pipeline's scheduler says"):
        smoothcache.compile(pipe, Schedule(STEPS, ROWS), calls_per_step=2)
    with pytest.raises(CalibrationError, match="calls_per_step is for bare models"):
        calibrate(pipe, lambda pipe: None, calls_per_step=2)
    nothing = Parts(pipe.scheduler, vae=pipe.vae)
    with pytest.raises(TypeError, match=r"Parts has no denoiser: no forward of vae \(AutoencoderKL\) has"):
        compiled(nothing)
    with pytest.raises(TypeError, match="scheduler of Parts is a NoneType, expected"):
        compiled(Parts(None, transformer=pipe.transformer))
    compiled(pipe)
    with pytest.raises(CompiledError, match="compiled already"):
        compiled(pipe)
    assert type(pipe.vae.forward.__self__) is diffusers.AutoencoderKL


class Parts:
    """An object with named parts and a scheduler: all that a pipeline must be."""

    def __init__(self, scheduler, **parts):
        self.scheduler, self.components = scheduler, parts


def test_a_controlnet_is_no_denoiser():
    class TinyControlNet(nn.Module):
        def forward(self, x, timestep):
            return x

    pipe = dit()
    pipe = compiled(Parts(pipe.scheduler, controlnet=TinyControlNet(), transformer=pipe.transformer))
    assert "forward" not in vars(pipe.components["controlnet"]) and "forward" in vars(pipe.components["transformer"])


# Saving, moving, hooks.


def test_saving_and_loading(tmp_path):
    pipe = compiled(dit())
    names = list(dit().transformer.state_dict())
    assert list(pipe.transformer.state_dict()) == names
    actual = run(DIT, pipe, STEPS)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler and "forward" not in vars(loaded.transformer)
    loaded.set_progress_bar_config(disable=True)
    assert difference(actual, expected_of(DIT, loaded)) <= 1e-5


def test_moving_to_another_dtype_and_back():
    pipe = dit()
    expected = expected_of(DIT, pipe)
    compiled(pipe)
    run(DIT, pipe, STEPS)
    pipe.transformer.to(torch.float64)
    assert next(pipe.transformer.parameters()).dtype == torch.float64
    pipe.to(torch.float32)
    assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_cpu_offload_put_on_before_and_after_compile(when):
    pipe = dit()
    expected = expected_of(DIT, pipe)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    compiled(pipe)
    if when == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5
    report = smoothcache.report(pipe)
    assert (report.graphs, report.calls, dict(report.breaks)) == (1, 2 * STEPS, {}), "the hook is not traced"
    with pytest.raises(CompiledError, match="compiled already"):
        smoothcache.compile(pipe.transformer, Schedule(STEPS, ROWS))
    pipe.remove_all_hooks()
    assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5
    assert smoothcache.report(pipe).calls == 3 * STEPS
    smoothcache.remove(pipe)
    assert difference(run(DIT, pipe, STEPS), run(DIT, dit(), STEPS)) == 0


def test_remove_under_a_hook_leaves_the_hook():
    pipe = dit()
    plain = run(DIT, pipe, STEPS)
    pipe.enable_model_cpu_offload(device="cpu")
    hooked = pipe.transformer.forward
    compiled(pipe)
    smoothcache.remove(pipe)
    assert pipe.transformer.forward is hooked
    assert torch.equal(run(DIT, pipe, STEPS), plain)


def test_progress_bars(capsys):
    pipe = compiled(dit())
    pipe.set_progress_bar_config(disable=False)
    run(DIT, pipe, STEPS)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


# Adapters.


def add_lora(pipe):
    from peft import LoraConfig

    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


def test_lora_loaded_and_unloaded():
    pytest.importorskip("peft", reason="peft makes the adapters")
    plain = expected_of(SD3, sd3())
    twin = sd3()
    add_lora(twin)
    adapted = expected_of(SD3, twin)
    pipe = compiled(sd3())
    assert difference(run(SD3, pipe, STEPS), plain) <= 1e-5
    add_lora(pipe)
    assert difference(run(SD3, pipe, STEPS), adapted) <= 1e-5
    assert difference(adapted, plain) >= 1e-3
    assert not smoothcache.report(pipe).forced
    pipe.transformer.disable_adapters()
    assert difference(run(SD3, pipe, STEPS), plain) <= 1e-5
    pipe.unload_lora_weights()
    assert difference(run(SD3, pipe, STEPS), plain) <= 1e-5
    assert not smoothcache.report(pipe).uncompiled_calls


# Calibration.


@pytest.mark.parametrize("name", ["sd3", "wan_2_2"])
def test_calibration_changes_nothing_and_measures_the_branches(name):
    case = CASES[name]
    pipe = case.make()
    plain = [run(case, pipe, STEPS, seed) for seed in (1, 2)]
    parts = [getattr(pipe, name) for name in case.denoisers]
    before, during, seen = [vars(part).keys() for part in parts], [], {}
    leaf = "transformer_blocks.0.ff" if name == "sd3" else "blocks.0.ffn"
    hooks = [
        part.get_submodule(leaf).register_forward_hook(lambda m, a, out, i=i: seen.setdefault(i, []).append(out))
        for i, part in enumerate(parts)
    ]
    [run(case, pipe, STEPS, seed) for seed in (1, 2)]
    [hook.remove() for hook in hooks]
    calibration = calibrate(pipe, lambda pipe: during.extend(run(case, pipe, STEPS, seed) for seed in (1, 2)))
    assert all(map(torch.equal, during, plain)) and len(during) == 2
    assert [vars(part).keys() for part in parts] == before and "." not in type(pipe.scheduler).__name__
    calls = 1 if name == "sd3" else 2
    expected = np.full((3, STEPS), np.nan)
    for lag in range(1, 4):
        found = {}
        for index, outputs in seen.items():
            first = 0 if index == 0 else case.second_begins
            steps = case.second_begins if index == 0 and len(seen) == 2 else STEPS - first
            for run_of in range(2):
                for call in range(calls):
                    series = outputs[run_of * steps * calls + call : (run_of + 1) * steps * calls : calls]
                    for step in range(lag, steps):
                        ratio = (series[step] - series[step - lag]).abs().sum() / series[step].abs().sum()
                        found.setdefault(first + step, []).append(float(ratio))
        for step, ratios in found.items():
            expected[lag - 1, step] = np.mean(ratios)
    (site,) = [site for site in calibration.sites if site.name == leaf]
    measured = np.where(site.count > 0, site.mean, np.nan)
    np.testing.assert_allclose(measured, expected, rtol=REORDERED.rtol)
    schedule = calibration.schedule(alpha=0.5)
    smoothcache.compile(pipe, schedule, backend="eager")
    run(case, pipe, STEPS)
    assert not smoothcache.report(pipe).forced


def test_calibration_gives_everything_back_after_an_error():
    pipe = dit()

    def sample(pipe):
        run(DIT, pipe, STEPS)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        calibrate(pipe, sample)
    assert "forward" not in vars(pipe.transformer) and type(pipe.scheduler) is diffusers.DDIMScheduler
    with pytest.raises(CalibrationError, match="set to 6 timesteps, expected 5"):
        calibrate(pipe, lambda pipe: run(DIT, pipe, STEPS), steps=5)


def test_calibration_wants_whole_runs_of_one_length():
    pipe = dit()
    with pytest.raises(CalibrationError, match="sample did not run the pipeline's denoisers"):
        calibrate(pipe, lambda pipe: None)
    with pytest.raises(CalibrationError, match="the runs had 2, 3 timesteps, 0 ended early"):
        calibrate(pipe, lambda pipe: (run(DIT, pipe, 2), run(DIT, pipe, 3)))
    compiled(pipe)
    with pytest.raises(CompiledError, match="compiled already"):
        calibrate(pipe, lambda pipe: None)


@pytest.mark.parametrize("name", ["dit_ddim", "sd3"])
def test_choose_on_a_pipeline(name):
    """Its timestep is expanded over the batch, so that the calls that are repeated must keep strides."""
    case = CASES[name]
    pipe = case.make()
    choice = smoothcache.choose(
        pipe,
        lambda pipe: run(case, pipe, STEPS),
        compute=0.6,
        orders=(0, 1),
        lags=2,
        probes=2,
        trajectories=6,
        progress=False,
    )
    assert len(choice.trials) == 2 and choice.schedule.compute_fraction <= 0.6
    assert len(choice.schedule.timesteps) == STEPS


def test_explain_takes_a_pipeline_and_a_function_that_runs_it():
    pipe, ran = sd3(), []
    schedule = smoothcache.Schedule.uniform(STEPS, 2)

    def sampled(pipe):
        ran.append(run(CASES["sd3"], pipe, STEPS))

    found = smoothcache.explain(pipe, sampled, schedule=schedule)
    assert not ran, "the first call of the denoiser tells the inputs"
    assert found.model == "SD3Transformer2DModel" and len(found.sites) > 1 and found.prediction.mac_ratio > 1.2
    assert not pipe.transformer._forward_pre_hooks
    smoothcache.compile(pipe, schedule, backend="eager")
    assert smoothcache.explain(pipe, sampled).flops == found.flops, "compiled or not"
    before = run(CASES["sd3"], pipe, STEPS)
    assert (
        smoothcache.report(pipe).trajectories == 1 and not smoothcache.report(pipe).forced and before.isfinite().all()
    )
    for wrong in ((), ("a prompt",), (torch.ones(1), torch.ones(1))):
        with pytest.raises(TypeError, match="takes one function that runs it"):
            smoothcache.explain(pipe, *wrong)
    with pytest.raises(TypeError, match="the function ran none of transformer"):
        smoothcache.explain(pipe, lambda pipe: None)


def test_explain_and_dump_of_two_denoisers(tmp_path):
    case = CASES["wan_2_2"]
    pipe = case.make()
    found = smoothcache.explain(
        pipe, lambda pipe: run(case, pipe, STEPS), schedule=smoothcache.Schedule.uniform(STEPS, 2)
    )
    parts = {site.name.split(": ")[0] for site in found.sites}
    assert parts == {"transformer", "transformer_2"} and found.prediction.mac_ratio > 1.2
    assert len(found.prediction.step_shares) == STEPS and max(found.prediction.step_shares) == pytest.approx(1)
    smoothcache.compile(pipe, smoothcache.Schedule.uniform(STEPS, 2), backend="eager")
    with pytest.raises(CompiledError, match="nothing is captured yet"):
        smoothcache.dump(pipe, tmp_path)
    run(case, pipe, STEPS)
    files = smoothcache.dump(pipe, tmp_path)
    assert files[0] == tmp_path / "transformer" / "README.md" and tmp_path / "transformer_2" / "sites.json" in files
    assert all(path.exists() for path in files)
    one = dit()
    smoothcache.compile(one, smoothcache.Schedule.uniform(STEPS, 2), backend="eager")
    run(CASES["dit_ddim"], one, STEPS)
    assert smoothcache.dump(one, tmp_path / "one")[0] == tmp_path / "one" / "README.md"


def test_steps_of_a_calibrated_pipeline_are_compared_with_its_scheduler():
    pipe = dit()
    with pytest.raises(CalibrationError, match="was set to 6 timesteps, expected 20: give steps=6, or leave it out"):
        calibrate(pipe, lambda pipe: run(CASES["dit_ddim"], pipe, 6), steps=20)
    assert calibrate(pipe, lambda pipe: run(CASES["dit_ddim"], pipe, 6), steps=6).steps == 6


# Perturbed attention guidance.


def perturbed(pipe):
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    return diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])


def test_perturbed_attention_guidance():
    """Its attention processor writes to a mask in a way that PyTorch cannot make functional."""
    pipe = perturbed(sd3())
    guided = {"pag_scale": 2.0}
    plain, unperturbed = run(SD3, pipe, STEPS, **guided), run(SD3, pipe, STEPS, pag_scale=0.0)
    assert difference(plain, unperturbed) >= 1e-3
    with cached_by_hand(SD3, pipe, ROWS):
        expected = run(SD3, pipe, STEPS, **guided)
    smoothcache.compile(pipe, Schedule(STEPS, ROWS), backend="eager")
    assert difference(run(SD3, pipe, STEPS, **guided), expected) <= 1e-5
    assert difference(plain, expected) >= 1e-3
    report = smoothcache.report(pipe)
    assert report.uncompiled_calls == 0 and not report.forced
