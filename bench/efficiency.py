"""How much of the saved arithmetic becomes saved time: ``python bench/efficiency.py``.

A DiT of 12 blocks, width 384, 256 tokens, batch 2, over 50 steps: plain ``torch.compile`` against ours with the
published schedule of 24 computed steps, by branch or by stack. Both run in turns; the outputs of a schedule that
computes everything are compared before anything is timed. Efficiency is the wall-clock speed-up over the MAC ratio (the
ideal). The cost of a cached call is that of calls timed one by one.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import PUBLISHED_24_OF_50, interleaved, ratio_of_medians, summary, write_result

import smoothcache_fx as smoothcache
from smoothcache_fx.demo.model import DiT, randomize


def build(depth: int, width: int) -> DiT:
    """A DiT over 4-channel 32x32 latents in patches of 2: 256 tokens."""
    return randomize(
        DiT(
            image_size=32,
            patch_size=2,
            channels=4,
            width=width,
            depth=depth,
            heads=width // 64,
            num_classes=1000,
        )
    )


@torch.no_grad()
def trajectory(model: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Euler steps of a rectified flow."""
    x = latents
    for step in range(steps):
        t = torch.full((len(x),), 1.0 - step / steps, device=x.device)
        x = x - model(x, t, labels) / steps
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--grain", choices=("branch", "stack"), default="branch", help="what is cached as one")
    parser.add_argument("--mode", default=None, help="torch.compile's mode, for both")
    parser.add_argument("--write", action="store_true", help="write bench/results/efficiency.json")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = build(arguments.depth, arguments.width).to(device)
    cached, identity = copy.deepcopy(plain), copy.deepcopy(plain)
    steps = len(PUBLISHED_24_OF_50)
    kinds = ("attn", "ffn") if arguments.grain == "branch" else ("stack",)
    schedule = smoothcache.Schedule(steps, dict.fromkeys(kinds, PUBLISHED_24_OF_50))
    compiled = torch.compile(plain, mode=arguments.mode)
    smoothcache.compile(cached, schedule, mode=arguments.mode)
    smoothcache.compile(identity, smoothcache.Schedule.uniform(steps, 1), mode=arguments.mode)

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(arguments.batch, 4, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 1000, (arguments.batch,), generator=generator).to(device)
    same = trajectory(identity, latents, labels, steps)
    torch.testing.assert_close(same, trajectory(compiled, latents, labels, steps), rtol=1e-3, atol=1e-3)

    seconds = interleaved(
        {
            "torch.compile": lambda: trajectory(compiled, latents, labels, steps),
            "smoothcache": lambda: trajectory(cached, latents, labels, steps),
        },
        arguments.rounds,
    )
    report = smoothcache.report(cached)
    at_first = torch.ones(arguments.batch, device=device)
    predicted = smoothcache.explain(cached, latents, at_first, labels, schedule=schedule).prediction
    speedup = ratio_of_medians(seconds["torch.compile"], seconds["smoothcache"])
    with smoothcache.timed(cached):
        for _ in range(arguments.rounds):
            trajectory(cached, latents, labels, steps)
    medians = {time.kind: time.median for time in smoothcache.report(cached).times}
    cached_share = medians["cached"] / medians["computed"]
    for name, values in seconds.items():
        one = summary(values)
        print(f"{name:14s} {one['median']:.3f} s  ({one['p20']:.3f} to {one['p80']:.3f})")
    print(f"speed-up {speedup:.3f}, MAC ratio {report.mac_ratio:.3f}, efficiency {speedup / report.mac_ratio:.3f}")
    print("predicted before compiling: {:.3f} to {:.3f}".format(*predicted.speedup))
    print(f"a cached call takes {cached_share:.2%} of a full one")
    print(
        f"caches {report.cache_bytes / 2**20:.1f} MiB, variants {report.variants}, "
        f"compiled in {sum(report.compile_seconds):.1f} s"
    )
    if arguments.write:
        path = write_result(
            "efficiency" if arguments.grain == "branch" else "efficiency_stack",
            {
                "arguments": vars(arguments),
                "seconds": {name: summary(values) for name, values in seconds.items()},
                "speedup": speedup,
                "predicted_speedup": predicted.speedup,
                "mac_ratio": report.mac_ratio,
                "efficiency": speedup / report.mac_ratio,
                "cached_step_share": cached_share,
                "cache_bytes": report.cache_bytes,
                "compile_seconds": report.compile_seconds,
            },
        )
        print(f"written to {path}")


if __name__ == "__main__":
    main()
