"""Speech and sound: F5-TTS's three backbones, and the transformer of stable-audio-tools."""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn

from helpers.cases import Case, Conditioning
from helpers.checks import branches

from .packages import load

BATCH, FRAMES, MEL, PHONES = 2, 24, 10, 6
#: The backbone needs neither audio features nor the splitting of Chinese words.
F5_UNUSED = ("torchaudio", "librosa", "rjieba", "pypinyin")
F5_SIZES = {"dim": 32, "heads": 2, "dim_head": 16, "ff_mult": 2, "mel_dim": MEL, "text_num_embeds": 20}


def _f5(name: str, backbone: str, found: dict[str, str], mask: bool = False, **config: object) -> Case:
    """A backbone of F5-TTS: noise, masked reference audio and characters in, velocity out, ``[batch, frames, mel]``."""
    file, _, cls = backbone.partition(".")
    module = load(f"f5_tts.model.backbones.{file}", bare=("f5_tts.model",), without=F5_UNUSED)
    frames = torch.arange(FRAMES) < torch.tensor([[FRAMES], [FRAMES - 5]]) if mask else None

    def call(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
        return model(x=x, cond=c["cond"], text=c["text"], time=torch.tensor(t, dtype=x.dtype), mask=frames)

    return Case(
        name,
        make=lambda: getattr(module, cls)(**F5_SIZES, **config),
        latents=lambda g: torch.randn(BATCH, FRAMES, MEL, generator=g),
        conditioning=lambda g: {
            "cond": torch.randn(BATCH, FRAMES, MEL, generator=g),
            "text": torch.randint(20, (BATCH, PHONES), generator=g),
        },
        call=call,
        branches=branches(found),
    )


def f5_dit() -> Case:
    found = {
        "input_embed.conv_pos_embed": "ffn",
        "transformer_blocks.0-1.attn": "attn",
        "transformer_blocks.0-1.ff.ff": "ffn",
    }
    return _f5("f5_dit", "dit.DiT", found, depth=2)


def f5_dit_as_released() -> Case:
    """Convolutions over the text, a mask over frames, rotary embedding on one head, QK norms, a long skip."""
    found = {
        "input_embed.conv_pos_embed": "ffn",
        "text_embed.text_blocks.0-1": "ffn",
        "transformer_blocks.0-1.attn": "attn",
        "transformer_blocks.0-1.ff.ff": "ffn",
    }
    return _f5(
        "f5_dit_as_released",
        "dit.DiT",
        found,
        mask=True,
        depth=2,
        text_dim=16,
        conv_layers=2,
        qk_norm="rms_norm",
        pe_attn_head=1,
        attn_mask_enabled=True,
        long_skip_connection=True,
    )


def f5_mmdit() -> Case:
    found = {
        "audio_embed.conv_pos_embed": "ffn",
        "transformer_blocks.0-2.attn": "attn",
        "transformer_blocks.0-2.ff_x.ff": "ffn",
        # The last block ends the text stream.
        "transformer_blocks.0-1.ff_c.ff": "ffn",
    }
    return _f5("f5_mmdit", "mmdit.MMDiT", found, depth=3)


def f5_unett(skips: str = "concat") -> Case:
    """E2-TTS: a long skip from each layer of the first half to one of the second."""
    found = {"input_embed.conv_pos_embed": "ffn", "layers.0-3.2": "attn", "layers.0-3.4.ff": "ffn"}
    return _f5(f"f5_unett_{skips}", "unett.UNetT", found, depth=4, skip_connect_type=skips)


CHANNELS, LENGTH, TEXT, TEXT_TOKENS, GLOBAL = 4, 32, 24, 5, 12


def stable_audio(name: str, found: dict[str, str], **config: object) -> Case:
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it found no flash-attention
        module = load("stable_audio_tools.models.dit", bare=("stable_audio_tools", "stable_audio_tools.models"))

    def call(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
        return model(x, torch.full((BATCH,), max(t, 0.05), dtype=x.dtype), **c)

    def make() -> nn.Module:
        sizes = {"io_channels": CHANNELS, "embed_dim": 64, "depth": 2, "num_heads": 1, "cond_token_dim": TEXT}
        return module.DiffusionTransformer(**sizes, global_cond_dim=GLOBAL, **config)

    return Case(
        name,
        make,
        latents=lambda g: torch.randn(BATCH, CHANNELS, LENGTH, generator=g),
        conditioning=lambda g: {
            "cross_attn_cond": torch.randn(BATCH, TEXT_TOKENS, TEXT, generator=g),
            "global_embed": torch.randn(BATCH, GLOBAL, generator=g),
        },
        call=call,
        branches=branches(found),
    )


BLOCK = {
    "transformer.layers.0-1.self_attn": "attn",
    "transformer.layers.0-1.cross_attn": "cross_attn",
    "transformer.layers.0-1.ff.ff": "ffn",
}


def stable_audio_open() -> Case:
    """Conditioning as a first token."""
    return stable_audio("stable_audio_open", BLOCK)


def stable_audio_adaln() -> Case:
    """Gates through a sigmoid, QK norms, layer scales, a conformer's convolutions."""
    return stable_audio(
        "stable_audio_adaln",
        {**BLOCK, "transformer.layers.0-1.conformer": "ffn"},
        global_cond_type="adaLN",
        conformer=True,
        layer_scale=True,
        attn_kwargs={"qk_norm": "ln"},
    )


def stable_audio_differential() -> Case:
    """Differential attention, whose output is the difference of two; its frequencies are scaled apart."""
    return stable_audio(
        "stable_audio_differential",
        BLOCK,
        attn_kwargs={"differential": True, "feat_scale": True},
        remove_norms=True,
    )


CASES = [
    f5_dit,
    f5_dit_as_released,
    f5_mmdit,
    f5_unett,
    stable_audio_open,
    stable_audio_adaln,
    stable_audio_differential,
]
