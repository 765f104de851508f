"""Sana's video models: linear attention, feed-forwards that mix neighbours, a world model with cameras, its refiner."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .case import BATCH, ZooCase, text, timestep

FRAMES, SIZE = 4, 4
#: The second prompt is shorter.
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def cameras(g: Generator) -> Tensor:
    """For each frame a camera's pose, a 4 by 4 matrix, and its focal lengths and centre: ``[BATCH, FRAMES, 20]``."""
    poses = torch.eye(4).repeat(BATCH, FRAMES, 1, 1)
    poses[..., :3, 3] = torch.randn(BATCH, FRAMES, 3, generator=g)
    lens = torch.tensor([SIZE, SIZE, SIZE / 2, SIZE / 2]).expand(BATCH, FRAMES, 4)
    return torch.cat([poses.flatten(2), lens], dim=2)


def call_world(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The first frame is given: its time is 0."""
    times = timestep(t)[:, None, None] * torch.tensor([0.0] + [1.0] * (FRAMES - 1))
    return model(x, times, **conditioning).sample


def call_refiner(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    coordinates = model.rope.prepare_video_coords(BATCH, FRAMES, SIZE, SIZE, x.device, fps=24.0)
    rotary = model.rope(coordinates, device=x.device)
    return model(x, timestep=timestep(t), video_rotary_emb=rotary, **conditioning).sample


CASES = [
    ZooCase(
        "SanaVideoTransformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {**text(24)(g), "encoder_attention_mask": MASK},
        call=lambda model, x, t, c: model(x, timestep=timestep(t), **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
    ZooCase(
        "SanaWMTransformer3DModel",
        config={
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "caption_channels": 24,
            "image_size": 32,
        },
        latents=lambda g: torch.randn(BATCH, 4, FRAMES, SIZE, SIZE, generator=g),
        conditioning=lambda g: {
            **text(24)(g),
            "encoder_attention_mask": MASK,
            "camera_conditions": cameras(g),
            "chunk_plucker": torch.randn(BATCH, 6, FRAMES, SIZE, SIZE, generator=g),
        },
        call=call_world,
        branches={
            "attn": ("blocks.*.attn",),
            "cross_attn": ("blocks.*.cross_attn",),
            "ffn": ("blocks.*.mlp",),
        },
    ),
    ZooCase(
        "SanaWMLTX2RefinerTransformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 16,
            "audio_cross_attention_dim": 32,
        },
        latents=lambda g: torch.randn(BATCH, FRAMES * SIZE * SIZE, 4, generator=g),
        conditioning=lambda g: {**text(24)(g), "encoder_attention_mask": MASK},
        call=call_refiner,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff",),
        },
        unfound={
            "transformer_blocks.*.audio_*": "never called: the refiner has LTX2's weights, but no audio",
            "transformer_blocks.*.video_to_audio_attn": "never called: the refiner has LTX2's weights, but no audio",
        },
    ),
]
