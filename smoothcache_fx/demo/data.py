"""Handwritten digits that scikit-learn ships: 1,797 real scans of 8x8 pixels, no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .extras import require


@dataclass(frozen=True)
class Digits:
    """Images float32 ``[n, 1, 8, 8]`` in [-1, 1] with int64 labels ``[n]``: for training, and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits(held_out: float = 0.2, seed: int = 0) -> Digits:
    """The digits, split by class with a fixed seed."""
    datasets = require("sklearn.datasets")
    selection = require("sklearn.model_selection")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = selection.train_test_split(images, labels, test_size=held_out, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
    return Digits(train_images, train_labels.long(), test_images, test_labels.long())
