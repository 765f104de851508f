"""One op a file, with its plain PyTorch reference; all are in ``torch.ops.smoothcache``."""

# transformers looks for a package called `kernels` by importing it. Where Python starts in this repository's root,
# it finds this folder, and must not register the ops a second time: torch drops the first ones, in use or not.
if __name__ != "kernels":
    from . import (  # noqa: F401 - registers the ops
        grouped_linear,
        matmul_store,
        relative_l1,
        residual_accumulate,
        residual_accumulate_norm,
        residual_forecast,
        residual_load,
        residual_norm,
        residual_store,
    )
