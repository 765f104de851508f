"""Sample a rectified flow with Euler steps and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .model import DiT, guide


def initial_noise(count: int, shape: Sequence[int], seed: int) -> Tensor:
    """Gaussian noise, float32 ``[count, *shape]`` on the CPU, the same whatever device samples.

    A sample's noise depends on ``seed`` and its index alone, so the first ten of a hundred are the ten.
    """
    noise = torch.empty(count, *shape)
    for index in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        noise[index].normal_(generator=generator)
    return noise


def check_labels(labels: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """The labels as int64 ``[n]``; raises ValueError unless they are whole numbers below ``num_classes``."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers [n], one for each image, got {labels.dtype} {list(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    if wrong:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, the model's classes; got {wrong}")
    return labels.long()


@torch.no_grad()
def sample(
    model: DiT,
    labels: Tensor | Sequence[int],
    *,
    steps: int = 50,
    cfg_scale: float = 1.5,
    seed: int = 0,
    device: torch.device | str | None = None,
    step_callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images of the labels: float32 ``[n, channels, image_size, image_size]``, about -1 to 1, on ``device``.

    The model is called exactly once a step, by ``model(x, t, y)`` with the conditional inputs and then the
    unconditional ones in one batch of ``2 * n``; so it may be compiled in any way.

    Args:
        model: a `DiT` in eval mode, plain or compiled.
        labels: integers ``[n]``.
        steps: Euler steps of equal length from t = 1, noise, to t = 0, data.
        cfg_scale: classifier-free guidance; 1 is none.
        seed: of the initial noise, 0 or more; nothing else is random. See `initial_noise`.
        device: where the model is; None reads it off the model's parameters.
        step_callback: called after each step with its index and the latents, shaped as the result.

    Raises:
        ValueError: if a label is none of the model's classes, or ``steps`` or ``seed`` is out of range.
    """
    labels = check_labels(labels, model.num_classes)
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    parameter = next(model.parameters())
    device = parameter.device if device is None else torch.device(device)
    shape = (model.channels, model.image_size, model.image_size)
    x = initial_noise(len(labels), shape, seed).to(device)
    y = torch.cat((labels, torch.full_like(labels, model.num_classes))).to(device)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for step in range(steps):
        t = torch.full((len(y),), times[step], device=device)
        velocity = model(torch.cat((x, x)).to(parameter.dtype), t, y)
        x = x + (times[step + 1] - times[step]) * guide(velocity.float(), cfg_scale)
        if step_callback is not None:
            step_callback(step, x)
    return x
