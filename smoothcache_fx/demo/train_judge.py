"""Train the demo's judge on the real images of Fashion-MNIST: ``python -m smoothcache_fx.demo.train_judge``.

Adam, images shifted by up to two pixels. The shipped file comes from the defaults; the log ended with::

    epoch 11 of 12  held-out accuracy 0.9097
    epoch 12 of 12  held-out accuracy 0.9103
    real against held-out images, Frechet distance of 1000: 0.166
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .data import FASHION_FOLDER, Images, load_fashion
from .judge import JUDGE, JudgeNetwork, load_judge, save_judge

log = logging.getLogger(__name__)

BATCH = 128
LEARNING_RATE = 1e-3
SHIFT = 2
#: Training images of each class whose features are kept, for the floor of Frechet distances.
REAL = 300


def shifted(images: Tensor, generator: Generator) -> Tensor:
    """Images ``[n, 1, size, size]``, each moved by up to two pixels either way; what moves in is empty."""
    size = images.shape[-1]
    padded = F.pad(images, (SHIFT,) * 4, value=-1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2, len(images), 1), generator=generator)
    rows, columns = (torch.arange(size) + offset for offset in (down, right))
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train_judge(data: Images, epochs: int, seed: int, output: Path) -> None:
    """Train the classifier, and write it to ``output`` with the features of real images."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    network = JudgeNetwork().train()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for epoch in range(epochs):
        order = torch.randperm(len(data.images), generator=generator).split(BATCH)
        for batch, chosen in enumerate(order):
            done = (epoch + batch / len(order)) / epochs
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (0.5 + 0.5 * math.cos(math.pi * done))
            loss = F.cross_entropy(network(shifted(data.images[chosen], generator)), data.labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        network.eval()
        held_out = accuracy(network, data.held_out_images, data.held_out_labels)
        log.info("epoch %2d of %d  held-out accuracy %.4f", epoch + 1, epochs, held_out)
        network.train()
    save_statistics(network, data, output)


@torch.no_grad()
def save_statistics(network: JudgeNetwork, data: Images, output: Path) -> None:
    """Write the classifier, and what it makes of the real images, with the weights as they are stored."""
    network = network.eval().half().float()
    real = network.features(data.images[each_class(data.labels, REAL)])
    held_out = torch.cat([network.features(part) for part in data.held_out_images.split(500)])
    recognised = accuracy(network, data.held_out_images, data.held_out_labels)
    save_judge(network, real, held_out, recognised, output)


@torch.no_grad()
def accuracy(network: JudgeNetwork, images: Tensor, labels: Tensor) -> float:
    """The share of the images that the network recognises."""
    predicted = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return float((predicted == labels).double().mean())


def each_class(labels: Tensor, count: int) -> Tensor:
    """Where the first ``count`` images of each class are, or as many as all have: ``[n]``, classes in turn."""
    found = [(labels == label).nonzero().flatten() for label in labels.unique()]
    count = min(count, *map(len, found))
    return torch.stack([places[:count] for places in found], dim=1).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=FASHION_FOLDER, help=f"folder of the dataset's files ({FASHION_FOLDER})")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, default=JUDGE)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    train_judge(load_fashion(arguments.data), arguments.epochs, arguments.seed, arguments.output)
    judge = load_judge(arguments.output)
    log.info("real against held-out images, Frechet distance of 1000: %.3f", judge.real_frechet_distance(1000))


if __name__ == "__main__":
    main()
