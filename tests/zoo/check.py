"""Run one class of the zoo: sites beside the listed branches, a cached trajectory beside the oracle's, figures."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import smoothcache_fx as smoothcache
from helpers.cases import Case, run_trajectory
from helpers.oracle import Oracle
from helpers.tolerances import tolerance, worst
from smoothcache_fx import Schedule
from smoothcache_fx.compiled.forward import compiled_forward

from .case import JOINED, ROWS, STEPS, ZooCase

#: PyTorch's counter has no formula for it.
FLASH_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Outcome:
    """What was seen of one class.

    Attributes:
        name: of the class.
        listed, found: branches as the zoo lists them and as sites were found, by kind.
        graphs: captured graphs; more than one is graph breaks.
        block_share: FLOPs inside sites over FLOPs of the blocks.
        model_share: FLOPs inside sites over FLOPs of the model.
        mac_ratio: of the schedule ``case.ROWS``.
        difference: largest absolute difference to the oracle's outputs along the trajectory.
        excess: the largest difference over the tolerance there; up to 1 is right.
        effect: largest absolute difference that caching makes at all, so what the comparison can see.
        seconds: for all of it.
        unfound: modules that are no residual branch, with the reason.
        sites: names of the sites.
        breaks: where the graph broke, and why.
        lost_share: FLOPs of blocks that lie in no site, over those of the model, where the graph broke.
    """

    name: str
    listed: dict[str, int]
    found: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    block_share: float = 0.0
    model_share: float = 0.0
    mac_ratio: float = 0.0
    difference: float = 0.0
    excess: float = 0.0
    effect: float = 0.0
    seconds: float = 0.0
    unfound: dict[str, str] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    lost_share: float = 0.0
    whole: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What is wrong with it, in words; empty where all is right."""
        found = []
        if self.found != self.listed:
            found.append(f"sites {self.found}, listed {self.listed}: {', '.join(self.sites)}")
        if not self.excess <= 1:
            found.append(f"{self.difference:.3g} off the oracle, {self.excess:.3g} times the tolerance")
        if not self.effect > 100 * self.difference:
            found.append(f"caching changes only {self.effect:.3g}: nothing was compared")
        if self.block_share < 0.95:
            found.append(f"only {self.block_share:.1%} of the blocks' FLOPs lie inside sites")
        if self.block_share > 1.05:
            found.append(f"{self.block_share:.1%} of the blocks' FLOPs are said to lie inside sites")
        return found


def check(zoo: ZooCase, *, backend: str = "eager", dtype: torch.dtype = torch.float32) -> Outcome:
    """Build, compile, and run a trajectory with the schedule ``ROWS`` beside the oracle's and the plain model's."""
    start = time.perf_counter()
    case = zoo.case()
    kinds = {name: branch.kind for name, branch in case.branches.items() if branch.kind}
    listed = Counter(kind for kind in kinds.values() if not kind.startswith(JOINED))
    outcome = Outcome(zoo.name, dict(sorted(listed.items())), unfound=dict(zoo.unfound))
    run: dict[str, Any] = {"steps": STEPS, "seed": 1, "dtype": dtype}
    model = case.build(0, dtype).requires_grad_(False)
    plain = run_trajectory(case, model, **run)
    blocks, total = eager_flops(case, zoo, model, dtype)
    with Oracle(
        model, case.branches, {name: ROWS[kind.removeprefix(JOINED)] for name, kind in kinds.items()}
    ) as oracle:
        expected = run_trajectory(case, model, around=oracle.step, **run)
    smoothcache.compile(model, Schedule(STEPS, ROWS), backend=backend)
    actual = run_trajectory(case, model, **run)
    report = smoothcache.report(model)
    sites = [site for program in compiled_forward(model).session.programs for b in program.bindings for site in b.sites]
    outcome.found = dict(sorted(Counter(site.kind for site in sites).items()))
    outcome.sites = [f"{site.name} ({site.kind})" for site in sites]
    outcome.graphs, outcome.breaks, outcome.lost_share = report.graphs, list(report.breaks), report.lost_share
    outcome.whole = list(report.whole)
    inside = sum(site.flops for site in sites)
    outcome.block_share, outcome.model_share = inside / blocks, inside / total
    outcome.mac_ratio = report.mac_ratio
    outcome.difference = largest_difference(actual, expected)
    outcome.excess = worst(actual, expected, tolerance(dtype, backend))
    outcome.effect = largest_difference(actual, plain)
    outcome.seconds = time.perf_counter() - start
    return outcome


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def flash_flops(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """FLOPs of an attention op, from the shapes of its inputs; the keys may have fewer heads."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def eager_flops(case: Case, zoo: ZooCase, model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs of the blocks, and of the whole model, in one call, as PyTorch counts them while it runs."""
    counter = FlopCounterMode(display=False, custom_mapping={FLASH_FOR_CPU: flash_flops})
    latents, (conditioning,) = case.inputs(1, dtype)
    # The counter cannot look into flex_attention, which in eager mode computes what dense attention does.
    flex = mock.patch("torch.nn.attention.flex_attention.flex_attention", dense_attention)
    with flex, counter, torch.no_grad():
        case.call(model, latents, 1.0, conditioning)
    counts = {name.partition(".")[2]: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    blocks = {
        name
        for container in zoo.block_containers
        for name, _ in model.named_modules()
        if name.rpartition(".")[0] == container
    }
    return sum(counts.get(name, 0) for name in blocks), counter.get_total_flops()
