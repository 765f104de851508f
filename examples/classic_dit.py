"""A DiT of one's own, sampled by a loop of one's own: ``python examples/classic_dit.py``.

The blocks are those of Peebles and Xie (arXiv 2212.09748): adaLN-Zero, and classifier-free guidance in a method of the
model that calls ``self.forward``. Nothing of it was made for caching. The weights are random, and small.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from smoothcache_fx.demo.model import randomize

STEPS = 20


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, classes: int = 10, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.patch = nn.Conv2d(4, width, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 64, width))
        self.time, self.label = nn.Linear(1, width), nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, 2 * 2 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t[:, None]) + self.label(y)
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, c)
        return nn.functional.pixel_shuffle(self.last(tokens).transpose(1, 2).unflatten(2, (8, 8)), 2)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """Both halves of the guidance in one call."""
        nothing = torch.full_like(y, self.classes)
        with_label, without = self.forward(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat((y, nothing))).chunk(2)
        return without + scale * (with_label - without)


@torch.no_grad()
def sample(model: DiT, seed: int) -> Tensor:
    """Euler steps of a rectified flow."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        t = torch.full((2,), 1 - step / STEPS)
        x = x - model.forward_with_cfg(x, t, torch.tensor([1, 2]), 1.5) / STEPS
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="inner compiler (inductor)")
    arguments = parser.parse_args()

    model = randomize(DiT())
    calibration = smoothcache.calibrate(model, lambda model: [sample(model, seed) for seed in range(3)])
    print(calibration)
    schedules = {f"compute {share:g}": calibration.schedule(compute=share) for share in (0.7, 0.5)}
    for name, schedule in schedules.items():
        print(f"\n{name}\n{schedule}")
    print(smoothcache.compare(model, schedules, lambda model: sample(model, seed=7), backend=arguments.backend))

    smoothcache.compile(model, schedules["compute 0.5"], backend=arguments.backend)
    sample(model, seed=8)
    print(smoothcache.report(model))


if __name__ == "__main__":
    main()
