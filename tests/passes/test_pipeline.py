"""The list of passes: which run for what, how to switch one off, and how to add one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.fx import GraphModule

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from smoothcache_fx import Schedule
from smoothcache_fx.passes import pipeline
from smoothcache_fx.passes.lowering import Lowering
from smoothcache_fx.passes.pipeline import PASSES, Pass, Target

ALL = Lowering(singles=True, runs=True, norms=True, groups=True)


def run(backend: str = "inductor") -> None:
    model = smoothcache.compile(
        randomize(Stack(), 0).eval(), Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend=backend
    )
    with torch.no_grad():
        for _ in range(2):
            model(*inputs())


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target(False, False, None, True), []),
        (Target(True, True, None, True), ["narrow", "store_products"]),
        (Target(False, False, ALL, False), ["fuse_adds", "fuse_norms"]),
        (Target(True, True, ALL, True), [one.name for one in PASSES]),
    ],
)
def test_which_passes_run(target, expected):
    assert [one.name for one in PASSES if one.applies(target)] == expected


def test_no_name_is_part_of_another():
    """A disabled pass would take the other with it."""
    names = [one.name for one in PASSES]
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_counters_say_what_the_passes_did():
    counters["smoothcache"].clear()
    run()
    found = dict(counters["smoothcache"])
    assert found["products_stored"] == 4 and found["products_narrowed"] > 0
    assert set(found) <= {"calls_removed", "products_narrowed", "products_stored"}, "all others are for CUDA"


def test_a_pass_can_be_switched_off(caplog):
    counters["smoothcache"].clear()
    with config.patch(disabled_passes="store_products"), caplog.at_level(logging.INFO, logger="smoothcache_fx"):
        run()
    assert "products_stored" not in counters["smoothcache"]
    assert "store_products is disabled" in caplog.text


def test_a_pass_of_ones_own(monkeypatch):
    seen = []

    def look(gm: GraphModule, target: Target) -> GraphModule:
        seen.append((len(gm.graph.nodes), target.reuses))
        return gm

    monkeypatch.setattr(pipeline, "PASSES", [*PASSES, Pass("look", look, lambda target: not target.optimizes)])
    run("eager")
    (computed, _), (reused, _) = seen
    assert [reuses for _, reuses in seen] == [False, True] and reused < computed
