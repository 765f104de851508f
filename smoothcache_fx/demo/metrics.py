"""How good sampled digits are: recognised by a classifier, and their Frechet distance from real ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import load_digits
from .extras import require


def _pixels(images: Tensor) -> np.ndarray:
    """Images ``[n, 1, 8, 8]`` as float64 ``[n, 64]`` from -1 to 1, what the scans can hold."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8) or len(images) == 0:
        raise ValueError(f"images must be [n, 1, 8, 8] with n of 1 or more, got {list(images.shape)}")
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite, got NaN or infinity; look for the step that made them")
    return images.detach().cpu().double().clamp(-1, 1).flatten(1).numpy()


class Classifier:
    """A support vector machine that has seen the real training digits and nothing of the diffusion model.

    ``held_out_accuracy`` is the share of held-out real digits that it recognises.
    """

    def __init__(self) -> None:
        digits = load_digits()
        self._machine = require("sklearn.svm").SVC(C=10.0, gamma="scale")
        self._machine.fit(_pixels(digits.images), digits.labels.numpy())
        self.held_out_accuracy = self.accuracy(digits.held_out_images, digits.held_out_labels)

    def predict(self, images: Tensor) -> Tensor:
        """The recognised labels, int64 ``[n]``, of images ``[n, 1, 8, 8]``."""
        return torch.from_numpy(self._machine.predict(_pixels(images))).long()

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of the images ``[n, 1, 8, 8]`` recognised as their labels, integers ``[n]``."""
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be [n], one for each image: got {list(labels.shape)} for {len(images)} images"
            )
        return float((self.predict(images) == labels.cpu()).double().mean())


@dataclass(frozen=True)
class _FeatureLayer:
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray


@cache
def _feature_layer() -> _FeatureLayer:
    """Trained once a process, in about a second: 64 pixels to 32 features, and their scale."""
    digits = load_digits()
    pixels = _pixels(digits.images)
    network = require("sklearn.neural_network").MLPClassifier(
        hidden_layer_sizes=(32,), activation="tanh", solver="lbfgs", alpha=1.0, max_iter=1000, random_state=0
    )
    network.fit(pixels, digits.labels.numpy())
    weight, bias = network.coefs_[0], network.intercepts_[0]
    return _FeatureLayer(weight, bias, np.tanh(pixels @ weight + bias).std(axis=0))


def features(images: Tensor) -> np.ndarray:
    """Features of images ``[n, 1, 8, 8]``, float64 ``[n, 32]``, by which `frechet_distance` compares.

    The hidden layer of a small network trained, from a fixed seed, to tell the real training digits apart;
    each feature is scaled to variance 1 on those digits.
    """
    layer = _feature_layer()
    return np.tanh(_pixels(images) @ layer.weight + layer.bias) / layer.scale


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of images ``[n, 1, 8, 8]``: 0 or more, 0 for equal statistics.

    ``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`` of the sets' `features`: the Frechet
    Inception Distance (Heusel et al., arXiv 1706.08500, equation 6) in another feature space, so its figures
    compare with each other alone, and with `real_frechet_distance`.

    Raises:
        ValueError: if a set has no more images than there are features, or images of another shape.
    """
    statistics = []
    for images in (a, b):
        values = features(images)
        if len(values) <= values.shape[1]:
            raise ValueError(
                f"a set must have more images than the {values.shape[1]} features, got {len(values)}: "
                "its covariance would be singular; sample more"
            )
        statistics.append((values.mean(axis=0), np.cov(values, rowvar=False)))
    (mean_a, covariance_a), (mean_b, covariance_b) = statistics
    # cov_a cov_b has the eigenvalues of the symmetric R cov_b R, where R is the root of cov_a.
    eigenvalues, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared
    return max(0.0, float(distance))


def real_frechet_distance(count: int | None = None, draws: int = 10) -> float:
    """The floor for `frechet_distance`: real training digits against the held-out ones.

    The mean over ``draws`` random subsets of ``count`` training digits, all classes alike (None: as many as are
    held out). Give the number of samples that it shall stand beside, since small sets lie farther apart.
    """
    digits = load_digits()
    count = len(digits.held_out_images) if count is None else min(count, len(digits.images))
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(draws):
        order = torch.randperm(len(digits.images), generator=generator)
        # The first of each class, then the second of each, and so on: any head of it has all classes alike.
        nth_of_class = F.one_hot(digits.labels[order]).cumsum(0).gather(1, digits.labels[order, None]).squeeze(1)
        chosen = order[nth_of_class.argsort(stable=True)[:count]]
        distances.append(frechet_distance(digits.images[chosen], digits.held_out_images))
    return sum(distances) / draws
