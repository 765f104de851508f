"""Handwritten digits that scikit-learn ships: 1,797 real scans of 8x8 pixels, no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .extras import require

#: Share of the digits that neither the model nor the metrics' networks are trained on, and the split's seed.
HELD_OUT = 0.2
SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images float32 ``[n, 1, 8, 8]`` from -1 (paper) to 1 (ink) with int64 labels ``[n]``."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits() -> Digits:
    """The digits, each class split alike, always the same way: 1,437 to train on, 360 held out."""
    datasets, selection = require("sklearn.datasets"), require("sklearn.model_selection")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    images, held_out_images, labels, held_out_labels = (
        torch.from_numpy(np.ascontiguousarray(part))
        for part in selection.train_test_split(images, labels, test_size=HELD_OUT, random_state=SEED, stratify=labels)
    )
    return Digits(images, labels.long(), held_out_images, held_out_labels.long())
