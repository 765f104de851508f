"""Image models of the last year, and models that edit images: Ernie, GLM, Hunyuan, JoyImage, Nucleus.

And the image transformers inside of U-Nets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .case import BATCH, ZooCase, text, timestep

SIZE, CHANNELS = 16, 4
TEXT_MASK = ((1,) * 8, (1,) * 6 + (0,) * 2)
JOY_IMAGE = {
    "in_channels": CHANNELS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}
UNUSED_TEXT = {"double_blocks.1.txt_mlp": "nothing uses the last block's text"}
JOINT_STREAMS = {"attn": ("double_blocks.*.attn",), "ffn": ("double_blocks.*.img_mlp", "double_blocks.*.txt_mlp")}


def image(g: Generator) -> Tensor:
    return torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=g)


def text_mask() -> Tensor:
    return torch.tensor(TEXT_MASK, dtype=torch.bool)


def glm_image(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    return model(
        x,
        prior_token_drop=torch.zeros(BATCH, SIZE * SIZE // 4, dtype=torch.bool),
        timestep=timestep(t),
        target_size=torch.full((BATCH, 2), 8.0 * SIZE, dtype=x.dtype),
        crop_coords=torch.zeros(BATCH, 2, dtype=x.dtype),
        **c,
    ).sample


def joy_image(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    """The image to be edited and the new one are two items, ``[batch, items, channels, frames, height, width]``."""
    items = torch.stack([c["source"], x], dim=1)
    return model(items, timestep(t), c["encoder_hidden_states"]).sample[:, 1]


def joy_image_plus(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    """Patches of the new image, then of the references; the second sample has a shorter reference, padded."""
    patches = torch.cat([x, c["references"]], dim=1)
    shapes = [[(1, 8, 8), (1, 4, 4)], [(1, 8, 8), (1, 2, 4)]]
    out = model(patches, timestep(t), c["encoder_hidden_states"], text_mask(), shapes).sample
    return out[:, : x.shape[1]]


CASES = [
    ZooCase(
        "HunyuanImageTransformer2DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "patch_size": (2, 2),
            "text_embed_dim": 24,
            "rope_axes_dim": (8, 8),
        },
        latents=image,
        conditioning=text(24),
        call=lambda model, x, t, c: model(x, timestep(t), encoder_attention_mask=text_mask(), **c).sample,
        branches={
            "attn": ("context_embedder.token_refiner.refiner_blocks.*.attn", "transformer_blocks.*.attn"),
            "ffn": (
                "context_embedder.token_refiner.refiner_blocks.*.ff",
                "transformer_blocks.*.ff",
                "transformer_blocks.*.ff_context",
            ),
            "attn_ffn": ("single_transformer_blocks.*.proj_out",),
        },
    ),
    ZooCase(
        "GlmImageTransformer2DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        latents=image,
        conditioning=lambda g: {
            **text(24)(g),
            "prior_token_id": torch.randint(32, (BATCH, SIZE * SIZE // 4), generator=g),
        },
        call=glm_image,
        # One feed-forward serves both streams, first the image and then the text.
        branches={"attn": ("transformer_blocks.*.attn1",), "ffn": ("transformer_blocks.*.ff",)},
        calls={"transformer_blocks.*.ff": 2},
        unfound={"transformer_blocks.1.ff#2": "nothing uses the last block's text"},
    ),
    ZooCase(
        "ErnieImageTransformer2DModel",
        config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        latents=lambda g: torch.randn(BATCH, CHANNELS, 8, 8, generator=g),
        conditioning=text(24, name="text_bth"),
        call=lambda model, x, t, c: model(x, timestep(t), text_lens=text_mask().sum(dim=1), **c).sample,
        branches={"attn": ("layers.*.self_attention",), "ffn": ("layers.*.mlp",)},
    ),
    ZooCase(
        "JoyImageEditTransformer3DModel",
        config=JOY_IMAGE,
        latents=lambda g: torch.randn(BATCH, CHANNELS, 1, SIZE, SIZE, generator=g),
        conditioning=lambda g: {**text(24)(g), "source": torch.randn(BATCH, CHANNELS, 1, SIZE, SIZE, generator=g)},
        call=joy_image,
        branches=JOINT_STREAMS,
        unfound=UNUSED_TEXT,
    ),
    ZooCase(
        "JoyImageEditPlusTransformer3DModel",
        config=JOY_IMAGE,
        latents=lambda g: torch.randn(BATCH, 64, CHANNELS, 1, 2, 2, generator=g),
        conditioning=lambda g: {**text(24)(g), "references": torch.randn(BATCH, 16, CHANNELS, 1, 2, 2, generator=g)},
        call=joy_image_plus,
        branches=JOINT_STREAMS,
        unfound=UNUSED_TEXT,
    ),
    ZooCase(
        "NucleusMoEImageTransformer2DModel",
        config={
            "patch_size": 1,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 32,
            "capacity_factors": 2.0,
        },
        latents=lambda g: torch.randn(BATCH, 64, CHANNELS, generator=g),
        conditioning=text(24),
        call=lambda model, x, t, c: (
            model(
                x,
                img_shapes=[(1, 8, 8)] * BATCH,
                encoder_hidden_states_mask=text_mask(),
                timestep=timestep(t, 1.0),
                **c,
            ).sample
        ),
        branches={"attn": ("transformer_blocks.*.attn",), "ffn": ("transformer_blocks.*.img_mlp",)},
    ),
    ZooCase(
        "Transformer2DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
        },
        latents=lambda g: torch.randn(BATCH, 32, 8, 8, generator=g),
        conditioning=text(24),
        call=lambda model, x, t, c: model(x, **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
    ZooCase(
        "DreamLiteTransformer2DModel",
        config={
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 32,
            "num_layers": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "use_linear_projection": True,
            "qk_norm": "rms_norm",
            "ff_mult": 3,
        },
        latents=lambda g: torch.randn(BATCH, 32, 8, 8, generator=g),
        conditioning=text(24),
        call=lambda model, x, t, c: model(x, **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
]
