"""A small trained Diffusion Transformer of handwritten digits, to see SmoothCache work on without a download.

Training, data and metrics need ``pip install "smoothcache_fx[demo]"``; the model and the sampler only torch.
"""

from .model import DiT, randomize
from .sampler import sample
from .weights import load_model

__all__ = ["DiT", "load_model", "randomize", "sample"]
