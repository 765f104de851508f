"""Calibration's data: statistics, the paper's rule, FLOP budgets, files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.published_rule import PublishedCalibration, published_scan
from smoothcache_fx.calibration.calibration import Calibration, SiteErrors
from smoothcache_fx.calibration.statistics import t_quantile
from smoothcache_fx.errors import CalibrationError
from smoothcache_fx.schedules.schedule import Schedule


def calibration_of(curves: dict[str, np.ndarray], flops: dict[str, float] | None = None) -> Calibration:
    """One site a group, one observation of `curves[group][k - 1, t]` at each lag k and step t >= k."""
    sites = []
    for group, curve in curves.items():
        lags, steps = curve.shape
        site = SiteErrors.empty(group.replace("*", "0"), group, "attn", 1.0, lags=lags, steps=steps)
        site.flops = (flops or {}).get(group, 1.0)
        for lag in range(1, lags + 1):
            for step in range(lag, steps):
                site.add(lag, step, curve[lag - 1, step])
        sites.append(site)
    return Calibration(steps, lags, sites)


def row_of(curve: np.ndarray, alpha: float, **options: bool) -> str:
    row = calibration_of({"g": curve}).schedule(alpha=alpha, **options).compute["g"]
    return "".join("1" if computed else "0" for computed in row)


def published_row(curve: np.ndarray, alpha: float) -> str:
    lists = [curve[lag - 1, lag:].tolist() for lag in range(1, len(curve) + 1)]
    return "".join(map(str, published_scan(lists, alpha, curve.shape[1])))


# Few values, so that ties with each other and with alpha are common.
levels = st.integers(0, 6).map(lambda level: level / 10)


@st.composite
def curve_arrays(draw, max_steps=16, max_lags=5):
    steps, lags = draw(st.integers(1, max_steps)), draw(st.integers(1, max_lags))
    values = draw(st.lists(levels, min_size=lags * steps, max_size=lags * steps))
    return np.array(values).reshape(lags, steps)


# Statistics


@pytest.mark.parametrize("degrees", [*range(1, 203), 500, 10**4, 10**7])
def test_t_quantile(degrees):
    assert t_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-10)


observations = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


@given(observations)
def test_welford_is_the_mean_and_the_squared_deviations(values):
    site = SiteErrors.empty("a", "a", "attn", 1.0, lags=2, steps=4)
    for value in values:
        site.add(2, 3, value)
    assert site.count.tolist() == [[0, 0, 0, 0], [0, 0, 0, len(values)]]
    assert site.mean[1, 3] == pytest.approx(np.mean(values), rel=1e-12)
    assert site.m2[1, 3] == pytest.approx(np.var(values) * len(values), rel=1e-9, abs=1e-18 + 1e-15 * max(values) ** 2)
    others = np.ones((2, 4), bool)
    others[1, 3] = False
    assert np.isnan(site.mean[others]).all() and (site.m2[others] == 0).all()


def test_welford_keeps_the_spread_of_large_values():
    site = SiteErrors.empty("a", "a", "attn", 1.0, lags=1, steps=2)
    for value in (1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16):
        site.add(1, 1, value)
    assert site.m2[0, 1] == 90.0


def filled(
    seed: int, name: str = "blocks.0.attn", trajectories: int = 3, flops: float = 2e9, steps: int = 6
) -> SiteErrors:
    rng = np.random.default_rng(seed)
    site = SiteErrors.empty(
        name, ".".join("*" if p.isdigit() else p for p in name.split(".")), "attn", flops, lags=2, steps=steps
    )
    for _ in range(trajectories):
        for lag in (1, 2):
            for step in range(lag, steps):
                site.add(lag, step, lag * rng.uniform(0.1, 0.3))
    return site


@given(observations, observations)
def test_merging_is_adding_all(first, second):
    sites = [SiteErrors.empty("a", "a", "attn", 1.0, lags=1, steps=3) for _ in range(3)]
    for values, targets in ((first, (0, 2)), (second, (1, 2))):
        for value in values:
            for target in targets:
                sites[target].add(1, 2, value)
    merged = sites[0].merge(sites[1])
    assert merged.count.tolist() == sites[2].count.tolist() == [[0, 0, len(first) + len(second)]]
    assert merged.mean[0, 2] == pytest.approx(sites[2].mean[0, 2], rel=1e-12)
    scale = max(first + second) ** 2
    assert merged.m2[0, 2] == pytest.approx(sites[2].m2[0, 2], rel=1e-9, abs=1e-18 + 1e-15 * scale)
    assert np.isnan(merged.mean[0, :2]).all()


def test_merging_with_nothing_changes_nothing():
    site = filled(0)
    nothing = SiteErrors.empty(site.name, site.group, site.kind, site.flops, lags=2, steps=6)
    assert site.merge(nothing) == site and nothing.merge(site) == site


def test_flops_of_merged_sites_are_the_mean_over_observations():
    few, many = filled(0, trajectories=1, flops=2e9), filled(1, trajectories=3, flops=6e9)
    assert few.merge(many).flops == many.merge(few).flops == 5e9
    assert few.merge(few).flops == 2e9


def test_error_and_interval_are_over_all_sites_and_observations():
    rng = np.random.default_rng(3)
    values = rng.uniform(0.1, 0.9, (4, 5, 2, 7))  # sites, trajectories, lags, steps
    sites = []
    for number, of_site in enumerate(values):
        site = SiteErrors.empty(f"blocks.{number}.attn", "blocks.*.attn", "attn", 1.0, lags=2, steps=7)
        for curve in of_site:
            for lag, step in ((k, t) for k in (1, 2) for t in range(k, 7)):
                site.add(lag, step, curve[lag - 1, step])
        sites.append(site)
    calibration = Calibration(7, 2, [*sites, filled(0, "blocks.0.mlp", steps=7)])
    error, interval = calibration.error("blocks.*.attn"), calibration.interval("blocks.*.attn")
    assert error.shape == interval.shape == (2, 7) and error.dtype == interval.dtype == np.float64
    flat = values.reshape(20, 2, 7)
    low, high = scipy.stats.t.interval(0.95, 19, flat.mean(0), scipy.stats.sem(flat))
    for lag, step in ((k, t) for k in (1, 2) for t in range(7)):
        if step < lag:
            assert np.isnan(error[lag - 1, step]) and np.isnan(interval[lag - 1, step])
        else:
            assert error[lag - 1, step] == pytest.approx(flat[:, lag - 1, step].mean(), rel=1e-12)
            expected = (high - low)[lag - 1, step] / 2
            assert interval[lag - 1, step] == pytest.approx(expected, rel=1e-9)


def test_one_observation_has_no_interval():
    calibration = calibration_of({"g": np.full((2, 4), 0.5)})
    assert np.isnan(calibration.interval("g")).all()
    assert calibration.error("g")[1].tolist()[2:] == [0.5, 0.5]


def test_groups_keep_the_models_order():
    names = ["blocks.0.mlp", "blocks.0.attn", "blocks.1.mlp", "blocks.1.attn"]
    calibration = Calibration(6, 2, [filled(0, name) for name in names])
    groups = {group: [site.name for site in sites] for group, sites in calibration.groups.items()}
    assert list(groups.items()) == [("blocks.*.mlp", names[::2]), ("blocks.*.attn", names[1::2])]


# The paper's rule


@given(curve_arrays(), levels | st.floats(0, 1))
def test_the_rule_is_the_published_one(curve, alpha):
    assert row_of(curve, alpha) == published_row(curve, alpha)


@given(curve_arrays(), levels)
def test_without_keep_last_only_the_last_step_differs(curve, alpha):
    kept, free = row_of(curve, alpha), row_of(curve, alpha, keep_last=False)
    assert free[:-1] == kept[:-1] and kept[-1] == "1" and free[0] == "1"
    if free[-1] == "0":
        source = free.rindex("1")
        lag = len(free) - 1 - source
        assert curve[lag - 1, -1] <= alpha, "the last step is reused only where its own error allows it"


def curve_with(steps: int, lags: int, low: list[tuple[int, int]]) -> np.ndarray:
    """Error 1, but 0.1 where a computed step s (first) may be reused for k steps (second)."""
    curve = np.ones((lags, steps))
    for source, lag in low:
        curve[lag - 1, source + lag] = 0.1
    return curve


@pytest.mark.parametrize(
    "low, kept, free",
    [
        pytest.param([], "111111", "111111", id="nothing below alpha"),
        pytest.param([(0, 3)], "100011", "100011", id="lags 1 and 2 are not looked at"),
        pytest.param([(0, 1), (0, 2)], "100111", "100111", id="the largest lag wins"),
        pytest.param([(0, 1), (1, 3)], "101111", "101111", id="no jump from a reused step"),
        pytest.param([(3, 2)], "111101", "111100", id="a reach to the last step"),
        pytest.param([(2, 3)], "111001", "111000", id="the longest reach to the last step"),
        pytest.param([(3, 2), (3, 1)], "111101", "111100", id="no smaller lag in its place"),
        pytest.param([(4, 1)], "111111", "111110", id="a reach of one to the last step"),
        pytest.param([(0, 3), (4, 1)], "100011", "100010", id="two reaches fill the row"),
    ],
)
def test_edges_of_the_rule(low, kept, free):
    curve = curve_with(6, 3, low)
    assert row_of(curve, 0.1) == published_row(curve, 0.1) == kept
    assert row_of(curve, 0.1, keep_last=False) == free


@pytest.mark.parametrize("steps, kept, free", [(1, "1", "1"), (2, "11", "10"), (3, "101", "100")])
def test_fewer_steps_than_lags(steps, kept, free):
    curve = np.zeros((5, steps))
    assert (row_of(curve, 0.0), row_of(curve, 0.0, keep_last=False)) == (kept, free)
    assert published_row(curve, 0.0) == kept


def test_the_published_row_follows_from_its_jumps():
    """The 24-of-50 row of the paper (alpha 0.18): reuse of 3, 2, 2, then 1 to the end, the last step kept."""
    jumps = [(0, 3), (4, 2), (7, 2), *((source, 1) for source in range(10, 49, 2))]
    row = row_of(curve_with(50, 3, jumps), 0.18)
    assert row == "1000100100" + "10" * 19 + "11"
    assert row.count("1") == 24


def test_a_longer_reuse_can_cost_compute():
    """Alpha 0.3 allows a reuse of 2 from step 0, which jumps over step 1, from where 0.2 allows one of 3."""
    curve = np.ones((3, 8))
    curve[2, 4] = 0.2  # from step 1, 3 steps
    curve[1, 2] = 0.3  # from step 0, 2 steps
    calibration = calibration_of({"g": curve})
    assert row_of(curve, 0.2) == "11000111" and row_of(curve, 0.3) == "10011111"
    assert calibration.schedule(compute=0.7, solver="greedy").compute_fraction == 5 / 8
    assert calibration.alpha_for(0.7) == 0.2 and calibration.alpha_for(0.75) == 0.3


def test_steps_that_were_not_observed_are_computed():
    site = SiteErrors.empty("a", "a", "attn", 1.0, lags=2, steps=5)
    site.add(1, 2, 0.1)
    schedule = Calibration(5, 2, [site]).schedule(alpha=math.inf)
    assert schedule.compute["a"] == (True, True, False, True, True)


class Branches(torch.nn.Module):
    """Residual blocks whose branches are modules, under a timestep that changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": torch.nn.Linear(16, 16), "mlp": torch.nn.Linear(16, 16)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        for block in self.blocks:
            x = x + 0.3 * torch.tanh(block["attn"](x * (1 + math.cos(t))))
            x = x + 0.3 * torch.tanh(block["mlp"](x * (1 + math.sin(t))))
        return x


