"""Schedule: selectors, rows, files, and what a user does wrong."""

from __future__ import annotations

import copy
import fnmatch
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoothcache_fx.errors import ScheduleError, SmoothCacheError
from smoothcache_fx.schedules.schedule import KINDS, Schedule, last_compute

# What SmoothCache publishes for DiT-XL/2, 1 = compute (its smoothcache_schedules folder; arXiv 2411.10510).
PUBLISHED = {
    "50 steps, alpha 0.08": "10010101" + "1" * 42,
    "50 steps, alpha 0.18": "1000100100" + "10" * 19 + "11",
    "30 steps, alpha 0.35": "100" + "10" * 12 + "111",
    "70 steps, alpha 0.08": "1000100100" + "10" * 29 + "11",
}
PUBLISHED_COUNTS = {
    "50 steps, alpha 0.08": 46,
    "50 steps, alpha 0.18": 24,
    "30 steps, alpha 0.35": 16,
    "70 steps, alpha 0.08": 34,
}


@dataclass(frozen=True)
class Site:
    name: str
    group: str
    kind: str


def site(name: str, kind: str = "attn") -> Site:
    return Site(name, ".".join("*" if part.isdigit() else part for part in name.split(".")), kind)


def row(text: str) -> list[int]:
    return [int(c) for c in text]


# Which selector wins


def chosen(selectors: list[str], target: Site) -> str | None:
    """The selector that wins: each gets the row that computes its own index in binary."""
    schedule = Schedule(9, {key: row(f"1{number + 1:08b}") for number, key in enumerate(selectors)})
    number = int("".join(str(int(c)) for c in schedule.row_for(target)[1:]), 2) - 1
    return None if number == 254 else selectors[number]


RANKING = ["blocks.3.attn1", "blocks.*.attn1", "blocks.*", "*.attn1", "*.3.*", "attn", None]


@pytest.mark.parametrize("winner", RANKING)
def test_the_most_specific_selector_wins(winner):
    losers = RANKING[RANKING.index(winner) + 1 :]
    selectors = ["ffn", *losers[::2], winner, "blocks.4.attn1", *losers[1::2], "*.4.*"]
    assert chosen([key for key in selectors if key is not None], site("blocks.3.attn1")) == winner


def test_wildcards_do_not_count_as_literal_characters():
    assert chosen(["*a*t*t*n*1", "*.attn1"], site("blocks.3.attn1")) == "*.attn1"
    assert chosen(["*.attn1", "??????????????"], site("blocks.3.attn1")) == "*.attn1"


def test_unselected_sites_are_always_computed():
    schedule = Schedule(4, {"attn": row("1000")})
    assert schedule.row_for(site("blocks.0.mlp", "ffn")) == (True,) * 4
    assert Schedule(3).row_for(site("blocks.0.mlp", "ffn")) == (True,) * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_selects_only_its_own_kind(kind):
    schedule = Schedule(2, {kind: row("10")})
    for other in KINDS:
        assert schedule.row_for(site("blocks.0.module", other)) == (True, other != kind)


def test_a_module_named_like_a_kind_is_no_kind():
    schedule = Schedule(2, {"attn": row("10")})
    assert schedule.row_for(site("blocks.0.attn", "cross_attn")) == (True, True)
    assert schedule.row_for(site("blocks.0.mixer", "attn")) == (True, False)
    assert schedule.row_for(site("attn", "cross_attn")) == (True, False), "an exact name goes first"


def test_a_group_beats_other_groups_that_match_its_sites_as_globs():
    selectors = ["*.attn", "blocks.*.attn", "blocks.*.*.attn", "blocks.*.inner.attn"]
    assert chosen(selectors, site("blocks.0.attn")) == "blocks.*.attn"
    assert chosen(selectors, site("blocks.0.1.attn")) == "blocks.*.*.attn"
    assert chosen(selectors, site("blocks.0.inner.attn")) == "blocks.*.inner.attn"
    assert chosen(selectors, site("0.attn")) == "*.attn"


def test_a_leading_star_dot_also_matches_a_top_level_module():
    schedule = Schedule(2, {"*.attn": row("10"), "*.7.mlp": row("10")})
    reused = ["attn", "blocks.0.attn", "a.b.c.attn", "7.mlp", "blocks.7.mlp"]
    computed = ["xattn", "blocks.attn2", "mlp", "17.mlp", "blocks.17.mlp", "attn.mlp"]
    assert [name for name in reused + computed if not schedule.row_for(site(name, "ffn"))[1]] == reused


