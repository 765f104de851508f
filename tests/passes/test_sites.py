"""``find_sites`` on graphs whose sites are known by construction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.capture import Attention, Block, Stack, capture, inputs
from helpers.models import CASES
from smoothcache_fx.passes.facts import MATMULS, packet
from smoothcache_fx.passes.names import WEIGHT, common_module, group_of, unique_names
from smoothcache_fx.passes.sites import find_sites, find_sites_and_rejections, only_needed_by


def sites_of(model: nn.Module, *args: torch.Tensor, backend: str = "eager"):
    (program,) = capture(model.eval(), *args, backend=backend)
    return find_sites(program.builder.captured.graph)


def analyze_of(model: nn.Module, *args: torch.Tensor):
    (program,) = capture(model.eval(), *args)
    return find_sites_and_rejections(program.builder.captured.graph)


class Mlp(nn.Sequential):
    def __init__(self, width: int = 16) -> None:
        super().__init__(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))


class Residual(nn.Module):
    """``x + branch(x)`` for any branch."""

    def __init__(self, branch) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.branch = branch

    def forward(self, x, c):
        return x + self.branch(self, x, c)


def test_names_kinds_groups_and_order():
    sites = sites_of(Stack(), *inputs())
    assert [(s.name, s.kind, s.group) for s in sites] == [
        ("blocks.0.attn", "attn", "blocks.*.attn"),
        ("blocks.0.mlp", "ffn", "blocks.*.mlp"),
        ("blocks.1.attn", "attn", "blocks.*.attn"),
        ("blocks.1.mlp", "ffn", "blocks.*.mlp"),
    ]


def test_the_output_is_what_comes_before_the_gate():
    batch, tokens, width = 2, 6, 16
    for site in sites_of(Block(width), *inputs(batch, tokens, width)):
        (output,), (gates,) = site.outputs, site.gates
        assert packet(output) is torch.ops.aten.addmm, "the projection itself, gate and views taken off"
        assert gates == ((batch, 1, width),)
        assert output in site.region and not any(add in site.region for add in site.adds)


def test_flops_and_bytes_are_those_of_the_formulas():
    batch, tokens, width, heads = 2, 6, 16, 2
    attn, ffn = sites_of(Block(width, heads), *inputs(batch, tokens, width))
    rows = batch * tokens
    projections = 2 * rows * width * 4 * width
    scores_and_values = 2 * 2 * batch * tokens * tokens * width
    assert attn.flops == projections + scores_and_values
    assert ffn.flops == 2 * 2 * rows * width * 4 * width
    assert attn.cache_bytes == ffn.cache_bytes == rows * width * 4


def test_flops_of_cpu_flash_attention_are_counted():
    """PyTorch's own counter gives the CPU's fused attention no FLOPs at all."""
    (attn, _) = sites_of(Block(), *inputs())
    names = [str(node.target) for node in attn.region]
    assert any("flash_attention_for_cpu" in name for name in names)


@pytest.mark.parametrize("name", CASES)
def test_the_same_sites_are_found_in_inductors_graph(name):
    """Decompositions rewrite norms, activations and softmax; sites, kinds and names must not depend on them."""
    case = CASES[name]
    latents, (conditioning,) = case.inputs(1, torch.float32)
    found = {}
    for backend in ("eager", "inductor"):
        programs = []

        class Captured(nn.Module):
            def __call__(self, *args, **kwargs):
                programs.extend(capture(case.build(), *args, backend=backend, **kwargs))  # noqa: B023
                raise StopIteration

        if backend == "inductor":
            with pytest.MonkeyPatch.context() as patch:
                # Only the captured graph is looked at: the back half is left out.
                patch.setattr("smoothcache_fx.capture._inductor.compile", lambda gm, *rest: lambda a: gm(*a))
                with pytest.raises(StopIteration):
                    case.call(Captured(), latents, 1.0, conditioning)
        else:
            with pytest.raises(StopIteration):
                case.call(Captured(), latents, 1.0, conditioning)
        torch._dynamo.reset()
        found[backend] = [
            (site.name, site.kind, len(site.outputs)) for program in programs for site in program.builder.sites
        ]
    assert found["inductor"] == found["eager"]


def test_a_lora_beside_its_base_is_one_site_with_one_cache():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(2, 16)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = Lora(), Lora()

        def forward(self, x, c):
            return x + self.fc2(F.gelu(self.fc1(x)))

    (site,) = sites_of(Model(), *inputs())
    assert site.kind == "ffn" and len(site.outputs) == 1


def test_gated_attention_is_attention_and_a_joined_feed_forward_is_both():
    class Gated(nn.Module):
        def __init__(self, joined: bool):
            super().__init__()
            self.attn, self.gate, self.out = Attention(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)
            self.wide = nn.Linear(32, 16)
            self.joined = joined

        def forward(self, x, c):
            if self.joined:
                return x + self.wide(torch.cat((self.attn(x), F.gelu(self.gate(x))), dim=-1))
            return x + self.out(self.attn(x) * torch.sigmoid(self.gate(x)))

    assert [s.kind for s in sites_of(Gated(False), *inputs())] == ["attn"]
    assert [s.kind for s in sites_of(Gated(True), *inputs())] == ["attn_ffn"]


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (lambda m, x, c: 0.044 * x * x * x, "no matmul"),
        (lambda m, x, c: m.first(c)[:, None], "neither operand"),
        (lambda m, x, c: m.first.weight[0], "a parameter"),
    ],
    ids=["pointwise", "conditioning", "parameter"],
)
def test_adds_that_are_no_branch_are_refused_with_the_reason(branch, reason):
    (program,) = capture(Residual(branch).eval(), *inputs())
    sites, rejections = find_sites_and_rejections(program.builder.captured.graph)
    assert sites == []
    assert any(reason in rejection.reason for rejection in rejections)
    assert all("capture.py" in r.source or "test_sites.py" in r.source for r in rejections)


def test_a_residual_on_the_conditioning_vector_is_no_site():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, c):
            c = c + self.embed(F.silu(self.out(c)))
            return self.out(x) * c[:, None]

    (program,) = capture(Model().eval(), *inputs())
    sites, rejections = find_sites_and_rejections(program.builder.captured.graph)
    assert not sites and any("two-dimensional" in r.reason for r in rejections)


def test_a_residual_around_residuals_is_no_site():
    class LongSkip(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = Stack(), nn.Linear(16, 16)

        def forward(self, x, c):
            return x + self.out(self.inner(x, c))

    (program,) = capture(LongSkip().eval(), *inputs())
    sites, rejections = find_sites_and_rejections(program.builder.captured.graph)
    assert len(sites) == 4 and any("spans the residual add" in r.reason for r in rejections)


def test_a_feed_forward_that_skips_its_blocks_attention_is_a_site_of_its_own():
    """``x + mlp(norm(x + attn(x)))``: the skip path passes by the attention's sum."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.norm, self.mlp = Attention(16, 2), nn.LayerNorm(16), Mlp()

        def forward(self, x, c):
            return x + self.mlp(self.norm(x + c[:, None] * self.attn(x)))

    (program,) = capture(Block().eval(), *inputs())
    attn, mlp = find_sites(program.builder.captured.graph)
    assert (attn.name, attn.kind, mlp.name, mlp.kind) == ("attn", "attn", "mlp", "ffn")
    assert not set(attn.region) & set(mlp.region)


