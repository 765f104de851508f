"""Training of the demo's DiT: what is saved, and that a run which was cut short ends as if it had not been."""

from __future__ import annotations

import pytest
import torch

from smoothcache_fx.demo import train as module
from smoothcache_fx.demo.data import Images
from smoothcache_fx.demo.weights import load_model

STEPS = 6


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "CONFIG", {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "heads": 2})
    monkeypatch.setattr(module, "SAVED_EVERY", 2)
    monkeypatch.setattr(torch, "compile", lambda model: model)  # it would take longer than the training


def trained(path, **settings):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.arange(20) % 10
    data = Images(images, labels, images, labels)
    module.train(data, path, steps=STEPS, batch=4, learning_rate=1e-2, **settings)
    return load_model(path=path).state_dict()


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole.safetensors")
    rate, checkpoint = module.learning_rate_at, tmp_path / "checkpoint.pt"

    def cut(step, steps, peak):
        if step == 4:
            raise KeyboardInterrupt
        return rate(step, steps, peak)

    monkeypatch.setattr(module, "learning_rate_at", cut)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.safetensors", checkpoint=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    monkeypatch.setattr(module, "learning_rate_at", rate)
    resumed = trained(tmp_path / "cut.safetensors", checkpoint=checkpoint)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert not torch.equal(whole["blocks.0.mlp.fc1.weight"], trained(tmp_path / "x", seed=1)["blocks.0.mlp.fc1.weight"])
