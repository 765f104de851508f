"""Runs of blocks that are cached as one: which there are, whole trajectories against an oracle, and what is refused."""

from __future__ import annotations

import copy
import itertools
import runpy

import numpy as np
import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Block, Long, Stack, inputs, stacks_of
from helpers.cases import Case, randomize, run_trajectory
from helpers.models import CASES
from helpers.stack_oracle import StackOracle
from helpers.tolerances import COMPILED, REORDERED, assert_trajectories_close, tolerance
from smoothcache_fx import Schedule, ScheduleError
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.demo import load_model
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.passes.facts import MATMULS, module_path, packet
from smoothcache_fx.passes.guard import CACHE
from smoothcache_fx.passes.names import BlockRange
from smoothcache_fx.schedules.selectors import block_range
from zoo.catalog import CASES as ZOO

ROW = (1, 0, 1, 1, 0, 0, 1, 0)
STEPS = len(ROW)
#: Dynamo cannot capture it: see test_zoo.py.
NOT_COVERED = "WanAnimate2Transformer3DModel"
#: Stacks that the oracle has no say on: lists whose members are no modules that are called, or whose block has its
#: stream in another argument than the first.
NOT_COMPARED = ("local_facial_extractor.layers", "vace_blocks")
#: Where errors of float32 grow on the way: what caching changes, over what rounding may.
SENSITIVE = {"SanaWMTransformer3DModel": 1000}


def check(
    case: Case,
    order: int,
    backend: str = "eager",
    streams: int = 1,
    dtype: torch.dtype = torch.float32,
    **settings,
) -> list[str]:
    """Compile with the longest stacks and compare with the oracle; returns the stacks."""
    model = case.build(0, dtype).requires_grad_(False)
    run = {"steps": STEPS, "seed": 1, "dtype": dtype, "streams": streams}
    plain = run_trajectory(case, model, **run)
    names = [stack.name for stack in explained(case, model, dtype).stacks]
    rows = dict.fromkeys((name for name in names if name.rpartition(".")[0] not in NOT_COMPARED), ROW)
    calls = streams if streams > 1 else None
    schedule = Schedule(STEPS, rows, order=order, **settings)
    smoothcache.compile(model, schedule, backend=backend, calls_per_step=calls)
    actual = run_trajectory(case, model, **run)
    report = smoothcache.report(model)
    assert sorted(stacks_of(model)) == sorted(rows)
    assert not report.forced, report
    assert not products_of_blocks(model)
    smoothcache.remove(model)
    with StackOracle(model, rows, order, settings.get("times")) as oracle:
        expected = run_trajectory(case, model, around=oracle.step, **run)
    effect = max(float((ours - theirs).abs().max()) for ours, theirs in zip(actual, plain, strict=True))
    if case.name in SENSITIVE and order:
        error = max(float((ours - theirs).abs().max()) for ours, theirs in zip(actual, expected, strict=True))
        assert error * SENSITIVE[case.name] < effect
    else:
        # A ring's values are added in the order of their slots, the oracle's newest first.
        allowed = REORDERED if order else tolerance(dtype, backend)
        allowed = COMPILED if backend == "inductor" else allowed
        assert_trajectories_close(actual, expected, allowed, case.name)
    assert effect > 1e-3, "caching changes nothing: nothing was compared"
    assert torch.equal(actual[0], plain[0]) or backend == "inductor"
    return names


def products_of_blocks(model: nn.Module) -> list[str]:
    """The products of blocks of stacks that are left where all stacks are reused, by module."""
    left = []
    for program in compiled_forward(model).session.programs:
        ranges = [block_range(site.name) for site in program.builder.sites if site.entries]
        for mask, graph in program.builder.graphs.items():
            if not mask.compute:
                paths = [module_path(node) for node in graph.graph.nodes if packet(node) in MATMULS]
                # diffusers' DiT embeds the timestep for its final layer by a module of its first block.
                paths = [path for path in paths if ".norm1.emb." not in f"{path}."]
                left += [path for path in paths for blocks in ranges if _is_in(path, blocks)]
    return left