def test_a_projections_own_residual_is_a_part_of_the_branch_around_it():
    """A feed-forward that mixes neighbouring frames in a convolution with a residual of its own, as in Sana-Video."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.mix = nn.Linear(16, 32), nn.Linear(32, 16), nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x, c):
            h = self.down(self.up(x).relu())
            return x + c[:, None] * (h + self.mix(h.transpose(1, 2)).transpose(1, 2))

    (program,) = capture(Block().eval(), *inputs())
    (site,) = find_sites(program.builder.captured.graph)
    assert site.kind == "ffn" and {weight.meta[WEIGHT].split(".")[0] for weight in site.weights} == {
        "up",
        "down",
        "mix",
    }
    assert site.gates == (((2, 1, 16),),)


def test_a_projection_with_a_residual_is_no_site():
    """``conv(x) + x`` on raw latents, as Stable Audio has it: cached, it would hand out the last step's latents."""
    sites, rejections = analyze_of(Residual(lambda block, x, c: block.first(x)), *inputs())
    assert not sites and "a projection and no more" in rejections[0].reason


def test_packed_tokens_without_a_batch_are_tokens():
    """Cosmos 3 packs all sequences into ``[tokens, width]``; what attention mixes is no conditioning vector."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Attention(16, 2), Mlp()

        def forward(self, x):
            x = x + self.attn(x[None])[0]
            return x + self.mlp(x)

    assert [site.name for site in sites_of(Packed(), torch.randn(6, 16))] == ["attn", "mlp"]


def test_a_residual_beside_other_work_of_a_branch_is_a_part_of_it():
    """Motif-Video's single stream: cross-attention is added to attention's output, and an MLP runs beside both."""

    class SingleStream(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.cross, self.up, self.out = (
                Attention(16, 2),
                Attention(16, 2),
                nn.Linear(16, 32),
                nn.Linear(48, 16),
            )

        def forward(self, x, c):
            y = self.attn(x)
            y = y + self.cross(y)
            return x + c[:, None] * self.out(torch.cat((y, F.gelu(self.up(x))), dim=-1))

    (site,) = sites_of(SingleStream(), *inputs())
    assert site.kind == "attn_ffn" and site.gates == (((2, 1, 16),),)


def test_cross_attention_on_attentions_output_is_a_site_of_its_own():
    """``x + attn(x) + cross(attn(x))``: reused attention feeds the cross-attention from its cache."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.query, self.key, self.out = Attention(16, 2), *(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x, text):
            y = self.attn(x)
            query, key = self.query(y), self.key(text)
            return x + y + self.out((query @ key.transpose(1, 2)).softmax(-1) @ key)

    first, second = sites_of(Block(), inputs()[0], torch.randn(2, 4, 16))
    assert (first.kind, second.kind) == ("attn", "cross_attn")
    assert first.outputs[0] not in second.region and not set(first.weights) & set(second.weights)


