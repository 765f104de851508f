"""Video with text and sound in one sequence, video of worlds, motion, and proteins."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .case import BATCH, ZooCase, position_grid, text, timestep

CHANNELS, FRAMES = 4, 4
TEXT_TOKENS, AUDIO_TOKENS, VIDEO_TOKENS = 8, 8, 64
RESIDUES, LATENT = 64, 6


def video(g: Generator) -> Tensor:
    """64 tokens where patches are 1 x 2 x 2."""
    return torch.randn(BATCH, CHANNELS, FRAMES, 8, 8, generator=g)


def cosmos(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    return model(x, timestep(t, 1.0, x.dtype), fps=24, **c).sample


def cosmos3(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    """Both videos are packed into one sequence without a batch dimension, after the text."""
    tokens = BATCH * VIDEO_TOKENS
    grid = position_grid(BATCH * FRAMES, 4, 4).long().T + TEXT_TOKENS
    after_text = torch.arange(TEXT_TOKENS, TEXT_TOKENS + tokens)
    out = model(
        text_indexes=torch.arange(TEXT_TOKENS),
        position_ids=torch.cat([torch.arange(TEXT_TOKENS).expand(3, -1), grid], dim=1),
        und_len=TEXT_TOKENS,
        sequence_length=TEXT_TOKENS + tokens,
        vision_tokens=list(x.split(1)),
        vision_token_shapes=[(FRAMES, 4, 4)] * BATCH,
        vision_sequence_indexes=after_text,
        vision_mse_loss_indexes=after_text,
        vision_timesteps=torch.full((tokens,), 1000.0 * t),
        vision_noisy_frame_indexes=[torch.arange(FRAMES)] * BATCH,
        **c,
    )
    return torch.cat(out.sample)


def minimax_h3(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    """Rows of the packed sequence: text, then video, then audio; the latents' rows are video's and audio's."""
    frames, rows = x.split([VIDEO_TOKENS, AUDIO_TOKENS], dim=1)
    sizes = torch.tensor([TEXT_TOKENS, VIDEO_TOKENS, AUDIO_TOKENS])
    text_rows, video_rows, audio_rows = torch.arange(int(sizes.sum())).split(sizes.tolist())
    along = torch.arange(max(TEXT_TOKENS, AUDIO_TOKENS), dtype=torch.float32)[:, None].expand(-1, 3)
    out = model(
        hidden_states=frames,
        audio_hidden_states=rows,
        # The text's timestep is zero.
        timestep=torch.tensor([0.0, 1000.0 * t]),
        timestep_indices=torch.tensor([0, 1, 1]).repeat_interleave(sizes),
        token_tags=torch.tensor([1, 0, 2]).repeat_interleave(sizes),
        position_ids=torch.cat([along[:TEXT_TOKENS], position_grid(FRAMES, 4, 4), along[:AUDIO_TOKENS]]),
        video_indices=video_rows,
        audio_indices=audio_rows,
        text_indices=text_rows,
        **c,
    )
    return torch.cat([out.sample, out.audio_sample], dim=1)


def proteina(model: nn.Module, x: Tensor, t: float, c: Mapping[str, Tensor]) -> Tensor:
    """Latents are the coordinates of the alpha carbons, and each residue's latent vector."""
    mask = torch.ones(BATCH, RESIDUES, dtype=torch.bool)
    mask[1, -4:] = False
    now = torch.full((BATCH,), 1 - t, dtype=x.dtype)
    out = model(
        bb_ca=x[..., :3],
        local_latents=x[..., 3:],
        bb_ca_time=now,
        local_latents_time=now,
        padding_mask=mask,
        token_type=c["token_type"],
        conditioning={
            "is_in_context_conditioning": torch.zeros_like(mask),
            "supports_local_latent": torch.ones_like(mask),
            "molecule_iid": c["molecule"],
            "bond_mask": c["bonds"],
        },
    )
    return torch.cat([out.backbone, out.local_latents], dim=-1)


