"""What goes into a model and comes out of it: shapes that change, dtypes, layouts, structures, optional inputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from helpers.cases import Branch, Case, randomize, run_trajectory
from helpers.inline_dits import (
    CHANNELS,
    LABELS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    AdaLNZeroBlock,
    CrossAttentionBlock,
    InlineDiT,
)
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.tolerances import COMPILED, SAME_KERNELS, assert_close, assert_trajectories_close, worst
from smoothcache_fx import Schedule
from zoo.case import ROWS, STEPS

#: float16's own; autocast's outputs have the dtype of the last linear layer.
ALLOWED = {**SAME_KERNELS, torch.float16: SAME_KERNELS[torch.bfloat16]}


def rows_of(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: ROWS[branch.kind] for name, branch in case.branches.items()}


def check(
    case: Case,
    dtype: torch.dtype = torch.float32,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> nn.Module:
    """A trajectory is the oracle's and not the plain model's; the compiled model."""
    run: dict[str, Any] = {"steps": STEPS, "seed": 1, "dtype": dtype}
    with around():
        plain = run_trajectory(case, case.build(0, dtype), **run)
        with Oracle(case.build(0, dtype), case.branches, rows_of(case)) as oracle:
            expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
        model = smoothcache.compile(case.build(0, dtype), Schedule(STEPS, ROWS), backend="eager")
        actual = run_trajectory(case, model, **run)
    allowed = ALLOWED[expected[0].dtype]
    assert_trajectories_close(actual, expected, allowed, case.name)
    assert worst(plain, expected, allowed) > 100, "the cache changes nothing: nothing was compared"
    report = smoothcache.report(model)
    assert sum(group.reused for group in report.groups) and not report.forced
    return model


@pytest.mark.parametrize("name", ["adaln_zero", "cross_attention", "joint", "diffusers_dit"])
def test_float16(name):
    check(CASES[name], torch.float16)


@pytest.mark.parametrize("name", ["adaln_zero", "cross_attention", "joint", "diffusers_dit"])
def test_autocast(name):
    check(CASES[name], around=lambda: torch.autocast("cpu", torch.bfloat16))


def test_channels_last():
    """Latents in channels-last memory, into a convolution over patches that is channels-last, too."""
    case = CASES["diffusers_dit"]
    latents = case.latents

    def build() -> nn.Module:
        model = case.make()
        model.pos_embed.proj.to(memory_format=torch.channels_last)
        return model

    check(
        replace(case, make=build, latents=lambda g: latents(g).to(memory_format=torch.channels_last)),
    )


@dataclass
class Output:
    sample: Tensor
    hidden: dict[str, tuple[Tensor, Tensor]]


class Structured(nn.Module):
    """Gives its output in a structure, and takes its inputs by keyword only."""

    def __init__(self, structure: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.dit = InlineDiT(AdaLNZeroBlock(), AdaLNZeroBlock())
        self.structure = structure

    def forward(self, *, x: Tensor, t: Tensor | float, label: Tensor, guidance: Tensor | None = None) -> Any:
        """``guidance`` is added to the latents where it is given."""
        if not isinstance(t, Tensor):
            t = torch.full((len(x),), t, dtype=x.dtype)
        if guidance is not None:
            x = x + guidance
        return self.structure(self.dit(x, t, label, x))


BRANCHES = {
    name: Branch(name, kind, matmuls=2)
    for index in (0, 1)
    for name, kind in ((f"dit.blocks.{index}.attn", "attn"), (f"dit.blocks.{index}.mlp", "ffn"))
}


def structured(structure: Callable[[Tensor], Any], read: Callable[[Any], Tensor], **inputs: Any) -> Case:
    def call(model: nn.Module, x: Tensor, t: float, c: Any) -> Tensor:
        more = {name: value(x, t) for name, value in inputs.items()}
        return read(model(x=x, label=c["label"], **{"t": torch.full((len(x),), t), **more}))

    case = CASES["adaln_zero"]
    return replace(case, name="structured", make=lambda: Structured(structure), call=call, branches=BRANCHES)


@pytest.mark.parametrize(
    ("structure", "read"),
    [
        (lambda y: (y,), lambda output: output[0]),
        (lambda y: [y, {"half": y / 2}], lambda output: output[1]["half"] * 2),
        (lambda y: Output(y, {"pair": (y, -y)}), lambda output: -output.hidden["pair"][1]),
        (lambda y: {"sample": {"image": y}, "none": None, "text": "x"}, lambda output: output["sample"]["image"]),
    ],
    ids=["tuple", "list", "dataclass", "nested"],
)
def test_structured_outputs(structure, read):
    check(structured(structure, read))


def itself(y: Any) -> Any:
    return y


def check_with_computed_step(case: Case, step: int) -> None:
    """Two trajectories, where a new graph, with no cache to read, takes over at ``step``: it computes, and says so."""
    rows = {name: [*row[:step], 1, *row[step + 1 :]] for name, row in rows_of(case).items()}
    model = smoothcache.compile(case.build(), Schedule(STEPS, ROWS), backend="eager")
    run: dict[str, Any] = {"steps": STEPS, "seed": 1, "dtype": torch.float32}
    with Oracle(case.build(), case.branches, rows) as oracle:
        expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
    for _ in range(2):
        actual = run_trajectory(case, model, **run)
        assert_trajectories_close(actual, expected, ALLOWED[torch.float32], case.name)
    report = smoothcache.report(model)
    assert report.graphs == 2
    assert [group.sites for group in report.groups] == [2] * len(report.groups), "each counts once"
    assert sum(report.forced.values()) == 2 * sum(not row[step] for row in rows_of(case).values())


def test_an_input_that_is_missing_from_some_step_on():
    given = torch.full((2, 1, CHANNELS), 0.3)
    check_with_computed_step(structured(itself, itself, guidance=lambda x, t: given if t > 0.6 else None), 3)


def test_a_timestep_that_is_a_float_costs_the_cache_and_the_report_says_so():
    """Dynamo makes a graph of each value where the float goes into a new tensor: none has anything to reuse."""
    case = structured(itself, itself, t=lambda x, t: t)
    model = smoothcache.compile(case.build(), Schedule(STEPS, ROWS), backend="eager")
    run: dict[str, Any] = {"steps": STEPS, "seed": 1, "dtype": torch.float32}
    expected = run_trajectory(case, case.build(), **run)
    assert_trajectories_close(run_trajectory(case, model, **run), expected, ALLOWED[torch.float32], case.name)
    report = smoothcache.report(model)
    assert report.graphs == STEPS
    assert sum(report.forced.values()) == sum(row.count(0) for row in rows_of(case).values())


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "default"])
def test_batch_and_resolution_change_between_trajectories(dynamic):
    """Each trajectory is the oracle's, and ``dynamic=True`` has one graph for all of them."""

    class AnySize(InlineDiT):
        def __init__(self) -> None:
            super().__init__(CrossAttentionBlock(), CrossAttentionBlock())
            self.pos_embed = nn.Parameter(torch.zeros(1, 64, self.embed.out_features))

        def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Tensor) -> Tensor:
            c = self.time(t[:, None].expand(-1, self.time.in_features)) + self.label(label)
            h = self.embed(x) + self.pos_embed[:, : x.shape[1]]
            for block in self.blocks:
                h = block(h, c, text)
            return self.out(self.norm(h))

    def case(batch: int, tokens: int) -> Case:
        return replace(
            CASES["cross_attention"],
            make=AnySize,
            latents=lambda g: torch.randn(batch, tokens, CHANNELS, generator=g),
            conditioning=lambda g: {
                "label": torch.randint(LABELS, (batch,), generator=g),
                "text": torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=g),
            },
            call=lambda model, x, t, c: model(x, torch.full((batch,), t), **c),
        )

    sizes = [(2, 12), (3, 20), (2, 30), (5, 12), (2, 12)]
    first = case(*sizes[0])
    model = smoothcache.compile(first.build(), Schedule(STEPS, ROWS), backend="eager", dynamic=dynamic)
    with Oracle(first.build(), first.branches, rows_of(first)) as oracle:
        for seed, size in enumerate(sizes):
            run: dict[str, Any] = {"steps": STEPS, "seed": seed, "dtype": torch.float32}
            expected = run_trajectory(case(*size), oracle.model, around=oracle.step, **run)
            actual = run_trajectory(case(*size), model, **run)
            assert_trajectories_close(actual, expected, ALLOWED[torch.float32], str(size))
    report = smoothcache.report(model)
    assert report.graphs == (1 if dynamic else 2)
    assert not report.forced