def _is_in(path: str, blocks: BlockRange) -> bool:
    inside = path.removeprefix(f"{blocks.container}.").partition(".")[0]
    return path.startswith(f"{blocks.container}.") and inside.isdigit() and int(inside) in blocks.indices


def explained(case: Case, model: nn.Module, dtype: torch.dtype = torch.float32) -> smoothcache.Explanation:
    """What ``explain`` says of the first call of a trajectory."""
    found = []

    class Stop(Exception):
        pass

    def explain(*args, **kwargs):
        del model.forward
        found.append(smoothcache.explain(model, *args, **kwargs))
        raise Stop

    model.forward = explain
    latents, (conditioning, *_) = case.inputs(1, dtype)
    with torch.no_grad(), pytest.raises(Stop):
        case.call(model, latents, 1.0, conditioning)
    return found[0]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("adaln_zero", 2),
        ("diffusers_dit", 1),
        *((name, k) for name in ("diffusers_sd3", "diffusers_flux") for k in (0, 2)),
    ],
)
def test_the_trajectory_is_the_oracles(name, order):
    assert check(CASES[name], order)


@pytest.mark.parametrize(
    "settings",
    [{"times": [1000.0, 900.0, 700.0, 650.0, 400.0, 300.0, 200.0, 50.0]}, {}],
    ids=["times", "two_streams"],
)
def test_times_and_streams(settings):
    check(CASES["diffusers_flux"], 2, streams=1 if settings else 2, **settings)


def test_under_inductor():
    assert check(CASES["diffusers_sd3"], 1, backend="inductor") == ["transformer_blocks.0-2"]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(set(ZOO) - {NOT_COVERED}))
def test_every_class(name, order):
    assert check(ZOO[name].case(), order)


@pytest.mark.parametrize("name", ["adaln_zero", "diffusers_flux"])
def test_computing_everything_is_the_plain_model_bit_for_bit(name):
    case = CASES[name]
    model = case.build(0).requires_grad_(False)
    run = {"steps": 3, "seed": 1, "dtype": torch.float32}
    plain = run_trajectory(case, model, **run)
    smoothcache.compile(model, Schedule(3, {"stack": (1, 1, 1)}), backend="eager")
    for ours, theirs in zip(run_trajectory(case, model, **run), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["diffusers_dit", "diffusers_sd3", "diffusers_flux", "demo"])
def test_a_reused_step_has_the_products_of_embeddings_and_the_final_layer_alone(name):
    case = CASES[name]
    model = smoothcache.compile(case.build(0), Schedule(2, {"stack": (1, 0)}), backend="eager")
    run_trajectory(case, model, steps=2, seed=1, dtype=torch.float32)
    (program,) = compiled_forward(model).session.programs
    (reused,) = [graph.graph for mask, graph in program.builder.graphs.items() if not mask.compute]
    blocks = {node.name for site in program.builder.branches for node in (*site.region, *site.weights)}
    products = {node.name for node in reused.nodes if packet(node) in MATMULS}
    assert products and products.isdisjoint(blocks)
    assert blocks.isdisjoint(node.name for node in reused.nodes if node.op == "placeholder")
    caches = [node for node in reused.nodes if CACHE in node.meta]
    assert len(caches) == sum(len(site.outputs) for site in program.builder.sites if site.entries)
    assert all([user.target for user in node.users] == [torch.ops.aten.add.Tensor] for node in caches)


class Padded(Stack):
    """Reads in a loop how long each text is, as HunyuanVideo-Framepack does: Dynamo gives up on the whole frame there,
    and captures each block by itself, unless numbers may be read in a graph.
    """

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        lengths = (c[:, 0] * 0 + 4).int()
        for row in range(len(x)):
            mask[row, : lengths[row]] = True
        x = x * mask[..., None]
        for block in self.blocks:
            x = block(x, c)
        return x


