"""What `quality.py` samples the demo's DiT with: Euler, and diffusers' DDIM and multi-step DPM-Solver++.

The model predicts the velocity of a rectified flow, ``v = noise - data`` at ``x = (1 - t) data + t noise``. Samplers
call it once a step, so that caches see the steps that the sampler takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from smoothcache_fx.demo.model import DiT, guide
from smoothcache_fx.demo.sampler import initial_noise, sample

GUIDANCE = 1.5


@dataclass(frozen=True)
class Sampler:
    """A way to sample.

    Attributes:
        title: for pictures and tables.
        steps: as many as users take of it.
        run: images float32 ``[n, channels, size, size]`` for a model, labels ``[n]``, a number of steps, a seed and, if
            it is to be another than `GUIDANCE`, a guidance scale.
    """

    title: str
    steps: int
    run: Callable[..., Tensor]


def _noise_and_velocity(
    model: DiT, labels: Tensor, seed: int, guidance: float
) -> tuple[Tensor, Callable[[Tensor, float], Tensor]]:
    """Initial noise, and the guided velocity at latents and a time, by one call of a doubled batch."""
    device = next(model.parameters()).device
    noise = initial_noise(len(labels), (model.channels, model.image_size, model.image_size), seed).to(device)
    y = torch.cat((labels, torch.full_like(labels, model.num_classes))).to(device)

    def velocity(x: Tensor, t: float) -> Tensor:
        return guide(model(torch.cat((x, x)), torch.full((len(y),), t, device=device), y), guidance)

    return noise, velocity


def _euler(model: DiT, labels: Tensor, steps: int, seed: int, guidance: float = GUIDANCE) -> Tensor:
    return sample(model, labels, steps=steps, cfg_scale=guidance, seed=seed)


@torch.no_grad()
def _ddim(model: DiT, labels: Tensor, steps: int, seed: int, guidance: float = GUIDANCE) -> Tensor:
    """DDIM on the variance-preserving path ``z = sqrt(a) data + sqrt(1 - a) noise``, which is the flow's up to scale.

    Divided by ``sqrt(a) + sqrt(1 - a)`` it is the flow's ``x`` at ``t = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a))``, where
    the noise is ``x + (1 - t) v``.
    """
    x, velocity = _noise_and_velocity(model, labels, seed, guidance)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        signal = float(scheduler.alphas_cumprod[timestep]) ** 0.5
        spread = (1 - signal**2) ** 0.5
        t = spread / (signal + spread)
        flow = x / (signal + spread)
        x = scheduler.step(flow + (1 - t) * velocity(flow, t), timestep, x).prev_sample
    return x


@torch.no_grad()
def _dpm(model: DiT, labels: Tensor, steps: int, seed: int, guidance: float = GUIDANCE) -> Tensor:
    """DPM-Solver++(2M) on the flow itself."""
    x, velocity = _noise_and_velocity(model, labels, seed, guidance)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        x = scheduler.step(velocity(x, sigma), timestep, x).prev_sample
    return x


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": Sampler("Euler", 50, _euler),
        "ddim": Sampler("DDIM", 50, _ddim),
        "dpm": Sampler("DPM-Solver++ (2M)", 25, _dpm),
    }
)