def test_characters_other_than_star_and_question_mark_are_literal():
    schedule = Schedule(2, {"a[0].b+.?": row("10")})
    assert schedule.row_for(site("a[0].b+.x")) == (True, False)
    for name in ("a0.b+.x", "a[0].bb.x", "a[0].b+.xy", "a[0]xb+.x"):
        assert schedule.row_for(site(name)) == (True, True), name


parts = st.sampled_from(["blocks", "0", "1", "12", "attn", "attn1", "ff", "x"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(names, st.text("*?.abx01tn", min_size=1, max_size=12).filter(lambda glob: not glob.startswith("*.")))
def test_globs_match_what_fnmatch_matches(name, glob):
    if glob in KINDS or glob == site(name).group:
        return
    selected = not Schedule(2, {glob: [1, 0]}).row_for(site(name, "other"))[1]
    assert selected == fnmatch.fnmatchcase(name, glob)


def test_equally_specific_globs_must_agree():
    target = site("blocks.3.attn")
    agreeing = Schedule(3, {"blocks.3.*": row("100"), "*ocks.3.att?": row("110"), "blocks*.attn": row("110")})
    assert agreeing.row_for(target) == (True, True, False)
    torn = Schedule(3, {"bl?cks.3.attn": row("100"), "blocks.3.at?n": row("110"), "attn": row("100")})
    message = r"'blocks\.3\.attn'.*'bl\?cks\.3\.attn' and 'blocks\.3\.at\?n'.*by its name"
    with pytest.raises(ScheduleError, match=message):
        torn.row_for(target)
    named = Schedule(3, {**torn.compute, "blocks.3.attn": row("111")})
    assert named.row_for(target) == (True, True, True)


def test_unused_selectors():
    sites = [site("blocks.0.attn"), site("blocks.1.attn"), site("blocks.0.mlp", "ffn")]
    selectors = ["cross_attn", "attn", "blocks.1.attn", "blocks.2.attn", "*.mlp", "*.mlp2", "blocks.*.attn"]
    schedule = Schedule(1, {key: [1] for key in selectors})
    assert schedule.unused_selectors(iter(sites)) == ["cross_attn", "blocks.2.attn", "*.mlp2"]
    assert schedule.unused_selectors([]) == selectors


# Rows


@pytest.mark.parametrize(
    "value",
    [
        [1, 0, 1],
        (True, False, True),
        np.array([1, 0, 1]),
        np.array([True, False, True]),
        torch.tensor([1, 0, 1]),
        torch.tensor([True, False, True]),
        [np.int8(1), np.bool_(False), torch.tensor(1)],
        pytest.param((c == "1" for c in "101"), id="generator"),
    ],
    ids=repr,
)
def test_rows_of_any_sequence_of_decisions(value):
    schedule = Schedule(np.int64(3), {"attn": value})
    assert schedule == Schedule(3, {"attn": [1, 0, 1]})
    assert [type(c) for c in schedule.row_for(site("a"))] == [bool] * 3


rows_of_any_length = st.lists(st.booleans(), max_size=40).map(lambda rest: (True, *rest))


@given(rows_of_any_length)
def test_last_compute_is_the_nearest_computed_step(decisions):
    for step in range(len(decisions)):
        source = last_compute(decisions, step)
        assert decisions[source] and source <= step
        assert not any(decisions[source + 1 : step + 1])


def test_uniform_is_fora():
    schedule = Schedule.uniform(7, 3)
    assert schedule == Schedule(7, dict.fromkeys(KINDS, row("1001001")))
    assert Schedule.uniform(6, 3, ["ffn"]) == Schedule(6, {"ffn": row("100100")}), "the last step is not forced"
    assert Schedule.uniform(5, 1).compute_fraction == 1.0


# Fractions


def test_compute_fraction():
    compute = {"attn": row("1000"), "ffn": row("1010")}
    assert Schedule(4).compute_fraction == 1.0
    assert Schedule(4, compute).compute_fraction == 0.375
    assert Schedule(4, compute, flops={"attn": 1, "ffn": 3}).compute_fraction == 1.75 / 4
    assert Schedule(4, compute, flops={"attn": 1, "ffn": 3, "cross_attn": 4}).compute_fraction == 5.75 / 8
    assert Schedule(4, compute, flops={"attn": 0, "ffn": 3}).compute_fraction == 0.5
    assert Schedule(4, flops={}).compute_fraction == 1.0


@given(rows_of_any_length, st.lists(st.floats(1e-3, 1e18), min_size=1, max_size=6))
def test_equal_rows_have_their_own_fraction_whatever_the_weights(decisions, weights):
    flops = {f"g{number}": weight for number, weight in enumerate(weights)}
    schedule = Schedule(len(decisions), dict.fromkeys(flops, decisions), flops=flops)
    assert schedule.compute_fraction == sum(decisions) / len(decisions)


# Value semantics


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 12))
    selectors = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    tail = st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1)
    compute = {key: [1, *draw(tail)] for key in selectors}
    weight = st.floats(min_value=1e-300, allow_infinity=False) | st.integers(1, 10**15)
    flops = draw(st.none() | st.fixed_dictionaries({key: weight for key in selectors}))
    return Schedule(steps, compute, flops=flops)