class Scaled(nn.Module):
    """Feed-forward blocks whose input is scaled by a timestep per sample, and by a number."""

    def __init__(self) -> None:
        super().__init__()
        layers = ((nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in layers)

    def forward(self, x: Tensor, timestep: Tensor, number: int = 0) -> Tensor:
        x = x + timestep[:, None, None] / 1000 + number / 100
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("what", ["begin of a view", "number"])
def test_what_changes_with_each_step_and_shapes_nothing_keeps_the_cache(what, backend):
    """A graph first needed in mid-trajectory is captured for sizes that may change: one step is computed in full.

    Its timesteps are views, whose places in the storage are inputs of the graph then; as is a number that changes.
    """
    model, plain = (copy.deepcopy(one) for one in [randomize(Scaled(), 0).eval()] * 2)
    smoothcache.compile(model, Schedule(8, {"ffn": [1, 0, 0, 0, 0, 0, 0, 0]}), backend=backend)
    timesteps = torch.linspace(1000, 125, 8)
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
    kept: list[Tensor] = []
    for step, timestep in enumerate(timesteps):
        number = 20 + step if what == "number" and step >= 3 else 10
        if step == 3:
            x, kept = x[2:].clone(), []
        given = timestep.expand(len(x)) if what == "begin of a view" else timestep.repeat(len(x))
        y = model(x, given, number)
        if not kept:
            kept = branches_of(plain, x, given, number)
        expected = x + given[:, None, None] / 1000 + number / 100 + sum(kept)
        assert_close(y, expected, COMPILED)
        x = x - 0.1 * y
    report = smoothcache.report(model)
    assert report.forced == {"no value in this trajectory yet, at step 3": 2}
    assert [(group.computed, group.reused) for group in report.groups] == [(4, 12)]


def branches_of(model: Scaled, *inputs: Any) -> list[Tensor]:
    """What each block adds."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: found.append(args[-1])) for block in model.blocks]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return found
