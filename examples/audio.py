"""A transformer in the shape of Stable Audio Open, with a multi-step SDE solver: ``python examples/audio.py``.

The guidance's halves are two calls of the model in a step, so each has a cache of its own (``calls_per_step=2``). The
solver is diffusers' (it needs ``torchsde``), the weights are random.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import CosineDPMSolverMultistepScheduler, StableAudioDiTModel
from torch import Tensor

import smoothcache_fx as smoothcache
from smoothcache_fx.demo.model import randomize

STEPS = 20


def build() -> StableAudioDiTModel:
    model = StableAudioDiTModel(
        sample_size=64,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=64,
        cross_attention_input_dim=64,
        global_states_input_dim=128,
        time_proj_dim=32,
    )
    return randomize(model)


@torch.no_grad()
def sample(model: StableAudioDiTModel, seed: int) -> Tensor:
    torch.manual_seed(seed)  # the solver draws its noise from the global generator
    scheduler = CosineDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction")
    scheduler.set_timesteps(STEPS)
    text, length = torch.randn(1, 12, 64), torch.randn(1, 1, 128)
    latents = torch.randn(1, 8, 64) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep)
        with_text, without = (
            model(given, timestep[None], encoder_hidden_states=hidden, global_hidden_states=length).sample
            for hidden in (text, torch.zeros_like(text))
        )
        latents = scheduler.step(without + 3 * (with_text - without), timestep, latents).prev_sample
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    arguments = parser.parse_args()

    model = build()
    calibration = smoothcache.calibrate(
        model, lambda model: [sample(model, seed) for seed in range(2)], calls_per_step=2
    )
    print(calibration)
    schedule = calibration.schedule(compute=0.5)
    print(schedule)
    smoothcache.compile(model, schedule, backend=arguments.backend, calls_per_step=2)
    print(f"{tuple(sample(model, seed=7).shape)}")
    print(smoothcache.report(model))


if __name__ == "__main__":
    main()
