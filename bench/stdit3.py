"""A video transformer of STDiT3's shape (Open-Sora 1.2): pairs of a spatial and a temporal block.

Each block has self-attention over the tokens of a frame (spatial) or of a place (temporal, with rotary embedding),
cross-attention to the text, ungated, and a feed-forward; adaLN-single: one modulation for all blocks and a table of
offsets in each. Sizes of the published STDiT3-XL/2 by default.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention ``[n, tokens, width]`` with RMS-normed queries and keys; rotary if asked."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of ``[..., tokens, width]``."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_linear(x), *self.kv_linear(text).chunk(2, dim=-1))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One block on ``[batch, frames, places, width]``."""

    def __init__(self, width: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, rotary=temporal)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor) -> Tensor:
        batch, frames, places, _ = x.shape
        table = (self.scale_shift_table + modulation.unflatten(-1, (6, -1)))[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(dim=-2)
        h = self.norm1(x) * (1 + scale1) + shift1
        if self.temporal:
            h = self.attn(h.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, places)).transpose(1, 2)
        else:
            h = self.attn(h.flatten(0, 1)).unflatten(0, (batch, frames))
        x = x + gate1 * h
        x = x + self.cross_attn(x.flatten(1, 2), text).unflatten(1, (frames, places))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class STDiT3(nn.Module):
    """Velocity of video latents ``[batch, channels, frames, height, width]``, given timesteps ``[batch]`` from 0 to 1
    and text states ``[batch, tokens, text_width]``."""

    def __init__(
        self,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        channels: int = 4,
        patch: int = 2,
        text_width: int = 4096,
    ) -> None:
        super().__init__()
        self.patch, self.width, self.channels = patch, width, channels
        self.x_embedder = nn.Conv3d(channels, width, (1, patch, patch), (1, patch, patch))
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(
            nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.spatial_blocks = nn.ModuleList(Block(width, heads, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(width, heads, temporal=True) for _ in range(depth))
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.randn(2, width) / math.sqrt(width))
        self.final = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        dtype, (frames, height, width) = x.dtype, x.shape[2:]
        angle = 1000 * timestep.float()[:, None] * 10000.0 ** (-torch.arange(128, device=x.device) / 128)
        t = self.t_embedder(torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype))
        modulation = self.t_block(t)
        h = self.x_embedder(x).flatten(3).permute(0, 2, 3, 1)
        h = h + self._positions(height // self.patch, width // self.patch, h)
        text = self.y_embedder(text)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = temporal(spatial(h, text, modulation), text, modulation)
        shift, scale = (self.final_table + t[:, None])[:, None, None].unbind(dim=-2)
        h = self.final(self.norm_final(h) * (1 + scale) + shift)
        p = self.patch
        h = h.view(len(x), frames, height // p, width // p, p, p, self.channels)
        return h.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)

    def _positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Sines and cosines of a token's row and column, ``[rows * columns, width]``."""
        quarter = self.width // 4
        frequencies = 10000.0 ** (-torch.arange(quarter, device=like.device) / quarter)
        row = torch.arange(rows, device=like.device)[:, None] * frequencies
        column = torch.arange(columns, device=like.device)[:, None] * frequencies
        row = torch.cat((row.sin(), row.cos()), dim=-1)[:, None].expand(-1, columns, -1)
        column = torch.cat((column.sin(), column.cos()), dim=-1)[None].expand(rows, -1, -1)
        return torch.cat((row, column), dim=-1).flatten(0, 1).to(like.dtype)
