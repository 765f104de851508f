"""Fashion-MNIST, which the demo's model and its judge are trained on."""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Where Debian's package dataset-fashion-mnist puts its files.
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
#: Of the classes of Fashion-MNIST, in the order of their labels.
FASHION_NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class Images:
    """Images float32 ``[n, 1, size, size]`` from -1 (empty) to 1 (full) with int64 labels ``[n]``."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_fashion(folder: str | PathLike[str] = FASHION_FOLDER) -> Images:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 images of 28x28 pixels to train on, 10,000 held out.

    Args:
        folder: with the four files of the dataset, ``train-images-idx3-ubyte.gz`` and so on.

    Raises:
        FileNotFoundError: if a file is not there; the message says where to get it.
        ValueError: if a file is of another format.
    """
    parts = []
    for split in ("train", "t10k"):
        pixels = _read_idx(Path(folder) / f"{split}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(Path(folder) / f"{split}-labels-idx1-ubyte.gz", 1)
        if len(pixels) != len(labels):
            raise ValueError(f"{folder} has {len(pixels)} images and {len(labels)} labels of the split {split}")
        parts += [torch.from_numpy(pixels / np.float32(127.5) - np.float32(1)).unsqueeze(1)]
        parts += [torch.from_numpy(labels.astype(np.int64))]
    return Images(*parts)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A gzipped IDX file of bytes: the array that it holds."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: install Debian's package dataset-fashion-mnist, or download the four files of "
            "github.com/zalandoresearch/fashion-mnist and name their folder"
        )
    with gzip.open(path) as file:
        data = file.read()
    header = 4 + 4 * dimensions
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data) if len(data) >= header else (0,)
    if magic != 0x800 + dimensions or len(data) != header + math.prod(shape):
        raise ValueError(f"{str(path)!r} is no IDX file of bytes in {dimensions} dimensions")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
