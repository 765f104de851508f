"""``calibrate``: what it measures, that it changes nothing, and what it refuses."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Stack
from helpers.cases import randomize
from helpers.digits import digits_model
from helpers.models import CASES
from helpers.published_rule import PublishedCalibration, published_scan
from helpers.tolerances import REORDERED
from smoothcache_fx import CalibrationError, CompiledError, NoSitesError, Schedule, demo

STEPS = 10


class Timed(nn.Module):
    def __init__(self, broken: bool = False):
        super().__init__()
        self.stack = Stack(broken=broken)

    def forward(self, x, timestep):
        return self.stack(x, torch.sin(timestep.view(-1, 1) * torch.arange(1, 17)))


@pytest.fixture
def model():
    return randomize(Timed(), 0).eval()


@torch.no_grad()
def sample(model, seeds=(0,), steps=STEPS):
    """Euler steps; returns all latents of all trajectories."""
    seen = []
    for seed in seeds:
        x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = x - model(x, torch.full((2,), 1 - step / steps)) / steps
            seen.append(x)
    return seen


def calibrate(model, run, **options):
    return smoothcache.calibrate(model, run, progress=False, **options)


@pytest.mark.parametrize("broken", [False, True], ids=["one_graph", "graph_breaks"])
def test_the_sampled_output_is_the_same_bit_for_bit(broken):
    model = randomize(Timed(broken), 0).eval()
    plain = sample(model, (0, 1))
    during = []
    calibration = calibrate(model, lambda model: during.extend(sample(model, (0, 1))))
    assert all(map(torch.equal, during, plain)) and len(during) == len(plain)
    assert "forward" not in model.__dict__
    assert [site.name for site in calibration.sites] == [
        f"stack.blocks.{i}.{branch}" for i in range(2) for branch in ("attn", "mlp")
    ]


def test_errors_are_those_of_the_branches_own_outputs(model):
    """Against hooks on the modules: the mean over sites and trajectories of sum|y_t - y_{t-k}| / sum|y_t|."""
    lags, seeds = 3, (0, 1, 2)
    outputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda m, a, out, name=name: outputs.setdefault(name, []).append(out))
        for name, module in model.named_modules()
        if name.endswith((".attn", ".mlp"))
    ]
    sample(model, seeds)
    for hook in hooks:
        hook.remove()
    calibration = calibrate(model, lambda model: sample(model, seeds), lags=lags)
    assert (calibration.steps, calibration.lags) == (STEPS, lags)
    for suffix in ("attn", "mlp"):
        group = f"stack.blocks.*.{suffix}"
        expected = np.full((lags, STEPS), np.nan)
        for lag in range(1, lags + 1):
            for step in range(lag, STEPS):
                ratios = [
                    float((run[step] - run[step - lag]).abs().sum() / run[step].abs().sum())
                    for name, all_runs in outputs.items()
                    if name.endswith(suffix)
                    for run in (all_runs[i * STEPS : (i + 1) * STEPS] for i in range(len(seeds)))
                ]
                expected[lag - 1, step] = np.mean(ratios)
        np.testing.assert_allclose(calibration.error(group), expected, rtol=REORDERED.rtol)


@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_schedules_are_those_of_the_published_helper_on_the_same_model_and_seed(model, alpha):
    """The helper's measure and scan as published; see ``published_rule`` for why it cannot be installed."""
    published = PublishedCalibration(model, ["attn", "mlp"], lags=3, steps=STEPS)
    with published.recording():
        sample(model)
    calibration = calibrate(model, sample)
    schedule = calibration.schedule(alpha=alpha)
    for component, row in published.schedule(alpha).items():
        assert [int(c) for c in schedule.compute[f"stack.blocks.*.{component}"]] == row
    for component, group in (("attn", "stack.blocks.*.attn"), ("mlp", "stack.blocks.*.mlp")):
        lists = [error[~np.isnan(error)].tolist() for error in calibration.error(group)]
        assert published_scan(lists, alpha, STEPS) == [int(c) for c in schedule.compute[group]], component