@pytest.mark.parametrize("steps, lags", [(20, 3), (13, 5)])
def test_one_trajectory_measured_and_solved_as_published(steps, lags):
    """The same outputs through the published helper's lists and ours: equal rows at every alpha."""
    torch.manual_seed(0)
    model = Branches()
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("attn", "mlp")):
            module.register_forward_hook(lambda *call, name=name: outputs.setdefault(name, []).append(call[-1]))
    x = torch.randn(2, 5, 16)
    published = PublishedCalibration(model, ["attn", "mlp"], lags, steps)
    with torch.no_grad(), published.recording():
        for step in range(steps):
            x = x - 0.1 * model(x, 3 * (step / steps) ** 2)
    assert [len(outputs[f"blocks.{i}.{kind}"]) for i in range(3) for kind in ("attn", "mlp")] == [steps] * 6

    sites = []
    for name, of_site in outputs.items():
        group = f"blocks.*.{name.rpartition('.')[2]}"
        site = SiteErrors.empty(name, group, "attn", 1.0, lags=lags, steps=steps)
        for lag, step in ((k, t) for k in range(1, lags + 1) for t in range(k, steps)):
            change = (of_site[step - lag] - of_site[step]).abs().sum() / of_site[step].abs().sum()
            site.add(lag, step, float(change))
        sites.append(site)
    calibration = Calibration(steps, lags, sites)
    seen = set()
    for alpha in np.linspace(0, 0.6, 61):
        rows = calibration.schedule(alpha=alpha).compute
        expected = published.schedule(alpha)
        assert {group: list(map(int, row)) for group, row in rows.items()} == {
            f"blocks.*.{component}": row for component, row in expected.items()
        }
        seen.add(rows["blocks.*.attn"])
    assert len(seen) > 10, "the alphas have to make a difference"


