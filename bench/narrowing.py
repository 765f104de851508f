"""What is left of a cached step's arithmetic: ``python bench/narrowing.py``.

FLOPs of a step that reuses every branch, before and after ``passes/narrow.py`` has cut the modulations down to the
rows that are read (gates), beside those of a full step. Published configurations; counted on graphs of the meta device,
so nothing is computed and no weights are made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import write_result
from ddim import build_dit
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from smoothcache_fx import Schedule
from smoothcache_fx.capture import _torch
from smoothcache_fx.capture.inner import inner_compiler
from smoothcache_fx.capture.session import Session
from smoothcache_fx.graphs.tables import format_table
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.narrow import narrow
from smoothcache_fx.passes.specialize import specialize
from smoothcache_fx.runtime.calls import ModelCall
from smoothcache_fx.runtime.clock import Clock

Made = tuple[nn.Module, Mapping[str, Any]]


def dit_xl_2() -> Made:
    """256x256 pixels, two samples (guidance)."""
    model = build_dit(layers=28, heads=16, head_dim=72, size=32)
    integers = torch.zeros(2, dtype=torch.long)
    return model, {"hidden_states": torch.empty(2, 4, 32, 32), "timestep": integers, "class_labels": integers}


def sd3_medium() -> Made:
    """1024x1024 pixels, 333 tokens of text, two samples (guidance)."""
    model = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )
    return model, {
        "hidden_states": torch.empty(2, 16, 128, 128),
        "encoder_hidden_states": torch.empty(2, 333, 4096),
        "pooled_projections": torch.empty(2, 2048),
        "timestep": torch.zeros(2),
    }


def flux_dev() -> Made:
    """1024x1024 pixels, 512 tokens of text, one sample."""
    model = FluxTransformer2DModel(guidance_embeds=True)
    return model, {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
    }


MODELS: dict[str, Callable[[], Made]] = {"DiT-XL/2": dit_xl_2, "SD3-medium": sd3_medium, "Flux.1-dev": flux_dev}


def count(make: Callable[[], Made]) -> dict[str, int]:
    """FLOPs of a full step, and of one that reuses everything: with whole modulations, and with narrowed ones."""
    with torch.device("meta"):
        model, inputs = make()
    session = Session(Schedule(steps=1), inner_compiler("eager", None, None, None), Clock(1), model.eval())
    session.current.call = ModelCall(session.clock.tick())
    with torch.no_grad():
        _torch.dynamo_compile(model.forward, session)(**inputs)
    (program,) = session.programs
    reusing = specialize(program.builder.guarded, compute=set())
    return {
        "full": program.builder.flops,
        "reused": count_flops(reusing.graph),
        "narrowed": count_flops(narrow(reusing).graph),
        "sites": len(program.builder.sites),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--write", action="store_true", help="write bench/results/narrowing.json")
    arguments = parser.parse_args()
    found = {name: count(MODELS[name]) for name in arguments.only}
    rows = [("", "full step", "all reused", "narrowed", "share of a full step")]
    for name, flops in found.items():
        shares = f"{flops['reused'] / flops['full']:.3%} to {flops['narrowed'] / flops['full']:.3%}"
        rows.append((name, *(f"{flops[key] / 1e9:.2f} GFLOP" for key in ("full", "reused", "narrowed")), shares))
    print(format_table(rows))
    if arguments.write:
        print(f"written to {write_result('narrowing', {'flops': found})}")


if __name__ == "__main__":
    main()
