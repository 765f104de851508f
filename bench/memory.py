"""What caching takes and can gain for well-known models at their true sizes: ``python bench/memory.py``.

Models are built from their published configurations on the meta device, so nothing is allocated and nothing computed:
``explain`` counts FLOPs and bytes in the captured graph. Caches are for one image or video, with guidance as the
model's pipeline has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import write_result
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from smoothcache_fx.graphs.tables import format_bytes, format_table

STEPS = 50
RESULT = Path(__file__).parent / "results" / "memory.json"


@dataclass(frozen=True)
class Family:
    """A model at its true size.

    Attributes:
        make: the transformer, on the current device and in the current default dtype.
        inputs: of one call.
        size: what is made, in words.
        guided: samples that the transformer sees of one that is made: 2 with classifier-free guidance, in one batch
            or in two calls; 1 where guidance is an input of the model.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    size: str
    guided: int = 2


def tensor(*shape: int) -> Tensor:
    return torch.empty(shape)


def step() -> Tensor:
    return torch.empty(1, dtype=torch.float32)


def flux() -> Mapping[str, Any]:
    return {
        "hidden_states": tensor(1, 4096, 64),
        "encoder_hidden_states": tensor(1, 512, 4096),
        "pooled_projections": tensor(1, 768),
        "timestep": step(),
        "guidance": step(),
        "img_ids": tensor(4096, 3),
        "txt_ids": tensor(512, 3),
    }


def video(channels: int, frames: int, height: int, width: int, tokens: int) -> Mapping[str, Any]:
    return {
        "hidden_states": tensor(1, channels, frames, height, width),
        "timestep": step(),
        "encoder_hidden_states": tensor(1, tokens, 4096),
    }


def hunyuan() -> Mapping[str, Any]:
    return {
        **video(16, 33, 90, 160, 256),
        "encoder_attention_mask": torch.empty(1, 256, dtype=torch.int64),
        "pooled_projections": tensor(1, 768),
        "guidance": step(),
    }


def cogvideox() -> Mapping[str, Any]:
    return {
        "hidden_states": tensor(1, 13, 16, 60, 90),
        "encoder_hidden_states": tensor(1, 226, 4096),
        "timestep": step(),
        "image_rotary_emb": (tensor(13 * 30 * 45, 64), tensor(13 * 30 * 45, 64)),
    }


FAMILIES = {
    "DiT-XL/2": Family(
        lambda: diffusers.DiTTransformer2DModel(sample_size=32, out_channels=8, num_embeds_ada_norm=1000),
        lambda: {
            "hidden_states": tensor(1, 4, 32, 32),
            "timestep": torch.empty(1, dtype=torch.int64),
            "class_labels": torch.empty(1, dtype=torch.int64),
        },
        "256 x 256",
    ),
    "PixArt-Sigma": Family(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=128, cross_attention_dim=1152, caption_channels=4096, use_additional_conditions=False
        ),
        lambda: {
            "hidden_states": tensor(1, 4, 128, 128),
            "encoder_hidden_states": tensor(1, 300, 4096),
            "timestep": step(),
        },
        "1024 x 1024",
    ),
    "SD 3.5 Large": Family(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            out_channels=16,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
        lambda: {
            "hidden_states": tensor(1, 16, 128, 128),
            "encoder_hidden_states": tensor(1, 333, 4096),
            "pooled_projections": tensor(1, 2048),
            "timestep": step(),
        },
        "1024 x 1024",
    ),
    "FLUX.1-dev": Family(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), flux, "1024 x 1024", guided=1),
    "Stable Audio Open": Family(
        diffusers.StableAudioDiTModel,
        lambda: {
            "hidden_states": tensor(1, 64, 1024),
            "timestep": step(),
            "encoder_hidden_states": tensor(1, 130, 768),
            "global_hidden_states": tensor(1, 1, 1536),
        },
        "47 s",
    ),
    "CogVideoX-5B": Family(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=48,
            num_layers=42,
            sample_height=60,
            sample_width=90,
            use_rotary_positional_embeddings=True,
        ),
        cogvideox,
        "720 x 480, 49 frames",
    ),
    "Wan 2.1 1.3B": Family(
        lambda: diffusers.WanTransformer3DModel(num_layers=30, num_attention_heads=12, ffn_dim=8960),
        lambda: video(16, 21, 60, 104, 512),
        "832 x 480, 81 frames",
    ),
    "Wan 2.1 14B": Family(
        diffusers.WanTransformer3DModel, lambda: video(16, 21, 90, 160, 512), "1280 x 720, 81 frames"
    ),
    "HunyuanVideo": Family(
        lambda: diffusers.HunyuanVideoTransformer3DModel(guidance_embeds=True),
        hunyuan,
        "1280 x 720, 129 frames",
        guided=1,
    ),
}


def measured(family: Family) -> dict[str, Any]:
    """What ``explain`` says of the model, and of every second step computed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = family.make().eval()
            inputs = family.inputs()
        found = smoothcache.explain(model, schedule=Schedule.uniform(STEPS, 2), **inputs)
    finally:
        torch.set_default_dtype(before)
    stacked = sum(stack.cache_bytes for stack in found.stacks)
    in_stacks = sum(stack.flops for stack in found.stacks)
    assert not found.unstacked, "the rest would need caches of branches"
    caches = {"branch": found.prediction.cache_bytes, "stack": stacked}
    return {
        "size": family.size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "flops": found.flops,
        "sites": len(found.sites),
        "share_in_sites": sum(site.flops for site in found.sites) / found.flops,
        "mac_ratio": found.prediction.mac_ratio,
        "cached_call_share": {"branch": min(found.prediction.step_shares), "stack": 1 - in_stacks / found.flops},
        "stacks": [stack.name for stack in found.stacks],
        # A forecast of order 1 keeps two values of each.
        "cache_bytes": {
            grain: {order: (order + 1) * family.guided * size for order in (0, 1)} for grain, size in caches.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(FAMILIES), help="some of the models")
    parser.add_argument("--write", action="store_true", help="write bench/results/memory.json; others stay in it")
    arguments = parser.parse_args()
    heading = ("model", "sample", "weights", "branches", "order 1", "stacks", "order 1", "cached call's FLOPs")
    rows, results = [heading], {}
    for name in arguments.only:
        results[name] = one = measured(FAMILIES[name])
        caches = [size for by_order in one["cache_bytes"].values() for size in by_order.values()]
        shares = " / ".join(f"{share:.2%}" for share in one["cached_call_share"].values())
        sizes = map(format_bytes, (one["weight_bytes"], *caches))
        rows.append((name, one["size"], *sizes, shares))
        print(f"{name}: {one['sites']} branches, stacks {', '.join(one['stacks'])}", flush=True)
    print(format_table(rows))
    if arguments.write:
        known = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
        print(f"written to {write_result('memory', {'steps': STEPS, 'models': known | results})}")


if __name__ == "__main__":
    main()