# FLOP budgets


@st.composite
def models(draw):
    """One to three groups of equal shape, with small whole FLOPs."""
    steps, lags = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    shape = {"min_size": lags * steps, "max_size": lags * steps}
    curve = st.lists(levels, **shape).map(lambda values: np.array(values).reshape(lags, steps))
    curves = draw(st.lists(curve, min_size=1, max_size=3))
    flops = {f"g{number}": float(draw(st.integers(1, 5))) for number in range(len(curves))}
    return calibration_of(dict(zip(flops, curves, strict=True)), flops)


@given(models(), st.integers(1, 20), st.booleans())
def test_a_budget_is_met_as_well_as_any_alpha_meets_it(calibration, twentieths, keep_last):
    budget = twentieths / 20
    tried = [calibration.schedule(alpha=level / 10, keep_last=keep_last) for level in range(7)]
    fractions = [schedule.compute_fraction for schedule in tried]
    allowed = [fraction for fraction in fractions if fraction <= budget]
    if not allowed:
        with pytest.raises(CalibrationError, match=f"the least is {min(fractions):.4g}"):
            calibration.schedule(compute=budget, keep_last=keep_last, solver="greedy")
        return
    schedule = calibration.schedule(compute=budget, keep_last=keep_last, solver="greedy")
    assert schedule.compute_fraction == max(allowed)
    alpha = calibration.alpha_for(budget, keep_last=keep_last)
    assert alpha == fractions.index(max(allowed)) / 10, "the smallest alpha of those"
    assert schedule == calibration.schedule(alpha=alpha, keep_last=keep_last)


