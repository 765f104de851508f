"""Plans of other methods: each against its rule written down anew, or against diffusers' own hooks."""

from __future__ import annotations

import argparse
import contextlib
import random
from collections import defaultdict

import pytest
import torch
from diffusers.hooks import (
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import smoothcache_fx as smoothcache
from helpers.cases import Branch, Case, run_trajectory
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.stack_oracle import StackOracle
from helpers.tolerances import REORDERED, Tolerance, assert_trajectories_close, tolerance
from smoothcache_fx import Schedule, ScheduleError
from smoothcache_fx.importers import db_cache, learning_to_cache, mag_cache, pyramid_attention_broadcast, taylor_seer
from smoothcache_fx.schedules.schedule import KINDS
from zoo.catalog import CASES as ZOO

LATTE = ZOO["LatteTransformer3DModel"].case()
DTYPE = torch.float32


class Site:
    def __init__(self, branch: str, kind: str) -> None:
        self.name, self.group, self.kind = branch, branch, kind


def save_router(path, logits: torch.Tensor, **more) -> None:
    """``logits``: ``[steps, 2 * depth]``, as the training script saves them."""
    routers = {f"{index}.prob": row for index, row in enumerate(logits)}
    torch.save({"routers": routers, "args": argparse.Namespace(lr=1e-3, model="DiT-XL/2"), **more}, path)


# Learning-to-Cache


def computed_by_its_sampler(logits: torch.Tensor, threshold: float) -> list[list[bool]]:
    """Per step and branch whether Learning-to-Cache computes it: its sampling loop, with nothing but what is kept.

    The sampler counts the timestep down, forgets all that is kept when the count is odd, and computes a branch if
    nothing of it is kept, or if it is among those that its router's thresholded scores select.
    """
    steps, branches = logits.shape
    kept: set[int] = set()
    decisions = []
    for count in reversed(range(steps)):
        if count % 2 == 1:
            kept.clear()
        selected = {branch for branch in range(branches) if 1 / (1 + torch.exp(-logits[count, branch])) > threshold}
        decisions.append([branch not in kept or branch in selected for branch in range(branches)])
        kept.update(range(branches))
    return decisions


@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize("steps", [10, 20, 50, 7, 1])
def test_a_router_decides_as_its_own_sampler_does(tmp_path, steps, threshold):
    logits = 2.0 * torch.randn(steps, 2 * 12) - 1.0
    save_router(tmp_path / "router.pt", logits)
    schedule = learning_to_cache(tmp_path / "router.pt", threshold=threshold)
    decisions = computed_by_its_sampler(logits, threshold)
    assert steps == 1 or 0 < sum(map(sum, decisions)) < steps * 24, "both decisions occur"
    rows = {
        f"blocks.{block}.{part}": tuple(decision[2 * block + offset] for decision in decisions)
        for block in range(12)
        for offset, part in enumerate(("attn", "mlp"))
    }
    assert schedule.steps == steps
    assert {name: schedule.row_for(Site(name, "attn" if "attn" in name else "ffn")) for name in rows} == rows


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("demo", None),
        ("diffusers_dit", ("transformer_blocks.{block}.attn1", "transformer_blocks.{block}.ff")),
    ],
)
def test_a_model_follows_a_router(tmp_path, case, names):
    case = CASES[case]
    branches = list(case.branches)  # of a block attention goes first, as in the router
    logits = 2.0 * torch.randn(10, len(branches))
    save_router(tmp_path / "router.pt", logits)
    schedule = learning_to_cache(tmp_path / "router.pt", **({} if names is None else {"names": names}))
    decisions = computed_by_its_sampler(logits, 0.1)
    rows = {name: [int(decision[i]) for decision in decisions] for i, name in enumerate(branches)}
    compiled = smoothcache.compile(case.build(), schedule, backend="eager")
    run = {"steps": 10, "seed": 1, "dtype": DTYPE}
    with Oracle(case.build(), case.branches, rows) as oracle:
        expected = run_trajectory(case, oracle.model, around=oracle.step, **run)
    assert_trajectories_close(run_trajectory(case, compiled, **run), expected, tolerance(DTYPE), repr(schedule))
    report = smoothcache.report(compiled)
    assert sum(group.computed for group in report.groups) == sum(oracle.calls.values()) == sum(map(sum, decisions))


