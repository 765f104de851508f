"""Modules inside of which the graph breaks: kept whole where they can be, computed at every step where they cannot."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from helpers.cases import Branch, Case, run_trajectory
from helpers.checks import check_all_compute, check_sites, check_trajectory
from helpers.inline_dits import (
    WIDTH,
    AdaLNZeroBlock,
    Attention,
    CrossAttention,
    CrossAttentionBlock,
    FeedForward,
    InlineDiT,
    modulate,
)
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.tolerances import SAME_KERNELS, assert_trajectories_close
from smoothcache_fx import CompiledError, Schedule
from smoothcache_fx.capture.whole import WholeModule, whole_module
from smoothcache_fx.reports import explain
from zoo.case import ROWS, STEPS


class RoutedExperts(nn.Module):
    """HiDream's and DeepSeek's: the tokens of each expert are selected in Python, by numbers read from the device."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat, output = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        start = 0
        for expert, count in zip(self.experts, chosen.bincount(minlength=3).cpu().numpy(), strict=True):
            if count:
                rows = order[start : start + count]
                output[rows] = (weights[rows, None] * expert(flat[rows])).to(output.dtype)
            start += count
        return output.view(x.shape)


class RoutedBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = RoutedExperts()


class LongestAttention(Attention):
    """Variable-length kernels want the longest sequence as a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        longest = int((x.abs().sum(-1) >= 0).sum(-1).max())
        return super().forward(x[:, :longest])


class LongestCrossAttention(CrossAttention):
    def forward(self, x: Tensor, mask: Tensor | None, *, causal: bool, text: Tensor, name: str = "") -> Tensor:
        assert mask is None and not causal and name == "cross"
        longest = int((text.abs().sum(-1) >= 0).sum(-1).max())
        return super().forward(x, text[:, :longest])


class LongestBlock(CrossAttentionBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = LongestAttention(), Keyword(LongestCrossAttention())


class Keyword(nn.Module):
    """Hands the text on by keyword, and constants."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.inner(x, None, causal=False, text=text, name="cross")


def case_of(make: Callable[[], nn.Module], kinds: dict[str, str]) -> Case:
    return replace(
        CASES["cross_attention"],
        make=lambda: InlineDiT(make(), make()),
        branches={
            f"blocks.{i}.{part}": Branch(f"blocks.{i}.{part}", kinds[part], matmuls=0) for i in (0, 1) for part in kinds
        },
    )


ROUTED = case_of(RoutedBlock, {"attn": "attn", "mlp": "ffn"})
LONGEST = case_of(LongestBlock, {"attn": "attn", "cross_attn.inner": "cross_attn", "mlp": "ffn"})
RUN = {"steps": STEPS, "seed": 1, "dtype": torch.float32}
each_case = pytest.mark.parametrize("case", [ROUTED, LONGEST], ids=["routed", "longest"])