@given(models(), levels, st.booleans())
def test_joint_rows_reuse_where_all_groups_may(calibration, alpha, keep_last):
    largest = np.maximum.reduce([calibration.error(group) for group in calibration.groups])
    rows = calibration.schedule(alpha=alpha, rows="joint", keep_last=keep_last).compute
    assert rows.keys() == calibration.groups.keys()
    for row in rows.values():
        assert "".join("1" if computed else "0" for computed in row) == row_of(largest, alpha, keep_last=keep_last)


@given(models(), st.integers(1, 20))
def test_a_budget_is_met_with_joint_rows(calibration, twentieths):
    tried = [calibration.schedule(alpha=level / 10, rows="joint").compute_fraction for level in range(7)]
    allowed = [fraction for fraction in tried if fraction <= twentieths / 20]
    if not allowed:
        with pytest.raises(CalibrationError, match=f"the least is {min(tried):.4g}"):
            calibration.schedule(compute=twentieths / 20, rows="joint", solver="greedy")
        return
    assert calibration.schedule(compute=twentieths / 20, rows="joint", solver="greedy").compute_fraction == max(allowed)


def test_a_budget_is_met_exactly_whatever_the_flops_are():
    curve = curve_with(50, 3, [(0, 3), (4, 2), (7, 2), *((source, 1) for source in range(10, 49, 2))])
    flops = {"blocks.*.attn": 0.1, "blocks.*.mlp": 0.2, "blocks.*.cross": 0.3}
    calibration = calibration_of(dict.fromkeys(flops, curve), flops)
    assert calibration.schedule(compute=0.48, solver="greedy").compute_fraction == 0.48
    assert calibration.schedule(compute=1, solver="greedy").compute_fraction == 1.0