@given(schedules())
def test_save_and_load_round_trip(tmp_path_factory, schedule):
    path = tmp_path_factory.mktemp("schedules") / "schedule.json"
    schedule.save(path)
    loaded = Schedule.load(str(path))
    assert loaded == schedule and hash(loaded) == hash(schedule)
    assert list(loaded.compute) == list(schedule.compute), "selectors keep their order"
    assert loaded.compute_fraction == schedule.compute_fraction


@given(schedules())
def test_copies_are_equal(schedule):
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule))):
        assert twin == schedule and hash(twin) == hash(schedule)


def test_equality_and_hash():
    one = Schedule(3, {"attn": row("100"), "ffn": row("101")})
    assert one == Schedule(3, {"ffn": (True, False, True), "attn": row("100")})
    others = [
        Schedule(3, {"attn": row("100"), "ffn": row("111")}),
        Schedule(3, {"attn": row("100")}),
        Schedule(3, {"attn": row("100"), "*.ff": row("101")}),
        Schedule(3, {"attn": row("100"), "ffn": row("101")}, flops={"attn": 1, "ffn": 2}),
        Schedule(4, {"attn": row("1000"), "ffn": row("1010")}),
    ]
    assert len({one, *others}) == 6
    assert one != {"attn": row("100"), "ffn": row("101")}


def test_a_schedule_does_not_change():
    rows = {"attn": row("100")}
    schedule = Schedule(3, rows)
    rows["attn"][1] = 1
    rows["ffn"] = row("100")
    assert schedule == Schedule(3, {"attn": row("100")})
    with pytest.raises(FrozenInstanceError):
        schedule.steps = 4
    with pytest.raises(TypeError):
        schedule.compute["ffn"] = (True, False, False)


def test_picture():
    schedule = Schedule(10, {"blocks.*.attn1": row("1001010001"), "ffn": [1] * 10})
    assert str(schedule).splitlines() == [
        "blocks.*.attn1  █··█·█···█   4/10",
        "ffn             ██████████  10/10",
    ]
    assert str(Schedule(7)) == "every site is computed at each of 7 steps"


# Files


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("attention, ffn", [("attn", "mlp"), ("attn1", "ff")])
def test_published_files(tmp_path, case, attention, ffn):
    decisions = row(PUBLISHED[case])
    path = tmp_path / "published.json"
    path.write_text(json.dumps({attention: decisions, ffn: decisions}))
    schedule = Schedule.load(path)
    assert schedule.steps == int(case.split()[0]) == len(decisions)
    assert list(schedule.compute) == [f"*.{attention}", f"*.{ffn}"]
    for name in (f"blocks.0.{attention}", f"blocks.27.{ffn}", f"a.b.3.{ffn}", attention):
        assert sum(schedule.row_for(site(name))) == PUBLISHED_COUNTS[case]
    for name in ("blocks.0.attn2", "blocks.0.cross", f"{attention}.0.norm"):
        assert all(schedule.row_for(site(name, "attn"))), "the key is a module's name, not a kind"
    schedule.save(path)
    assert Schedule.load(path) == schedule


