"""x-transformers as denoisers: its encoder layers between two projections, with the options that DiTs use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.cases import Case, Conditioning
from helpers.checks import branches
from helpers.inline_dits import timestep_embedding

from .packages import load

BATCH, TOKENS, CHANNELS, WIDTH = 2, 16, 4, 32
TEXT_TOKENS = 5


class Denoiser(nn.Module):
    """x-transformers' continuous wrapper, with the timestep as a condition or as an added embedding."""

    def __init__(self, transformer: nn.Module, conditioned: bool) -> None:
        super().__init__()
        self.time = nn.Linear(WIDTH, WIDTH)
        self.transformer = transformer
        self.conditioned = conditioned

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """``x [batch, tokens, channels]``, ``t [batch]``, ``context [batch, text tokens, width]``."""
        c = self.time(timestep_embedding(t, WIDTH))
        inputs = {"condition": c} if self.conditioned else {"sum_embeds": c[:, None]}
        return self.transformer(x, **inputs, **({} if context is None else {"context": context}))


def _case(name: str, found: dict[str, str], outputs: dict[str, str] | None = None, **config: object) -> Case:
    module = load("x_transformers")
    crossed = bool(config.get("cross_attend"))
    conditioned = any(key.startswith("use_adaptive") for key in config)

    def make() -> nn.Module:
        layers = module.Encoder(dim=WIDTH, depth=2, heads=2, attn_dim_head=16, **config)
        return Denoiser(
            module.ContinuousTransformerWrapper(
                dim_in=CHANNELS, dim_out=CHANNELS, max_seq_len=TOKENS, attn_layers=layers
            ),
            conditioned,
        )

    def call(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
        return model(x, torch.full((BATCH,), t, dtype=x.dtype), **c)

    return Case(
        name,
        make,
        latents=lambda g: torch.randn(BATCH, TOKENS, CHANNELS, generator=g),
        conditioning=lambda g: {"context": torch.randn(BATCH, TEXT_TOKENS, WIDTH, generator=g)} if crossed else {},
        call=call,
        branches=branches(found, outputs),
    )


def _layers(*kinds: str, depth: int = 2, inner: str = "") -> dict[str, str]:
    """Its layers are numbered through: attention, feed-forward, attention, ...; each is norms, branch, residual."""
    return {
        f"transformer.attn_layers.layers.{index}.1{inner}{'.ff' if kind == 'ffn' else ''}": kind
        for index, kind in enumerate(kinds * depth)
    }


def plain() -> Case:
    return _case("x_plain", _layers("attn", "ffn"))


def flash_and_rotary() -> Case:
    return _case("x_flash_and_rotary", _layers("attn", "ffn"), attn_flash=True, rotary_pos_emb=True, ff_glu=True)


def adaln_zero() -> Case:
    """Its pair of options for the DiT block."""
    return _case(
        "x_adaln_zero", _layers("attn", "ffn", inner=".fn"), use_adaptive_layernorm=True, use_adaptive_layerscale=True
    )


def cross_attention() -> Case:
    return _case("x_cross_attention", _layers("attn", "cross_attn", "ffn"), cross_attend=True, use_rmsnorm=True)


def sandwich_norm() -> Case:
    """A norm before and one after each branch."""
    return _case("x_sandwich_norm", _layers("attn", "ffn"), sandwich_norm=True, attn_qk_norm=True)


def gated_attention() -> Case:
    """A gate on the heads' values, layer scales, and a residual stream that is scaled."""
    return _case(
        "x_gated_attention",
        _layers("attn", "ffn", inner=".fn"),
        attn_gate_values=True,
        use_layerscale=True,
        scale_residual=True,
    )


CASES = [plain, flash_and_rotary, adaln_zero, cross_attention, sandwich_norm, gated_attention]
