"""One op a file, with its plain PyTorch reference."""

from .relative_l1 import relative_l1

__all__ = ["relative_l1"]
