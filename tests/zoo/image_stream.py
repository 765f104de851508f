"""Image models that run text and image, or one of them, in a single stream of tokens."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers import transformer_ideogram4 as ideogram

from .case import BATCH, ZooCase, position_grid, text, timestep
from .image_joint import HEADS, LAYERS, image, tokens

TEXT = 8


def _ideogram(model, x, t, c):
    """Text first, then the image's tokens; each half of the sequence is masked where it is not."""
    image_positions = torch.arange(TEXT + x.shape[1]) >= TEXT
    indicator = torch.where(image_positions, ideogram.OUTPUT_IMAGE_INDICATOR, ideogram.LLM_TOKEN_INDICATOR)
    positions = torch.cat((torch.zeros(TEXT, 3), position_grid(1, 8, 8)))
    output = model(
        hidden_states=torch.nn.functional.pad(x, (0, 0, TEXT, 0)),
        timestep=timestep(t, 1.0, x.dtype),
        encoder_hidden_states=torch.nn.functional.pad(c["encoder_hidden_states"], (0, 0, 0, x.shape[1])),
        position_ids=positions.long().expand(BATCH, -1, -1),
        segment_ids=torch.zeros(BATCH, len(image_positions), dtype=torch.long),
        indicator=indicator.expand(BATCH, -1),
    ).sample
    return output[:, TEXT:]


CASES = [
    ZooCase(
        "PRXTransformer2DModel",
        config={
            "in_channels": 4,
            "context_in_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        latents=image(),
        conditioning=text(32),
        call=lambda model, x, t, c: model(hidden_states=x, timestep=timestep(t, 1.0, x.dtype), **c).sample,
        branches={"attn": ("blocks.*.attention",), "ffn": ("blocks.*.down_proj",)},
    ),
    ZooCase(
        "Krea2Transformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 64,
            "axes_dims_rope": (4, 6, 6),
        },
        latents=tokens(),
        conditioning=lambda g: {"encoder_hidden_states": torch.randn(BATCH, TEXT, 2, 32, generator=g)},
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                timestep=timestep(t, 1.0, x.dtype),
                position_ids=torch.cat((torch.zeros(TEXT, 3), position_grid(1, 8, 8))),
                **c,
            ).sample
        ),
        branches={
            "attn": (
                "text_fusion.layerwise_blocks.*.attn",
                "text_fusion.refiner_blocks.*.attn",
                "transformer_blocks.*.attn",
            ),
            "ffn": (
                "text_fusion.layerwise_blocks.*.ff",
                "text_fusion.refiner_blocks.*.ff",
                "transformer_blocks.*.ff",
            ),
        },
    ),
    ZooCase(
        "Ideogram4Transformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 32,
            "mrope_section": (4, 2, 2),
        },
        latents=tokens(),
        conditioning=text(32),
        call=_ideogram,
        branches={"attn": ("layers.*.attention",), "ffn": ("layers.*.feed_forward",)},
    ),
    ZooCase(
        "Flux3Transformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        latents=tokens(),
        conditioning=lambda g: {
            **text(32)(g),
            "image_cond_hidden_states": torch.randn(BATCH, 16, 4, generator=g),
        },
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                timestep=timestep(t, 1.0, x.dtype),
                img_ids=position_grid(1, 8, 8, 1),
                txt_ids=position_grid(1, 1, 1, TEXT),
                image_cond_ids=1 + position_grid(1, 4, 4, 1),
                **c,
            ).sample
        ),
        branches={
            "attn_ffn": (
                "txt_mode_blocks.*.attn",
                "mode_blocks.image.*.attn",
                "mode_blocks.image_cond.*.attn",
                "single_transformer_blocks.*.attn",
            ),
        },
        joined={
            "attn_ffn": (
                "txt_mode_blocks.*.ff",
                "mode_blocks.image.*.ff",
                "mode_blocks.image_cond.*.ff",
                "single_transformer_blocks.*.ff",
            ),
        },
    ),
    ZooCase(
        "LuminaNextDiT2DModel",
        config={
            **LAYERS,
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 32,
        },
        latents=image(),
        conditioning=text(32),
        call=lambda model, x, t, c: model(
            hidden_states=x,
            timestep=timestep(1 - t, 1.0, x.dtype),
            encoder_mask=torch.ones(BATCH, TEXT),
            cross_attention_kwargs={},
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(16, 16, 16),
            **c,
        ).sample[:, :4],
        # Self- and cross-attention are mixed before one projection.
        branches={"attn": ("layers.*.attn2.to_out.0",), "ffn": ("layers.*.feed_forward",)},
    ),
    ZooCase(
        "OmniGenTransformer2DModel",
        config={
            **LAYERS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "pad_token_id": 0,
            "vocab_size": 100,
            "time_step_dim": 32,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        latents=image(),
        conditioning=lambda g: {"input_ids": torch.randint(100, (BATCH, TEXT), generator=g)},
        call=lambda model, x, t, c: (
            model(
                hidden_states=x,
                timestep=timestep(1 - t, 1.0, x.dtype),
                input_ids=c["input_ids"],
                # One picture of the user's, of 2 by 2 patches, in the middle of the text.
                input_img_latents=[x[:1, :, :4, :4]],
                input_image_sizes={0: [[2, 6]]},
                attention_mask=torch.ones(BATCH, TEXT + 65, TEXT + 65, dtype=torch.long),
                position_ids=torch.arange(TEXT + 65).expand(BATCH, -1),
            ).sample
        ),
        branches={"attn": ("layers.*.self_attn",), "ffn": ("layers.*.mlp",)},
    ),
    ZooCase(
        "BriaFibo2Transformer2DModel",
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        latents=image(),
        conditioning=lambda g: {"encoder_hidden_states": torch.randn(BATCH, 3, TEXT, 32, generator=g)},
        call=lambda model, x, t, c: model(hidden_states=x, timestep=timestep(t, 1.0, x.dtype), **c).sample,
        branches={
            "attn": ("noise_refiner.*.attention", "layers.*.attention", "perceiver.layers.*.self_attention"),
            "cross_attn": ("layers.*.cross_attention", "perceiver.layers.*.cross_attention"),
            "ffn": ("noise_refiner.*.feed_forward", "layers.*.feed_forward", "perceiver.layers.*.ffn"),
        },
    ),
    ZooCase(
        "QwenImage21Transformer2DModel",
        config={
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "out_channels": 4,
            "context_in_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        latents=tokens(),
        conditioning=text(32),
        call=lambda model, x, t, c: model(
            hidden_states=x,
            timestep=timestep(t, 1.0, x.dtype),
            img_shapes=[[(1, 8, 8)]] * BATCH,
            # A slot of the vision-language encoder stands for two by two tokens.
            img_mask=(torch.arange(TEXT + 16) >= TEXT).expand(BATCH, -1),
            **c,
        ).sample[:, -64:],
        branches={"attn": ("transformer_blocks.*.attn",), "ffn": ("transformer_blocks.*.img_mlp",)},
    ),
]