def test_the_schedule_runs_and_meets_its_budget(model):
    schedule = calibrate(model, sample).schedule(compute=0.6)
    assert 0.2 < schedule.compute_fraction <= 0.6
    smoothcache.compile(model, schedule, backend="eager")
    sample(model, (0, 1))
    report = smoothcache.report(model)
    assert report.trajectories == 2 and not report.forced
    done = sum(group.computed for group in report.groups)
    assert done == 2 * 2 * sum(sum(row) for row in schedule.compute.values())


@pytest.mark.parametrize("name", ["joint", "diffusers_sd3"])
def test_a_site_with_two_outputs_is_measured_as_one(name):
    case = CASES[name]
    model = case.build()
    latents, (conditioning,) = case.inputs(1, torch.float32)

    def run(model):
        x = latents
        for step in range(4):
            x = x - 0.1 * case.call(model, x, 1 - step / 4, conditioning)

    with torch.no_grad():
        calibration = calibrate(model, run, steps=4)
    assert {site.name for site in calibration.sites} == set(case.branches)
    assert all(np.isfinite(site.mean[0, 1:]).all() and (site.mean[0, 1:] > 0).all() for site in calibration.sites)


def test_each_call_of_a_step_has_its_own_history(model):
    """Conditional and unconditional calls take turns: each is compared with its own kind."""

    @torch.no_grad()
    def guided(model):
        for _step in range(4):
            for scale in (1.0, 5.0):
                model(torch.full((2, 6, 16), scale), torch.full((2,), 0.5))

    calibration = calibrate(model, guided, calls_per_step=2, steps=4)
    assert calibration.steps == 4
    assert all((site.mean[0, 1:] == 0).all() and (site.count[0, 1:] == 2).all() for site in calibration.sites)