def test_the_schedule_carries_the_flops_of_the_groups():
    sites = [
        filled(0, "blocks.0.attn", flops=1e9),
        filled(1, "blocks.1.attn", flops=2e9),
        filled(2, "head.mlp", flops=1e9),
    ]
    schedule = Calibration(6, 2, sites).schedule(alpha=0.25)
    assert schedule.flops == {"blocks.*.attn": 3e9, "head.mlp": 1e9} and schedule.steps == 6
    weighed = 0.75 * sum(schedule.compute["blocks.*.attn"]) + 0.25 * sum(schedule.compute["head.mlp"])
    assert schedule.compute_fraction == pytest.approx(weighed / 6, rel=1e-15)
    uncounted = Calibration(6, 2, [filled(0, flops=0.0)]).schedule(alpha=0.25)
    assert uncounted.flops is None


def test_an_unreachable_budget_says_what_can_be_reached():
    calibration = calibration_of({"g": np.zeros((2, 7))})
    with pytest.raises(
        CalibrationError, match=r"computes 0\.3 .*least is 0\.4286, at alpha 0; .*compute=0\.429 or more"
    ):
        calibration.schedule(compute=0.3, solver="greedy")
    assert calibration.schedule(compute=0.429, solver="greedy") == Schedule(
        7, {"g": [1, 0, 0, 1, 0, 0, 1]}, flops={"g": 1.0}
    )


# Files, merging, printing


def small() -> Calibration:
    sites = [
        filled(0, "blocks.0.attn"),
        filled(1, "blocks.1.attn"),
        filled(2, "blocks.0.mlp", trajectories=1),
    ]
    return Calibration(6, 2, sites, history_bytes=3 * 2**20, metadata={"model": "DiT", "sampler": ["ddim", 6]})


def test_save_and_load_round_trip(tmp_path):
    calibration = small()
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(str(tmp_path / "calibration.json"))
    assert loaded == calibration
    assert loaded.schedule(alpha=0.2) == calibration.schedule(alpha=0.2)
    loaded.sites[0].add(1, 1, 0.5)
    assert loaded != calibration, "a loaded calibration takes more observations"


@given(st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=4))
def test_files_keep_every_bit(tmp_path_factory, values):
    site = SiteErrors.empty('odd "name"\n.é', "g", "attn", 1 / 3, lags=1, steps=2)
    for value in values:
        site.add(1, 1, min(value, 1e150))
    path = tmp_path_factory.mktemp("calibrations") / "calibration.json"
    Calibration(2, 1, [site]).save(path)
    assert Calibration.load(path).sites == [site]


