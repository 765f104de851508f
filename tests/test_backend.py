"""Programs and bindings, recompiles, shapes, the registered backend, and PyTorch's caches on disk."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import smoothcache_fx as smoothcache
from helpers.capture import Attention, Block, Stack, inputs
from helpers.cases import randomize
from helpers.oracle import ModuleCall, Oracle
from helpers.tolerances import REORDERED, assert_close
from smoothcache_fx import Schedule
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.runtime.binding import Binding
from smoothcache_fx.runtime.caches import Stream


def check(model, reference, branches, rows, *, backend="eager", trajectories=2, sizes=((2, 6),), **options):
    """A compiled model's outputs equal the oracle's over whole trajectories; returns the compiled model."""
    steps = len(next(iter(rows.values())))
    smoothcache.compile(model, Schedule(steps, rows), backend=backend, **options)
    with Oracle(reference, branches, rows) as oracle, torch.no_grad():
        for trajectory in range(trajectories):
            x, _ = inputs(*sizes[trajectory % len(sizes)])
            for step in range(steps):
                c = torch.randn(len(x), 16)
                actual = model(x, c)
                with oracle.step(step):
                    expected = reference(x, c)
                assert_close(actual, expected, REORDERED)
                x = x + 0.1 * torch.randn_like(x)
    return model


def pair(make):
    """The same model twice, with random weights."""
    return randomize(make(), 0).eval(), randomize(make(), 0).eval()


ROWS = {
    "blocks.0.attn": [1, 0, 1, 0, 0],
    "blocks.0.mlp": [1, 1, 0, 0, 1],
    "blocks.1.attn": [1, 0, 0, 1, 0],
    "blocks.1.mlp": [1, 0, 1, 1, 0],
}
BRANCHES = {name: ModuleCall(name) for name in ROWS}


def test_one_graph_that_serves_two_blocks_keeps_them_apart():
    """A graph break behind each block: Dynamo captures the block once and runs it for both."""
    model = check(*pair(lambda: Stack(broken=True)), BRANCHES, ROWS)
    programs = [p for p in compiled_forward(model).session.programs if p.builder.sites]
    (program,) = programs
    first, second = program.bindings
    assert [site.name for site in first.sites] == ["blocks.0.attn", "blocks.0.mlp"]
    assert [site.name for site in second.sites] == ["blocks.1.attn", "blocks.1.mlp"]
    buffers = [b.streams[0].buffers for b in (first, second)]
    assert {t.data_ptr() for t in buffers[0]}.isdisjoint({t.data_ptr() for t in buffers[1]})
    assert first.plan.compute != second.plan.compute


@pytest.mark.parametrize("broken", [False, True], ids=["one_graph", "graph_break"])
def test_a_block_called_twice_in_a_step_has_two_caches(broken):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, c):
            for _ in range(2):
                x = self.block(0.9 * x, c)
                if broken:
                    torch._dynamo.graph_break()
            return x

    rows = {
        "block.attn": [1, 0, 1, 0],
        "block.mlp": [1, 1, 0, 1],
        "block.attn#2": [1, 0, 0, 1],
        "block.mlp#2": [1, 0, 1, 0],
    }
    branches = {name: ModuleCall(name.partition("#")[0], int("#2" in name)) for name in rows}
    model = check(*pair(Tied), branches, rows)
    names = {site.name for p in compiled_forward(model).session.programs for b in p.bindings for site in b.sites}
    assert names == set(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compile_for_three_trajectories_and_a_variant_per_mask(dtype):
    model = randomize(Stack(), 0).eval().to(dtype)
    steps = 12
    rows = {"attn": [1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1], "ffn": [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1]}
    smoothcache.compile(model, Schedule(steps, rows), backend="eager")
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for _ in range(3):
            for _step in range(steps):
                x, c = inputs()
                model(x.to(dtype), c.to(dtype))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    report = smoothcache.report(model)
    assert report.graphs == 1 and report.calls == 36 and report.trajectories == 3
    assert report.variants == len(set(zip(rows["attn"], rows["ffn"], strict=True))) == 4
    assert not report.forced


class Masked(nn.Module):
    """Joint attention with the tokens of a text that a mask lets through, as video models drop its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.attn, self.up, self.down = (
            nn.Linear(16, 16),
            Attention(16, 2),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
        )

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.inlet(x)
        kept = torch.nonzero(mask, as_tuple=False).flatten()
        x = x + self.attn(torch.cat((h, text[:, kept]), dim=1))[:, : x.shape[1]]
        return x + self.down(self.up(x).relu())


