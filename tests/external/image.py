"""Images: k-diffusion's transformer, timm's blocks in DiTs, the block of the first DiT."""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.cases import Case, Conditioning
from helpers.checks import branches
from helpers.inline_dits import timestep_embedding

from .packages import load

BATCH, LABELS, WIDTH, HEADS = 2, 10, 32, 2
IMAGE = (4, 8, 8)


def _class_conditional(name: str, make, call, found: dict[str, str], outputs: dict[str, str] | None = None) -> Case:
    return Case(
        name,
        make,
        latents=lambda g: torch.randn(BATCH, *IMAGE, generator=g),
        conditioning=lambda g: {"y": torch.randint(LABELS, (BATCH,), generator=g)},
        call=call,
        branches=branches(found, outputs),
    )


def k_diffusion() -> Case:
    """A branch's module adds the residual itself; a parameter is clamped in place by every call."""
    module = load(
        "k_diffusion.models.image_transformer_v1",
        bare=("k_diffusion", "k_diffusion.models"),
        # Samplers, images, a cosine transform: what k_diffusion.layers imports beside torch.
        without=("dctorch", "torchdiffeq", "torchsde", "torchvision"),
    )

    def make() -> nn.Module:
        return module.ImageTransformerDenoiserModelV1(
            n_layers=2, d_model=128, d_ff=64, in_features=4, out_features=4, patch_size=(2, 2), num_classes=LABELS
        )

    def call(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
        return model(x, torch.full((BATCH,), 0.1 + t, dtype=x.dtype), class_cond=c["y"])

    found = {"blocks.0-1.self_attn": "attn", "blocks.0-1.ff": "ffn"}
    return _class_conditional("k_diffusion", make, call, found, {"self_attn": "out_proj", "ff": "down_proj"})


class BlocksDiT(nn.Module):
    """Patches, positions, blocks called as ``block(x)`` or ``block(x, c)``, pixels."""

    def __init__(self, *blocks: nn.Module, conditioned: bool = False, out_channels: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, WIDTH, 2, 2)
        self.positions = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.label = nn.Embedding(LABELS, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, 4 * out_channels)
        self.conditioned = conditioned

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``x [batch, 4, 8, 8]``, ``t [batch]`` in [0, 1], ``y [batch]``."""
        c = self.time(timestep_embedding(t, WIDTH)) + self.label(y)
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        if not self.conditioned:
            x = torch.cat((c[:, None], x), dim=1)
        for block in self.blocks:
            x = block(x, c) if self.conditioned else block(x)
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        x = self.out(self.norm(x[:, -16:]) * (1 + scale) + shift)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (4, 4)), 2)


def call_blocks(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
    return model(x, torch.full((BATCH,), t, dtype=x.dtype), **c)[:, :4]


def timm_blocks() -> ModuleType:
    return load("timm.models.vision_transformer", without=("torchvision",))


def _timm(name: str, block: str, found: dict[str, str], outputs: dict[str, str] | None = None, **config) -> Case:
    cls = getattr(timm_blocks(), block)
    return _class_conditional(
        name,
        lambda: BlocksDiT(*(cls(WIDTH, HEADS, **config) for _ in range(2))),
        call_blocks,
        found,
        outputs,
    )


def timm_block() -> Case:
    """The plain ViT block as U-ViT uses it, conditioning as a first token; layer scales and QK norms on."""
    found = {"blocks.0-1.attn": "attn", "blocks.0-1.mlp": "ffn"}
    return _timm("timm_block", "Block", found, qkv_bias=True, qk_norm=True, init_values=1e-5)


def timm_post_norm_block() -> Case:
    """A norm after each branch; it is computed from the branch, so it may lie before or after the cache."""
    found = {"blocks.0-1.attn": "attn", "blocks.0-1.mlp": "ffn"}
    return _timm("timm_post_norm_block", "ResPostBlock", found, qkv_bias=True)


def timm_parallel_scaling_block() -> Case:
    """ViT-22B: one projection for queries, keys, values and the feed-forward, one for both outputs."""
    found, outputs = {"blocks.0-1": "attn_ffn"}, dict.fromkeys("01", "drop_path")
    return _timm("timm_parallel_scaling_block", "ParallelScalingBlock", found, outputs)


class AdaLNBlock(nn.Module):
    """The DiT block around timm's attention and feed-forward: shift, scale and gate from the conditioning."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def timm_adaln() -> Case:
    timm = timm_blocks()

    def make() -> nn.Module:
        return BlocksDiT(
            *(
                AdaLNBlock(
                    timm.Attention(WIDTH, num_heads=HEADS, qkv_bias=True),
                    timm.Mlp(WIDTH, 4 * WIDTH, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0.0),
                )
                for _ in range(2)
            ),
            conditioned=True,
        )

    found = {"blocks.0-1.attn": "attn", "blocks.0-1.mlp": "ffn"}
    return _class_conditional("timm_adaln", make, call_blocks, found)


class SlowAttention(nn.Module):
    """Attention as timm wrote it before fused kernels: scores, softmax, values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(width // HEADS)).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ClassicDiT(BlocksDiT):
    """The first DiT: twice the channels out, for a learned sigma; guidance calls ``forward`` on twice the batch."""

    def __init__(self, depth: int = 2) -> None:
        blocks = (AdaLNBlock(SlowAttention(), Mlp()) for _ in range(depth))
        super().__init__(*blocks, conditioned=True, out_channels=8)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """``x`` and ``t`` hold the same values twice, ``y`` labels and then the null class."""
        half = x[: len(x) // 2]
        noise, rest = self.forward(torch.cat((half, half)), t, y).chunk(2, dim=1)
        conditional, unconditional = noise.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat((torch.cat((guided, guided)), rest), dim=1)


CLASSIC = {"blocks.0-1.attn": "attn", "blocks.0-1.mlp": "ffn"}


def classic_dit() -> Case:
    return _class_conditional("classic_dit", ClassicDiT, call_blocks, CLASSIC)


def classic_dit_guided() -> Case:
    """Sampled through ``forward_with_cfg``, a method that calls the compiled ``forward``."""

    def call(model: nn.Module, x: Tensor, t: float, c: Conditioning) -> Tensor:
        with_null = torch.cat((c["y"], torch.full_like(c["y"], LABELS - 1)))
        times = torch.full((2 * BATCH,), t, dtype=x.dtype)
        return model.forward_with_cfg(torch.cat((x, x)), times, with_null, 1.5)[:BATCH, :4]

    return _class_conditional("classic_dit_guided", ClassicDiT, call, CLASSIC)


CASES = [
    k_diffusion,
    timm_block,
    timm_post_norm_block,
    timm_parallel_scaling_block,
    timm_adaln,
    classic_dit,
    classic_dit_guided,
]