def test_files_are_strict_json(tmp_path):
    small().save(tmp_path / "calibration.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "calibration.json").read_text(), parse_constant=refuse)
    assert (data["format"], data["version"]) == ("smoothcache_fx.calibration", 2)
    assert data["sites"][0]["mean"][1][:2] == [None, None]


def test_merge():
    first, second = small(), small()
    second.sites.reverse()
    second.metadata["sampler"] = ["ddim", 12]
    second.history_bytes = 5
    merged = first.merge(second)
    assert [site.name for site in merged.sites] == [site.name for site in first.sites]
    assert merged.sites[0].count[0, 1] == 6 and merged.sites[2].count[0, 1] == 2
    assert np.allclose(merged.error("blocks.*.attn"), first.error("blocks.*.attn"), rtol=1e-14, equal_nan=True)
    narrower = merged.interval("blocks.*.attn")[0, 1:] < first.interval("blocks.*.attn")[0, 1:]
    assert narrower.all()
    assert merged.history_bytes == 3 * 2**20 and merged.metadata == {"model": "DiT"}


def test_table():
    lines = str(small()).splitlines()
    assert lines[0] == "6 steps, 3 sites, 1 to 3 observations of each site at each step, history 3.0 MiB"
    assert lines[1].split() == ["group", "kind", "sites", "FLOPs", "lag", "1", "lag", "2"]
    error, interval = small().error("blocks.*.attn"), small().interval("blocks.*.attn")
    middle = 1 + int(np.argsort(error[0, 1:])[2])
    assert lines[2].startswith("blocks.*.attn  attn      2  66.7%  ")
    assert f"  {error[0, middle]:.4f} ±{interval[0, middle]:.4f}  " in lines[2]
    assert lines[3].startswith("blocks.*.mlp   attn      1  33.3%  ") and "±" not in lines[3]
    assert len({len(line) for line in lines[1:4]}) == 1, "aligned"


# What a user does wrong


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_an_error_that_is_no_number_names_site_and_step(value):
    site = filled(0)
    before = site.count.copy()
    with pytest.raises(CalibrationError, match=r"'blocks.0.attn' at step 5: .*since step 3 is .*NaN or infinity"):
        site.add(2, 5, value)
    assert np.array_equal(site.count, before)


@pytest.mark.parametrize("lag, step", [(0, 1), (3, 3), (2, 1), (1, 6), (1, -1)])
def test_observations_outside_the_arrays(lag, step):
    with pytest.raises(CalibrationError, match=r"expected a lag from 1 to 2 and a step from the lag to 5"):
        filled(0).add(lag, step, 0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "alpha is None, compute is None and quality is None; give exactly one"),
        ({"alpha": 0.1, "compute": 0.5}, "give exactly one"),
        ({"alpha": -0.1}, r"alpha is -0\.1, expected a number of at least 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": "0.1"}, r"alpha is '0\.1'"),
        ({"alpha": True}, "alpha is True"),
        ({"compute": 0}, "compute is 0, expected a share"),
        ({"compute": 1.01}, r"compute is 1\.01"),
        ({"compute": math.nan}, "compute is nan"),
        ({"compute": "half"}, "compute is 'half'"),
        ({"alpha": 0.5, "rows": "nonsense"}, "rows is 'nonsense', expected 'joint' or 'group' with the greedy"),
        ({"compute": 0.5, "rows": "nonsense"}, "rows is 'nonsense', expected 'joint', 'group' or 'site'"),
        ({"compute": 0.5, "order": 3}, "order is 3, expected 0, 1 or 2, or None for the best"),
        ({"compute": 0.5, "max_variants": 1}, "max_variants is 1, expected a whole number of at least 2"),
        ({"alpha": 0.1, "rows": "site"}, "rows is 'site', .* rows of sites need solver='optimal'"),
    ],
)
def test_misuse_of_schedule(arguments, message):
    with pytest.raises(CalibrationError, match=message):
        small().schedule(**arguments)


def test_unknown_groups():
    with pytest.raises(CalibrationError, match=r"no group 'attn'; this calibration has 'blocks\.\*\.attn', 'blocks"):
        small().error("attn")
    with pytest.raises(CalibrationError, match="no group"):
        small().interval("attn")


def test_calibrations_that_do_not_fit_cannot_be_merged():
    with pytest.raises(CalibrationError, match="6 steps and 2 lags with one of 7 steps and 2 lags"):
        small().merge(Calibration(7, 2, [filled(0, steps=7)]))
    with pytest.raises(CalibrationError, match=r"2 only in the first \(blocks.0.mlp, blocks.1.attn\), 1 only in the"):
        small().merge(Calibration(6, 2, [filled(0), filled(0, "blocks.0.ff")]))
    with pytest.raises(CalibrationError, match="merge with a Schedule"):
        small().merge(Schedule(6))
    other = small()
    other.sites[0].kind = "ffn"
    with pytest.raises(CalibrationError, match="'blocks.0.attn'.*kinds are 'attn' and 'ffn'"):
        small().merge(other)
    with pytest.raises(CalibrationError, match=r"shapes \[lags, steps\] are \[2, 6\] and \[2, 7\]"):
        filled(0).merge(filled(0, steps=7))


def test_sites_that_do_not_fit():
    with pytest.raises(CalibrationError, match="without sites"):
        Calibration(6, 2, [])
    with pytest.raises(CalibrationError, match="more than one site is called 'blocks.0.attn'"):
        Calibration(6, 2, [filled(0), filled(1)])
    with pytest.raises(CalibrationError, match=r"shape \[2, 6\], expected \[lags, steps\] = \[3, 6\]"):
        Calibration(6, 3, [filled(0)])
    with pytest.raises(CalibrationError, match="steps is 0"):
        Calibration(0, 2, [filled(0)])
    with pytest.raises(CalibrationError, match="history_bytes is -1"):
        Calibration(6, 2, [filled(0)], history_bytes=-1)
    with pytest.raises(CalibrationError, match="metadata is a list"):
        Calibration(6, 2, [filled(0)], metadata=[])
    with pytest.raises(CalibrationError, match="flops of site 'a' is nan"):
        SiteErrors.empty("a", "a", "attn", math.nan, lags=1, steps=2)
    with pytest.raises(CalibrationError, match="a site's kind is None"):
        SiteErrors.empty("a", "a", None, 1.0, lags=1, steps=2)


