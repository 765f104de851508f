"""Blocks that are written in other ways than most: what a finder by rule of thumb gets wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from .cases import Branch, Case
from .inline_dits import (
    CHANNELS,
    TEXT_WIDTH,
    TOKENS,
    WIDTH,
    AdaLNZeroBlock,
    Attention,
    FeedForward,
    InlineDiT,
    merge_heads,
    modulate,
    plain_norm,
    split_heads,
    timestep_embedding,
)
from .models import CASES as MODELS


class AddcmulBlock(nn.Module):
    """ComfyUI's and SGLang's way to modulate and to gate: ``addcmul(x, gate, branch)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(), plain_norm()
        self.attn, self.mlp = Attention(), FeedForward()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1)))
        return torch.addcmul(x, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)), gate2)


class ParallelAddcmulBlock(nn.Module):
    """The sum of both branches is gated, then added: one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both = plain_norm(), AttentionBesideFeedForward()
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        return torch.addcmul(x, self.modulation(c)[:, None], self.both(self.norm(x + c[:, None])))


class AttentionBesideFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x) + self.mlp(x)


class Float32StreamBlock(nn.Module):
    """Wan: sums in float32, cast back, whatever the dtype of the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(), plain_norm()
        self.attn, self.mlp = Attention(), FeedForward()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).float().chunk(6, dim=-1)
        h = self.attn(modulate(self.norm1(x.float()), shift1, scale1).type_as(x))
        x = (x.float() + h * gate1[:, None]).type_as(x)
        h = self.mlp(modulate(self.norm2(x.float()), shift2, scale2).type_as(x))
        return (x.float() + h.float() * gate2[:, None]).type_as(x)


class FlexAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(merge_heads(flex_attention(*map(split_heads, self.qkv(x).chunk(3, dim=-1)))))


class FlexAttentionBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = FlexAttention()


class SoftExperts(nn.Module):
    """A dense mixture: every expert sees every token."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class TopExperts(SoftExperts):
    """The two best experts of each token, by masks instead of by selected rows, beside one that always runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        output = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            output += (weights * (chosen == i)).sum(-1, keepdim=True) * expert(x)
        return output + self.shared(x)


class SoftExpertsBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = SoftExperts()


class TopExpertsBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = TopExperts()


class UShapedDiT(InlineDiT):
    """U-ViT, HunyuanDiT: the second half reads the first half's streams, by a cat and a projection or by a sum."""

    def __init__(self) -> None:
        super().__init__(*(AdaLNZeroBlock() for _ in range(4)))
        self.skip = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor) -> Tensor:
        c = self.time(timestep_embedding(t)) + self.label(label)
        first = self.embed(x) + self.pos_embed
        second = self.blocks[0](first, c, text)
        x = self.blocks[1](second, c, text)
        x = self.blocks[2](self.skip(torch.cat((x, second), dim=-1)), c, text)
        x = self.blocks[3](x + first, c, text)
        return self.out(self.norm(x))


class ControlledDiT(InlineDiT):
    """A ControlNet in the same graph: a copy of the first block, fed with a hint, adds to the stream of the rest."""

    def __init__(self) -> None:
        super().__init__(AdaLNZeroBlock(), AdaLNZeroBlock())
        self.control, self.before, self.after = AdaLNZeroBlock(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor, hint: Tensor) -> Tensor:
        c = self.time(timestep_embedding(t)) + self.label(label)
        x = self.embed(x) + self.pos_embed
        control = self.control(x + self.before(self.embed(hint)), c, text)
        for block in self.blocks:
            x = block(x, c, text) + self.after(control)
        return self.out(self.norm(x))


class RefinedTextDiT(InlineDiT):
    """HunyuanVideo, Mochi: blocks of the text's own, and an attention that pools it into the conditioning."""

    def __init__(self) -> None:
        super().__init__(AdaLNZeroBlock())
        self.text_embed, self.refiner = nn.Linear(TEXT_WIDTH, WIDTH), AdaLNZeroBlock()
        self.pooler = Pooler()

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor) -> Tensor:
        c = self.time(timestep_embedding(t)) + self.label(label)
        text = self.refiner(self.text_embed(text), c, text)
        c = c + self.pooler(text)
        x = self.blocks[0](self.embed(x) + self.pos_embed, c, text)
        return self.out(self.norm(x + text.mean(dim=1, keepdim=True)))


class Pooler(nn.Module):
    """``[batch, tokens, width] -> [batch, width]``: the mean attends to all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x.mean(dim=1, keepdim=True), x), dim=1)
        key, value = self.kv(x).chunk(2, dim=-1)
        pooled = F.scaled_dot_product_attention(*map(split_heads, (self.q(x[:, :1]), key, value)))
        return self.proj(merge_heads(pooled))[:, 0]


def _case(name: str, make: type[nn.Module], kinds: Mapping[str, str]) -> Case:
    """``make`` is a whole model, or a block to be stacked; ``kinds`` has the submodules that are branches."""
    like = MODELS["adaln_zero"]
    is_block = not issubclass(make, InlineDiT)
    places = ("blocks.0.", "blocks.1.") if is_block else ("",)
    return replace(
        like,
        name=name,
        make=(lambda: InlineDiT(make(), make())) if is_block else make,
        branches={
            place + part: Branch(place + part, kind, matmuls=0) for place in places for part, kind in kinds.items()
        },
    )


def _hint(like: Case) -> Case:
    """With another image among the conditioning."""
    return replace(
        like,
        conditioning=lambda g: {**like.conditioning(g), "hint": torch.randn(2, TOKENS, CHANNELS, generator=g)},
    )


def _blocks(*names: str) -> dict[str, str]:
    return {f"{name}.{part}": kind for name in names for part, kind in BRANCHES.items()}


BRANCHES = {"attn": "attn", "mlp": "ffn"}
CASES = [
    _case("addcmul", AddcmulBlock, BRANCHES),
    _case("parallel_addcmul", ParallelAddcmulBlock, {"both": "attn_ffn"}),
    _case("float32_stream", Float32StreamBlock, BRANCHES),
    _case("flex_attention", FlexAttentionBlock, BRANCHES),
    _case("soft_experts", SoftExpertsBlock, BRANCHES),
    _case("top_experts", TopExpertsBlock, BRANCHES),
    _case("u_shaped", UShapedDiT, _blocks(*(f"blocks.{i}" for i in range(4)))),
    _hint(_case("control", ControlledDiT, _blocks("control", "blocks.0", "blocks.1"))),
    _case("refined_text", RefinedTextDiT, _blocks("refiner", "blocks.0")),
]
