"""The paper's audio model: Stable Audio Open, DPM-Solver++ (SDE), 100 steps, guidance 7.

``python bench/paper_stable_audio.py``: the published configuration with random weights, in diffusers'
``StableAudioPipeline``. Smaller, for a CPU: ``--layers 2 --heads 4 --latents 128 --steps 20 --samples 2``.
"""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderOobleck, CosineDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from paper import Subject, arguments_of, run, twin

from smoothcache_fx.demo.model import randomize


def main() -> None:
    arguments = arguments_of(__doc__, layers=24, heads=24, latents=1024, tokens=128, batch=1, steps=100)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=arguments.latents,
        in_channels=64,
        num_layers=arguments.layers,
        attention_head_dim=64,
        num_attention_heads=arguments.heads,
        num_key_value_attention_heads=max(1, arguments.heads // 2),
        out_channels=64,
        cross_attention_dim=768,
        time_proj_dim=256,
        global_states_input_dim=1536,
        cross_attention_input_dim=768,
    )
    randomize(transformer).to(device, dtype)
    # The text encoder is fed beforehand, and decoding is no part of what is measured.
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        decoder_channels=8,
        decoder_input_channels=64,
        channel_multiples=[1, 1],
    )
    projection = StableAudioProjectionModel(text_encoder_dim=768, conditioning_dim=768, min_value=0, max_value=512)
    vae, projection = (part.to(device, dtype).eval() for part in (vae, projection))
    scheduler = CosineDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)

    def build() -> StableAudioPipeline:
        pipeline = StableAudioPipeline(
            vae=vae,
            text_encoder=None,
            projection_model=projection,
            tokenizer=None,
            transformer=twin(transformer),
            scheduler=copy.deepcopy(scheduler),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sample(pipeline: StableAudioPipeline, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        text = torch.randn(2, arguments.batch, arguments.tokens, 768, generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(arguments.batch, arguments.tokens, dtype=torch.long, device=device)
        prompt, negative = text.to(device, dtype)
        torch.manual_seed(seed)  # the solver's own noise
        return pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            attention_mask=mask,
            negative_attention_mask=mask,
            audio_end_in_s=arguments.latents * vae.hop_length / vae.config.sampling_rate,
            guidance_scale=7.0,
            num_inference_steps=arguments.steps,
            generator=generator,
            output_type="latent",
            return_dict=False,
        )[0]

    run(
        Subject(
            "paper_stable_audio",
            build,
            sample,
            lambda pipeline: pipeline.transformer,
            arguments.steps,
            (0.15, 0.30),
            3,
        ),
        arguments,
    )


if __name__ == "__main__":
    main()