def test_routers_are_numbered_not_sorted_as_text(tmp_path):
    """Ten before two would be right as text."""
    logits = torch.full((11, 2), -9.0)
    logits[2] = 9.0
    save_router(tmp_path / "router.pt", logits)
    schedule = learning_to_cache(tmp_path / "router.pt")
    # Steps 0 to 10 follow routers 10 to 0: the first step, the odd ones, and router 2 compute.
    assert schedule.row_for(Site("blocks.0.attn", "attn")) == tuple(map(bool, (1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0)))


GOOD = {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD, r"no state dict under 'routers', but '0.prob', '1.prob' \(a bare state dict, as U-ViT's routers"),
        ({"model": {}}, "no state dict under 'routers', but 'model'; expected a router of Learning-to-Cache for DiT"),
        ([1], "holds a list, expected a router"),
        ({"routers": []}, "no state dict under 'routers'"),
        ({"routers": {}}, "are not numbered"),
        ({"routers": {"0.prob": torch.zeros(4), "2.prob": torch.zeros(4)}}, r"\['1.prob', '2.prob'\] are missing or"),
        ({"routers": {**GOOD, "1.prob": torch.zeros(3)}}, r"router '1.prob' is torch.float32 \[3\], expected float"),
        ({"routers": {**GOOD, "1.prob": torch.zeros(4, dtype=torch.int64)}}, r"torch.int64 \[4\]"),
        ({"routers": {**GOOD, "1.prob": torch.zeros(2, 2)}}, r"\[2, 2\]"),
        ({"routers": {**GOOD, "1.prob": 3.0}}, "'1.prob' is float"),
        ({"routers": {**GOOD, "1.prob": torch.zeros(6)}}, "'1.prob' has 6 logits, '0.prob' 4"),
        ({"routers": {"0.prob": torch.zeros(0)}}, "'0.prob' has 0 logits"),
        ({"routers": {**GOOD, "1.prob": torch.full((4,), torch.nan)}}, "NaN or infinite"),
        ({"routers": GOOD, "code": nn.Linear(1, 1)}, r"cannot be loaded \(UnpicklingError"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "router.pt")
    with pytest.raises(ScheduleError, match=message):
        learning_to_cache(tmp_path / "router.pt")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ScheduleError, match=r"cannot read the router .*none\.pt': No such file"):
        learning_to_cache(tmp_path / "none.pt")
    save_router(tmp_path / "cut.pt", torch.zeros(2, 2))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:200])
    for name, content in (("empty.pt", b""), ("text.pt", b"attn: 1")):
        (tmp_path / name).write_bytes(content)
    for name in ("cut.pt", "empty.pt", "text.pt"):
        with pytest.raises(ScheduleError, match=rf"{name}' cannot be loaded \(\w+: .*expected a router"):
            learning_to_cache(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold is 1\.5, expected a number from 0 to 1"),
        ({"threshold": "0.1"}, "threshold is '0.1'"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"names": "*.{block}.attn"}, "expected two selectors"),
        ({"names": ("*.attn", "*.{block}.mlp")}, "each with {block}"),
        ({"names": ("*.{block}.x", "*.{block}.x")}, "expected two selectors"),
    ],
)
def test_wrong_options_of_a_router(tmp_path, options, message):
    save_router(tmp_path / "router.pt", torch.zeros(2, 2))
    with pytest.raises(ScheduleError, match=message):
        learning_to_cache(tmp_path / "router.pt", **options)


# Pyramid Attention Broadcast

