"""Sample a rectified flow with Euler steps and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .model import DiT


def initial_noise(count: int, shape: Sequence[int], seed: int) -> Tensor:
    """Gaussian noise ``[count, *shape]`` on the CPU; sample i's depends on seed and i alone."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
                        for i in range(count)])


@torch.no_grad()
def sample(
    model: DiT,
    labels: Tensor,
    *,
    steps: int = 50,
    cfg_scale: float = 1.5,
    seed: int = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images for the labels, float32 ``[len(labels), channels, size, size]`` on the model's device.

    Args:
        model: in eval mode; called once a step, with conditional and unconditional inputs in one batch.
        labels: int64 ``[n]``.
        steps: Euler steps from t = 1 to t = 0.
        cfg_scale: classifier-free guidance; 1 is none.
        seed: of the initial noise; sampling itself is deterministic.
        on_step: called with the step's index and the latents after it.
    """
    if labels.ndim != 1 or labels.is_floating_point() or bool(((labels < 0) | (labels >= model.num_classes)).any()):
        raise ValueError(f"labels must be integers [n] from 0 to {model.num_classes - 1}, got {labels.tolist()}")
    parameter = next(model.parameters())
    shape = (model.channels, model.image_size, model.image_size)
    x = initial_noise(len(labels), shape, seed).to(parameter.device, parameter.dtype)
    labels = labels.to(parameter.device)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for step, (now, after) in enumerate(zip(times, times[1:])):
        t = torch.full((len(labels),), now, device=x.device, dtype=x.dtype)
        x = x + (after - now) * model.forward_with_cfg(x, t, labels, cfg_scale)
        if on_step is not None:
            on_step(step, x)
    return x.float()
