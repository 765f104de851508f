"""The paper's image model: DiT-XL/2 at 256x256, DDIM, guidance 1.5: ``python bench/paper_dit.py``.

The published configuration with random weights, in diffusers' ``DiTPipeline``. Smaller, for a CPU:
``--layers 4 --heads 4 --batch 1 --steps 20 --samples 2``.
"""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from paper import Subject, arguments_of, run, twin

from smoothcache_fx.demo.model import randomize


def main() -> None:
    arguments = arguments_of(__doc__, layers=28, heads=16, batch=32, steps=50)
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=arguments.heads,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=arguments.layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    randomize(transformer).to(arguments.device, dtype)
    # Decoding is no part of what is measured.
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    vae = vae.to(arguments.device, dtype).eval()
    scheduler = DDIMScheduler(clip_sample=False)

    def build() -> DiTPipeline:
        pipeline = DiTPipeline(transformer=twin(transformer), vae=vae, scheduler=copy.deepcopy(scheduler))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sample(pipeline: DiTPipeline, seed: int) -> torch.Tensor:
        generator = torch.Generator(arguments.device).manual_seed(seed)
        labels = [(seed + index) % 1000 for index in range(arguments.batch)]
        return pipeline(
            labels,
            guidance_scale=1.5,
            num_inference_steps=arguments.steps,
            generator=generator,
            output_type="np",
            return_dict=False,
        )[0]

    run(
        Subject(
            "paper_dit", build, sample, lambda pipeline: pipeline.transformer, arguments.steps, (0.08, 0.18, 0.22), 3
        ),
        arguments,
    )


if __name__ == "__main__":
    main()
