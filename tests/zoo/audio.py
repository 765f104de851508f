"""Models of music and sound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from .case import BATCH, ZooCase, text, timestep

SAMPLES, CHANNELS = 64, 8


def stable_audio(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    # One token more: the global states are put before the audio's.
    rotary = get_1d_rotary_pos_embed(8, SAMPLES + 1, use_real=True, repeat_interleave_real=False)
    return model(x, timestep(t, 1.0), rotary_embedding=rotary, **c).sample


def ace_step(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    now = timestep(t, 1.0, x.dtype)
    return model(x, timestep=now, timestep_r=now, **c).sample


def long_cat(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    return model(
        x,
        encoder_attention_mask=torch.tensor([[1] * 8, [1] * 6 + [0] * 2], dtype=torch.bool),
        timestep=timestep(t, 1.0, x.dtype),
        attention_mask=torch.ones(BATCH, SAMPLES, dtype=torch.bool),
        **c,
    ).sample


def spectrogram(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    notes_mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2], dtype=torch.bool)
    context_mask = torch.ones(BATCH, 16, dtype=torch.bool)
    return model(
        encodings_and_masks=[(c["notes"], notes_mask), (c["context"], context_mask)],
        decoder_input_tokens=x,
        decoder_noise_time=timestep(t, 1.0, x.dtype),
    )


CASES = [
    ZooCase(
        "StableAudioDiTModel",
        config={
            "sample_size": SAMPLES,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "cross_attention_input_dim": 24,
            "time_proj_dim": 16,
            "global_states_input_dim": 20,
        },
        latents=lambda g: torch.randn(BATCH, CHANNELS, SAMPLES, generator=g),
        conditioning=lambda g: {
            **text(24)(g),
            "global_hidden_states": torch.randn(BATCH, 1, 20, generator=g),
        },
        call=stable_audio,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
    ZooCase(
        "AceStepTransformer1DModel",
        config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 3 * CHANNELS,
            "audio_acoustic_hidden_dim": CHANNELS,
            "sliding_window": 8,
            "encoder_hidden_size": 24,
        },
        latents=lambda g: torch.randn(BATCH, 2 * SAMPLES, CHANNELS, generator=g),
        conditioning=lambda g: {
            **text(24)(g),
            "context_latents": torch.randn(BATCH, 2 * SAMPLES, 2 * CHANNELS, generator=g),
        },
        call=ace_step,
        branches={
            "attn": ("layers.*.self_attn",),
            "cross_attn": ("layers.*.cross_attn",),
            "ffn": ("layers.*.mlp",),
        },
    ),
    ZooCase(
        "StableAudio3DiTModel",
        config={
            "io_channels": CHANNELS,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 20,
            "local_add_cond_dim": CHANNELS + 1,
            "timestep_features_dim": 16,
            "num_memory_tokens": 4,
        },
        latents=lambda g: torch.randn(BATCH, CHANNELS, SAMPLES, generator=g),
        conditioning=lambda g: {
            **text(24)(g),
            "global_hidden_states": torch.randn(BATCH, 20, generator=g),
            "local_add_cond": torch.randn(BATCH, CHANNELS + 1, SAMPLES, generator=g),
        },
        call=lambda model, x, t, c: (
            model(
                x,
                timestep(t, 1.0, x.dtype),
                encoder_attention_mask=torch.tensor([[1] * 8, [1] * 6 + [0] * 2], dtype=torch.bool),
                **c,
            ).sample
        ),
        branches={
            "attn": ("transformer_blocks.*.self_attn",),
            "cross_attn": ("transformer_blocks.*.cross_attn",),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
    ZooCase(
        "LongCatAudioDiTTransformer",
        config={"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 24, "latent_dim": CHANNELS},
        latents=lambda g: torch.randn(BATCH, SAMPLES, CHANNELS, generator=g),
        conditioning=lambda g: {**text(24)(g), "latent_cond": torch.randn(BATCH, SAMPLES, CHANNELS, generator=g)},
        call=long_cat,
        branches={
            "attn": ("blocks.*.self_attn",),
            "cross_attn": ("blocks.*.cross_attn",),
            # The text's ConvNeXt blocks are a depthwise convolution and a feed-forward in one residual branch.
            "ffn": ("blocks.*.ffn", "text_conv_layer.*.pwconv2"),
        },
    ),
    ZooCase(
        "MiniMaxMusic3Transformer1DModel",
        config={
            "in_channels": CHANNELS,
            "condition_dim": 24,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 96,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        latents=lambda g: torch.randn(BATCH, CHANNELS, SAMPLES, generator=g),
        conditioning=text(24, SAMPLES),
        call=lambda model, x, t, c: model(x, timestep(t, 1.0, x.dtype), **c).sample,
        branches={"attn": ("transformer_blocks.*.attn",), "ffn": ("transformer_blocks.*.ff_out",)},
    ),
    ZooCase(
        # It predicts codes and does not denoise; tried all the same, its embeddings taken for latents.
        "MiniMaxMusic3RVQDepthDecoder",
        config={
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "audio_vocab_size": 16,
            "max_position_embeddings": SAMPLES,
        },
        latents=lambda g: torch.randn(BATCH, SAMPLES, 32, generator=g),
        conditioning=lambda g: {},
        call=lambda model, x, t, c: model(x),
        branches={"attn": ("layers.*.attn",), "ffn": ("layers.*.down_proj",)},
    ),
    ZooCase(
        "T5FilmDecoder",
        config={
            "input_dims": CHANNELS,
            "targets_length": SAMPLES,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 96,
        },
        latents=lambda g: torch.randn(BATCH, SAMPLES, CHANNELS, generator=g),
        conditioning=lambda g: {
            "notes": torch.randn(BATCH, 8, 32, generator=g),
            "context": torch.randn(BATCH, 16, 32, generator=g),
        },
        call=spectrogram,
        branches={
            "attn": ("decoders.*.layer.0.attention",),
            "cross_attn": ("decoders.*.layer.1.attention",),
            "ffn": ("decoders.*.layer.2.DenseReluDense",),
        },
    ),
]
