"""One op a file, with its plain PyTorch reference; all are in ``torch.ops.smoothcache``."""

from .relative_l1 import relative_l1
from .residual_accumulate import residual_accumulate
from .residual_load import residual_load
from .residual_norm import residual_norm
from .residual_store import residual_store

__all__ = ["relative_l1", "residual_accumulate", "residual_load", "residual_norm", "residual_store"]
