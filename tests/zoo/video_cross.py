"""Video models of DiT blocks that read the text by cross-attention: LTX, Latte, Allegro."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import Tensor, nn

from .case import BATCH, ZooCase, text, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
#: The second prompt is shorter.
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
DIT = {
    "attn": ("transformer_blocks.*.attn1",),
    "cross_attn": ("transformer_blocks.*.attn2",),
    "ffn": ("transformer_blocks.*.ff",),
}
VIDEO_TOKENS, AUDIO_TOKENS = 64, 32


def call_ltx2(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Video and audio are denoised together: the latents are the tokens of both, one after the other."""
    video, audio = x.split([VIDEO_TOKENS, AUDIO_TOKENS], dim=1)
    sizes = {"num_frames": 4, "height": 4, "width": 4, "audio_num_frames": AUDIO_TOKENS}
    output = model(video, audio, timestep=timestep(t), sigma=timestep(t), **conditioning, **sizes)
    return torch.cat([output.sample, output.audio_sample], dim=1)


def call_allegro(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """With the rotary embedding of 4 frames of 4 by 4 tokens, as the pipeline makes it."""
    *frequencies, frames, rows, columns = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 4)
    positions = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T[:, None]
    return model(x, timestep=timestep(t), image_rotary_emb=(frequencies, tuple(positions)), **conditioning).sample


CASES = [
    ZooCase(
        "LTXVideoTransformer3DModel",
        config={**HEADS, **CHANNELS, "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 24},
        latents=lambda g: torch.randn(BATCH, 64, 4, generator=g),
        conditioning=lambda g: {**text(24)(g), "encoder_attention_mask": MASK},
        call=lambda model, x, t, c: (
            model(
                x,
                timestep=timestep(t),
                num_frames=4,
                height=4,
                width=4,
                rope_interpolation_scale=(8 / 25, 32.0, 32.0),
                **c,
            ).sample
        ),
        branches=DIT,
    ),
    ZooCase(
        "LTX2VideoTransformer3DModel",
        config={
            **HEADS,
            **CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 16,
            "audio_cross_attention_dim": 32,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
        },
        latents=lambda g: torch.randn(BATCH, VIDEO_TOKENS + AUDIO_TOKENS, 4, generator=g),
        conditioning=lambda g: {
            **text(24)(g),
            **text(24, name="audio_encoder_hidden_states")(g),
            "encoder_attention_mask": MASK,
            "audio_encoder_attention_mask": MASK,
        },
        call=call_ltx2,
        branches={
            "attn": ("transformer_blocks.*.attn1", "transformer_blocks.*.audio_attn1"),
            "cross_attn": (
                "transformer_blocks.*.attn2",
                "transformer_blocks.*.audio_attn2",
                "transformer_blocks.*.audio_to_video_attn",
                "transformer_blocks.*.video_to_audio_attn",
            ),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.audio_ff"),
        },
    ),
    ZooCase(
        "LatteTransformer3DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 16,
            "patch_size": 2,
            "video_length": 4,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "num_embeds_ada_norm": 1000,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 16, 16, generator=g),
        conditioning=text(24),
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample[:, :4],
        branches={
            "attn": ("transformer_blocks.*.attn1", "temporal_transformer_blocks.*.attn1"),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff", "temporal_transformer_blocks.*.ff"),
        },
    ),
    ZooCase(
        "AllegroTransformer3DModel",
        config={
            **CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 4,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {**text(24)(g), "encoder_attention_mask": MASK},
        call=call_allegro,
        branches=DIT,
    ),
]
