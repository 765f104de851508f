"""Wan and the models derived from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .case import BATCH, ZooCase, text, timestep

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
BRANCHES = {
    "attn": ("blocks.*.attn1",),
    "cross_attn": ("blocks.*.attn2",),
    "ffn": ("blocks.*.ffn",),
}
#: With an image, whose states come before 512 text tokens: their number is written into the attention.
IMAGE = {"image_dim": 24, "added_kv_proj_dim": 32}


def image_and_text(g: Generator) -> dict[str, Tensor]:
    return {**text(32, tokens=512)(g), **text(24, tokens=6, name="encoder_hidden_states_image")(g)}


def call_animate(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The channels of the reference and its mask stand beside the latents'."""
    others = dict(conditioning)
    return model(torch.cat([x, others.pop("condition")], dim=1), timestep(t), **others).sample


CASES = [
    ZooCase(
        "WanTransformer3DModel",
        config=WAN,
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=text(32),
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches=BRANCHES,
    ),
    ZooCase(
        "ChronoEditTransformer3DModel",
        config={**WAN, **IMAGE, "rope_temporal_skip_len": 8},
        latents=lambda g: torch.randn(BATCH, 4, 2, 16, 8, generator=g),
        conditioning=image_and_text,
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches=BRANCHES,
    ),
    ZooCase(
        "SkyReelsV2Transformer3DModel",
        config={**WAN, "inject_sample_info": True, "num_frame_per_block": 2},
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=text(32),
        # Diffusion forcing: each frame has a timestep of its own.
        call=lambda model, x, t, c: (
            model(
                x,
                timestep(t)[:, None] * torch.tensor([1.0, 1.0, 0.9, 0.9]),
                enable_diffusion_forcing=True,
                fps=[1],
                **c,
            ).sample
        ),
        branches=BRANCHES,
    ),
    ZooCase(
        "WanVACETransformer3DModel",
        config={**WAN, "num_layers": 3, "ffn_dim": 160, "vace_layers": [0, 2], "vace_in_channels": 8},
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            "control_hidden_states": torch.randn(BATCH, 8, 4, 8, 8, generator=g),
            "control_hidden_states_scale": torch.tensor([1.0, 0.8]),
        },
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches={
            "attn": ("blocks.*.attn1", "vace_blocks.*.attn1"),
            "cross_attn": ("blocks.*.attn2", "vace_blocks.*.attn2"),
            "ffn": ("blocks.*.ffn", "vace_blocks.*.ffn"),
        },
    ),
    ZooCase(
        "WanAnimateTransformer3DModel",
        config={
            **WAN,
            **IMAGE,
            "num_layers": 4,
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {
            **image_and_text(g),
            "condition": torch.randn(BATCH, 8, 4, 8, 8, generator=g),
            "pose_hidden_states": torch.randn(BATCH, 4, 3, 8, 8, generator=g),
            "face_pixel_values": torch.randn(BATCH, 3, 12, 16, 16, generator=g),
        },
        call=call_animate,
        branches={**BRANCHES, "cross_attn": ("blocks.*.attn2", "face_adapter.*")},
    ),
    ZooCase(
        "AnyFlowTransformer3DModel",
        config=WAN,
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=text(32),
        # It jumps from one time to another, and takes both for each frame.
        call=lambda model, x, t, c: (
            model(x, timestep(t)[:, None].expand(-1, 4), timestep(0.8 * t)[:, None].expand(-1, 4), **c).sample
        ),
        branches=BRANCHES,
    ),
]