def test_a_break_before_the_blocks_does_not_split_a_run():
    model, given = randomize(Padded(3), 0).eval(), inputs()
    explanation = smoothcache.explain(model, *given)
    assert [stack.name for stack in explanation.stacks] == ["blocks.0-2"]
    outputs = {}
    for kinds in (("attn", "ffn"), ("stack",)):
        smoothcache.compile(model, Schedule(2, dict.fromkeys(kinds, (1, 0))), backend="eager")
        outputs[kinds] = [model(*given) for _ in range(2)]
        report = smoothcache.report(model)
        if kinds == ("stack",):
            assert report.graphs == 1 and stacks_of(model) == ["blocks.0-2"]
        else:
            assert report.graphs == explanation.graphs > 1 and report.breaks == explanation.breaks
        smoothcache.remove(model)
        assert torch.equal(outputs[kinds][0], model(*given))


@pytest.mark.parametrize(
    "between, expected, reason",
    [
        ("nothing", ["blocks.0-3"], ""),
        ("skips", ["blocks.0-3"], ""),
        ("scale", ["blocks.0-3"], ""),
        ("control", ["blocks.0-1", "blocks.2-3"], "adds what is computed outside of the blocks"),
        ("output", ["blocks.0-1", "blocks.2-3"], "the model's output uses the output of an inner block"),
    ],
)
def test_a_run_holds_what_nothing_outside_looks_into(between, expected, reason):
    model = randomize(Long(between), 0)
    given = (*inputs(), torch.randn(2, 6, 16))
    found = smoothcache.explain(model, *given)
    assert [stack.name for stack in found.stacks] == expected
    assert found.stacks[-1].ends == "the last block" and found.stacks[0].begins == "the first block"
    if reason:
        assert reason in found.stacks[0].ends and found.stacks[1].begins == found.stacks[0].ends
        assert reason in str(found)
    assert [stack.shapes for stack in found.stacks] == [((2, 6, 16),)] * len(expected)
    assert found.to_dict()["stacks"][0]["name"] == expected[0]


class WideSums(nn.Module):
    """Blocks whose sums are in float32 between bfloat16 branches, as Wan's; the output is float32, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))

    def forward(self, x, c):
        for block in self.blocks:
            x = (x.float() + block.attn(x)).type_as(x)
            x = x + block.attn(x)
            x = (x.float() + block.mlp(x)).type_as(x)
        return x.float().tanh()


def test_what_is_cached_has_the_streams_dtype():
    x, c = (value.bfloat16() for value in inputs())
    (stack,) = smoothcache.explain(randomize(WideSums(), 0).bfloat16(), x, c).stacks
    assert stack.name == "blocks.0-2" and stack.cache_bytes == x.nbytes


def test_a_range_is_split_where_a_long_skip_leaves_it():
    model = smoothcache.compile(randomize(Long("skips"), 0), Schedule(2, {"blocks.1-3": (1, 0)}), backend="eager")
    with torch.no_grad():
        model(*inputs())
    assert stacks_of(model) == ["blocks.1-3"]
    model = smoothcache.compile(randomize(Long("skips"), 0), Schedule(2, {"blocks.0-2": (1, 0)}), backend="eager")
    with torch.no_grad():
        model(*inputs())
    assert stacks_of(model) == ["blocks.0-0", "blocks.1-2"], "block 3 reads what block 0 gives"


class Interleaved(nn.Module):
    """Between the two blocks of one list stands one of another, of a higher index."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.extra = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), Block(32)])

    def forward(self, x, c):
        return self.blocks[1](self.extra[3](self.blocks[0](x, c), c), c)


def test_a_run_may_hold_a_block_of_another_list():
    model = smoothcache.compile(randomize(Interleaved(), 0), Schedule(2, {"stack": (1, 0)}), backend="eager")
    with torch.no_grad():
        model(*inputs(width=32))
    assert stacks_of(model) == ["blocks.0-1"]
    held = next(site for site in compiled_forward(model).session.sites()).holds
    assert {branch.name for branch in held} >= {"extra.3.attn", "extra.3.mlp"}