STEPS = 12
#: As ``run_trajectory`` gives them to diffusers' models.
TIMESTEPS = [1000 * (1 - step / STEPS) for step in range(STEPS)]
PAB = {
    "pixart": (CASES["diffusers_pixart"], {"spatial": 2, "cross": 3}),
    "latte": (LATTE, {"spatial": 2, "temporal": 4, "cross": 3}),
    "latte, spatial": (LATTE, {"spatial": 3}),
    "latte, temporal": (LATTE, {"temporal": 3}),
    "flux": (CASES["diffusers_flux"], {"spatial": 3}),
    "range": (CASES["diffusers_pixart"], {"spatial": 4, "cross": 3, "timestep_range": (250, 900)}),
    "ranges": (CASES["diffusers_pixart"], {"spatial": 4, "cross": 3, "timestep_range": {"cross": (-1, 2000)}}),
}


class Watched:
    """Samples a model for some steps, and notes at which of them each of its linear layers ran."""

    def __init__(self, case: Case, steps: int) -> None:
        self.case, self.steps, self.model = case, steps, case.build()
        self.step = -1
        self.ran: dict[str, set[int]] = defaultdict(set)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_, name=name: self.ran[name].add(self.step))

    def sample(self) -> list[torch.Tensor]:
        self.model.register_forward_pre_hook(lambda *_: setattr(self, "step", self.step + 1))
        return run_trajectory(self.case, self.model, steps=self.steps, seed=1, dtype=DTYPE)

    def row(self, branch: Branch) -> tuple[bool, ...]:
        """At which steps the branch's module computed its linear layers."""
        ran = [
            steps for name, steps in self.ran.items() if name == branch.module or name.startswith(f"{branch.module}.")
        ]
        assert all(steps == ran[0] for steps in ran), branch
        return tuple(step in ran[0] for step in range(self.steps))


def diffusers_pab(timestep, *, spatial=None, temporal=None, cross=None, timestep_range=(100, 800)):
    """Its config; if both are given, with identifiers that tell spatial from temporal attention."""
    each = timestep_range if isinstance(timestep_range, dict) else dict.fromkeys(PAB_KINDS, timestep_range)
    apart = {"spatial_attention_block_identifiers": ("^transformer_blocks",)} if spatial and temporal else {}
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        temporal_attention_block_skip_range=temporal,
        cross_attention_block_skip_range=cross,
        current_timestep_callback=timestep,
        **{f"{kind}_attention_timestep_skip_range": each.get(kind, (100, 800)) for kind in PAB_KINDS},
        **apart,
    )


PAB_KINDS = ("spatial", "temporal", "cross")


@pytest.mark.parametrize("name", PAB)
def test_pab_decides_and_reuses_as_diffusers_hooks_do(name):
    """Which steps ran, per branch; and, as both keep the same values, the same outputs."""
    case, options = PAB[name]
    hooked = Watched(case, STEPS)
    apply_pyramid_attention_broadcast(hooked.model, diffusers_pab(lambda: TIMESTEPS[hooked.step], **options))
    expected = hooked.sample()
    schedule = pyramid_attention_broadcast(TIMESTEPS, **options)
    # diffusers skips the attention inside of Flux' single-stream blocks, which is half of a branch.
    branches = {name: branch for name, branch in case.branches.items() if branch.kind != "attn_ffn"}
    assert all(
        schedule.row_for(Site(name, "attn_ffn")) == (True,) * STEPS for name in set(case.branches) - set(branches)
    )
    rows = {name: schedule.row_for(Site(name, branch.kind)) for name, branch in branches.items()}
    assert rows == {name: hooked.row(branch) for name, branch in branches.items()}
    assert not all(map(all, rows.values())), "something is reused"
    if name in ("pixart", "latte"):
        compiled = smoothcache.compile(case.build(), schedule, backend="eager")
        actual = run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=DTYPE)
        assert_trajectories_close(actual, expected, tolerance(DTYPE), repr(schedule))


