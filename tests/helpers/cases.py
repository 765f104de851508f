"""How a model is sampled, and what is expected of it: what correctness tests share.

Freshly initialised DiTs have zero gates and zero output projections, with which every mistake in a cache goes
unseen: ``randomize`` gives all parameters values with which activations stay O(1) and every branch matters
(``test_oracle.py`` asserts both).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from smoothcache_fx import Schedule

CFG_SCALE = 1.5
Conditioning = Mapping[str, Tensor]
#: Called with step and stream; the model is called inside the context that it returns.
Around = Callable[[int, int], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Branch:
    """One site as it must be found, and where the oracle keeps its output.

    Attributes:
        module: the submodule whose output is the branch before its gate.
        kind: of the site.
        matmuls: products with a weight that only this branch needs.
        call: which call of the submodule it is, within one call of the model.
        outputs: values that the site caches; two where the submodule feeds two residual adds.
    """

    module: str
    kind: str
    matmuls: int
    call: int = 0
    outputs: int = 1


@dataclass(frozen=True)
class Case:
    """A model and how it is sampled.

    Attributes:
        make: the model, with whatever values its parameters start with.
        latents: what a trajectory starts from.
        conditioning: what stays the same along a trajectory.
        call: ``call(model, latents, t, conditioning)`` -> the model's prediction, in the latents' shape;
            ``t`` falls from 1 to 0.
        branches: site name -> the branch, all that the model has.
        shared_matmuls: products with a weight that only branches need, but several: such as a projection
            of the text that they attend to.
    """

    name: str
    make: Callable[[], nn.Module]
    latents: Callable[[Generator], Tensor]
    conditioning: Callable[[Generator], dict[str, Tensor]]
    call: Callable[[nn.Module, Tensor, float, Conditioning], Tensor]
    branches: Mapping[str, Branch]
    shared_matmuls: int = 0

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in eval mode; equal seeds give equal models."""
        torch.manual_seed(seed)
        # diffusers' own `to` warns of a list of modules, even of an empty one.
        return nn.Module.to(randomize(self.make(), seed), dtype)

    def inputs(self, seed: int, dtype: torch.dtype, streams: int = 1) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Initial noise, and the conditioning of each stream."""
        generator = Generator().manual_seed(seed)
        latents = self.latents(generator).to(dtype)
        conditionings = [self.conditioning(generator) for _ in range(streams)]
        return latents, [
            {key: x.to(dtype) if x.is_floating_point() else x for key, x in conditioning.items()}
            for conditioning in conditionings
        ]

    def step(
        self,
        model: nn.Module,
        latents: Tensor,
        index: int,
        steps: int,
        conditionings: Sequence[Conditioning],
        around: Around,
    ) -> tuple[Tensor, list[Tensor]]:
        """One Euler step: the next latents, and the model's output for each stream."""
        outputs = []
        for stream, conditioning in enumerate(conditionings):
            with around(index, stream):
                outputs.append(self.call(model, latents, 1 - index / steps, conditioning))
        prediction = outputs[0]
        if len(outputs) > 1:
            prediction = outputs[1] + CFG_SCALE * (outputs[0] - outputs[1])
        return latents - prediction / steps, outputs


def run_trajectory(
    case: Case,
    model: nn.Module,
    *,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    streams: int = 1,
    around: Around | None = None,
) -> list[Tensor]:
    """The model's outputs at every call of one trajectory.

    They are kept as they were returned, uncopied: a cached model must not hand out memory that it writes to
    again.
    """
    around = around or (lambda step, stream: contextlib.nullcontext())
    latents, conditionings = case.inputs(seed, dtype, streams)
    outputs: list[Tensor] = []
    with torch.no_grad():
        for index in range(steps):
            latents, predictions = case.step(model, latents, index, steps, conditionings, around)
            outputs.extend(predictions)
    return outputs


def group_of(name: str) -> str:
    """The name with indices wildcarded, and without the ordinal of a tied call."""
    return ".".join("*" if part.isdigit() else part for part in name.split("#")[0].split("."))


def random_rows(names: Sequence[str], steps: int, seed: int, masks: int = 5) -> tuple[Schedule, dict[str, list[int]]]:
    """A schedule with a row of its own for each group, and one for a single site; and every site's row.

    At most ``masks`` distinct decisions are spread over the steps, so that each recurs, as in real schedules.
    """
    generator = random.Random(seed)
    later = [*range(1, masks), *generator.choices(range(1, masks), k=steps - masks)]
    mask_of_step = [0, *generator.sample(later, k=steps - 1)]
    rows: dict[str, list[int]] = {}
    # One site is selected by name, against its group.
    for selector in [*dict.fromkeys(map(group_of, names)), generator.choice(names)]:
        while True:
            decisions = [1, *generator.choices((0, 1), weights=(3, 2), k=masks - 1)]
            row = [decisions[mask] for mask in mask_of_step]
            if 1 < sum(row) < steps and row not in rows.values():
                break
        rows[selector] = row
    return Schedule(steps, rows), {name: rows.get(name, rows.get(group_of(name))) for name in names}


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a random, non-zero value of a sane scale, in place; the model is put in eval mode.

    Matmul weights keep their input's variance, norms' scales are around 1, embeddings and tables are O(1).
    """
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = torch.randn(parameter.shape, generator=generator)
                if isinstance(module, nn.Embedding):
                    pass
                elif parameter.ndim > 1 and name == "weight":
                    values /= math.sqrt(parameter[0].numel())
                elif name == "weight":
                    values = 1 + 0.2 * values
                else:
                    values *= 0.2 if name == "bias" else 0.7
                parameter.copy_(values)
    return model.eval()
