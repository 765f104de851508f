"""The models that correctness is tested on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Generator, Tensor, nn

from smoothcache_fx.demo.model import DiT as DemoDiT

from .cases import Branch, Case, Conditioning
from .inline_dits import (
    CHANNELS,
    LABELS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    TOKENS,
    AdaLNZeroBlock,
    CrossAttentionBlock,
    FlatBlock,
    InlineDiT,
    JointDiT,
    ParallelBlock,
    PostNormBlock,
    SingleStreamBlock,
    UngatedBlock,
)

BATCH = 2

# Written out in inline_dits.py


def _inline(name: str, make: Callable[[], nn.Module], branches: Mapping[str, Branch], shared_matmuls: int = 0) -> Case:
    return Case(
        name,
        make,
        latents=lambda g: torch.randn(BATCH, TOKENS, CHANNELS, generator=g),
        conditioning=lambda g: {
            "label": torch.randint(LABELS, (BATCH,), generator=g),
            "text": torch.randn(BATCH, TEXT_TOKENS, TEXT_WIDTH, generator=g),
        },
        call=lambda model, x, t, c: model(x, torch.full((BATCH,), t, dtype=x.dtype), **c),
        branches=branches,
        shared_matmuls=shared_matmuls,
    )


def _per_block(depth: int, template: Mapping[str, Branch], prefix: str = "blocks") -> dict[str, Branch]:
    """``template`` for each block, ``attn`` completed to ``blocks.0.attn``; '' is the block itself."""
    return {
        f"{prefix}.{index}.{name}".rstrip("."): replace(branch, module=f"{prefix}.{index}.{branch.module}")
        for index in range(depth)
        for name, branch in template.items()
    }


ATTN = Branch("attn", "attn", matmuls=2)
CROSS = Branch("cross_attn", "cross_attn", matmuls=3)
MLP = Branch("mlp", "ffn", matmuls=2)
FLAT = {"attn": Branch("out", "attn", matmuls=4), "ffn": Branch("down", "ffn", matmuls=3)}
INLINE = [
    _inline(
        "adaln_zero",
        lambda: InlineDiT(AdaLNZeroBlock(), AdaLNZeroBlock(), AdaLNZeroBlock()),
        _per_block(3, {"attn": ATTN, "mlp": MLP}),
    ),
    _inline(
        "ungated",
        lambda: InlineDiT(UngatedBlock(), UngatedBlock()),
        _per_block(2, {"attn": ATTN, "mlp": MLP}),
    ),
    _inline(
        "parallel",
        lambda: InlineDiT(ParallelBlock(), ParallelBlock()),
        _per_block(2, {"attn": ATTN, "mlp": MLP}),
    ),
    _inline(
        "cross_attention",
        lambda: InlineDiT(CrossAttentionBlock(), CrossAttentionBlock()),
        _per_block(2, {"attn": ATTN, "cross_attn": CROSS, "mlp": MLP}),
    ),
    _inline(
        "post_norm",
        lambda: InlineDiT(PostNormBlock(), PostNormBlock()),
        _per_block(2, {"attn": ATTN, "mlp": MLP}),
    ),
    _inline("flat", lambda: InlineDiT(FlatBlock(), FlatBlock()), _per_block(2, FLAT), shared_matmuls=1),
    _inline(
        "single_stream",
        lambda: InlineDiT(SingleStreamBlock(), SingleStreamBlock()),
        _per_block(2, {"": Branch("linear2", "attn_ffn", matmuls=2)}),
    ),
    _inline(
        "joint",
        lambda: JointDiT(2),
        _per_block(
            2,
            {
                "attn": Branch("attn", "attn", matmuls=4, outputs=2),
                "mlp": MLP,
                "text_mlp": Branch("text_mlp", "ffn", matmuls=2),
            },
        ),
    ),
    _inline(
        "tied",
        lambda: InlineDiT(*[AdaLNZeroBlock()] * 2, UngatedBlock()),
        {
            "blocks.0.attn": replace(ATTN, module="blocks.0.attn"),
            "blocks.0.mlp": replace(MLP, module="blocks.0.mlp"),
            "blocks.0.attn#2": replace(ATTN, module="blocks.0.attn", call=1),
            "blocks.0.mlp#2": replace(MLP, module="blocks.0.mlp", call=1),
            "blocks.1.attn": replace(ATTN, module="blocks.1.attn"),
            "blocks.1.mlp": replace(MLP, module="blocks.1.mlp"),
        },
    ),
]

# diffusers' transformers, at small sizes

IMAGE = (4, 8, 8)
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
INNER_WIDTH = 2 * 16
FF = Branch("ff", "ffn", matmuls=2)


def _timestep(t: float, dtype: torch.dtype | None = None) -> Tensor:
    """diffusers counts timesteps from 1000 down."""
    return torch.full((BATCH,), 1000 * t, dtype=dtype)


def _image(g: Generator) -> Tensor:
    return torch.randn(BATCH, *IMAGE, generator=g)


def _text(g: Generator) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(BATCH, TEXT_TOKENS, TEXT_WIDTH, generator=g)}


def _pooled_text(g: Generator) -> dict[str, Tensor]:
    return {**_text(g), "pooled_projections": torch.randn(BATCH, TEXT_WIDTH, generator=g)}


def _call_flux(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
    side = torch.arange(4, dtype=x.dtype)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
    positions = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1)
    return model(
        hidden_states=x,
        timestep=_timestep(t / 1000, x.dtype),
        img_ids=positions,
        txt_ids=torch.zeros(TEXT_TOKENS, 3, dtype=x.dtype),
        **c,
    ).sample


DIT = Case(
    "diffusers_dit",
    make=lambda: DiTTransformer2DModel(**SIZES, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=LABELS),
    latents=_image,
    conditioning=lambda g: {"class_labels": torch.randint(LABELS, (BATCH,), generator=g)},
    call=lambda model, x, t, c: model(hidden_states=x, timestep=_timestep(t).long(), **c).sample,
    branches=_per_block(2, {"attn1": Branch("attn1", "attn", matmuls=4), "ff": FF}, "transformer_blocks"),
)
PIXART = Case(
    "diffusers_pixart",
    make=lambda: PixArtTransformer2DModel(
        **SIZES,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=INNER_WIDTH,
        caption_channels=TEXT_WIDTH,
    ),
    latents=_image,
    conditioning=_text,
    call=lambda model, x, t, c: (
        model(
            hidden_states=x,
            timestep=_timestep(t).long(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            **c,
        ).sample
    ),
    branches=_per_block(
        2,
        {
            "attn1": Branch("attn1", "attn", matmuls=4),
            "attn2": Branch("attn2", "cross_attn", matmuls=4),
            "ff": FF,
        },
        "transformer_blocks",
    ),
    # The text's projection.
    shared_matmuls=2,
)
JOINT = {
    "attn": Branch("attn", "attn", matmuls=8, outputs=2),
    "ff": FF,
    "ff_context": Branch("ff_context", "ffn", matmuls=2),
}
SD3 = Case(
    "diffusers_sd3",
    make=lambda: SD3Transformer2DModel(
        **SIZES,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=INNER_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ),
    latents=_image,
    conditioning=_pooled_text,
    call=lambda model, x, t, c: model(hidden_states=x, timestep=_timestep(t), **c).sample,
    branches={
        **_per_block(2, JOINT, "transformer_blocks"),
        # The last block ends the text stream: its attention feeds one residual add, has no output projection
        # for text, and alone needs the modulation of its text input.
        "transformer_blocks.2.attn": Branch("transformer_blocks.2.attn", "attn", matmuls=8),
        "transformer_blocks.2.ff": replace(FF, module="transformer_blocks.2.ff"),
    },
    # Where all branches are reused nobody reads the text stream: its embedding and two modulations.
    shared_matmuls=3,
)
FLUX = Case(
    "diffusers_flux",
    make=lambda: FluxTransformer2DModel(
        **SIZES,
        num_layers=2,
        num_single_layers=2,
        patch_size=1,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    ),
    latents=lambda g: torch.randn(BATCH, 16, 4, generator=g),
    conditioning=_pooled_text,
    call=_call_flux,
    branches={
        **_per_block(2, JOINT, "transformer_blocks"),
        **_per_block(2, {"": Branch("proj_out", "attn_ffn", matmuls=5)}, "single_transformer_blocks"),
    },
)
DEMO = Case(
    "demo",
    make=lambda: DemoDiT(width=32, depth=3, heads=2, image_size=8, patch_size=2),
    latents=lambda g: torch.randn(BATCH, 1, 8, 8, generator=g),
    conditioning=lambda g: {"y": torch.randint(10, (BATCH,), generator=g)},
    call=lambda model, x, t, c: model(x, torch.full((BATCH,), t, dtype=x.dtype), **c),
    branches=_per_block(3, {"attn": ATTN, "mlp": MLP}),
)

CASES = {case.name: case for case in (*INLINE, DEMO, DIT, PIXART, SD3, FLUX)}