def test_published_files_with_an_index(tmp_path):
    path = tmp_path / "published.json"
    path.write_text(json.dumps({"attn": row("1010"), "attn-7": row("1001"), "mlp-0": row("1000")}))
    schedule = Schedule.load(path)
    assert list(schedule.compute) == ["*.attn", "*.7.attn", "*.0.mlp"]
    expected = {"blocks.7.attn": "1001", "7.attn": "1001", "blocks.17.attn": "1010", "blocks.70.attn": "1010"}
    expected |= {"blocks.7.mlp": "1111", "blocks.0.mlp": "1000", "blocks.10.mlp": "1111"}
    assert {name: schedule.row_for(site(name)) for name in expected} == {
        name: tuple(map(bool, row(text))) for name, text in expected.items()
    }


def test_published_files_decide_as_the_published_helper_does(tmp_path):
    """Differential: which calls `dit-smoothcache` skips, for every module it would wrap."""
    from SmoothCache.smooth_cache_helper import SmoothCacheHelper

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp, self.norm = (torch.nn.Linear(1, 1) for _ in range(3))

    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(Block() for _ in range(12)), "head": Block()})
    published = {
        "attn": row("10100"),
        "attn-1": row("11001"),
        "mlp-11": row("10000"),
        "mlp-head": row("10010"),
    }
    path = tmp_path / "published.json"
    path.write_text(json.dumps(published))
    schedule = Schedule.load(path)
    helper = SmoothCacheHelper(model, [Block], ["attn", "mlp", "norm"], published)
    helper.wrap_components()
    wrapped = list(helper.original_forwards)
    assert len(wrapped) == 39
    for name in wrapped:
        for step in range(5):
            helper.current_steps[name] = step + 1  # the helper has counted this call when it decides
            assert helper.is_skip_step(name) == (not schedule.row_for(site(name))[step]), (name, step)


def test_files_are_readable(tmp_path):
    path = tmp_path / "schedule.json"
    Schedule(3, {"attn": row("100"), "ffn": row("101")}, flops={"attn": 2.0, "ffn": 4.5}).save(path)
    data = json.loads(path.read_text())
    assert data["format"] == "smoothcache_fx.schedule" and data["version"] == 2
    assert '    "ffn": [1, 0, 1]\n' in path.read_text()