def test_history_on_the_cpu_and_its_size(model):
    """Outputs of as many steps as forecasts look back; of ``lags`` for the paper's rule alone."""
    calibration = calibrate(model, sample, lags=2, history_device="cpu", order=None)
    values = 4 * 2 * 6 * 16  # sites, batch, tokens, width
    assert calibration.history_bytes == 2 * values * 4
    default = calibrate(model, sample, lags=2)
    reach = 2 * (2 + 1) - 1
    assert default.history_bytes == (reach + 1) * values * 4 and default.effects.reach == reach
    assert np.allclose(calibration.error("stack.blocks.*.attn")[0, 1:], default.error("stack.blocks.*.attn")[0, 1:])
    assert calibration.schedule(alpha=0.3) == default.schedule(alpha=0.3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_name_site_and_step(model, value):
    def run(model):
        with torch.no_grad():
            for step in range(3):
                if step == 2:
                    model.stack.blocks[1].mlp[2].bias[3] = value
                model(torch.randn(2, 6, 16), torch.full((2,), 1 - step / 3))

    with pytest.raises(CalibrationError, match=r"output of stack.blocks.1.mlp has NaN or infinite values at step 2"):
        calibrate(model, run)
    assert "forward" not in model.__dict__, "the model is given back"


def test_a_branch_that_stays_zero_has_no_error(model):
    with torch.no_grad():
        for parameter in model.stack.blocks[0].attn.proj.parameters():
            parameter.zero_()
    calibration = calibrate(model, sample)
    (site,) = [site for site in calibration.sites if site.name == "stack.blocks.0.attn"]
    assert (site.mean[0, 1:] == 0).all()


def test_no_calls():
    with pytest.raises(CalibrationError, match="sample did not call the model"):
        calibrate(Timed().eval(), lambda model: None)


def test_trajectories_of_different_lengths(model):
    with pytest.raises(CalibrationError, match="took 4, 6 calls of the model, expected one multiple"):
        calibrate(model, lambda model: (sample(model, steps=4), sample(model, steps=6)))
    with pytest.raises(CalibrationError, match="took 4 calls of the model, expected 5 each"):
        calibrate(model, lambda model: sample(model, steps=4), steps=5)


def test_a_compiled_or_training_model_is_refused(model):
    smoothcache.compile(model, Schedule(STEPS, {"attn": [1] * STEPS}), backend="eager")
    with pytest.raises(CompiledError, match="compiled already"):
        calibrate(model, sample)
    with pytest.raises(CompiledError, match="training mode"):
        calibrate(Timed().train(), sample)


def test_a_model_without_sites():
    class Plain(nn.Module):
        def forward(self, x, timestep):
            return x * timestep.view(-1, 1, 1)

    with pytest.raises(NoSitesError, match="Plain has no residual branch"):
        calibrate(Plain().eval(), sample)


def test_a_sampler_that_compiles_the_model_itself(model):
    """``torch.compile`` on top does not trace what observes the model."""
    plain = calibrate(model, sample)
    on_top = torch.compile(model, backend="eager")
    wrapped = calibrate(model, lambda model: sample(on_top))
    for ours, theirs in zip(wrapped.sites, plain.sites, strict=True):
        assert ours.name == theirs.name and np.array_equal(ours.mean, theirs.mean, equal_nan=True)


def test_a_progress_bar_is_shown(model, capsys):
    smoothcache.calibrate(model, sample)
    assert "calibrating" in capsys.readouterr().err


def slices(model, size=8):
    """Like a diffusers pipeline: one timestep is expanded over the batch, and an input is a slice."""
    x = torch.randn(2, size + 2, 16, generator=torch.Generator().manual_seed(0))[:, :size]
    with torch.no_grad():
        for timestep in torch.linspace(1000, 250, 4):
            x = x - 0.1 * model(x, timestep.expand(2))
    return x


@pytest.mark.parametrize("sample", [slices, lambda model: [slices(model, 8), slices(model, 12)]])
@pytest.mark.parametrize("options", [{"order": 1}, {"schedule": Schedule.uniform(4, 2)}], ids=["order", "schedule"])
def test_calls_are_repeated_with_inputs_of_the_same_strides(model, sample, options, caplog):
    calibration = calibrate(model, sample, **options)
    assert calibration.timesteps == (1000.0, 750.0, 500.0, 250.0)
    assert "captured as another graph" not in caplog.text


def test_a_repeated_call_that_is_captured_anew_is_computed_and_told(model, monkeypatch, caplog):
    """Copies that Dynamo sees as other inputs: branches without a history are computed, not looked up."""
    monkeypatch.setattr(
        "smoothcache_fx.measure.observe.copied", functools.partial(torch.utils._pytree.tree_map, torch.clone)
    )
    plain = slices(model)
    found = []
    calibrate(model, lambda m: found.append(slices(m)), schedule=Schedule.uniform(4, 2))
    torch.testing.assert_close(found[0], plain)
    assert "was captured as another graph than the call itself" in caplog.text


def test_weights_on_the_meta_device_are_refused(model):
    with pytest.raises(CalibrationError, match="are on the meta device, so that there is nothing to measure"):
        calibrate(model.to("meta"), sample)


def measured_within(limit, **settings):
    model = digits_model()
    settings = {"order": None, "steps": 8, "max_history_bytes": limit, "progress": False, **settings}
    return smoothcache.calibrate(model, lambda model: demo.sample(model, torch.arange(4), steps=8), **settings)


@pytest.fixture(scope="module")
def whole():
    return measured_within(None)


def test_a_history_that_fits_is_measured_whole(whole):
    assert measured_within(whole.history_bytes) == whole and "token_share" not in whole.metadata


def test_one_that_does_not_is_measured_on_some_tokens(whole):
    some = measured_within(whole.history_bytes // 8)
    assert some.metadata["token_share"] == pytest.approx(1 / 8)
    assert some.history_bytes == whole.history_bytes // 3, "one whole step's outputs"
    for group in whole.groups:
        assert np.nanmax(abs(some.error(group) / whole.error(group) - 1)) < 0.2
        assert (some.error(group) != whole.error(group)).any()
    assert some.schedule(alpha=0.2).compute


def test_further_calls_need_whole_outputs():
    with pytest.raises(CalibrationError, match="max_history_bytes is 1.0 MiB. Effects and followed"):
        measured_within("1MiB", order=0)
