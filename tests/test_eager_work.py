"""Work that graph breaks leave to Python: counted, so that another capture is tried, and said where none helps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Attention, Block, inputs
from helpers.cases import randomize
from smoothcache_fx import Schedule
from smoothcache_fx.capture import ways as traced
from smoothcache_fx.capture.eager_work import flop_counter, flops_by_container
from smoothcache_fx.compiled.forward import compiled_forward

mochi = pytest.importorskip("diffusers").MochiTransformer3DModel


@pytest.fixture
def model() -> nn.Module:
    """Small as in diffusers' own tests: its attention drops the text's padding by ``nonzero``, in a loop."""
    config = {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 12}
    text = {"pooled_projection_dim": 16, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 16}
    return randomize(mochi(**config, **text, qk_norm="rms_norm", activation_fn="swiglu"), 0).eval()


def sample(model: nn.Module, steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 2, 16, 16, generator=generator)
    text = torch.randn(2, 16, 16, generator=generator)
    found = []
    with torch.no_grad():
        for step in range(steps):
            timestep = torch.full((2,), 900.0 - 100 * step)
            mask = torch.ones(2, 16, dtype=torch.bool)
            (out,) = model(x, text, timestep, encoder_attention_mask=mask, return_dict=False)
            found.append(out)
            x = x - 0.1 * out
    return found


@pytest.mark.filterwarnings("ignore:.*CPU Autocast")
def test_attention_that_ran_in_no_graph_becomes_a_site(model):
    smoothcache.compile(model, Schedule.uniform(4, 2), backend="eager")
    assert all(output.isfinite().all() for output in sample(model))
    report = smoothcache.report(model)
    assert report.graphs == 1 and not report.breaks and not report.forced
    groups = {group.group: group for group in report.groups}
    assert groups["transformer_blocks.*.attn1"].sites == 2
    assert all(group.computed == group.reused for group in report.groups)


@pytest.mark.filterwarnings("ignore:.*CPU Autocast")
def test_what_no_graph_holds_is_in_the_share_that_is_lost(model, monkeypatch):
    """Where no other capture is tried. Everything in the blocks but the feed-forwards is done at every step."""
    counter = flop_counter()
    with counter:
        sample(model, 1)
    whole = counter.get_total_flops()
    monkeypatch.setattr(traced, "WORTH_A_TRY", 2.0)
    smoothcache.compile(model, Schedule.uniform(4, 2), backend="eager")
    sample(model)
    report = smoothcache.report(model)
    assert report.breaks and {group.kind for group in report.groups} == {"ffn"}
    blocks = compiled_forward(model).session.capture.eager_flops["transformer_blocks"]
    in_sites = sum(s.flops for p in compiled_forward(model).session.programs for b in p.bindings for s in b.sites)
    assert report.lost_share == pytest.approx((blocks - in_sites) / whole)
    assert 0.25 < report.lost_share < 0.9, "attention is most of what is lost"
    assert f"{report.lost_share:.1%} of the FLOPs" in str(report)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.heads = nn.ModuleList([Attention(16, 2)])
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, c)
        return self.last(self.heads[0](x))


def test_blocks_are_counted_by_their_outermost_list():
    model, (x, c) = Nested().eval(), inputs()
    counted = flops_by_container(model, lambda: model(x, c))
    rows, batch = x.shape[0] * x.shape[1], x.shape[0]
    attention = 2 * rows * 16 * (48 + 16) + 2 * 2 * batch * 2 * x.shape[1] ** 2 * 8
    block = attention + 2 * 2 * rows * 16 * 64 + 2 * batch * 16 * 96
    assert counted == {"blocks": 2 * block, "heads": attention, "": 2 * rows * 16 * 16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
