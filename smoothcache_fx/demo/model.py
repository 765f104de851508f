"""A class-conditional Diffusion Transformer with adaLN-Zero, in the structure of Peebles & Xie (arXiv 2212.09748)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


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
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
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
    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, ``[batch]`` in [0, 1], through a small MLP."""

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        steps = torch.arange(frequencies) / frequencies
        self.register_buffer("frequencies", 1000.0 * torch.exp(-math.log(10000.0) * steps), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies.dtype).unsqueeze(1) * self.frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=1))


class DiT(nn.Module):
    """Predicts the velocity of a rectified flow for images ``[batch, channels, image_size, image_size]``.

    Args:
        image_size, patch_size, channels: of the images; ``image_size`` must be a multiple of ``patch_size``.
        width, depth, heads, mlp_ratio: of the transformer; ``width`` must be a multiple of ``heads``.
        num_classes: labels run from 0 to ``num_classes - 1``; ``num_classes`` itself means no label.

    The defaults are the shipped digits model. As in the reference implementation the gates and the last layer start
    at zero, so that an untrained model's branches add nothing: see ``randomize``.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        patch_size: int = 2,
        channels: int = 1,
        width: int = 128,
        depth: int = 12,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image_size must be a multiple of patch_size and width of heads; got image_size={image_size}, "
                f"patch_size={patch_size}, width={width}, heads={heads}"
            )
        self.config = {
            "image_size": image_size, "patch_size": patch_size, "channels": channels, "width": width,
            "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, "num_classes": num_classes,
        }
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.num_classes = num_classes
        self.x_embedder = nn.Linear(channels * patch_size**2, width)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2, width) * 0.02)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels * patch_size**2)
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        for module in (*(block.adaLN_modulation[1] for block in self.blocks),
                       self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at ``x``, in its shape.

        Args:
            x: noisy images, ``[batch, channels, image_size, image_size]``.
            t: ``[batch]``, 1 for pure noise, 0 for data.
            y: ``[batch]`` int64 labels; ``num_classes`` for none.
        """
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be [batch, {', '.join(map(str, expected))}], got {list(x.shape)}")
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(self.patchify(x)) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance with one call of a doubled batch: arguments and result as in ``forward``."""
        none = torch.full_like(y, self.num_classes)
        both = self.forward(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, none)))
        conditional, unconditional = both.chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional)

    def patchify(self, x: Tensor) -> Tensor:
        """``[batch, channels, size, size]`` -> ``[batch, tokens, channels * patch_size**2]``."""
        batch, patch, side = x.shape[0], self.patch_size, self.image_size // self.patch_size
        x = x.reshape(batch, self.channels, side, patch, side, patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, self.channels * patch * patch)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of ``patchify``."""
        batch, patch, side = x.shape[0], self.patch_size, self.image_size // self.patch_size
        x = x.reshape(batch, side, side, self.channels, patch, patch)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, self.channels, self.image_size, self.image_size)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random, non-zero value of a sane scale, in place; returns the model in eval mode.

    For tests and benchmarks at sizes for which there are no trained weights: untrained models with zero gates or
    zero output projections hide every mistake in a cached branch.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
            parameter.copy_(values.to(parameter.dtype))
    return model.eval()
