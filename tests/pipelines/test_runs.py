"""Whole runs of real pipelines: cached as the schedule says, to the oracle's numbers; uncached, to the plain ones."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from smoothcache_fx.compiled.forward import compiled_forwards

from .build import CASES, run
from .eager_cache import branches_of, cached_by_hand

STEPS = 6
#: One row a kind, so that a branch taken for another kind shows.
ROWS = {
    "attn": [1, 0, 1, 0, 0, 1],
    "cross_attn": [1, 0, 0, 1, 0, 0],
    "ffn": [1, 1, 0, 0, 1, 0],
    "attn_ffn": [1, 0, 0, 1, 1, 0],
}


def rows_of(case):
    rows = {kind: list(ROWS[kind]) for kind in case.branches}
    for row in rows.values():
        row[case.second_begins] = 1  # a denoiser has nothing cached when it begins
    return rows


def difference(ours, theirs):
    """The largest difference over the largest value."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_oracles(name):
    case = CASES[name]
    pipe = case.make()
    plain = run(case, pipe, STEPS)
    with cached_by_hand(case, pipe, rows_of(case)) as oracles:
        expected = run(case, pipe, STEPS)
    assert smoothcache.compile(pipe, Schedule(STEPS, rows_of(case)), backend="eager") is pipe
    for seed in (2, 1):  # what an earlier run has left is not used
        actual = run(case, pipe, STEPS, seed)
    assert difference(actual, expected) <= 1e-5
    assert difference(plain, expected) >= 1e-3, "caching changes nothing: nothing was compared"
    report = smoothcache.report(pipe)
    assert report.trajectories == 2 and report.steps == 2 * STEPS and not report.forced
    assert sum(group.computed for group in report.groups) == 2 * sum(sum(o.calls.values()) for o in oracles)
    for component, forward in compiled_forwards(pipe).items():
        found = Counter(site.kind for p in forward.session.programs for b in p.bindings for site in b.sites)
        assert found == Counter(branch.kind for branch in branches_of(case, getattr(pipe, component)).values())


@pytest.mark.parametrize("name", CASES)
def test_computing_everything_is_the_plain_pipeline(name):
    case, steps = CASES[name], 3
    pipe = case.make()
    plain = run(case, pipe, steps)
    smoothcache.compile(pipe, Schedule(steps, {kind: [1] * steps for kind in case.branches}), backend="eager")
    assert torch.equal(run(case, pipe, steps), plain)
    smoothcache.remove(pipe)
    assert torch.equal(run(case, pipe, steps), plain)
