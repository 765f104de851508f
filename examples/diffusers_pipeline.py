"""A pipeline of diffusers, whose scheduler tells the steps: ``python examples/diffusers_pipeline.py``.

With weights from a hub the first lines of ``main`` would be ``DiTPipeline.from_pretrained(...)``; here they are random.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

import smoothcache_fx as smoothcache
from smoothcache_fx.demo.model import randomize

STEPS = 20


def build() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=16,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    pipe = DiTPipeline(transformer=randomize(transformer), vae=vae.eval(), scheduler=DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DiTPipeline, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = pipe([207, 360], generator=generator, num_inference_steps=STEPS, output_type="np").images
    return torch.from_numpy(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    arguments = parser.parse_args()

    pipe = build()
    calibration = smoothcache.calibrate(pipe, lambda pipe: [sample(pipe, seed) for seed in range(3)])
    schedule = calibration.schedule(compute=0.5)
    print(schedule)
    smoothcache.compile(pipe, schedule, backend=arguments.backend)
    images = sample(pipe, seed=7)
    print(f"{tuple(images.shape)} from {images.min():.2f} to {images.max():.2f}")
    print(smoothcache.report(pipe))
    smoothcache.remove(pipe)


if __name__ == "__main__":
    main()
