"""A small trained Diffusion Transformer of Fashion-MNIST, to see SmoothCache work on without a download.

Weights and metrics need ``pip install "smoothcache_fx[demo]"``; the model and the sampler only torch.
"""

from .model import DiT, randomize
from .sampler import sample
from .weights import load_model

__all__ = ["DiT", "load_model", "randomize", "sample"]
