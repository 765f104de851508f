"""Image models that attend over text and image together."""

from __future__ import annotations

import torch

from .case import BATCH, ZooCase, position_grid, text, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LAYERS = {"num_layers": 2}


def tokens(channels: int = 4):
    """Latents in a row: 64 tokens, the patches of an 8 by 8 grid."""
    return lambda g: torch.randn(BATCH, 64, channels, generator=g)


def image(channels: int = 4, size: int = 16):
    return lambda g: torch.randn(BATCH, channels, size, size, generator=g)


def _cogview(model, x, t, c):
    size = torch.full((BATCH, 2), 16.0, dtype=x.dtype)
    return model(
        hidden_states=x,
        timestep=timestep(t),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros_like(size),
        **c,
    ).sample


CASES = [
    *(
        ZooCase(
            name,
            config={
                **HEADS,
                **LAYERS,
                "in_channels": 4,
                "out_channels": 4,
                "text_embed_dim": 32,
                "time_embed_dim": 32,
                "condition_dim": 16,
                "pos_embed_max_size": 16,
                "sample_size": 16,
                **rope,
            },
            latents=image(),
            conditioning=text(32),
            call=_cogview,
            branches={"attn": ("transformer_blocks.*.attn1",), "ffn": ("transformer_blocks.*.ff",)},
            calls=calls,
            unfound=unfound,
        )
        for name, rope, calls, unfound in (
            ("CogView3PlusTransformer2DModel", {}, {}, {}),
            (
                "CogView4Transformer2DModel",
                {"rope_axes_dim": (16, 16)},
                # Image and text go through it one after the other.
                {"transformer_blocks.*.ff": 2},
                {"transformer_blocks.1.ff#2": "nothing uses the last block's text"},
            ),
        )
    ),
    ZooCase(
        "Flux2Transformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        latents=tokens(),
        conditioning=text(32),
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                timestep=timestep(t, 1.0, x.dtype),
                guidance=torch.full((BATCH,), 3.5, dtype=x.dtype),
                img_ids=position_grid(1, 8, 8, 1),
                txt_ids=position_grid(1, 1, 1, 8),
                **c,
            ).sample
        ),
        branches={
            "attn": ("transformer_blocks.*.attn",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
            "attn_ffn": ("single_transformer_blocks.*.attn",),
        },
    ),
    ZooCase(
        "BriaFiboTransformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 6, 6],
            "text_encoder_dim": 16,
        },
        latents=tokens(),
        conditioning=lambda g: {
            **text(32)(g),
            "layers": torch.randn(4, BATCH, 8, 16, generator=g),
        },
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                encoder_hidden_states=c["encoder_hidden_states"],
                text_encoder_layers=list(c["layers"]),
                timestep=timestep(t, 1000.0, x.dtype),
                img_ids=position_grid(1, 8, 8),
                txt_ids=torch.zeros(8, 3),
            ).sample
        ),
        branches={
            "attn": ("transformer_blocks.*.attn",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
            "attn_ffn": ("single_transformer_blocks.*.proj_out",),
        },
    ),
    ZooCase(
        "QwenImageTransformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        latents=tokens(16),
        conditioning=text(32),
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                timestep=timestep(t, 1.0, x.dtype),
                img_shapes=[[(1, 8, 8)]] * BATCH,
                encoder_hidden_states_mask=torch.ones(BATCH, 8, dtype=torch.bool),
                **c,
            ).sample
        ),
        branches={
            "attn": ("transformer_blocks.*.attn",),
            "ffn": ("transformer_blocks.*.img_mlp", "transformer_blocks.*.txt_mlp"),
        },
        unfound={"transformer_blocks.1.txt_mlp": "nothing uses the last block's text"},
    ),
    ZooCase(
        "ZImageTransformer2DModel",
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32],
        },
        latents=image(),
        conditioning=text(32, tokens=32),
        call=lambda model, x, t, c: torch.stack(
            model(
                [picture[:, None] for picture in x],
                timestep(t, 1.0, x.dtype),
                list(c["encoder_hidden_states"]),
            ).sample
        )[:, :, 0],
        branches={
            "attn": ("noise_refiner.*.attention", "context_refiner.*.attention", "layers.*.attention"),
            "ffn": ("noise_refiner.*.feed_forward", "context_refiner.*.feed_forward", "layers.*.feed_forward"),
        },
    ),
    ZooCase(
        "HiDreamImageTransformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_single_layers": 2,
            "caption_channels": [32, 16],
            "text_emb_dim": 32,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1, 2, 3],
        },
        latents=image(),
        conditioning=lambda g: {
            "encoder_hidden_states_t5": torch.randn(BATCH, 8, 32, generator=g),
            "encoder_hidden_states_llama3": torch.randn(4, BATCH, 8, 16, generator=g),
            "pooled_embeds": torch.randn(BATCH, 32, generator=g),
        },
        call=lambda model, x, t, c: model(hidden_states=x, timesteps=timestep(t), **c).sample,
        branches={
            "attn": ("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
            "ffn": (
                "double_stream_blocks.*.block.ff_i",
                "double_stream_blocks.*.block.ff_t",
                "single_stream_blocks.*.block.ff_i",
            ),
        },
    ),
    ZooCase(
        "HunyuanDiT2DModel",
        config={
            **HEADS,
            "num_layers": 4,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 16,
            "hidden_size": 32,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 32,
            "text_len": 8,
            "text_len_t5": 8,
        },
        latents=image(),
        conditioning=lambda g: {
            **text(32)(g),
            **text(32, name="encoder_hidden_states_t5")(g),
            "style": torch.zeros(BATCH, dtype=torch.long),
        },
        call=lambda model, x, t, c: model(
            hidden_states=x,
            timestep=timestep(t),
            text_embedding_mask=torch.ones(BATCH, 8),
            text_embedding_mask_t5=torch.ones(BATCH, 8),
            image_meta_size=torch.full((BATCH, 6), 16.0, dtype=x.dtype),
            image_rotary_emb=(torch.ones(64, 16), torch.full((64, 16), 0.1)),
            **c,
        ).sample[:, :4],
        branches={
            "attn": ("blocks.*.attn1", "time_extra_emb.pooler"),
            "cross_attn": ("blocks.*.attn2",),
            "ffn": ("blocks.*.ff",),
        },
        unfound={"time_extra_emb.pooler": "attention that pools the text into one vector, added to no residual stream"},
    ),
]
