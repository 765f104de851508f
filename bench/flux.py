"""FLUX.1-dev's transformer at its true size, 1024 px: ``python bench/flux.py``.

12 billion random weights, one image, 28 steps of Euler's sampler without a text encoder or decoder, 12 steps computed,
beside plain ``torch.compile`` in the same mode, taking turns. ``--small`` is a tiny model, to see that all works.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import interleaved, ratio_of_medians, summary, synchronize, write_result
from ddim import CallTimer, even_row
from diffusers import FluxTransformer2DModel
from paper import twin
from torch import nn

import smoothcache_fx as smoothcache

STEPS, COMPUTED = 28, 12
#: The rest are FLUX.1-dev's, which are the class's defaults.
SMALL = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def build(small: bool, device: str, dtype: torch.dtype) -> nn.Module:
    """Random weights, made where they are to stay: 24 GB of bfloat16 would take minutes to copy."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FluxTransformer2DModel(guidance_embeds=True, **(SMALL if small else {}))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class Sampler:
    """Euler steps from noise to an image of ``side`` x ``side`` patches."""

    def __init__(self, model: nn.Module, side: int, text: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
        self.latents = randn(1, side * side, model.config.in_channels)
        self.conditioning = {
            "encoder_hidden_states": randn(1, text, model.config.joint_attention_dim),
            "pooled_projections": randn(1, model.config.pooled_projection_dim),
            "img_ids": positions.to(device, torch.float32),
            "txt_ids": torch.zeros(text, 3, device=device),
            "guidance": torch.full((1,), 3.5, device=device),
        }
        self.timesteps = [torch.full((1,), 1 - step / STEPS, device=device).to(dtype) for step in range(STEPS)]

    @torch.no_grad()
    def __call__(self, model: nn.Module, timer: CallTimer) -> torch.Tensor:
        x = self.latents
        for timestep in self.timesteps:
            given = {"hidden_states": x, "timestep": timestep, "return_dict": False, **self.conditioning}
            (velocity,) = timer.call(model, **given)
            x = x - velocity / STEPS
        return x


def figures(calls: list[float], row: list[int]) -> dict[str, float]:
    """Milliseconds of a call at steps of each kind; the first call of a trajectory is left out."""
    kinds = {kind: [1e3 * t for t, on in zip(calls, row, strict=True) if on == kind][int(kind) :] for kind in (1, 0)}
    return {"full_ms": statistics.median(kinds[1]), "cached_ms": statistics.median(kinds[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--mode", help="of torch.compile, for both")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write bench/results/flux_cuda.json")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not (cuda or arguments.small):
        parser.error("12 billion weights are for a GPU, and there is none: --small is a tiny model")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = build(arguments.small, device, dtype)
    sampler = Sampler(model, *((8, 16) if arguments.small else (64, 512)), device, dtype)
    row = even_row(STEPS, COMPUTED)
    plain, ours = twin(model), twin(model)
    plain.forward = torch.compile(plain.forward, backend=arguments.backend, mode=arguments.mode)
    schedule = smoothcache.Schedule(STEPS, dict.fromkeys(("attn", "ffn", "attn_ffn"), row))
    smoothcache.compile(ours, schedule, backend=arguments.backend, mode=arguments.mode)

    models = {"torch.compile": plain, "smoothcache": ours}
    timers: dict[str, list[CallTimer]] = {name: [] for name in models}

    def run(name: str) -> None:
        timers[name].append(CallTimer(cuda))
        if not sampler(models[name], timers[name][-1]).isfinite().all():
            raise RuntimeError(f"{name}: the sample holds NaN or infinity")

    seconds = interleaved({name: lambda name=name: run(name) for name in models}, arguments.rounds)
    synchronize()
    seen = smoothcache.report(ours)
    speedup = ratio_of_medians(seconds["torch.compile"], seconds["smoothcache"])
    results: dict[str, Any] = {
        name: {"seconds": summary(found), **figures(timers[name][-1].seconds(), row)} for name, found in seconds.items()
    }
    results["smoothcache"] |= {
        "speedup": speedup,
        "mac_ratio": seen.mac_ratio,
        "efficiency_in_same_mode": speedup / seen.mac_ratio,
        "cached_step_share": results["smoothcache"]["cached_ms"] / results["smoothcache"]["full_ms"],
        "cache_bytes": seen.cache_bytes,
        "compile_seconds": seen.compile_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    for name, found in results.items():
        print(f"{name}: full call {found['full_ms']:.2f} ms, cached {found['cached_ms']:.2f} ms")
    print(f"{speedup:.2f} times faster at a MAC ratio of {seen.mac_ratio:.2f}")
    if arguments.write:
        print(f"written to {write_result('flux', {'arguments': vars(arguments), 'results': {'1': results}})}")


if __name__ == "__main__":
    main()
