"""Train the demo's DiT on handwritten digits: ``python -m smoothcache_fx.demo.train``.

Rectified flow (x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0), AdamW, an exponential moving
average of the weights, labels dropped in one case of ten for classifier-free guidance. Only the training
split of the digits is seen. One thread by default: their number decides the order of sums, and so the last
bits.

The shipped weights come from the defaults; the log ended with::

    step  3900 of 4000  loss 0.3276  2079 s
    step  4000 of 4000  loss 0.3242  2117 s
    500 samples: 100.0% recognised (held-out digits 99.4%), Frechet distance 0.582 (real 0.311)
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import Digits, load_digits
from .metrics import Classifier, frechet_distance, real_frechet_distance
from .model import DiT
from .sampler import sample
from .weights import WEIGHTS, load_model, save_model

log = logging.getLogger(__name__)

LABEL_DROPOUT = 0.1
WARM_UP_STEPS = 100
EMA_DECAY = 0.998


def draw_timesteps(count: int, generator: Generator) -> Tensor:
    """Timesteps ``[count]`` in (0, 1): logit-normal, where most is to be learnt, and a quarter uniform.

    The first and last Euler steps lie where a logit-normal distribution alone has next to nothing.
    """
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.randn(count, generator=generator).sigmoid()
    return torch.where(torch.rand(count, generator=generator) < 0.25, uniform, logit_normal)


def flow_loss(model: DiT, digits: Digits, batch: int, generator: Generator) -> Tensor:
    """The mean squared error of the velocity on a random batch."""
    chosen = torch.randint(len(digits.images), (batch,), generator=generator)
    clean = digits.images[chosen]
    drop = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    labels = torch.where(drop, model.num_classes, digits.labels[chosen])
    noise = torch.randn(clean.shape, generator=generator)
    t = draw_timesteps(batch, generator)
    share = t.view(-1, 1, 1, 1)
    # The fused attention's bfloat16 backward takes five times as long as the plain one on a CPU.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model((1 - share) * clean + share * noise, t, labels)
    return F.mse_loss(velocity.float(), noise - clean)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    decay = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, step / WARM_UP_STEPS) * (0.02 + 0.98 * decay)


def train(steps: int, batch: int, learning_rate: float, seed: int, output: Path) -> None:
    """Train, and write the averaged weights to ``output``, every 500 steps and at the end."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    digits = load_digits()
    model, average = DiT().train(), DiT().eval()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate)
        loss = flow_loss(model, digits, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            elapsed = time.perf_counter() - start
            log.info("step %5d of %d  loss %.4f  %4.0f s", step, steps, sum(losses[-100:]) / 100, elapsed)
        if step % 500 == 0 or step == steps:
            save_model(average, output)


def evaluate(model: DiT, count: int = 500) -> None:
    """Log how well samples are recognised, and how far they are from held-out digits."""
    digits, classifier = load_digits(), Classifier()
    labels = torch.arange(count) % model.num_classes
    images = sample(model, labels)
    log.info(
        "%d samples: %.1f%% recognised (held-out digits %.1f%%), Frechet distance %.3f (real %.3f)",
        count,
        100 * classifier.accuracy(images, labels),
        100 * classifier.held_out_accuracy,
        frechet_distance(images, digits.held_out_images),
        real_frechet_distance(count),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.batch, arguments.learning_rate, arguments.seed, arguments.output)
    evaluate(load_model(path=arguments.output))


if __name__ == "__main__":
    main()
