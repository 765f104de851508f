"""Video models whose text and video tokens attend jointly: CogVideoX and ConsisID, HunyuanVideo, Mochi, EasyAnimate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .case import BATCH, ZooCase, text, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
#: The second prompt is shorter.
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
HUNYUAN = {
    **HEADS,
    **CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
HUNYUAN_BRANCHES = {
    "attn": ("transformer_blocks.*.attn", "context_embedder.token_refiner.refiner_blocks.*.attn"),
    "ffn": (
        "transformer_blocks.*.ff",
        "transformer_blocks.*.ff_context",
        "context_embedder.token_refiner.refiner_blocks.*.ff",
    ),
    "attn_ffn": ("single_transformer_blocks.*.proj_out",),
}


def rotary(tokens: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a rotary embedding, each ``[tokens, width]``, neighbours in pairs."""
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 2)
    angles = (torch.arange(tokens)[:, None] * frequencies).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def call_consisid(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The face's features are one tensor for each scale of the extractor."""
    features = {**conditioning, "id_vit_hidden": list(conditioning["id_vit_hidden"])}
    return model(x, timestep=timestep(t), image_rotary_emb=rotary(64), **features).sample


CASES = [
    ZooCase(
        "CogVideoXTransformer3DModel",
        config={
            **HEADS,
            **CHANNELS,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 13,
            "max_text_seq_length": 8,
            "use_rotary_positional_embeddings": True,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=text(32),
        call=lambda model, x, t, c: model(x, timestep=timestep(t), image_rotary_emb=rotary(64), **c).sample,
        branches={"attn": ("transformer_blocks.*.attn1",), "ffn": ("transformer_blocks.*.ff",)},
    ),
    ZooCase(
        "HunyuanVideoTransformer3DModel",
        config=HUNYUAN,
        latents=lambda g: torch.randn(BATCH, 4, 4, 4, 4, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            "encoder_attention_mask": MASK,
            "pooled_projections": torch.randn(BATCH, 16, generator=g),
            "guidance": torch.full((BATCH,), 6000.0),
        },
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches=HUNYUAN_BRANCHES,
    ),
    ZooCase(
        "HunyuanVideo15Transformer3DModel",
        config={
            **HEADS,
            **CHANNELS,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "text_embed_dim": 32,
            "text_embed_2_dim": 16,
            "image_embed_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 4, 4, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            "encoder_attention_mask": MASK,
            "encoder_hidden_states_2": torch.randn(BATCH, 4, 16, generator=g),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
            "image_embeds": torch.randn(BATCH, 4, 24, generator=g),
        },
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        # Nothing reads the text after the last block, but its feed-forward runs: the blocks are captured one by one.
        branches={kind: patterns for kind, patterns in HUNYUAN_BRANCHES.items() if kind != "attn_ffn"},
    ),
    ZooCase(
        "MochiTransformer3DModel",
        config={
            **HEADS,
            **CHANNELS,
            "num_layers": 3,
            "pooled_projection_dim": 24,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {**text(32)(g), "encoder_attention_mask": MASK.bool()},
        call=lambda model, x, t, c: model(x, timestep=timestep(t), **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
        },
        unfound={"time_embed.pooler": "attention that pools the text into one vector, added to no residual stream"},
    ),
    ZooCase(
        "HunyuanVideoFramepackTransformer3DModel",
        config={
            **HUNYUAN,
            "patch_size": 2,
            "has_image_proj": True,
            "image_proj_dim": 24,
            "has_clean_x_embedder": True,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            "encoder_attention_mask": MASK,
            "pooled_projections": torch.randn(BATCH, 16, generator=g),
            "image_embeds": torch.randn(BATCH, 4, 24, generator=g),
            "guidance": torch.full((BATCH,), 6000.0),
            "indices_latents": torch.arange(8, 12),
            "latents_clean": torch.randn(BATCH, 4, 2, 8, 8, generator=g),
            "indices_latents_clean": torch.tensor([0, 7]),
            "latents_history_2x": torch.randn(BATCH, 4, 2, 8, 8, generator=g),
            "indices_latents_history_2x": torch.arange(5, 7),
            "latents_history_4x": torch.randn(BATCH, 4, 4, 8, 8, generator=g),
            "indices_latents_history_4x": torch.arange(1, 5),
        },
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches=HUNYUAN_BRANCHES,
    ),
    ZooCase(
        "ConsisIDTransformer3DModel",
        config={
            **CHANNELS,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 4,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 13,
            "max_text_seq_length": 8,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 16,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 16,
            "LFE_vit_dim": 24,
            "LFE_depth": 4,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 2,
            "LFE_num_scale": 2,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            "id_cond": torch.randn(BATCH, 16, generator=g),
            "id_vit_hidden": torch.randn(2, BATCH, 6, 24, generator=g),
        },
        call=call_consisid,
        branches={
            "attn": ("transformer_blocks.*.attn1", "local_facial_extractor.layers.*.0"),
            "cross_attn": ("perceiver_cross_attention.*",),
            "ffn": ("transformer_blocks.*.ff", "local_facial_extractor.layers.*.1"),
        },
    ),
    ZooCase(
        "EasyAnimateTransformer3DModel",
        config={
            **HEADS,
            **CHANNELS,
            "patch_size": 2,
            "num_layers": 3,
            "mmdit_layers": 3,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "add_norm_text_encoder": True,
            "after_norm": True,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=text(32),
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.txt_ff"),
        },
        unfound={"transformer_blocks.2.txt_ff": "nothing reads the last block's text"},
    ),
]
