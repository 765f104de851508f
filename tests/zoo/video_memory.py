"""Video models that see earlier frames or a reference beside the latents: Helios, AnyFlow FAR, Wan-Animate-2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Generator, Tensor, nn

from .case import BATCH, ZooCase, text, timestep
from .video_wan import BRANCHES, WAN

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
FRAME_TOKENS = 16


def indices(first: int, frames: int) -> Tensor:
    return torch.arange(first, first + frames).expand(BATCH, -1)


def keys_and_values(frames: int, generator: Generator) -> Tensor:
    """What a pass over other frames has left, as a model with its own weights would."""
    return torch.randn(LAYERS, 2, BATCH, frames * FRAME_TOKENS, HEADS, HEAD_DIM, generator=generator)


def call_far(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The second chunk of a video, four frames, after a first chunk of one frame."""
    others = dict(conditioning)
    memory = others.pop("memory").transpose(3, 4)
    cache = [{"full_cache": kept, "compressed_cache": kept[:, :, :, :0]} for kept in memory]
    times = timestep(t)[:, None].expand(-1, 4)
    flag = {"is_cache_step": False, "num_cached_chunks": 1}
    return model(x, times, 0.8 * times, chunk_partition=[1, 4], kv_cache=cache, kv_cache_flag=flag, **others).sample


def call_animate_2(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    """One frame more than the reference has, and lists of what there is one of for each video."""
    cache = WanAnimate2KVCache(LAYERS)
    for index, (key, value) in enumerate(conditioning["memory"]):
        cache.get(index).store(key, value)
    return torch.stack(
        model(
            list(x),
            timestep(t),
            list(conditioning["encoder_hidden_states"]),
            list(conditioning["condition"]),
            cache,
            "cached",
            4 * FRAME_TOKENS,
            encoder_hidden_states_image=conditioning["encoder_hidden_states_image"],
            reference_grid_sizes=torch.tensor([[3, 4, 4]] * BATCH),
            origin_len=9,
            origin_area=[64, 64],
        ).sample
    )


CASES = [
    ZooCase(
        "HeliosTransformer3DModel",
        config={
            **{key: value for key, value in WAN.items() if key != "rope_max_seq_len"},
            "rope_dim": (4, 6, 6),
            "is_amplify_history": True,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            "indices_hidden_states": indices(8, 4),
            "latents_history_short": torch.randn(BATCH, 4, 2, 8, 8, generator=g),
            "indices_latents_history_short": indices(6, 2),
            "latents_history_mid": torch.randn(BATCH, 4, 2, 8, 8, generator=g),
            "indices_latents_history_mid": indices(4, 2),
            "latents_history_long": torch.randn(BATCH, 4, 4, 8, 8, generator=g),
            "indices_latents_history_long": indices(0, 4),
        },
        call=lambda model, x, t, c: model(x, timestep(t), **c).sample,
        branches=BRANCHES,
    ),
    ZooCase(
        "AnyFlowFARTransformer3DModel",
        config={**WAN, "chunk_partition": (1, 4)},
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {**text(32)(g), "memory": keys_and_values(1, g)},
        call=call_far,
        branches=BRANCHES,
    ),
    ZooCase(
        "WanAnimate2Transformer3DModel",
        config={
            "text_len": 8,
            "in_dim": 12,
            "dim": HEADS * HEAD_DIM,
            "ffn_dim": 64,
            "freq_dim": 16,
            "text_dim": 32,
            "out_dim": 4,
            "num_heads": HEADS,
            "num_layers": LAYERS,
        },
        latents=lambda g: torch.randn(BATCH, 4, 4, 8, 8, generator=g),
        conditioning=lambda g: {
            **text(32)(g),
            **text(1280, tokens=6, name="encoder_hidden_states_image")(g),
            "condition": torch.randn(BATCH, 8, 4, 8, 8, generator=g),
            "memory": keys_and_values(3, g),
        },
        call=call_animate_2,
        branches={"attn": ("blocks.*.self_attn",), "cross_attn": ("blocks.*.cross_attn",), "ffn": ("blocks.*.ffn",)},
    ),
]
