"""Capture a model's ATen graphs with their weights marked, as the passes get them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smoothcache_fx import Schedule
from smoothcache_fx.capture import _torch
from smoothcache_fx.capture.inner import inner_compiler
from smoothcache_fx.capture.program import Program
from smoothcache_fx.capture.session import Session
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.runtime.calls import ModelCall
from smoothcache_fx.runtime.clock import Clock

from .cases import Case


def capture(model: nn.Module, *args: Any, backend: str = "eager", **kwargs: Any) -> list[Program]:
    """The programs of one call of the model, in the order they were captured."""
    session = _session(model, backend)
    with torch.no_grad():
        _torch.dynamo_compile(model.forward, session)(*args, **kwargs)
    return session.programs


def capture_case(case: Case, dtype: torch.dtype = torch.float32, backend: str = "eager") -> list[Program]:
    """The programs of the first call of a case's trajectory."""
    model = case.build(0, dtype)
    latents, (conditioning, *_) = case.inputs(1, dtype)
    session = _session(model, backend)
    model.forward = _torch.dynamo_compile(model.forward, session)
    with torch.no_grad():
        case.call(model, latents, 1.0, conditioning)
    return session.programs


def _session(model: nn.Module, backend: str) -> Session:
    session = Session(Schedule(steps=1), inner_compiler(backend, None, None, None), Clock(1), model)
    session.current.call = ModelCall(session.clock.tick())
    return session


class Block(nn.Module):
    """A DiT block: ``x + gate * attn(modulate(norm(x)))``, then the same with a feed-forward."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]
        return self.proj(nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """``depth`` blocks in a row; with ``broken``, a graph break after each."""

    def __init__(self, depth: int = 2, width: int = 16, broken: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.broken = broken

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, c)
            if self.broken:
                torch._dynamo.graph_break()
        return x


class Denoiser(Stack):
    """A stack with the arguments of a user's model: steps can be told by their timesteps."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, timestep if label is None else timestep + label)


class Long(nn.Module):
    """Four blocks, and something between the second and the third."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))
        self.skips = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.between = between

    def forward(self, x, c, control=None):
        seen = []
        for index, block in enumerate(self.blocks):
            if self.between == "skips" and index > 1:
                x = self.skips[index - 2](torch.cat([x, seen.pop()], dim=-1))
            x = block(x, c)
            if index < 2:
                seen.append(x)
            if self.between == "control" and index == 1:
                x = x + control
            if self.between == "scale" and index == 1:
                x = x * 0.9
        return (x, seen[1]) if self.between == "output" else x


def inputs(batch: int = 2, tokens: int = 6, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, tokens, width), torch.randn(batch, width)


def stacks_of(model: nn.Module) -> list[str]:
    """The runs of blocks that a compiled model caches as one."""
    return [site.name for site in compiled_forward(model).session.sites() if site.kind == "stack"]
