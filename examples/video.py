"""A video transformer with spatial, temporal and cross attention: ``python examples/video.py``.

Latte's blocks, as diffusers has them, under DDIM; the weights are random. The schedule selects groups by
name: temporal blocks are reused more often than spatial ones.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel
from torch import Tensor

import smoothcache_fx as smoothcache
from smoothcache_fx.demo.model import randomize

STEPS = 12


def build() -> LatteTransformer3DModel:
    model = LatteTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=128,
        caption_channels=64,
        video_length=4,
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    )
    return randomize(model)


@torch.no_grad()
def sample(model: LatteTransformer3DModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 4, 8, 8, generator=generator)  # [batch, channels, frames, height, width]
    text = torch.randn(1, 6, 64, generator=generator)
    for timestep in scheduler.timesteps:
        noise = model(latents, timestep=timestep[None], encoder_hidden_states=text).sample
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    arguments = parser.parse_args()

    model = build()
    text = torch.randn(1, 6, 64)
    explanation = smoothcache.explain(
        model, torch.randn(1, 4, 4, 8, 8), timestep=torch.tensor([999]), encoder_hidden_states=text
    )
    print(explanation)
    every_2nd, every_3rd = ([int(step % n == 0) for step in range(STEPS)] for n in (2, 3))
    rows = {"transformer_blocks.*": every_2nd, "temporal_transformer_blocks.*": every_3rd}
    schedule = smoothcache.Schedule(STEPS, rows)
    print(schedule)
    smoothcache.compile(model, schedule, backend=arguments.backend)
    print(f"{tuple(sample(model, seed=7).shape)}")
    print(smoothcache.report(model))


if __name__ == "__main__":
    main()