def test_metadata_that_json_cannot_hold(tmp_path):
    for value in ({1, 2}, math.nan):
        calibration = small()
        calibration.metadata["extra"] = value
        with pytest.raises(CalibrationError, match="metadata holds what JSON cannot"):
            calibration.save(tmp_path / "calibration.json")
    assert not (tmp_path / "calibration.json").exists()


def changed(path: list[str | int], value: object) -> object:
    """Edits what `save` wrote: the entry at `path` becomes `value`, or goes where that is `...`."""

    def edit(data: dict) -> dict:
        place = data
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return data

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            changed(["format"], "smoothcache_fx.schedule"),
            "format 'smoothcache_fx.schedule', expected 'smoothcache_fx.cal",
        ),
        (changed(["format"], ...), "format None"),
        (changed(["version"], 3), "version 3 .*upgrade"),
        (changed(["sites"], ...), r"missing \['sites'\]"),
        (changed(["alpha"], 1), r"unknown \['alpha'\]"),
        (changed(["steps"], "6"), "steps is '6'"),
        (changed(["lags"], 3), r"expected \[lags, steps\] = \[3, 6\]"),
        (changed(["history_bytes"], 1.5), r"history_bytes is 1\.5"),
        (changed(["metadata"], None), "metadata is a NoneType"),
        (changed(["sites"], {}), "sites is a dict, expected a list"),
        (changed(["sites"], []), "without sites"),
        (changed(["sites", 0], 3), "a site is a int"),
        (changed(["sites", 0, "m2"], ...), "a site is .*expected an object with name, .*m2"),
        (changed(["sites", 0, "name"], "blocks.1.attn"), "more than one site is called"),
        (changed(["sites", 0, "kind"], 3), "a site's kind is 3"),
        (changed(["sites", 0, "flops"], "1"), "flops of site 'blocks.0.attn' is '1'"),
        (changed(["sites", 0, "count"], 3), "count of site 'blocks.0.attn' is no list of lists"),
        (changed(["sites", 0, "count", 0], [0]), r"rows of \[1, 6\] entries"),
        (changed(["sites", 0, "count"], [[0] * 6]), "of shapes"),
        (changed(["sites", 0, "count", 0, 2], 1.0), r"count of site 'blocks.0.attn' has 1\.0"),
        (changed(["sites", 0, "count", 0, 2], True), "has True"),
        (changed(["sites", 0, "count", 0, 2], 2**64), "has 18446744073709551616"),
        (changed(["sites", 0, "count", 0, 2], 0), "impossible errors"),
        (changed(["sites", 0, "count", 0, 2], -1), "impossible errors"),
        (changed(["sites", 0, "mean", 0, 2], "0.1"), r"mean of site 'blocks.0.attn' has '0\.1'"),
        (changed(["sites", 0, "mean", 0, 2], None), "impossible errors"),
        (changed(["sites", 0, "mean", 0, 2], -0.1), "impossible errors"),
        (changed(["sites", 0, "mean", 0, 0], 0.1), "impossible errors"),
        (changed(["sites", 0, "m2", 0, 2], -0.1), "impossible errors"),
        (changed(["sites", 0, "m2", 0, 2], math.inf), "impossible errors"),
    ],
)
def test_foreign_and_corrupt_files(tmp_path, edit, message):
    path = tmp_path / "foreign.json"
    small().save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(path)
    assert "foreign.json" in str(caught.value)


def test_files_that_are_no_json(tmp_path):
    with pytest.raises(CalibrationError, match=r"none\.json.*No such file"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(CalibrationError, match=r"half\.json.*not JSON"):
        Calibration.load(tmp_path / "half.json")
    small().schedule(alpha=0.2).save(tmp_path / "schedule.json")
    with pytest.raises(CalibrationError, match="format 'smoothcache_fx.schedule'"):
        Calibration.load(tmp_path / "schedule.json")