# What a user does wrong


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps is 0, expected a whole number of at least 1"),
        ({"steps": "50"}, "steps is '50'"),
        ({"steps": 2.0}, r"steps is 2\.0"),
        ({"steps": True}, "steps is True"),
        ({"order": 3}, "order is 3, expected 0, 1 or 2"),
        ({"order": -1}, "order is -1"),
        ({"order": 0.5}, r"order is 0\.5"),
        ({"order": {"attn": 3}}, "order is 3, expected 0, 1 or 2"),
        ({"order": {"": 1}}, "a selector is ''"),
        ({"steps": 2, "times": 1.0}, r"times is 1\.0, expected a number for each of the 2 steps"),
        ({"steps": 2, "times": [1.0]}, "times has 1 entries, expected one for each of the 2 steps"),
        ({"steps": 2, "times": [1.0, "0"]}, "times has '0', expected finite numbers"),
        ({"steps": 2, "times": [1.0, float("inf")]}, "times has inf"),
        ({"steps": 3, "times": [1.0, 0.0, 0.0]}, "times neither rises nor falls"),
        ({"steps": 3, "times": [0.0, 2.0, 1.0]}, "times neither rises nor falls"),
        ({"compute": [1, 0]}, "compute is a list, expected a mapping from selector to row"),
        ({"compute": {"": [1]}}, "a selector is ''"),
        ({"compute": {7: [1]}}, "a selector is 7"),
        ({"steps": 2, "compute": {"attn": [1]}}, r"'attn' has 1 entries.*2 steps.*steps=1"),
        ({"steps": 2, "compute": {"attn": [0, 1]}}, "'attn' reuses at step 0.*make its first entry 1"),
        ({"steps": 2, "compute": {"attn": [1, 2]}}, "'attn' has 2 at step 1, expected 1 .*or 0"),
        ({"steps": 2, "compute": {"attn": [1, 0.0]}}, r"'attn' has 0\.0 at step 1"),
        ({"steps": 2, "compute": {"attn": [1, None]}}, "'attn' has None at step 1"),
        ({"steps": 2, "compute": {"attn": "10"}}, "row of 'attn' is '10', expected a sequence of 2"),
        ({"steps": 2, "compute": {"attn": 1}}, "row of 'attn' is 1, expected a sequence of 2"),
        ({"steps": 2, "compute": {"attn": torch.ones(2, 2)}}, "'attn' has tensor.* at step 0"),
        ({"flops": [1.0]}, "flops is a list"),
        ({"steps": 1, "compute": {"attn": [1]}, "flops": {}}, "flops has no entry for 'attn'"),
        ({"flops": {"attn": -1.0}}, r"flops of 'attn' is -1\.0"),
        ({"flops": {"attn": float("nan")}}, "flops of 'attn' is nan"),
        ({"flops": {"attn": float("inf")}}, "flops of 'attn' is inf"),
        ({"flops": {"attn": 10**400}}, "flops of 'attn' is 1000"),
        ({"flops": {"attn": True}}, "flops of 'attn' is True"),
        ({"flops": {"attn": 0, "ffn": 0.0}}, "all entries of flops are 0"),
        ({"flops": {3: 1.0}}, "a selector is 3"),
    ],
)
def test_misuse_of_the_constructor(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 2), "steps is 0"),
        (("9", 2), "steps is '9'"),
        ((9, 0), "interval is 0"),
        ((9, 1.5), r"interval is 1\.5"),
        ((9, 2, ["attn", "mlp"]), r"kinds has \['mlp'\], expected .*cross_attn"),
        ((9, 2, "attn"), r"kinds is 'attn', expected a sequence"),
    ],
)
def test_misuse_of_uniform(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.uniform(*arguments)


GOOD = {
    "format": "smoothcache_fx.schedule",
    "version": 2,
    "steps": 2,
    "order": 0,
    "compute": {},
    "flops": None,
    "times": None,
}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON|holds a JSON int"),
        ("[1, 0]", "holds a JSON list, expected an object"),
        ("{}", "format None, expected 'smoothcache_fx.schedule'"),
        ('{"attn": 3}', "format None"),
        ('{"attn": [1], "attn": [1]}', "'attn' more than once"),
        ('{"attn": [1, 0], "mlp": [1]}', "'[*].mlp' has 1 entries"),
        ('{"attn": []}', "steps is 0"),
        ('{"attn": [0, 1]}', "'[*].attn' reuses at step 0"),
        ('{"attn": [1, "0"]}', "'[*].attn' has '0' at step 1"),
        ('{"a.b": [1]}', "'a.b': expected the name of a module"),
        (
            '{"format": "smoothcache_fx.calibration"}',
            "format 'smoothcache_fx.calibration', expected",
        ),
        (json.dumps({**GOOD, "version": 3}), "version 3 .*reads up to 2; upgrade"),
        (json.dumps({**GOOD, "version": "1"}), "version '1'"),
        (json.dumps({**GOOD, "version": True}), "version True"),
        (json.dumps({**GOOD, "version": 0}), "version 0"),
        (
            json.dumps({"format": GOOD["format"], "version": 1}),
            r"missing \['compute', 'flops', 'order', 'steps'\]",
        ),
        (
            json.dumps({"format": GOOD["format"], "version": 2}),
            r"missing \['compute', 'flops', 'order', 'steps', 'times'\]",
        ),
        (json.dumps({**GOOD, "alpha": 1}), r"unknown \['alpha'\]"),
        (json.dumps({**GOOD, "steps": "2"}), "steps is '2'"),
        (json.dumps({**GOOD, "order": 3}), "order is 3"),
        (json.dumps({**GOOD, "compute": [[1, 0]]}), "compute is a list"),
        (json.dumps({**GOOD, "compute": {"attn": [1]}}), "'attn' has 1 entries"),
        (json.dumps({**GOOD, "compute": {"attn": {"0": 1}}}), "row of 'attn' is"),
        (json.dumps({**GOOD, "flops": {"attn": "1"}}), "flops of 'attn' is '1'"),
        (json.dumps({**GOOD, "flops": {"attn": float("nan")}}), "flops of 'attn' is nan"),
    ],
)
def test_foreign_and_corrupt_files(tmp_path, text, message):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule.load(path)
    assert "foreign.json" in str(caught.value), "the message names the file"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ScheduleError, match=r"none\.json.*No such file") as caught:
        Schedule.load(tmp_path / "none.json")
    assert isinstance(caught.value, SmoothCacheError) and isinstance(caught.value, ValueError)
    with pytest.raises(ScheduleError, match="cannot read"):
        Schedule.load(tmp_path)
    (tmp_path / "weights").write_bytes(b"\x80\x81\xfe")
    with pytest.raises(ScheduleError, match="not text"):
        Schedule.load(tmp_path / "weights")