def test_attention_with_a_recurrence_or_projected_queries_is_attention():
    """What is activated and joins before the last attention makes its queries: no feed-forward."""

    def rotated(block, x, c):
        query, key = block.first(x), block.second(x)
        mixed = query @ (query.transpose(1, 2) @ key)
        query = torch.cat((mixed[..., :8], F.relu(key)[..., 8:]), dim=-1)
        return (query @ key.transpose(1, 2)).softmax(-1) @ key

    (site,) = sites_of(Residual(rotated), *inputs())
    assert site.kind == "attn"


def test_what_only_has_the_shape_of_the_stream_does_not_descend_from_it():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x):
            return x + self.mlp(torch.ones_like(x))

    sites, rejections = analyze_of(Shifted(), inputs()[0])
    assert not sites and "constant" in rejections[0].reason


def test_experts_share_the_tokens_that_are_split_among_them():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Mlp() for _ in range(4))

        def forward(self, x, counts):
            parts = x.flatten(0, 1).split(counts.tolist())
            done = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
            return x + torch.cat(done).view(x.shape)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        (site,) = sites_of(Experts(), inputs()[0], torch.tensor([3, 3, 3, 3]))
    assert site.flops == sum(2 * 3 * (16 * 32 + 32 * 16) for _ in range(4))


def test_a_skip_path_may_be_scaled():
    """``scale * x + branch(x)``: a learned scale of the stream, or DeepNorm's constant one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.attn, self.mlp = nn.Parameter(torch.randn(16)), Attention(16, 2), Mlp()

        def forward(self, x, c):
            x = self.scale * x + self.attn(x)
            return 0.8 * x + c[:, None] * self.mlp(x)

    assert [site.name for site in sites_of(Block(), *inputs())] == ["attn", "mlp"]


def test_a_branch_may_be_corrected_by_a_function_of_itself():
    """stable-audio-tools scales an attention's mean over the tokens apart from the rest."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.low, self.high = (
                Attention(16, 2),
                nn.Parameter(torch.randn(16)),
                nn.Parameter(torch.randn(16)),
            )

        def forward(self, x, c):
            y = self.attn(x)
            mean = y.mean(1, keepdim=True)
            return x + (y + self.low * mean + self.high * (y - mean))

    assert [site.kind for site in sites_of(Block(), *inputs())] == ["attn"]


def test_residuals_on_what_depends_on_the_timestep_alone_are_no_sites():
    """Chroma computes all modulation by a small residual network, a token a block, from the timestep."""

    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.refine, self.mlp = nn.Parameter(torch.randn(3, 16)), Mlp(), Mlp()

        def forward(self, x, timestep):
            shifts = timestep[:, None, None] * self.embed
            shifts = shifts + self.refine(shifts)
            return x + self.mlp(x + shifts[:, :1])

    (program,) = capture(Modulated().eval(), inputs()[0], torch.rand(2))
    sites, rejections = find_sites_and_rejections(program.builder.captured.graph)
    assert [site.name for site in sites] == ["mlp"]
    assert "depends on vectors alone" in " ".join(rejection.reason for rejection in rejections)


def test_nothing_is_changed():
    (program,) = capture(Stack().eval(), *inputs())
    graph = program.builder.captured.graph
    before = graph.python_code("self").src
    find_sites(graph)
    assert graph.python_code("self").src == before


def test_work_shared_by_two_sites_belongs_to_neither():
    """A product that two parallel branches read is not saved by reusing one of them."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inlet, self.attn = nn.Linear(16, 16), Attention(16, 2)
            self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

        def forward(self, x, c):
            x = x + 1
            text = self.inlet(c)[:, None]
            return x + self.attn(x + text) + self.mlp(x + text)

    sites = sites_of(Shared(), *inputs())
    assert len(sites) == 2
    for site in sites:
        only = only_needed_by(site.outputs)
        products = [node for node in only if packet(node) in MATMULS]
        assert len(products) == 2, "its own two, and not the one on the conditioning"


def test_names():
    assert common_module(["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias"]) == "blocks.0.attn"
    assert common_module(["a.weight", "b.weight"]) == ""
    assert group_of("blocks.3.attn#2") == "blocks.*.attn"
    assert unique_names(["b.0", "b.0", ""], ["attn", "ffn", "ffn"]) == ["b.0.attn", "b.0.ffn", "ffn"]
    assert unique_names(["b.attn", "b.attn"], ["attn", "attn"]) == ["b.attn", "b.attn#2"]
    assert unique_names(["b.attn"], ["attn"], call=1) == ["b.attn#2"]
