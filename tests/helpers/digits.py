"""A small trained DiT of handwritten digits, which the package's demo used before it had Fashion-MNIST.

12 blocks, 64 tokens; `smoothcache_fx.demo.train` made it of the digits that scikit-learn ships.
"""

from __future__ import annotations

from pathlib import Path

from smoothcache_fx.demo.model import DiT
from smoothcache_fx.demo.weights import load_model

WEIGHTS = Path(__file__).with_name("digits_dit.safetensors")


def digits_model() -> DiT:
    """The trained model, float32, in eval mode, on the CPU."""
    return load_model(path=WEIGHTS)
