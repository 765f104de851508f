"""The Kandinsky family: a prior of image embeddings, video, video with sound, super-resolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .case import BATCH, ZooCase, text, timestep

FRAMES, HEIGHT, WIDTH, CHANNELS = 4, 8, 8, 4
VIDEO = (FRAMES, HEIGHT, WIDTH, CHANNELS)
AUDIO = (16, 6)
BLOCK_SIZES = {"time_dim": 32, "model_dim": 32, "ff_dim": 96, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)}
TEXT = {"in_text_dim": 24, "in_text_dim2": 20, "num_text_blocks": 2}


def prompt(g: Generator) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.randn(BATCH, 8, 24, generator=g),
        "pooled_projections": torch.randn(BATCH, 20, generator=g),
    }


def kandinsky5(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    return model(
        hidden_states=x,
        timestep=timestep(t),
        visual_rope_pos=[torch.arange(FRAMES), torch.arange(HEIGHT // 2), torch.arange(WIDTH // 2)],
        text_rope_pos=torch.arange(8),
        **c,
    ).sample


def kandinsky6(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    """The latents are a video and its sound, each flattened, one after the other."""
    video, audio = x.split([FRAMES * HEIGHT * WIDTH * CHANNELS, AUDIO[0] * AUDIO[1]], dim=1)
    out = model(
        hidden_states=video.unflatten(1, VIDEO),
        audio_hidden_states=audio.unflatten(1, AUDIO),
        timestep=timestep(t),
        **c,
    )
    return torch.cat([out.sample.flatten(1), out.audio_sample.flatten(1)], dim=1)


def super_resolution(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    known = torch.ones_like(x[..., :1])
    return model(torch.cat([x, c["low_resolution"], known], dim=-1), timestep(t)).sample


CASES = [
    ZooCase(
        "Kandinsky5Transformer3DModel",
        config={**BLOCK_SIZES, **TEXT, "in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS},
        latents=lambda g: torch.randn(BATCH, *VIDEO, generator=g),
        conditioning=prompt,
        call=kandinsky5,
        branches={
            "attn": ("text_transformer_blocks.*.self_attention", "visual_transformer_blocks.*.self_attention"),
            "cross_attn": ("visual_transformer_blocks.*.cross_attention",),
            "ffn": ("text_transformer_blocks.*.feed_forward", "visual_transformer_blocks.*.feed_forward"),
        },
    ),
    ZooCase(
        "Kandinsky6Transformer3DModel",
        config={
            **BLOCK_SIZES,
            **TEXT,
            "in_visual_dim": CHANNELS,
            "out_visual_dim": CHANNELS,
            "visual_cond": False,
            "in_audio_dim": AUDIO[1],
            "out_audio_dim": AUDIO[1],
            "ca_rope": True,
        },
        latents=lambda g: torch.randn(BATCH, FRAMES * HEIGHT * WIDTH * CHANNELS + AUDIO[0] * AUDIO[1], generator=g),
        conditioning=prompt,
        call=kandinsky6,
        branches={
            "attn": (
                "video_text_transformer_blocks.*.attn",
                "audio_text_transformer_blocks.*.attn",
                "visual_transformer_blocks.*.video_dec_block.self_attention",
                "visual_transformer_blocks.*.audio_dec_block.self_attention",
            ),
            "cross_attn": (
                "visual_transformer_blocks.*.video_dec_block.cross_attention",
                "visual_transformer_blocks.*.audio_dec_block.cross_attention",
                "visual_transformer_blocks.*.va_cross_attention",
                "visual_transformer_blocks.*.av_cross_attention",
            ),
            "ffn": (
                "video_text_transformer_blocks.*.feed_forward",
                "audio_text_transformer_blocks.*.feed_forward",
                "visual_transformer_blocks.*.video_dec_block.feed_forward",
                "visual_transformer_blocks.*.audio_dec_block.feed_forward",
            ),
        },
    ),
    ZooCase(
        "Kandinsky6SRTransformer3DModel",
        config={**BLOCK_SIZES, "in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "nabla_window": (1, 1, 1)},
        latents=lambda g: torch.randn(BATCH, *VIDEO, generator=g),
        conditioning=lambda g: {"low_resolution": torch.randn(BATCH, *VIDEO, generator=g)},
        call=super_resolution,
        branches={
            "attn": ("visual_transformer_blocks.*.self_attention",),
            "ffn": ("visual_transformer_blocks.*.feed_forward",),
        },
    ),
    ZooCase(
        "PriorTransformer",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "embedding_dim": 24,
            "num_embeddings": 64,
        },
        latents=lambda g: torch.randn(BATCH, 24, generator=g),
        conditioning=lambda g: {**text(24, 64)(g), "proj_embedding": torch.randn(BATCH, 24, generator=g)},
        call=lambda model, x, t, c: (
            model(x, timestep(t), attention_mask=torch.ones(BATCH, 64, dtype=torch.bool), **c).predicted_image_embedding
        ),
        branches={"attn": ("transformer_blocks.*.attn1",), "ffn": ("transformer_blocks.*.ff",)},
    ),
]
