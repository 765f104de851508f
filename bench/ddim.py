"""What `end_to_end.py` samples: the paper's DiT with random weights, under DDIM with classifier-free guidance.

The loop around the transformer is the same for all that are compared, so only the transformer differs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from smoothcache_fx.calibration import optimal
from smoothcache_fx.demo.model import randomize

GUIDANCE = 1.5
CHANNELS = 4
CLASSES = 1000
#: PyTorch's counter has no formula for it.
FLASH_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Peer:
    """A model that is sampled from.

    Attributes:
        forward: the transformer, called as ``DiTTransformer2DModel.forward`` is.
        fresh: a context manager that is entered around each trajectory, so that it begins with nothing cached.
        setting: how the peer was set up, in words.
        model: the smoothcache model, where it is one.
    """

    forward: Callable[..., Any]
    fresh: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    setting: str = ""
    model: torch.nn.Module | None = None


def build_dit(layers: int, heads: int, head_dim: int, size: int) -> DiTTransformer2DModel:
    """DiT with adaLN-Zero over ``size`` x ``size`` latents in patches of 2; random weights, none of them zero."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    return randomize(model).requires_grad_(False)


class CallTimer:
    """Seconds of each call of a trajectory. On CUDA by events on the stream, so that nothing waits for the device."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self._marks: list[tuple[Any, Any]] = []

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = self._mark()
        output = forward(*args, **kwargs)
        self._marks.append((begin, self._mark()))
        return output

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        if not self.cuda:
            return [end - begin for begin, end in self._marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._marks]


@dataclass
class Sampler:
    """DDIM without a decoder. The guidance's two halves are one call of a doubled batch, as in DiT's own code.

    Latents and the scheduler's arithmetic are float32, whatever the transformer's dtype is.

    Attributes:
        images: in a trajectory; the transformer is called with twice as many.
        steps: of the scheduler.
        size: of the latents.
        device, dtype: of the transformer.
    """

    images: int
    steps: int
    size: int
    device: str
    dtype: torch.dtype
    scheduler: DDIMScheduler = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The scheduler stays on the CPU: its step would wait for the device to read a timestep from there.
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.scheduler.set_timesteps(self.steps)
        self._timesteps = self.scheduler.timesteps.tolist()
        batch = 2 * self.images
        self._timestep_inputs = [torch.full((batch,), t, device=self.device) for t in self._timesteps]
        generator = torch.Generator().manual_seed(0)
        shape = (self.images, CHANNELS, self.size, self.size)
        self._noise = torch.randn(shape, generator=generator).to(self.device)
        labels = [index % CLASSES for index in range(self.images)] + [CLASSES] * self.images
        self._labels = torch.tensor(labels, device=self.device)

    @torch.no_grad()
    def __call__(self, peer: Peer, around_call: Callable[..., Any] | None = None) -> Tensor:
        """Latents ``[images, 4, size, size]`` of one trajectory. ``around_call(forward, ...)`` makes the calls."""
        latents = self._noise
        with peer.fresh():
            for timestep, timestep_input in zip(self._timesteps, self._timestep_inputs, strict=True):
                if self.device != "cpu":
                    # Outputs of CUDA graphs may be overwritten: the last ones have been used.
                    torch.compiler.cudagraph_mark_step_begin()
                doubled = torch.cat((latents, latents)).to(self.dtype)
                arguments = {"timestep": timestep_input, "class_labels": self._labels, "return_dict": False}
                if around_call is None:
                    output = peer.forward(doubled, **arguments)
                else:
                    output = around_call(peer.forward, doubled, **arguments)
                # The other channels are the learned variance, which DDIM does not need.
                conditional, unconditional = output[0][:, :CHANNELS].float().chunk(2)
                guided = unconditional + GUIDANCE * (conditional - unconditional)
                latents = self.scheduler.step(guided, timestep, latents, return_dict=False)[0]
        return latents

    def outputs(self, peer: Peer, after_call: Callable[[], None] = lambda: None) -> Tensor:
        """The predicted noise of each step of a trajectory, float32 on the CPU: ``[steps, 2 * images, 4, size, size]``.

        What is wrong with a late step can be seen here, and not in the latents, which it hardly changes.
        """
        kept = []

        def keep(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            kept.append(output[0][:, :CHANNELS].float().cpu().clone())
            after_call()
            return output

        self(peer, keep)
        return torch.stack(kept)

    def flops(self, peer: Peer) -> list[int]:
        """FLOPs of each call of an uncompiled peer's trajectory, counted while it runs."""
        counts = []

        def count(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            counter = FlopCounterMode(display=False, custom_mapping={FLASH_FOR_CPU: _flash_flops})
            with counter:
                output = forward(*args, **kwargs)
            counts.append(counter.get_total_flops())
            return output

        self(peer, count)
        return counts


def _flash_flops(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def even_row(steps: int, computed: int) -> list[int]:
    """A row that computes so many steps, first and last among them, at distances as equal as can be."""
    if not 2 <= computed <= steps:
        raise ValueError(f"between 2 and {steps} steps can be computed, got {computed}")
    return list(map(int, optimal.even_row(steps, computed)))