def test_diffusers_takes_temporal_attention_for_spatial():
    """Where its identifiers are left as they are: what the docstring warns of."""
    hooked = Watched(LATTE, STEPS)
    config = PyramidAttentionBroadcastConfig(2, 4, current_timestep_callback=lambda: TIMESTEPS[hooked.step])
    apply_pyramid_attention_broadcast(hooked.model, config)
    hooked.sample()
    theirs = {name: hooked.row(branch) for name, branch in LATTE.branches.items()}
    for options, same in (({"spatial": 2}, True), ({"spatial": 2, "temporal": 4}, False)):
        schedule = pyramid_attention_broadcast(TIMESTEPS, **options)
        ours = {name: schedule.row_for(Site(name, branch.kind)) for name, branch in LATTE.branches.items()}
        assert (ours == theirs) is same


def test_pab_by_hand():
    """Steps outside of the range count, its ends are outside, and the first step is computed anyway."""
    timesteps = [900, 801, 800, 799, 700, 600, 500, 101, 100, 50]
    schedule = pyramid_attention_broadcast(torch.tensor(timesteps), spatial=3)
    assert schedule == Schedule(10, {"attn": [1, 1, 1, 1, 0, 0, 1, 0, 1, 1]})
    inside = pyramid_attention_broadcast([500, 400, 300], spatial=9, cross=2)
    assert inside == Schedule(3, {"attn": [1, 0, 0], "cross_attn": [1, 0, 1]})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([[1, 2]], {}, "none of spatial, temporal and cross is given"),
        ([[]], {"spatial": 2}, r"timesteps is \[\], expected finite numbers: the sampler's timesteps"),
        ([10], {"spatial": 2}, "timesteps is 10"),
        ([["a"]], {"spatial": 2}, "timesteps is"),
        ([[1, 2]], {"spatial": 0}, "spatial is 0, expected a whole number of at least 1"),
        ([[1, 2]], {"cross": 2.0}, r"cross is 2\.0"),
        ([[1, 2]], {"cross": 2, "timestep_range": (800, 100)}, "the lower one first"),
        ([[1, 2]], {"cross": 2, "timestep_range": 100}, "timestep_range is 100"),
        (
            [[1, 2]],
            {"cross": 2, "timestep_range": {"text": (1, 2)}},
            r"timestep_range has \['text'\], expected some of",
        ),
        ([[1, 2]], {"cross": 2, "selectors": {"cross": "cross_attn"}}, "expected a sequence of selectors"),
        ([[1, 2]], {"cross": 2, "selectors": {"spatial": ("attn",)}}, r"selectors has \(\) for 'cross'"),
        ([[1, 2]], {"cross": 2, "selectors": {"text": ("attn",)}}, r"selectors has \['text'\]"),
    ],
)
def test_wrong_arguments_of_pab(arguments, options, message):
    with pytest.raises(ScheduleError, match=message):
        pyramid_attention_broadcast(*arguments, **options)


# MagCache


def mag_cache_rows(case: Case, steps: int, options: dict) -> set[tuple[bool, ...]]:
    """The rows of all branches under diffusers' hooks, in the second of two trajectories."""
    hooked = Watched(case, steps)
    apply_mag_cache(hooked.model, MagCacheConfig(num_inference_steps=steps, **options))
    hooked.sample()
    first = {hooked.row(branch) for branch in case.branches.values()}
    hooked.ran.clear()
    hooked.step = -1
    run_trajectory(case, hooked.model, steps=steps, seed=2, dtype=DTYPE)
    assert first == {hooked.row(branch) for branch in case.branches.values()}
    return first


