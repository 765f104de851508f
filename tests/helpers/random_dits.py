"""Transformers drawn at random from the ways in which models of the field are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .cases import Branch, Case
from .inline_dits import merge_heads, split_heads, timestep_embedding

WIDTH = 16
HEADS = 2
CHANNELS = 4
TEXT_WIDTH = 12
LABELS = 5

GATES = ("none", "per_sample", "tanh", "layer_scale", "scalar", "constant")
KINDS = {"attn": "attn", "cross": "cross_attn", "ffn": "ffn"}


@dataclass(frozen=True)
class Architecture:
    """One way to build a DiT.

    Attributes:
        depth: blocks.
        gate: what a branch's output is multiplied with: nothing, a value per sample and channel (through a
            tanh), a parameter per channel, a learned scalar, a number.
        norm: ``layer`` or ``rms``.
        post_norm: the norm is behind the branch instead of before it.
        parallel: all branches read the block's input.
        cross: whether there is cross-attention.
        modulation: what scales and shifts the norms: ``none``, values that each block computes
            (``per_block``), or values computed once, to which each block adds a table (``shared``).
        fused_qkv: one projection for queries, keys and values.
        explicit_attention: softmax(QK^T)V in matmuls.
        qk_norm: queries and keys are normalised.
        swiglu: of the feed-forward.
        bias: of all projections.
        mixed: the residual stream is float32, branches are bfloat16.
        batch, tokens, text_tokens: sizes of the inputs.
    """

    depth: int = 1
    gate: str = "none"
    norm: str = "layer"
    post_norm: bool = False
    parallel: bool = False
    cross: bool = False
    modulation: str = "none"
    fused_qkv: bool = True
    explicit_attention: bool = False
    qk_norm: bool = False
    swiglu: bool = False
    bias: bool = True
    mixed: bool = False
    batch: int = 2
    tokens: int = 6
    text_tokens: int = 3

    @property
    def branch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed else torch.float32

    @property
    def branches(self) -> list[str]:
        return ["attn", "cross", "ffn"] if self.cross else ["attn", "ffn"]


architectures = st.builds(
    Architecture,
    depth=st.integers(1, 3),
    gate=st.sampled_from(GATES),
    norm=st.sampled_from(("layer", "rms")),
    post_norm=st.booleans(),
    parallel=st.booleans(),
    cross=st.booleans(),
    modulation=st.sampled_from(("none", "per_block", "shared")),
    fused_qkv=st.booleans(),
    explicit_attention=st.booleans(),
    qk_norm=st.booleans(),
    swiglu=st.booleans(),
    bias=st.booleans(),
    mixed=st.booleans(),
    batch=st.integers(1, 3),
    tokens=st.sampled_from((1, 5, 6, 16)),
    text_tokens=st.sampled_from((1, 3, 6)),
)


class Attention(nn.Module):
    """Self-attention, or cross-attention where it is called with a text."""

    def __init__(self, a: Architecture, context_width: int = WIDTH) -> None:
        super().__init__()
        self.a = a
        self.fused = a.fused_qkv and context_width == WIDTH
        if self.fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=a.bias)
        else:
            self.q = nn.Linear(WIDTH, WIDTH, bias=a.bias)
            self.k = nn.Linear(context_width, WIDTH, bias=a.bias)
            self.v = nn.Linear(context_width, WIDTH, bias=a.bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH // HEADS) if a.qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(WIDTH, WIDTH, bias=a.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        projected = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(source), self.v(source))
        query, key, value = (split_heads(tensor, HEADS) for tensor in projected)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.a.explicit_attention:
            scores = query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
            return self.proj(merge_heads(scores.softmax(dim=-1) @ value))
        return self.proj(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class FeedForward(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=a.bias)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=a.bias) if a.swiglu else None
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=a.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        self.attn, self.ffn = Attention(a), FeedForward(a)
        self.cross = Attention(a, TEXT_WIDTH) if a.cross else None
        norm = nn.LayerNorm if a.norm == "layer" else nn.RMSNorm
        self.norms = nn.ModuleDict({name: norm(WIDTH) for name in a.branches})
        values = 3 * len(a.branches) * WIDTH
        self.modulation = nn.Linear(WIDTH, values, bias=a.bias) if a.modulation != "shared" else None
        self.table = nn.Parameter(torch.zeros(1, values)) if a.modulation == "shared" else None
        self.layer_scale = nn.ParameterDict({name: nn.Parameter(torch.zeros(WIDTH)) for name in a.branches})
        self.scalar = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in a.branches})

    def forward(self, x: Tensor, c: Tensor, shared: Tensor, text: Tensor) -> Tensor:
        modulated = shared + self.table if self.modulation is None else self.modulation(F.silu(c))
        shift_scale_gate = modulated[:, None].chunk(3 * len(self.a.branches), dim=-1)
        terms = []
        for i, name in enumerate(self.a.branches):
            term = self.branch(name, x, text, *shift_scale_gate[3 * i : 3 * i + 3])
            if self.a.parallel:
                terms.append(term)
            else:
                x = x + term
        for term in terms:
            x = x + term
        return x

    def branch(self, name: str, x: Tensor, text: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        h = x.to(self.a.branch_dtype)
        if not self.a.post_norm:
            h = self.norms[name](h)
        if self.a.modulation != "none":
            h = h * (1 + scale) + shift
        y = self.cross(h, text) if name == "cross" else getattr(self, name)(h)
        if self.a.post_norm:
            y = self.norms[name](y)
        return self.gated(name, y.to(x.dtype), gate.to(x.dtype))

    def gated(self, name: str, y: Tensor, gate: Tensor) -> Tensor:
        match self.a.gate:
            case "none":
                return y
            case "per_sample":
                return gate * y
            case "tanh":
                return y * gate.tanh()
            case "layer_scale":
                return y * self.layer_scale[name]
            case "scalar":
                return self.scalar[name] * y
            case "constant":
                return 0.5 * y
        raise ValueError(f"gate must be one of {GATES}, got {self.a.gate!r}")


class RandomDiT(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.time, self.label = nn.Linear(WIDTH, WIDTH), nn.Embedding(LABELS, WIDTH)
        self.shared = nn.Linear(WIDTH, 3 * len(a.branches) * WIDTH)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.depth))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor) -> Tensor:
        """``x [batch, tokens, CHANNELS]``, ``t [batch]``, ``text [batch, text_tokens, TEXT_WIDTH]``."""
        c = (self.time(timestep_embedding(t, WIDTH)) + self.label(label)).to(self.a.branch_dtype)
        text = text.to(self.a.branch_dtype)
        shared = self.shared(F.silu(c.to(t.dtype))).to(self.a.branch_dtype)
        x = self.embed(x)
        if self.a.modulation == "none":
            # Else a branch would hardly change from step to step.
            x = x + c[:, None].to(x.dtype)
        for block in self.blocks:
            x = block(x, c, shared, text)
        return self.out(self.norm(x))


def _make(a: Architecture) -> RandomDiT:
    model = RandomDiT(a)
    if a.mixed:
        model.blocks.to(torch.bfloat16)
    return model


def expected_branches(a: Architecture) -> Mapping[str, Branch]:
    """Under their names; what they cost is not said."""
    return {
        f"blocks.{index}.{name}": Branch(f"blocks.{index}.{name}", KINDS[name], matmuls=0)
        for index in range(a.depth)
        for name in a.branches
    }


def random_case(a: Architecture) -> Case:
    return Case(
        "random",
        make=lambda: _make(a),
        latents=lambda g: torch.randn(a.batch, a.tokens, CHANNELS, generator=g),
        conditioning=lambda g: {
            "label": torch.randint(LABELS, (a.batch,), generator=g),
            "text": torch.randn(a.batch, a.text_tokens, TEXT_WIDTH, generator=g),
        },
        call=lambda model, x, t, c: model(x, torch.full((a.batch,), t, dtype=x.dtype), **c),
        branches=expected_branches(a),
    )