def nested(inner):
    keys = st.sampled_from([*GOOD, "attn", "*.mlp"])
    return st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(st.recursive(leaves, nested, max_leaves=8))
def test_any_json_loads_or_raises_a_schedule_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "schedule.json"
    for content in (data, {**GOOD, **data} if isinstance(data, dict) else {**GOOD, "compute": data}):
        path.write_text(json.dumps(content))
        try:
            schedule = Schedule.load(path)
        except ScheduleError as error:
            assert str(path) in str(error)
        else:
            assert schedule.steps >= 1 and all(map(all, (r[:1] for r in schedule.compute.values())))


ORDERED = Schedule(3, {"attn": [1, 0, 1], "ffn": [1, 1, 0]}, order={"attn": 2, "*.1.ffn": 1}, times=[1.0, 0.6, 0.1])


NARROW = Schedule(3, ORDERED.compute, order=1, history_dtype="bfloat16")


def test_the_dtype_of_a_history_is_kept(tmp_path):
    NARROW.save(tmp_path / "s.json")
    loaded = Schedule.load(tmp_path / "s.json")
    for same in (loaded, pickle.loads(pickle.dumps(NARROW)), copy.deepcopy(NARROW), eval(repr(NARROW))):
        assert same == NARROW and hash(same) == hash(NARROW) and same.history_dtype == "bfloat16"
    full = replace(NARROW, history_dtype=None)
    assert full != NARROW and full == Schedule(3, ORDERED.compute, order=1)
    assert str(NARROW).endswith("forecasts of order 1, with a history of differences in bfloat16")
    full.save(tmp_path / "full.json")
    assert "history_dtype" not in (tmp_path / "full.json").read_text(), "other versions read it too"


@pytest.mark.parametrize(
    ("history_dtype", "order", "message"),
    [
        ("float32", 1, "history_dtype is 'float32', expected None, 'float16' or 'bfloat16'"),
        (torch.float16, 1, r"history_dtype is torch\.float16, expected None"),
        (["float16"], 1, r"history_dtype is \['float16'\], expected None"),
        ("float16", 0, "history_dtype is 'float16', but order is 0, so that nothing has a history"),
        ("float16", {"attn": 0}, r"but order is \{'attn': 0\}"),
    ],
)
def test_what_a_history_cannot_be(history_dtype, order, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(3, ORDERED.compute, order=order, history_dtype=history_dtype)


def test_orders_and_times_are_kept(tmp_path):
    ORDERED.save(tmp_path / "s.json")
    loaded = Schedule.load(tmp_path / "s.json")
    copies = [loaded, pickle.loads(pickle.dumps(ORDERED)), copy.deepcopy(ORDERED), eval(repr(ORDERED))]
    for same in copies:
        assert same == ORDERED and hash(same) == hash(ORDERED)
    assert loaded.times == (1.0, 0.6, 0.1)
    assert Schedule(3, ORDERED.compute, order=1) != Schedule(3, ORDERED.compute)
    assert "forecasts of order {'attn': 2, '*.1.ffn': 1}, in its times" in str(ORDERED)
    assert "forecasts" not in str(Schedule(3, ORDERED.compute))


def test_a_file_of_the_first_version_still_loads(tmp_path):
    data = {key: value for key, value in GOOD.items() if key != "times"}
    (tmp_path / "old.json").write_text(json.dumps({**data, "version": 1, "compute": {"attn": [1, 0]}}))
    assert Schedule.load(tmp_path / "old.json") == Schedule(2, {"attn": [1, 0]})


def test_the_most_specific_selector_gives_the_order():
    assert [ORDERED.order_for(site(f"blocks.1.{kind}", kind)) for kind in ("attn", "ffn")] == [2, 1]
    assert ORDERED.order_for(site("blocks.0.ffn", "ffn")) == 0 and ORDERED.highest_order == 2
    assert Schedule(2, {}, order=1).order_for(site("a")) == Schedule(2, {}, order=1).highest_order == 1
    ambiguous = Schedule(2, {}, order={"*.1.ffn": 1, "b*1.ffn": 2})
    with pytest.raises(ScheduleError, match="different orders"):
        ambiguous.order_for(site("blocks.1.ffn", "ffn"))


def test_an_order_for_nothing_is_an_unused_selector():
    schedule = Schedule(2, {"attn": [1, 0]}, order={"attn": 1, "*.mlp": 1})
    assert schedule.unused_selectors([site("blocks.0.attn")]) == ["*.mlp"]