class Sorted(Masked):
    """Then a feed-forward, the larger part, on a stream of tokens whose size depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 16))

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = super().forward(x, text, mask)
        kept = x[:, torch.nonzero(mask).flatten()]
        return kept + self.mlp(kept)


@pytest.mark.parametrize("lags", [None, 2])
def test_sizes_that_depend_on_data_break_the_graph_where_that_keeps_more_in_sites(lags):
    model, plain = (randomize(Sorted(), 0).eval() for _ in range(2))
    mask, (x, _), text = torch.tensor([1, 1, 0, 1]), inputs(), torch.randn(2, 4, 16)
    expected = plain(x, text, mask)
    if lags:
        calibration = smoothcache.calibrate(
            model, lambda m: [m(x + i, text, mask) for i in range(4)], lags=lags, steps=4, progress=False
        )
        counts = {site.name: site.count.tolist() for site in calibration.sites}
        assert counts == {name: [[0, 1, 1, 1], [0, 0, 1, 1]] for name in ("ffn", "mlp")}
        return
    smoothcache.compile(model, Schedule(2, {"ffn": [1, 0]}), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x, text, mask), expected)
        model(x + 1, text, mask)
        torch.testing.assert_close(model(x, text, mask), expected)
    report = smoothcache.report(model)
    assert report.graphs > 1 and report.breaks and report.lost_share > 0.05 and not report.forced
    assert {group.group: group.computed for group in report.groups} == {"ffn": 2, "mlp": 2}


def test_a_size_that_depends_on_data_does_not_break_the_graph():
    model, plain = (randomize(Masked(), 0).eval() for _ in range(2))
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
    with torch.no_grad():
        for mask in (torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 0])):
            (x, _), text = inputs(), torch.randn(2, 4, 16)
            fresh = model(x, text, mask)
            assert torch.equal(fresh, plain(x, text, mask))
            torch.testing.assert_close(model(x + 1, text, mask), fresh + 1)
    report = smoothcache.report(model)
    assert report.graphs == 1 and not report.breaks and not report.forced
    assert {group.kind: group.computed for group in report.groups} == {"attn": 2, "ffn": 2}
    graphs = compiled_forward(model).session.programs[0].builder.graphs
    (reusing,) = (graph for mask, graph in graphs.items() if not mask.compute)
    names = {str(node.target) for node in reusing.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in names for word in ("nonzero", "assert", "sym_", "mm")), names


def test_the_cache_stays_where_it_is():
    """Buffers are allocated once: CUDA graphs hold on to their addresses."""
    model = randomize(Stack(), 0).eval()
    smoothcache.compile(model, Schedule(4, {"attn": [1, 0, 1, 0], "ffn": [1, 0, 0, 0]}), backend="eager")
    addresses = set()
    with torch.no_grad():
        for _ in range(3 * 4):
            model(*inputs())
            (program,) = compiled_forward(model).session.programs
            addresses.add(tuple(t.data_ptr() for t in program.bindings[0].streams[0].buffers))
    assert len(addresses) == 1


@pytest.mark.parametrize("backend", ["eager_noexcept", "aot_eager_decomp_partition"])
def test_other_names_that_dynamo_lists_are_inner_compilers_too(backend):
    assert backend in torch._dynamo.list_backends(None)
    check(*pair(Stack), BRANCHES, ROWS, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({}, {}),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"options": {"epilogue_fusion": False}}, {"epilogue_fusion": False}),
    ],
    ids=["default", "mode", "options"],
)
def test_caches_are_static_inputs_and_mode_and_options_reach_every_variant(monkeypatch, arguments, setting):
    """The positions of caches and parameters are among ``static_input_idxs``, also in variants compiled later."""
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor_config

    from smoothcache_fx.passes.guard import CACHE
    from smoothcache_fx.passes.names import WEIGHT

    seen = []

    def spy(gm, example_inputs, **settings):
        holders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        caches = {i for i, node in enumerate(holders) if CACHE in node.meta}
        weights = {i for i, node in enumerate(holders) if WEIGHT in node.meta}
        seen.append((set(settings["static_input_idxs"]), caches, weights))
        assert {name: inductor_config.get_config_copy()[name] for name in setting} == setting
        return lambda values: gm(*values)  # what matters here comes before Inductor's code generation

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), **arguments)
    with torch.no_grad():
        model(*inputs()), model(*inputs())
    assert len(seen) == 2
    for static, caches, weights in seen:
        assert caches and caches <= static and weights <= static


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_shapes_between_trajectories(backend, dynamic):
    model = check(
        *pair(Stack),
        BRANCHES,
        ROWS,
        backend=backend,
        trajectories=5,
        sizes=((2, 6), (3, 8), (2, 9), (2, 6), (4, 5)),
        dynamic=dynamic,
    )
    assert smoothcache.report(model).graphs <= 2


def test_changing_shapes_under_inductor():
    check(
        *pair(lambda: Stack(2)),
        BRANCHES,
        ROWS,
        backend="inductor",
        trajectories=3,
        sizes=((2, 6), (3, 8), (2, 9)),
        dynamic=True,
    )


def test_a_change_of_shape_within_a_trajectory_computes_anew():
    model, reference = pair(Stack)
    smoothcache.compile(model, Schedule(4, {"attn": [1, 0, 0, 0], "ffn": [1, 0, 0, 0]}), backend="eager", dynamic=True)
    with torch.no_grad():
        model(*inputs(2, 6))
        x, c = inputs(2, 8)
        assert_close(model(x, c), reference(x, c), REORDERED)
    report = smoothcache.report(model)
    assert sum(report.forced.values()) == 4 and "step 1" in str(report)


def test_a_failed_call_leaves_no_half_written_cache_behind():
    model, reference = pair(Stack)
    smoothcache.compile(model, Schedule(3, {"attn": [1, 0, 0], "ffn": [1, 0, 0]}), backend="eager")
    with torch.no_grad():
        model(*inputs())
        (program,) = compiled_forward(model).session.programs
        variant = next(iter(program.dispatcher.variants.values()))
        run = variant.run
        model(*inputs()), model(*inputs())

        def fail(arguments):
            run(arguments)
            raise RuntimeError("out of memory")

        variant.run = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            model(*inputs())
        variant.run = run
        x, c = inputs()
        assert_close(model(x, c), reference(x, c), REORDERED)


# The backend by its name.


@pytest.fixture
def registered(monkeypatch):
    """Dynamo finds the entry point only where the package is installed; tests may run on a bare tree."""
    from torch._dynamo.backends import registry

    from smoothcache_fx.capture.registered import smoothcache_backend

    monkeypatch.setitem(registry._COMPILER_FNS, "smoothcache", smoothcache_backend)
    monkeypatch.setitem(registry._BACKENDS, "smoothcache", None)


def test_the_backend_by_name(registered):
    model, reference = pair(Stack)
    schedule = Schedule(5, ROWS)
    compiled = torch.compile(model, backend="smoothcache", options={"schedule": schedule, "backend": "eager"})
    with Oracle(reference, BRANCHES, ROWS) as oracle, torch.no_grad():
        for _ in range(2):
            for step in range(5):
                x, c = inputs()
                with oracle.step(step):
                    expected = reference(x, c)
                assert_close(compiled(x, c), expected, REORDERED)


def test_the_backend_by_name_keeps_its_step_over_a_recompile(registered):
    """A second graph of the same model, for another batch size, goes on at the step where the first was."""
    model, reference = pair(Stack)
    schedule = Schedule(4, {"attn": [1, 0, 0, 1], "ffn": [1, 0, 0, 1]})
    compiled = torch.compile(
        model, backend="smoothcache", options={"schedule": schedule, "backend": "eager"}, dynamic=False
    )
    with torch.no_grad():
        compiled(*inputs(2))
        x, c = inputs(3)
        assert_close(compiled(x, c), reference(x, c), REORDERED)
        compiled(x, c)
        x, c = inputs(3)
        assert_close(compiled(x, c), reference(x, c), REORDERED)  # step 3 computes


def test_the_backend_by_name_keeps_models_of_one_class_apart(registered):
    """Dynamo runs one graph for both, and yet each has its own steps and caches: they take turns here."""
    schedule = Schedule(4, {"attn": [1, 0, 1, 0], "ffn": [1, 0, 0, 1]})
    options = {"schedule": schedule, "backend": "eager"}
    together = [
        torch.compile(randomize(Stack(), seed).eval(), backend="smoothcache", options=options) for seed in (0, 1)
    ]
    alone = [smoothcache.compile(randomize(Stack(), seed).eval(), schedule, backend="eager") for seed in (0, 1)]
    with torch.no_grad():
        for _ in range(6):
            x, c = inputs()
            x = x * torch.rand(())  # no step is like another
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one(x, c), other(x, c))


def test_a_program_frees_the_caches_of_models_that_are_gone(registered, monkeypatch):
    """Another model may have its weights where theirs were, and must not read these. Nor does the program grow."""
    streams, bindings = [], []

    class NotedBinding(Binding):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            bindings.append(weakref.ref(self))

    def noted(*arguments):
        stream = Stream(*arguments)
        streams.append(weakref.ref(stream))
        return stream

    monkeypatch.setattr("smoothcache_fx.runtime.binding.Stream", noted)
    monkeypatch.setattr("smoothcache_fx.capture.program.Binding", NotedBinding)
    options = {"schedule": Schedule(4, {"attn": [1, 0, 1, 0]}), "backend": "eager"}
    for seed in range(3):
        model = torch.compile(randomize(Stack(), seed).eval(), backend="smoothcache", options=options)
        with torch.no_grad():
            model(*inputs())
        assert len(streams) == len(bindings) == seed + 1
        assert streams[-1]() is not None and bindings[-1]() is not None
        del model
        gc.collect()
        assert streams[-1]() is None and bindings[-1]() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "needs options"),
        ({"schedule": "fora"}, "got 'fora' as schedule"),
        ({"schedule": Schedule(3, {"encoder.*": [1, 0, 0]}), "backend": "eager"}, "has no such site"),
    ],
)
def test_the_backend_by_name_refuses(registered, options, message):
    compiled = torch.compile(Stack().eval(), backend="smoothcache", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(*inputs())


# What a plain torch.compile has left on disk.


TWO_PROCESSES = """
    import sys
    import torch
    import smoothcache_fx as smoothcache
    from helpers.capture import Stack, inputs
    from helpers.cases import randomize
    from smoothcache_fx.compiled.forward import compiled_forward
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    model = randomize(Stack(1), 0).eval()
    torch.manual_seed(3)
    calls = [inputs() for _ in range(2)]
    if sys.argv[1] == "plain":
        model = torch.compile(model)
    else:
        smoothcache.compile(model, smoothcache.Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}))
    with torch.no_grad():
        outputs = [model(*call) for call in calls]
    found = [counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")]
    assert found == ([1, 0, 0] if sys.argv[2] == "again" else [0, 1, 0]), counters["aot_autograd"]
    if sys.argv[2] == "again":
        assert not counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]
        earlier = torch.load(sys.argv[1])
        assert all(map(torch.equal, outputs, earlier))
    torch.save(outputs, sys.argv[1])
    if sys.argv[1] != "plain":
        report = smoothcache.report(model)
        (program,) = compiled_forward(model).session.programs
        assert [site.name for site in program.bindings[0].sites] == ["blocks.0.attn", "blocks.0.mlp"]
        assert [group.reused for group in report.groups] == [1, 1], report
        with smoothcache.disabled(model), torch.no_grad():
            fresh = model(*calls[1])
        assert (outputs[1] - fresh).abs().max() > 1e-2, "the second call was not cached"
        assert report.variants == 2
    print("done")
"""


def test_what_another_process_left_on_disk(tmp_path):
    """A plain compile's code does not stand in for ours, nor ours for it; each finds its own again.

    AOTAutograd's cache on disk does not know inner compilers.
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    paths = [path for path in sys.path if path]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *paths]),
    }
    for name, when in (("plain", "first"), ("cached", "first"), ("cached", "again"), ("plain", "again")):
        done = subprocess.run(
            [sys.executable, script, name, when],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and "done" in done.stdout, f"{name}:\n{done.stdout}\n{done.stderr}"


def test_code_on_disk_is_of_the_same_ops(monkeypatch):
    """An update may change an op's arguments: code that calls it as it was must not be found again."""
    from smoothcache_fx.capture import _inductor

    def misses() -> int:
        torch._dynamo.reset()
        counters.clear()
        model = randomize(Stack(1), 0).eval()
        smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}))
        with torch.no_grad():
            for _ in range(2):
                model(*inputs())
        return counters["inductor"]["fxgraph_cache_miss"]

    with fresh_cache():
        assert misses() == 2
        assert misses() == 0
        monkeypatch.setattr(_inductor, "_schemas", lambda: "residual_load(Tensor x, Tensor cache) -> Tensor")
        assert misses() == 2
