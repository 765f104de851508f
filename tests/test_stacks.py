"""Runs of blocks that are cached as one: which there are, what is captured and measured of them, what is refused."""

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
from helpers.cases import randomize, run_trajectory
from helpers.digits import digits_model
from helpers.models import CASES
from helpers.tolerances import REORDERED
from smoothcache_fx import Schedule, ScheduleError
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.demo.sampler import sample
from smoothcache_fx.passes.facts import MATMULS, packet
from smoothcache_fx.passes.guard import CACHE

ROW = (1, 0, 1, 1, 0, 0, 1, 0)
STEPS = len(ROW)


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


class DecidesByData(Stack):
    """Lists as many numbers of a tensor as another one says, as QwenImage 2.1 does: no graph can hold that, and Dynamo
    fails with an error that is none of its own.
    """

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        length = (c[:, 0] * 0 + 4).int()[0].item()
        if torch.arange(x.shape[1])[:length].tolist()[-1] == 3:
            x = x * 0.5
        return super().forward(x, c)


def test_what_cannot_be_captured_in_another_way_stays_as_it_was():
    model, given = randomize(DecidesByData(2), 0).eval(), inputs()
    plain = model(*given)
    assert [stack.name for stack in smoothcache.explain(model, *given).stacks] == ["blocks.0-1"]
    smoothcache.compile(model, Schedule(2, {"stack": (1, 0)}), backend="eager")
    assert torch.equal(model(*given), plain)
    model(*given)
    report = smoothcache.report(model)
    assert report.breaks and not report.forced and stacks_of(model) == ["blocks.0-1"]


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
    model = digits_model()

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
