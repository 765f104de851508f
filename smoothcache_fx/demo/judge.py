"""How good sampled pictures are: recognised by a classifier, and their Frechet distance from real ones.

Everything that it takes comes with the package, the real pictures' features included: no dataset is needed.
"""

from __future__ import annotations

import json
from functools import cache
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extras import require

JUDGE = Path(__file__).with_name("fashion_judge.safetensors")
FEATURES, CLASSES = 64, 10


class JudgeNetwork(nn.Module):
    """A small convolutional classifier of images ``[n, 1, 28, 28]``, trained on the real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.dropout = nn.Dropout(0.3)

    def features(self, images: Tensor) -> Tensor:
        """What the classes are told by, ``[n, 64]`` from -1 to 1."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.hidden(self.dropout(x.flatten(1))).tanh()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))


class Judge:
    """The classifier, and statistics of real images; see `load_judge`.

    Attributes:
        held_out_accuracy: the share of held-out real images that the classifier recognises.
    """

    def __init__(
        self, network: JudgeNetwork, real: Tensor, held_out: tuple[Tensor, Tensor], held_out_accuracy: float
    ) -> None:
        """``real`` are features ``[n, 64]`` of training images, classes in turn; ``held_out`` mean and covariance."""
        self.network = network.eval()
        self.held_out_accuracy = held_out_accuracy
        self._scale = real.double().numpy().std(axis=0)
        self._real = real.double().numpy() / self._scale
        mean, covariance = (part.double().numpy() for part in held_out)
        self._held_out = mean / self._scale, covariance / np.outer(self._scale, self._scale)

    def predict(self, images: Tensor) -> Tensor:
        """The recognised labels, int64 ``[n]``, of images ``[n, 1, 28, 28]``."""
        return self.network.head(self._raw(images)).argmax(1)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of the images ``[n, 1, 28, 28]`` recognised as their labels, integers ``[n]``."""
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be [n], one for each image: got {list(labels.shape)} for {len(images)} images"
            )
        return float((self.predict(images) == labels.cpu()).double().mean())

    def features(self, images: Tensor) -> np.ndarray:
        """Float64 ``[n, 64]``: the classifier's features, each scaled to variance 1 over real images."""
        return self._raw(images).double().numpy() / self._scale

    def frechet_distance(self, images: Tensor) -> float:
        """The Frechet distance of images ``[n, 1, 28, 28]`` from held-out real ones: 0 or more.

        As the Frechet Inception Distance (Heusel et al., arXiv 1706.08500), in this classifier's features: its
        figures compare with each other alone, and with `real_frechet_distance`.

        Raises:
            ValueError: for no more images than there are features, or images of another shape.
        """
        return frechet_distance(statistics_of(self.features(images)), self._held_out)

    def real_frechet_distance(self, count: int, draws: int = 10) -> float:
        """The floor for `frechet_distance`: of as many real training images, all classes alike, the mean over draws.

        Small sets lie farther apart, so give the number of samples that it shall stand beside.
        """
        random = np.random.default_rng(0)
        places = np.arange(len(self._real)).reshape(-1, CLASSES)
        drawn = (self._real[random.permuted(places, axis=0).flatten()[:count]] for _ in range(draws))
        return sum(frechet_distance(statistics_of(values), self._held_out) for values in drawn) / draws

    @torch.no_grad()
    def _raw(self, images: Tensor) -> Tensor:
        return torch.cat([self.network.features(part) for part in pixels_of(images, 28).split(500)])


def pixels_of(images: Tensor, size: int) -> Tensor:
    """Images ``[n, 1, size, size]`` as float32 on the CPU, from -1 to 1, which is all that a picture can hold."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, size, size) or len(images) == 0:
        raise ValueError(f"images must be [n, 1, {size}, {size}] with n of 1 or more, got {list(images.shape)}")
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite, got NaN or infinity; look for the step that made them")
    return images.detach().cpu().float().clamp(-1, 1)


def statistics_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features ``[n, width]``; raises ValueError for too few of them."""
    if len(features) <= features.shape[1]:
        raise ValueError(
            f"a set must have more images than the {features.shape[1]} features, got {len(features)}: "
            "its covariance would be singular; sample more"
        )
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """The Frechet distance of two normal distributions, each a mean and a covariance.

    ``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``, equation 6 of arXiv 1706.08500.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a, b
    # cov_a cov_b has the eigenvalues of the symmetric R cov_b R, where R is the root of cov_a.
    eigenvalues, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared
    return max(0.0, float(distance))


def save_judge(network: JudgeNetwork, real: Tensor, held_out: Tensor, held_out_accuracy: float, path: Path) -> None:
    """Write what `load_judge` reads; ``real`` and ``held_out`` are features ``[n, 64]`` of real images."""
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    state = {name: tensor.detach().half().contiguous() for name, tensor in (state | {"real": real}).items()}
    mean, covariance = statistics_of(held_out.double().numpy())
    state |= {"held_out_mean": torch.from_numpy(mean), "held_out_covariance": torch.from_numpy(covariance)}
    metadata = {"held_out_accuracy": json.dumps(held_out_accuracy)}
    path.write_bytes(require("safetensors.torch").save(state, metadata=metadata))


@cache
def load_judge(path: str | PathLike[str] = JUDGE) -> Judge:
    """The judge that the package ships, or one that ``python -m smoothcache_fx.demo.train_judge`` wrote.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
    """
    safetensors = require("safetensors")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no judge at {str(path)!r}; install the package whole, or train it: "
            "python -m smoothcache_fx.demo.train_judge"
        )
    with safetensors.safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        accuracy = json.loads(file.metadata()["held_out_accuracy"])
    network = JudgeNetwork()
    network.load_state_dict({name: state[f"network.{name}"] for name in network.state_dict()})
    return Judge(network, state["real"], (state["held_out_mean"], state["held_out_covariance"]), accuracy)