def test_every_block_behind_a_graph_break_is_a_stack_with_a_row_of_its_range():
    rows = {"blocks.0-0": (1, 1, 0), "blocks.1-2": (1, 0, 0)}
    model = randomize(Stack(4, broken=True), 0)
    x, c = inputs()
    smoothcache.compile(model, Schedule(3, rows), backend="eager")
    with torch.no_grad():
        for _ in range(3):
            model(x, c)
    assert stacks_of(model) == ["blocks.0-0", "blocks.1-1", "blocks.2-2", "blocks.3-3"]
    computed = {group.group: (group.computed, group.reused) for group in smoothcache.report(model).groups}
    assert computed == {
        "blocks.0-0": (2, 1),
        "blocks.1-1": (1, 2),
        "blocks.2-2": (1, 2),
        "blocks.3-3": (3, 0),
    }


def test_stacks_beside_branches_and_several_ranges():
    rows = {"blocks.1-2": (1, 0, 1, 0), "blocks.4-4": (1, 1, 0, 0), "attn": (1, 0, 0, 1)}
    model = smoothcache.compile(randomize(Stack(6), 0), Schedule(4, rows, order={"blocks.1-2": 1}), backend="eager")
    x, c = inputs()
    with torch.no_grad():
        for _ in range(4):
            model(x, c)
    groups = {group.group: (group.sites, group.computed) for group in smoothcache.report(model).groups}
    assert groups == {
        "blocks.*.attn": (3, 6),
        "blocks.*.mlp": (3, 12),
        "blocks.1-2": (1, 2),
        "blocks.4-4": (1, 2),
    }


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"blocks.0-2": ROW, "blocks.2-3": ROW}, "overlap: both select blocks 2 to 2 of 'blocks'"),
        ({"blocks.0-2": ROW, "blocks.1.attn": ROW}, "overlap: block 1 is cached as part of the stack"),
        ({"blocks.3-1": ROW}, "runs backwards"),
    ],
)
def test_overlaps_that_names_show(rows, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(STEPS, rows)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"stack": ROW, "attn": ROW}, "'attn' overlaps with the stack 'blocks.0-3'.* 'blocks.0.attn' and 3 more"),
        ({"blocks.0-1": ROW, "*.attn": ROW}, r"'\*.attn' overlaps with the stack 'blocks.0-1'"),
        ({"other.0-1": ROW}, "'other.0-1', but the model has no such run of blocks"),
        ({"blocks.2-9": ROW}, "'blocks.2-9' reaches beyond the last block, 3"),
    ],
)
def test_overlaps_that_the_model_shows(rows, message):
    model = smoothcache.compile(randomize(Stack(4), 0), Schedule(STEPS, rows), backend="eager")
    with torch.no_grad(), pytest.raises(ScheduleError, match=message):
        model(*inputs())


def test_a_schedule_with_ranges_goes_through_a_file(tmp_path):
    schedule = Schedule(STEPS, {"blocks.0-2": ROW, "stack": ROW}, order={"blocks.0-2": 2})
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule
    assert Schedule.uniform(4, 2, kinds=("stack",)).compute == {"stack": (True, False, True, False)}


def test_a_dumped_variant_runs_and_a_stack_is_one_box(tmp_path):
    model = smoothcache.compile(randomize(Stack(3), 0), Schedule(2, {"stack": (1, 0)}), backend="eager")
    x, c = inputs()
    with torch.no_grad():
        model(x, c), model(x, c)
    smoothcache.dump(model, tmp_path)
    drawing = (tmp_path / "graph_0" / "guarded.dot").read_text()
    assert drawing.count('label="blocks.0-2\\n') == 1
    code = (tmp_path / "graph_0" / "guarded.py").read_text()
    assert "restore_(" in code and "cache of blocks.0-2" in code
    file = tmp_path / "graph_0" / "guarded.py"
    assert runpy.run_path(str(file))["Graph"]()


