"""One op a file, with its plain PyTorch reference; all are in ``torch.ops.smoothcache``."""

# transformers looks for a package called `kernels` by importing it. Where Python starts in this repository's root,
# it finds this folder, and must not register the ops a second time: torch drops the first ones, in use or not.
if __name__ != "kernels":
    from .grouped_linear import grouped_linear
    from .matmul_store import matmul_store
    from .relative_l1 import relative_l1
    from .residual_accumulate import residual_accumulate
    from .residual_accumulate_norm import residual_accumulate_norm
    from .residual_forecast import residual_forecast
    from .residual_load import residual_load
    from .residual_norm import residual_norm
    from .residual_store import residual_store

    __all__ = [
        "grouped_linear",
        "matmul_store",
        "relative_l1",
        "residual_accumulate",
        "residual_accumulate_norm",
        "residual_forecast",
        "residual_load",
        "residual_norm",
        "residual_store",
    ]
