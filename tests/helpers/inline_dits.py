"""Small Diffusion Transformers, one per way in which models of the field write a residual branch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32
HEADS = 2
CHANNELS = 4
TOKENS = 12
TEXT_TOKENS = 5
TEXT_WIDTH = 24
LABELS = 10


def timestep_embedding(t: Tensor, width: int = WIDTH) -> Tensor:
    """Sinusoids ``[batch, width]`` of ``t [batch]`` in [0, 1], slow enough that steps resemble each other."""
    frequencies = torch.exp(torch.linspace(0.0, math.log(50.0), width // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(t.dtype)


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """``[batch, tokens, width]`` -> ``[batch, heads, tokens, width / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return merge_heads(F.scaled_dot_product_attention(*map(split_heads, (query, key, value))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def plain_norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.qkv(x).chunk(3, dim=-1)))


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(TEXT_WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.proj(attention(self.q(x), *self.kv(text).chunk(2, dim=-1)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class AdaLNZeroBlock(nn.Module):
    """DiT: norm and gate modulated by the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(), plain_norm()
        self.attn, self.mlp = Attention(), FeedForward()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class UngatedBlock(nn.Module):
    """Stable Audio, U-ViT: pre-norm without a gate, and here with the adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        x = x + c[:, None]
        x += self.attn(self.norm1(x))
        return x.add_(self.mlp(self.norm2(x)))


class ParallelBlock(nn.Module):
    """ViT-22B: both branches read the same normalised input and are added at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = plain_norm()
        self.attn, self.mlp = Attention(), FeedForward()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=-1)
        h = modulate(self.norm(x), shift, scale)
        return x + gate[:, None] * self.attn(h) + self.mlp(h)


class CrossAttentionBlock(nn.Module):
    """PixArt, STDiT: a table per block beside the conditioning; cross-attention without norm and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(), plain_norm()
        self.attn, self.cross_attn, self.mlp = Attention(), CrossAttention(), FeedForward()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        table = self.scale_shift_table[None] + self.modulation(F.silu(c)).unflatten(-1, (6, WIDTH))
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attn(x, text)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PostNormBlock(nn.Module):
    """Lumina-Next, Swin V2: the branch's output is normalised, then gated, by a tanh or a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), FeedForward()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.layer_scale = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        x = x + self.gate(c)[:, None].tanh() * self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x)) * self.layer_scale


class FlatBlock(nn.Module):
    """Weights of both branches on the block itself, so that only the kind tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.gate, self.down = (
            nn.Linear(i, o, bias=False) for i, o in ((WIDTH, 3 * WIDTH), (WIDTH, 3 * WIDTH), (3 * WIDTH, WIDTH))
        )

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        h = self.norm1(x + c[:, None])
        x = x + self.out(attention(self.query(h), self.key(h), self.value(h)))
        h = self.norm2(x + c[:, None])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class SingleStreamBlock(nn.Module):
    """Flux: attention and feed-forward side by side, joined by one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = plain_norm()
        self.linear1 = nn.Linear(WIDTH, 3 * WIDTH + 4 * WIDTH)
        self.linear2 = nn.Linear(WIDTH + 4 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=-1)
        qkv, hidden = self.linear1(modulate(self.norm(x), shift, scale)).split([3 * WIDTH, 4 * WIDTH], dim=-1)
        heads = attention(*qkv.chunk(3, dim=-1))
        output = self.linear2(torch.cat((heads, F.gelu(hidden, approximate="tanh")), dim=-1))
        return x + gate[:, None] * output


class InlineDiT(nn.Module):
    """Tokens in, tokens out, around blocks that are called as ``block(x, c, text)``.

    Args:
        blocks: run in order; a block that occurs twice is weight-tied.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.label = nn.Embedding(LABELS, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(dict.fromkeys(blocks))
        self.order = [list(self.blocks).index(block) for block in blocks]
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor) -> Tensor:
        """``x [batch, TOKENS, CHANNELS]``, ``t [batch]``, ``text [batch, TEXT_TOKENS, TEXT_WIDTH]``."""
        c = self.time(timestep_embedding(t)) + self.label(label)
        x = self.embed(x) + self.pos_embed
        for index in self.order:
            x = self.blocks[index](x, c, text)
        return self.out(self.norm(x))


class JointAttention(nn.Module):
    """One attention over the tokens of image and text; each stream has its own projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.proj, self.text_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((self.qkv(x), self.text_qkv(text)), dim=1)
        heads = attention(*both.chunk(3, dim=-1))
        image_heads, text_heads = heads.split([x.shape[1], text.shape[1]], dim=1)
        return self.proj(image_heads), self.text_proj(text_heads)


class JointBlock(nn.Module):
    """SD3, Flux: joint attention feeds the residual adds of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm1_text, self.norm2, self.norm2_text = (plain_norm() for _ in range(4))
        self.attn, self.mlp, self.text_mlp = JointAttention(), FeedForward(), FeedForward()
        self.modulation, self.text_modulation = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        c = F.silu(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.text_modulation(c).chunk(6, dim=-1)
        attended, text_attended = self.attn(
            modulate(self.norm1(x), shift1, scale1), modulate(self.norm1_text(text), t_shift1, t_scale1)
        )
        x = x + gate1[:, None] * attended
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        text = text + t_gate1[:, None] * text_attended
        text = text + t_gate2[:, None] * self.text_mlp(modulate(self.norm2_text(text), t_shift2, t_scale2))
        return x, text


class JointDiT(nn.Module):
    """Two streams to the end: the output reads both, so that no branch of the last block is dead."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.text_embed = nn.Linear(CHANNELS, WIDTH), nn.Linear(TEXT_WIDTH, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.label = nn.Embedding(LABELS, WIDTH)
        self.blocks = nn.ModuleList(JointBlock() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor) -> Tensor:
        """Shapes as for ``InlineDiT``."""
        c = self.time(timestep_embedding(t)) + self.label(label)
        x, text = self.embed(x), self.text_embed(text)
        for block in self.blocks:
            x, text = block(x, text, c)
        return self.out(self.norm(x + text.mean(dim=1, keepdim=True)))