CASES = [
    ZooCase(
        "CosmosTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (8, 16, 16),
            # Its mask is resized by torchvision, which need not be there.
            "concat_padding_mask": False,
        },
        latents=video,
        conditioning=text(24),
        call=cosmos,
        branches={
            "attn": ("transformer_blocks.*.attn1",),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
    ZooCase(
        "Cosmos3OmniTransformer",
        config={
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 96,
            "latent_channel": CHANNELS,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "patch_latent_dim": 4 * CHANNELS,
            "rope_axes_dim": (4, 2, 2),
            "vocab_size": 32,
        },
        latents=video,
        conditioning=lambda g: {"input_ids": torch.randint(32, (TEXT_TOKENS,), generator=g)},
        call=cosmos3,
        # Causal attention over the text and full attention of the video over both: two residual adds.
        branches={
            "attn": ("layers.*.self_attn.to_out", "layers.*.self_attn.to_add_out"),
            "ffn": ("layers.*.mlp", "layers.*.mlp_moe_gen"),
        },
    ),
    ZooCase(
        "MotifVideoTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "text_embed_dim": 24,
            "image_embed_dim": 20,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        latents=video,
        conditioning=lambda g: {**text(24)(g), "image_embeds": torch.randn(BATCH, 4, 20, generator=g)},
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches={
            "attn": ("transformer_blocks.*.attn",),
            "cross_attn": ("transformer_blocks.*.cross_attn",),
            "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
            "attn_ffn": ("single_transformer_blocks.*.proj_out",),
        },
    ),
    ZooCase(
        "MiniMaxH3Transformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "ffn_dim": 96,
            "in_channels": 2,
            "audio_in_channels": 8,
            "text_dim": 24,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 32,
            "rope_freq_dim": 2,
        },
        latents=lambda g: torch.randn(BATCH, VIDEO_TOKENS + AUDIO_TOKENS, 8, generator=g),
        conditioning=text(24),
        call=minimax_h3,
        branches={
            "attn": ("token_refiner.refiner_blocks.*.attn", "transformer_blocks.*.attn"),
            "ffn": ("token_refiner.refiner_blocks.*.ff", "transformer_blocks.*.ff"),
        },
    ),
    ZooCase(
        # AnimateDiff's motion module: attention among the frames at each position, twice.
        "TransformerTemporalModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 2,
            "norm_num_groups": 8,
            "positional_embeddings": "sinusoidal",
            "num_positional_embeddings": 16,
        },
        latents=lambda g: torch.randn(BATCH, 16, 32, 4, 4, generator=g),
        conditioning=lambda g: {},
        call=lambda model, x, t, c: model(x.flatten(0, 1), num_frames=16).sample.unflatten(0, (BATCH, 16)),
        branches={
            "attn": ("transformer_blocks.*.attn1", "transformer_blocks.*.attn2"),
            "ffn": ("transformer_blocks.*.ff",),
        },
    ),
    ZooCase(
        "RFD4ProteinaTransformer",
        config={
            "nlayers": 3,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": LATENT,
            "token_type_emb_dim": 8,
            "t_emb_dim": 16,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask", "molecule_idx_pair"),
            "update_pair_repr_every_n": 1,
            "tri_mult_c": 16,
            "num_sequence_classes": 12,
        },
        latents=lambda g: torch.randn(BATCH, RESIDUES, 3 + LATENT, generator=g),
        conditioning=lambda g: {
            "token_type": torch.randint(7, (BATCH, RESIDUES), generator=g),
            "molecule": torch.randint(2, (BATCH, RESIDUES), generator=g),
            "bonds": torch.randint(2, (BATCH, RESIDUES, RESIDUES), generator=g),
        },
        call=proteina,
        branches={
            # A triangle's multiplication mixes the pairs as attention mixes tokens.
            "attn": (
                "transformer_layers.*.mhba.mha",
                "pair_update_layers.*.tri_mult_out",
                "pair_update_layers.*.tri_mult_in",
            ),
            "ffn": ("transformer_layers.*.transition.transition", "pair_update_layers.*.transition_out"),
        },
        unfound={
            "transition_c_1": "not added to what it is computed from",
            "transition_c_2": "not added to what it is computed from",
        },
    ),
]
