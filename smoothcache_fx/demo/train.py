"""Train the demo's DiT on handwritten digits: ``python -m smoothcache_fx.demo.train``.

Rectified flow (x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0), AdamW, an exponential moving average of
the weights, labels dropped in one case of ten for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import load_digits
from .model import DiT
from .weights import WEIGHTS, save_model

log = logging.getLogger(__name__)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by at most half a pixel, by linear interpolation: the set is small."""
    shifts = torch.rand(len(images), 2, generator=generator) - 0.5
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.0
    theta[:, :, 2] = shifts * 2.0 / images.shape[-1]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1.0, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1.0
    keep = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.7
    return torch.where(keep, images, moved)


def train(steps: int, batch: int, learning_rate: float, seed: int, output: Path, compiled: bool) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    model = DiT()
    average = DiT()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.03, betas=(0.9, 0.99))
    forward = torch.compile(model) if compiled else model
    running, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            warm = min(1.0, step / 200)
            group["lr"] = learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        chosen = torch.randint(len(digits.images), (batch,), generator=generator)
        clean = augment(digits.images[chosen], generator)
        drop = torch.rand(batch, generator=generator) < 0.1
        labels = torch.where(drop, model.num_classes, digits.labels[chosen])
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator))
        weight = t.view(-1, 1, 1, 1)
        loss = F.mse_loss(forward((1 - weight) * clean + weight * noise, t, labels), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += (loss.item() - running) / min(step, 100)
        if step % 100 == 0:
            log.info("step %5d  loss %.4f  %.0f s", step, running, time.perf_counter() - start)
        if step % 1000 == 0 or step == steps:
            save_model(average.eval(), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; all by default")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.batch, arguments.learning_rate, arguments.seed, arguments.output,
          arguments.compile)


if __name__ == "__main__":
    main()