@pytest.fixture(scope="module")
def calibrated():
    model = load_model().eval()

    def run(model):
        return sample(model, torch.arange(4), steps=10)

    return model, run, smoothcache.calibrate(model, run, lags=4, grain="stack", steps=10, progress=False)


def test_calibration_of_stacks_plans_stacks(calibrated, tmp_path):
    model, run, calibration = calibrated
    assert calibration.grain == "stack" and list(calibration.groups) == ["blocks.0-11"]
    calibration.save(tmp_path / "c.json")
    assert smoothcache.Calibration.load(tmp_path / "c.json") == calibration
    schedule = calibration.schedule(compute=0.5)
    assert list(schedule.compute) == ["blocks.0-11"]
    compiled = smoothcache.compile(copy.deepcopy(model), schedule, backend="eager")
    run(compiled)
    report = smoothcache.report(compiled)
    assert report.mac_ratio > 1.9 and report.cache_bytes <= 2 * 8 * 64 * 128 * 4 * 2
    with pytest.raises(smoothcache.CalibrationError, match="cannot merge a calibration of grain 'stack'"):
        calibration.merge(smoothcache.calibrate(model, run, lags=4, steps=10, progress=False))
    with pytest.raises(smoothcache.CalibrationError, match="grain is 'blocks', expected 'branch' or 'stack'"):
        smoothcache.calibrate(model, run, grain="blocks")


def test_what_is_measured_is_what_a_stack_adds(calibrated):
    """Against hooks around the list of blocks."""
    model, run, calibration = calibrated
    added: list[torch.Tensor] = []
    entries: list[torch.Tensor] = []
    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda module, args: entries.append(args[0].clone())),
        model.blocks[-1].register_forward_hook(lambda module, args, output: added.append(output - entries.pop())),
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    expected = [float((new - old).abs().sum() / new.abs().sum()) for old, new in itertools.pairwise(added)]
    np.testing.assert_allclose(calibration.error("blocks.0-11")[0, 1:], expected, rtol=REORDERED.rtol)


def test_choose_tries_both_grains(calibrated):
    model, run, _ = calibrated
    choice = smoothcache.choose(
        model,
        run,
        compute=0.4,
        grains=("branch", "stack"),
        orders=(0, 1),
        lags=3,
        probes=2,
        trajectories=20,
        steps=10,
        progress=False,
    )
    assert {trial.grain for trial in choice.trials} == {"branch", "stack"}
    best = max(choice.trials, key=lambda trial: trial.metric)
    assert choice.schedule == best.schedule and choice.calibration.grain == best.grain
    with pytest.raises(smoothcache.CalibrationError, match="grains has"):
        smoothcache.choose(model, run, compute=0.4, grains=("block",))


@pytest.mark.parametrize("order", [0, 1])
def test_one_graph_for_all_sizes(order):
    model = randomize(Stack(3), 0)
    plain = copy.deepcopy(model)
    smoothcache.compile(model, Schedule(2, {"stack": (1, 0)}, order=order), backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, 6), (3, 9), (4, 6)):
            x, c = inputs(batch, tokens)
            expected, other = plain(x, c), torch.randn_like(x)
            assert torch.equal(model(x, c), expected)
            assert torch.equal(model(other, c), other + (expected - x))
    assert smoothcache.report(model).graphs == 1


def test_memory_stays_flat_over_trajectories_of_changing_sizes():
    model = smoothcache.compile(randomize(Stack(2), 0), Schedule(2, {"stack": (1, 0)}, order=1), backend="eager")
    sizes = []
    with torch.no_grad():
        for trajectory in range(200):
            x, c = inputs(1 + trajectory % 4, 4 + trajectory % 3)
            for _ in range(2):
                model(x, c)
            sizes.append(smoothcache.report(model).cache_bytes)
    largest = 2 * 4 * 6 * 16 * 4
    assert max(sizes[12:]) <= 3 * largest and max(sizes[100:]) <= max(sizes[12:100])
    session = compiled_forward(model).session
    smoothcache.remove(model)
    assert not list(session.bindings())