@each_case
def test_branches_are_sites(case):
    check_sites(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_the_trajectory_is_the_oracles(case, dtype):
    check_trajectory(case, dtype)


@each_case
def test_all_compute_is_the_plain_model_bit_for_bit(case):
    check_all_compute(case)


def rows_of(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: ROWS[branch.kind] for name, branch in case.branches.items()}


def trajectories(case: Case, model: nn.Module, computed: tuple[str, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """The model's, compiled, and the oracle's with ``computed`` at every step."""
    rows = {name: [1] * STEPS if name.endswith(computed) and computed else row for name, row in rows_of(case).items()}
    with Oracle(case.build(), case.branches, rows) as oracle:
        expected = run_trajectory(case, oracle.model, around=oracle.step, **RUN)
    smoothcache.compile(model, Schedule(STEPS, ROWS), backend="eager")
    return run_trajectory(case, model, **RUN), expected


def test_one_graph_its_work_and_what_is_said_of_it():
    model = ROUTED.build()
    names = dict(model.named_modules())
    actual, expected = trajectories(ROUTED, model)
    assert_trajectories_close(actual, expected, SAME_KERNELS[torch.float32], "routed")
    report = smoothcache.report(model)
    assert (report.graphs, report.breaks, report.lost_share) == (1, {}, 0.0)
    assert report.whole == ("blocks.0.mlp", "blocks.1.mlp")
    assert "run uncompiled, as one op each, since the graph would break inside: blocks.*.mlp (2)" in str(report)
    assert all("forward" not in vars(module) for name, module in names.items() if name)
    dense = CASES["adaln_zero"]
    plain = smoothcache.explain(dense.build(), *model_inputs(dense))
    routed = smoothcache.explain(ROUTED.build(), *model_inputs(ROUTED))
    assert "blocks.*.mlp (2)" in str(routed)
    flops = {site.name: site.flops for site in plain.sites}
    tokens, router = 2 * 12, 3
    for site in routed.sites:
        extra = 2 * tokens * WIDTH * router if site.kind == "ffn" else 0
        assert site.flops == flops[site.name] + extra, site.name


def model_inputs(case: Case) -> list[Tensor]:
    latents, (conditioning,) = case.inputs(1, torch.float32)
    return [latents, torch.ones(len(latents)), *conditioning.values()]


def test_explain_counts_their_work_after_the_capture(monkeypatch):
    """What captured the model may be collected before its graphs are read, which name the modules by number alone."""
    read = explain._explain_branches

    def collected(*args):
        gc.collect()
        return read(*args)

    monkeypatch.setattr(explain, "_explain_branches", collected)
    explanation = smoothcache.explain(ROUTED.build(), *model_inputs(ROUTED))
    assert [stack.name for stack in explanation.stacks] == ["blocks.0-1"]


def test_calibration_measures_them():
    case, model = ROUTED, ROUTED.build()
    calibration = smoothcache.calibrate(model, lambda model: run_trajectory(case, model, **RUN), progress=False)
    assert {site.name for site in calibration.sites} == set(case.branches)
    assert all("forward" not in vars(module) for module in model.modules())
    seen: list[Tensor] = []
    hook = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    run_trajectory(case, model, **RUN)
    hook.remove()
    (site,) = [site for site in calibration.sites if site.name == "blocks.1.mlp"]
    for step in range(1, STEPS):
        ratio = (seen[step] - seen[step - 1]).abs().sum() / seen[step].abs().sum()
        assert site.mean[0, step] == pytest.approx(float(ratio), rel=1e-5)


class GivesAPair(RoutedExperts):
    """Experts whose router's loss comes along."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = super().forward(x)
        return output, output.mean()


class FirstOfPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = GivesAPair()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)[0]


class PairBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FirstOfPair()


def test_where_the_broken_module_cannot_be_kept_whole_the_one_around_it_can():
    case = case_of(PairBlock, {"attn": "attn", "mlp": "ffn"})
    model = case.build()
    actual, expected = trajectories(case, model)
    assert_trajectories_close(actual, expected, SAME_KERNELS[torch.float32], "pair")
    assert smoothcache.report(model).whole == ("blocks.0.mlp", "blocks.1.mlp")


class Counted(RoutedExperts):
    """Takes a Python object, whose state no graph can follow."""

    def forward(self, x: Tensor, counts: list[str] | None = None) -> Tensor:
        return super().forward(x)


class CountedBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Counted()

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2), ["an object"])


class WritesToItsInput(RoutedExperts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class WritingBlock(AdaLNZeroBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = WritesToItsInput()


@pytest.mark.parametrize("make", [CountedBlock, WritingBlock])
def test_what_cannot_be_kept_whole_is_computed_at_every_step(make):
    case = case_of(make, {"attn": "attn", "mlp": "ffn"})
    model = case.build()
    actual, expected = trajectories(case, model, computed=("mlp",))
    assert_trajectories_close(actual, expected, SAME_KERNELS[torch.float32], "computed")
    report = smoothcache.report(model)
    assert not report.whole and report.breaks and report.lost_share > 0.3
    assert [group.kind for group in report.groups if group.reused] == ["attn"]


def test_autocast_is_not_kept_whole():
    """What runs inside of an op does not see the casts that autocast makes in the graph."""
    case, model = ROUTED, ROUTED.build()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = trajectories(case, model, computed=("mlp",))
    assert_trajectories_close(actual, expected, SAME_KERNELS[actual[0].dtype], "autocast")


def test_autocast_later_on():
    case, model = ROUTED, ROUTED.build()
    trajectories(case, model)
    rows = {name: row if name.endswith("attn") else [1] * STEPS for name, row in rows_of(case).items()}
    with torch.autocast("cpu", torch.bfloat16), Oracle(case.build(), case.branches, rows) as oracle:
        expected = run_trajectory(case, oracle.model, around=oracle.step, **RUN)
        actual = run_trajectory(case, model, **RUN)
    assert_trajectories_close(actual, expected, SAME_KERNELS[torch.bfloat16], "autocast")


def test_an_adapter_that_is_put_on_later_is_run():
    """The module runs as it is at the time, and what it gave before is not reused."""
    case, model = ROUTED, ROUTED.build()
    trajectories(case, model)
    twin = case.build()
    for one in (model, twin):
        one.blocks[0].mlp.experts[0] = nn.Sequential(one.blocks[0].mlp.experts[0], nn.Tanh())
    with Oracle(twin, case.branches, rows_of(case)) as oracle:
        expected = run_trajectory(case, twin, around=oracle.step, **RUN)
    actual = run_trajectory(case, model, **RUN)
    assert_trajectories_close(actual, expected, SAME_KERNELS[torch.float32], "another expert")


def whole(forward: Callable[..., Tensor]) -> WholeModule:
    call = {"arguments": ((...,), {}), "flops": 100, "elements": 12, "dimensions": 2, "output": torch.empty(3, 4)}
    return WholeModule("linear", nn.Linear(4, 4), forward, **call, keys=-1)


def test_the_op_passes_opcheck():
    linear = nn.Linear(4, 4)
    held = whole(linear)
    weights = [parameter.detach() for parameter in linear.parameters()]
    torch.library.opcheck(whole_module, ([torch.randn(3, 4)], weights, held.number, -1))


def test_an_embeddings_output_has_a_row_for_each_element():
    table = nn.Embedding(5, 4)
    call = {"arguments": ((...,), {}), "flops": 0, "elements": 6, "dimensions": 2, "output": torch.empty(2, 3, 4)}
    held = WholeModule("table", table, table, **call, keys=-1)
    indices = torch.tensor([[0, 4, 2]])
    weights = [table.weight.detach()]
    assert torch.equal(whole_module([indices], weights, held.number, -1), table(indices))
    torch.library.opcheck(whole_module, ([indices], weights, held.number, -1))


def test_the_op_gives_memory_of_its_own_in_rows():
    x = torch.randn(4, 3).T
    for forward in (lambda x: x, lambda x: x.clone(memory_format=torch.preserve_format)):
        held = whole(forward)
        output = whole_module([x], [], held.number, -1)
        assert torch.equal(output, x) and output.is_contiguous() and output.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("forward", "got"),
    [
        (lambda x: x[:1], r"torch.float32 \[1, 4\]"),
        (lambda x: x.double(), r"torch.float64 \[3, 4\]"),
        (lambda x: (x, x), "tuple"),
    ],
    ids=["shape", "dtype", "tuple"],
)
def test_another_output_than_at_first_is_an_error(forward, got):
    held = whole(forward)
    with pytest.raises(CompiledError, match=rf"linear gave {got}, expected .* torch.float32 \[3, 4\]"):
        whole_module([torch.randn(3, 4)], [], held.number, -1)


def test_work_grows_with_the_input():
    from torch.utils.flop_counter import FlopCounterMode

    held = whole(F.relu)
    with FlopCounterMode(display=False) as counter:
        whole_module([torch.randn(6, 4)], [], held.number, -1)
    assert counter.get_total_flops() == 200
