"""Image models of the first years: DiT, PixArt, SD3, Flux."""

from __future__ import annotations

import torch

from .case import BATCH, ZooCase, position_grid, text, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

CASES = [
    ZooCase(
        "SD3Transformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "sample_size": 16,
            "patch_size": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        latents=lambda g: torch.randn(BATCH, 4, 16, 16, generator=g),
        conditioning=lambda g: {**text(32)(g), "pooled_projections": torch.randn(BATCH, 32, generator=g)},
        call=lambda model, x, t, c: model(hidden_states=x, timestep=timestep(t), **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
        },
    ),
    ZooCase(
        "FluxTransformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        latents=lambda g: torch.randn(BATCH, 64, 4, generator=g),
        conditioning=lambda g: {**text(32)(g), "pooled_projections": torch.randn(BATCH, 32, generator=g)},
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                timestep=timestep(t, 1.0, x.dtype),
                img_ids=position_grid(1, 8, 8),
                txt_ids=torch.zeros(8, 3),
                **c,
            ).sample
        ),
        branches={
            "attn": ("transformer_blocks.*.attn",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
            "attn_ffn": ("single_transformer_blocks.*.proj_out",),
        },
    ),
]
