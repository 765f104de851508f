"""A class-conditional Diffusion Transformer with adaLN-Zero, as Peebles & Xie describe it (arXiv 2212.09748).

The module names are those of the reference implementation, so that what is learned here about names and kinds
carries over. It needs torch only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens ``[batch, tokens, width]`` by what the conditioning says, ``[batch, width]``."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def guide(velocity: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance: ``[2 * batch, ...]``, the conditional half first, to ``[batch, ...]``."""
    conditional, unconditional = velocity.chunk(2)
    return unconditional + cfg_scale * (conditional - unconditional)


class Attention(nn.Module):
    """Multi-head self-attention over tokens ``[batch, tokens, width]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(query, key, value)
        return self.proj(heads.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """Two linears with a GELU between, token by token, ``[batch, tokens, width]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and feed-forward, each with a shift, a scale and a gate that the conditioning sets."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """From tokens ``[batch, tokens, width]`` to the values of their patches."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, ``[batch]`` in [0, 1], through a small MLP to ``[batch, width]``."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # In float32 whatever the model's dtype: bfloat16 would round the angles of the fast sinusoids away.
        exponents = torch.arange(self.frequencies, device=t.device, dtype=torch.float32) / self.frequencies
        angles = 1000.0 * t.float().unsqueeze(1) * torch.exp(-math.log(10000.0) * exponents)
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


def position_embedding(side: int, width: int) -> Tensor:
    """Sinusoids of row and column, ``[1, side * side, width]``; ``width`` must be a multiple of 4."""
    steps = torch.arange(width // 4) / (width // 4)
    angles = torch.arange(side).unsqueeze(1) * torch.exp(-math.log(10000.0) * steps)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = axis.unsqueeze(1).expand(side, side, width // 2)
    columns = axis.unsqueeze(0).expand(side, side, width // 2)
    return torch.cat((rows, columns), dim=2).reshape(1, side * side, width)


class DiT(nn.Module):
    """Predicts the velocity of a rectified flow for images ``[batch, channels, image_size, image_size]``.

    By default it has 64 tokens, and 3.7 million parameters. As in the reference implementation the gates and the
    last layer start at zero, so the branches of an untrained model add nothing: see `randomize`.

    Args:
        image_size, patch_size, channels: of the images; the first must be a multiple of the second.
        width, depth, heads, mlp_ratio: of the transformer; the width must be a multiple of heads and of 4.
        num_classes: labels are from 0 to ``num_classes - 1``; ``num_classes`` is the null class, no label.

    Raises:
        ValueError: if a size is not positive, or does not divide as said above.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        patch_size: int = 1,
        channels: int = 1,
        width: int = 128,
        depth: int = 12,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": patch_size,
            "channels": channels,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
        }
        for name, size in self.config.items():
            if size <= 0:
                raise ValueError(f"{name} must be above 0, got {size}")
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}")
        if width % heads or width % 4:
            raise ValueError(f"width must be a multiple of 4 and of heads {heads}, got {width}")
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.num_classes = num_classes
        patch_values = channels * patch_size**2
        self.x_embedder = nn.Linear(patch_values, width)
        self.pos_embed = nn.Parameter(position_embedding(image_size // patch_size, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_values)
        self._initialize()

    def _initialize(self) -> None:
        """adaLN-Zero: every block is the identity at first, and the prediction zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.y_embedder, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at ``x``, in its shape and dtype.

        Args:
            x: noisy images, ``[batch, channels, image_size, image_size]``.
            t: floating point ``[batch]``, 1 for pure noise, 0 for data.
            y: int64 ``[batch]`` labels; ``num_classes`` for none.

        Raises:
            ValueError: if a shape or the dtype of ``t`` is another. Values are not looked at, which would
                wait for the device at each step; `sample` checks the labels.
        """
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be [batch, {', '.join(map(str, expected))}], got {list(x.shape)}")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t and y must be [batch], here [{len(x)}], got {list(t.shape)} and {list(y.shape)}")
        if not t.is_floating_point():
            raise ValueError(f"t must be floating point, from 0 to 1, got {t.dtype}; scale it, as a float")
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(self.patchify(x)) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance by one call of a doubled batch; arguments and result as in ``forward``."""
        null = torch.full_like(y, self.num_classes)
        velocity = self.forward(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, null)))
        return guide(velocity, cfg_scale)

    def patchify(self, x: Tensor) -> Tensor:
        """``[batch, channels, size, size]`` to ``[batch, tokens, channels * patch_size**2]``."""
        batch, patch, side = x.shape[0], self.patch_size, self.image_size // self.patch_size
        x = x.reshape(batch, self.channels, side, patch, side, patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, self.channels * patch * patch)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of ``patchify``."""
        batch, patch, side = x.shape[0], self.patch_size, self.image_size // self.patch_size
        x = x.reshape(batch, side, side, self.channels, patch, patch)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, self.channels, self.image_size, self.image_size)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random, non-zero values of a sane scale, in place; returns the model in eval mode.

    For tests and benchmarks at sizes for which there are no trained weights: zero gates or zero output
    projections would hide every mistake in a cached branch. Weights have variance 1 / fan-in, embeddings (of
    positions, too) 1, biases 0.04.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                std = 0.2
            elif parameter.ndim == 2 and id(parameter) not in embeddings:
                std = parameter.shape[1] ** -0.5
            else:
                std = 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()