NOISY = [1.0, *(1 + random.Random(3).uniform(-0.05, 0.03) for _ in range(29))]


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("diffusers_flux", 28, {"mag_ratios": FLUX_MAG_RATIOS}),
        ("diffusers_flux", 50, {"mag_ratios": FLUX_MAG_RATIOS, "threshold": 0.24, "max_skip_steps": 5}),
        ("diffusers_dit", 11, {"mag_ratios": FLUX_MAG_RATIOS, "threshold": 0.1, "retention_ratio": 0.0}),
        ("diffusers_pixart", 30, {"mag_ratios": NOISY, "threshold": 0.05, "max_skip_steps": 2}),
        ("diffusers_dit", 30, {"mag_ratios": NOISY, "threshold": 10.0, "max_skip_steps": 4, "retention_ratio": 0.3}),
        ("diffusers_dit", 6, {"mag_ratios": [1.0] * 6, "threshold": 0.0, "retention_ratio": 0.0}),
        ("diffusers_dit", 6, {"mag_ratios": [1.0] * 6, "max_skip_steps": 0}),
    ],
)
def test_mag_cache_decides_as_diffusers_hooks_do(name, steps, options):
    schedule = mag_cache(steps=steps, **{"ratios" if key == "mag_ratios" else key: v for key, v in options.items()})
    (row,) = mag_cache_rows(CASES[name], steps, options)
    assert schedule == Schedule(steps, dict.fromkeys(KINDS, row))
    assert sum(row) < steps or options.get("max_skip_steps") == 0


def test_a_model_runs_with_mag_caches_decisions():
    case = CASES["diffusers_flux"]
    schedule = mag_cache(FLUX_MAG_RATIOS, steps=12, threshold=0.2)
    compiled = smoothcache.compile(case.build(), schedule, backend="eager")
    run_trajectory(case, compiled, steps=12, seed=1, dtype=DTYPE)
    report = smoothcache.report(compiled)
    row = schedule.compute["attn"]
    assert report.variants == 2 and not report.forced
    assert sum(group.computed for group in report.groups) == sum(row) * len(case.branches)


@pytest.mark.parametrize("name", ["diffusers_dit", "diffusers_pixart"])
def test_at_the_grain_of_stacks_a_trajectory_is_mag_caches(name):
    case, options = CASES[name], {"threshold": 0.1, "retention_ratio": 0.0}
    hooked = case.build()
    apply_mag_cache(hooked, MagCacheConfig(num_inference_steps=11, mag_ratios=FLUX_MAG_RATIOS, **options))
    with hooked.cache_context("test") if isinstance(hooked, CacheMixin) else contextlib.nullcontext():
        theirs = run_trajectory(case, hooked, steps=11, seed=1, dtype=DTYPE)
    schedule = mag_cache(FLUX_MAG_RATIOS, steps=11, grain="stack", **options)
    assert 1 < sum(schedule.compute["stack"]) < 11
    ours = smoothcache.compile(case.build(), schedule, backend="eager")
    actual = run_trajectory(case, ours, steps=11, seed=1, dtype=DTYPE)
    assert_trajectories_close(actual, theirs, tolerance(DTYPE), "MagCache")


@pytest.mark.parametrize("order", [0, 1])
def test_db_cache_computes_the_blocks_at_both_ends(order):
    case, mask = CASES["diffusers_dit"], [1, 1, 0, 1, 0, 0]
    with pytest.raises(ScheduleError, match="no block between them is left"):
        db_cache(mask, blocks="transformer_blocks", depth=2, first=1, last=1)
    with pytest.raises(ScheduleError, match="has 0.5 at step 1, expected 1"):
        db_cache([1, 0.5, 0], blocks="transformer_blocks", depth=2, first=1)
    schedule = db_cache(mask, blocks="transformer_blocks", depth=2, first=1, order=order)
    assert schedule == Schedule(6, {"transformer_blocks.1-1": mask}, order=order)
    model = smoothcache.compile(case.build(), schedule, backend="eager")
    actual = run_trajectory(case, model, steps=6, seed=1, dtype=DTYPE)
    computed = {group.group: group.computed for group in smoothcache.report(model).groups}
    assert computed == {"transformer_blocks.*.attn1": 6, "transformer_blocks.*.ff": 6, "transformer_blocks.1-1": 3}
    smoothcache.remove(model)
    with StackOracle(model, schedule.compute, order) as oracle:
        expected = run_trajectory(case, model, steps=6, seed=1, dtype=DTYPE, around=oracle.step)
    assert_trajectories_close(actual, expected, REORDERED, "DBCache")


