"""Guess how a class that the zoo does not know is built small and called, so that tomorrow's class is tried too.

Sizes are taken from the names of the arguments, inputs from the names of ``forward``'s, branches from the names of
the modules' classes. What does not run raises ``ValueError`` with what was tried.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from smoothcache_fx.schedules.schedule import KINDS

from .case import BATCH, ZooCase, position_grid, timestep

WIDTH, CHANNELS, TEXT = 32, 4, 8
#: Small values by the end of an argument's name; the first that fits counts.
SIZES = [
    (r"(layers|depth|num_blocks|num_.*blocks)$", 2),
    (r"num_(attention|key_value|kv|q|self|cross).*heads?$|num_heads$", 2),
    (r"(attention_head_dim|head_dim|dim_head)$", 16),
    (r"(in|out)_channels$|latent_channels$", CHANNELS),
    (r"sample_(size|height|width)$", 16),
    (r"sample_frames$", 4),
    (r"patch_size_t$", 1),
    (r"(hidden_size|inner_dim|cross_attention_dim|caption_projection_dim)$", WIDTH),
    (r"(dim|features|channels)$", WIDTH),
]
LATENTS = {
    "image": (CHANNELS, 16, 16),
    "video": (CHANNELS, 4, 8, 8),
    "video, frames first": (4, CHANNELS, 8, 8),
    "tokens": (64, CHANNELS),
    "audio": (CHANNELS, 64),
}
ATTENTION, FEED_FORWARD = re.compile("attn|attention"), re.compile("feed_?forward|mlp|ffn|^ff")
#: What constructors and forwards raise that are called with wrong guesses.
WRONG_INPUTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def guess(name: str) -> ZooCase:
    """A case for the class of this name. Raises ValueError if no guess runs."""
    kind = getattr(diffusers, name)
    try:
        config = guess_config(kind)
        model = kind(**config).eval()
    except WRONG_INPUTS as error:
        raise ValueError(f"not in the zoo, and could not be built by guess: {error}") from error
    failures = []
    for what, shape in LATENTS.items():
        try:
            prediction = _call(model, torch.randn(BATCH, *shape), 1.0, {})
        except WRONG_INPUTS as error:
            failures.append(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if prediction.shape != (BATCH, *shape):
            failures.append(f"{what}: the output is {list(prediction.shape)}")
            continue
        return ZooCase(
            name,
            config,
            latents=lambda g, shape=shape: torch.randn(BATCH, *shape, generator=g),
            conditioning=lambda g: {},
            call=_call,
            branches=guess_branches(model),
        )
    raise ValueError(f"not in the zoo, and could not be called by guess: {'; '.join(failures)}")


def guess_config(kind: type[nn.Module]) -> dict[str, Any]:
    """Arguments of the class: small where a size is named, else left to their defaults."""
    config = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default = parameter.default
        is_size = isinstance(default, int) and not isinstance(default, bool)
        small = next((value for pattern, value in SIZES if re.search(pattern, name)), None)
        if is_size and small is not None:
            config[name] = small
        elif isinstance(default, (tuple, list)) and len(default) == 3 and re.search(r"axes.*dims?|rope_dim", name):
            config[name] = (4, 6, 6)
    return config


def guess_branches(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The attention and feed-forward modules that are children of repeated blocks."""
    found: dict[str, dict[str, None]] = {kind: {} for kind in KINDS}
    for name, module in model.named_modules():
        if not re.fullmatch(r"[\w.]+\.\d+", name):
            continue
        children = dict(module.named_children())
        if {"attn", "proj_mlp", "proj_out"} <= set(children):
            found["attn_ffn"][f"{name.rpartition('.')[0]}.*.proj_out"] = None
            continue
        for child, part in children.items():
            label = f"{child} {type(part).__name__}".lower()
            attention = "cross_attn" if re.search(r"cross|attn2", child) else "attn"
            kind = attention if ATTENTION.search(label) else "ffn" if FEED_FORWARD.search(label) else None
            if kind and "norm" not in label and next(part.parameters(), None) is not None:
                found[kind][f"{name.rpartition('.')[0]}.*.{child}"] = None
    return {kind: tuple(patterns) for kind, patterns in found.items() if patterns}


def _call(model: nn.Module, x: Tensor, t: float, conditioning: Mapping[str, Tensor]) -> Tensor:
    inputs: dict[str, Any] = {}
    width = dict(model.config)
    text = next((width[key] for key in TEXT_WIDTHS if isinstance(width.get(key), int)), WIDTH)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in ("hidden_states", "sample", "x", "latents"):
            inputs[name] = x
        elif name in ("timestep", "timesteps", "t", "sigma"):
            inputs[name] = timestep(t, dtype=x.dtype)
        elif name == "encoder_hidden_states":
            inputs[name] = torch.randn(BATCH, TEXT, text, generator=generator).to(x.dtype)
        elif name == "encoder_attention_mask":
            inputs[name] = torch.ones(BATCH, TEXT, dtype=torch.bool)
        elif name == "pooled_projections":
            inputs[name] = torch.randn(BATCH, width.get("pooled_projection_dim") or WIDTH, generator=generator).to(
                x.dtype
            )
        elif name == "guidance" and parameter.default is inspect.Parameter.empty:
            inputs[name] = torch.ones(BATCH, dtype=x.dtype)
        elif name == "img_ids":
            inputs[name] = position_grid(1, 8, 8)
        elif name == "txt_ids":
            inputs[name] = torch.zeros(TEXT, 3)
        elif name in ("class_labels", "y"):
            inputs[name] = torch.zeros(BATCH, dtype=torch.long)
    output = model(**inputs)
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return output


TEXT_WIDTHS = (
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "caption_channels",
    "cross_attention_dim",
    "cap_feat_dim",
    "context_in_dim",
)
