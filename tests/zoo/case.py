"""What the zoo says of a class: how to build it small, how to call it, and which of its modules are branches."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor, nn

from helpers.cases import Branch, Case

BATCH = 2
#: One row a kind, each another, so that a branch taken for another kind shows. All have a first and no last compute.
ROWS = {
    "attn": (1, 0, 1, 0, 0, 1, 0),
    "cross_attn": (1, 0, 0, 1, 0, 0, 0),
    "ffn": (1, 1, 0, 0, 1, 0, 0),
    "attn_ffn": (1, 0, 0, 1, 1, 0, 0),
}
STEPS = len(ROWS["attn"])
#: Before the kind of a module that shares its site with another one.
JOINED = "joined to "


@dataclass(frozen=True)
class ZooCase:
    """A denoiser class, its inputs, and its branches as a reader of its source would list them.

    Use at least 64 image (video, audio) tokens and few text tokens, two layers of each sort of block and a width
    of 32 to 64: then the shares of FLOPs are about those of the true model, and a case takes seconds.

    Attributes:
        name: of the class in diffusers.
        config: its arguments.
        latents: what a trajectory starts from, float32, ``BATCH`` in the first dimension.
        conditioning: further inputs, as float32 and integer tensors, the same along a trajectory.
        call: ``call(model, latents, t, conditioning)`` -> a prediction of the latents' shape; ``t`` falls from 1
            to 0, and the conditioning has the model's dtype. Other inputs that the class wants are made here.
        branches: kind -> patterns (``*`` for one name) of the submodules whose output is a branch before its gate,
            or from which the branch is computed by norms and projections alone: every attention and every
            feed-forward of every block, refiners' too.
        joined: kind -> patterns of modules that are one branch with one of those, as in ``x + gate * (attn + ff)``.
        unfound: patterns of attention or feed-forward modules that are no residual branch, or whose output nothing
            uses (the last block's text) -> the reason; ``ff#2`` is a module's second call. Their kind is ''.
        calls: patterns of modules called more than once in a call of the model -> how often.
    """

    name: str
    config: Mapping[str, Any]
    latents: Callable[[Generator], Tensor]
    conditioning: Callable[[Generator], dict[str, Tensor]]
    call: Callable[[nn.Module, Tensor, float, Mapping[str, Tensor]], Tensor]
    branches: Mapping[str, tuple[str, ...]]
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unfound: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)

    def make(self) -> nn.Module:
        return getattr(diffusers, self.name)(**self.config)

    def case(self) -> Case:
        """The case that the oracle and ``run_trajectory`` take; a branch is called by its module's name."""
        with torch.device("meta"):
            names = [name for name, _ in self.make().named_modules()]
        branches = {}
        joined = [(f"{JOINED}{kind}", patterns) for kind, patterns in self.joined.items()]
        for kind, patterns in (*self.branches.items(), *joined):
            for pattern in patterns:
                found = [name for name in names if matches(name, pattern)]
                if not found:
                    raise ValueError(f"{self.name} has no module {pattern!r}")
                for name in found:
                    for call in range(self.calls.get(pattern, 1)):
                        label = f"{name}#{call + 1}" if call else name
                        unfound = any(matches(label, pattern) for pattern in self.unfound)
                        branches[label] = Branch(name, "" if unfound else kind, matmuls=0, call=call)
        return Case(self.name, self.make, self.latents, self.conditioning, self.call, branches)

    @property
    def block_containers(self) -> set[str]:
        """The module lists that the branches' blocks are in: ``transformer_blocks``."""
        return {pattern.split(".*")[0] for patterns in self.branches.values() for pattern in patterns if "*" in pattern}


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern, component by component."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=True)
    )


def denoisers() -> list[str]:
    """The names of all transformer classes that the installed diffusers exports."""
    found = []
    for name in dir(diffusers):
        value = getattr(diffusers, name, None)
        if isinstance(value, type) and issubclass(value, nn.Module) and ".models.transformers." in value.__module__:
            found.append(name)
    return found


def text(width: int, tokens: int = 8, name: str = "encoder_hidden_states") -> Callable[[Generator], dict[str, Tensor]]:
    """Conditioning by the states of a text encoder alone."""
    return lambda g: {name: torch.randn(BATCH, tokens, width, generator=g)}


def timestep(t: float, scale: float = 1000.0, dtype: torch.dtype | None = None) -> Tensor:
    """``[BATCH]`` timesteps, from ``scale`` down."""
    return torch.full((BATCH,), scale * t, dtype=dtype)


def position_grid(*sizes: int) -> Tensor:
    """Positions of a grid of tokens, float32 ``[tokens, len(sizes)]``."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