def test_taylor_seer_of_stacks():
    schedule = taylor_seer(20, interval=4, order=2, kinds=("stack",))
    assert list(schedule.compute) == ["stack"] and schedule.order == 2


ratios = st.lists(st.floats(0.7, 1.3), min_size=1, max_size=40)


@given(ratios, st.floats(0, 0.5), st.integers(0, 6), st.floats(0, 1), st.integers(1, 60))
def test_mag_cache_keeps_its_promises(values, threshold, most, retained, steps):
    schedule = mag_cache(values, threshold=threshold, max_skip_steps=most, retention_ratio=retained, steps=steps)
    row = "".join(str(int(computed)) for computed in schedule.compute["ffn"])
    assert len(row) == steps and len(set(schedule.compute.values())) == 1
    assert max(map(len, row.split("1"))) <= most
    assert row.startswith("1" * max(1, int(retained * steps + 0.5)))


def test_ratios_are_as_many_as_steps_unless_told():
    assert mag_cache([1.0] * 9).steps == 9
    assert mag_cache(FLUX_MAG_RATIOS.numpy()).steps == 28


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, r"ratios is \[\], expected finite numbers"),
        ([1.0, float("inf")], {}, "ratios is"),
        (torch.ones(2, 2), {}, "ratios is"),
        ("1.0", {}, "ratios is '1.0'"),
        ([1.0], {"steps": 0}, "steps is 0"),
        ([1.0], {"threshold": -0.1}, r"threshold is -0\.1, expected a number of at least 0"),
        ([1.0], {"max_skip_steps": -1}, "max_skip_steps is -1"),
        ([1.0], {"retention_ratio": 1.1}, r"retention_ratio is 1\.1, expected a number from 0 to 1"),
    ],
)
def test_wrong_arguments_of_mag_cache(values, options, message):
    with pytest.raises(ScheduleError, match=message):
        mag_cache(values, **options)


# TaylorSeer


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"interval": 3, "compute_before": 2}, {"cache_interval": 3, "disable_cache_before_step": 2}),
        ({"order": 0, "compute_from": 9}, {"max_order": 0, "disable_cache_after_step": 9}),
        ({"interval": 1}, {"cache_interval": 1}),
    ],
)
@pytest.mark.parametrize("name", ["diffusers_dit", "diffusers_pixart"])
def test_taylor_seer_decides_and_forecasts_as_diffusers_hooks_do(name, options, theirs):
    """Up to order 1 both have the same values."""
    case = CASES[name]
    hooked = Watched(case, STEPS)
    config = TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, cache_identifiers=[".*attn[12]"], **theirs)
    apply_taylorseer_cache(hooked.model, config)
    with CacheMixin.cache_context(hooked.model, "the only one"):
        expected = hooked.sample()
    schedule = taylor_seer(STEPS, kinds=("attn", "cross_attn"), **options)
    for site, branch in case.branches.items():
        assert schedule.row_for(Site(site, branch.kind)) == hooked.row(branch), site
    compiled = smoothcache.compile(case.build(), schedule, backend="eager")
    actual = run_trajectory(case, compiled, steps=STEPS, seed=1, dtype=DTYPE)
    assert_trajectories_close(actual, expected, Tolerance(1e-5, 1e-5), repr(schedule))


def test_taylor_seer_by_hand():
    schedule = taylor_seer(12, interval=4, order=2, compute_before=2, compute_from=11)
    assert schedule.compute["ffn"] == tuple(step in (0, 1, 3, 7, 11) for step in range(12))
    assert schedule.highest_order == 2 and set(schedule.compute) == set(KINDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"compute_before": 0}, "compute_before is 0, expected a whole number of at least 1"),
        ({"order": 3}, "order is 3, expected 0, 1 or 2"),
        ({"kinds": ("mlp",)}, r"kinds has \['mlp'\]"),
    ],
)
def test_wrong_arguments_of_taylor_seer(options, message):
    with pytest.raises(ScheduleError, match=message):
        taylor_seer(10, **options)
