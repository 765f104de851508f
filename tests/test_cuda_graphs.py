"""CUDA graphs: what they ask of variants and callers, tried without a GPU; on a GPU the recordings themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from helpers.oracle import ModuleCall, Oracle
from helpers.tolerances import COMPILED, assert_close
from smoothcache_fx import Schedule
from smoothcache_fx.capture.cuda_graphs import may_run_twice, owned, recorded_at_once
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.passes.mutation import read_and_written

ROWS = {"attn": [1, 0, 1, 0], "ffn": [1, 1, 0, 0]}


@dataclass
class Output:
    sample: torch.Tensor
    more: tuple[torch.Tensor, int]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x, c):
        result = self.stack(x, c)
        return Output(result, (result * 2, 3))


def replays(gm, example_inputs, **settings):
    """Stands for a graph that Inductor has recorded: every call's outputs lie where the last call's did."""
    places = []

    def run(arguments):
        results = gm(*arguments)
        arguments.clear()
        if not places:
            places.extend(result.clone() for result in results)
        for place, result in zip(places, results, strict=True):
            place.copy_(result)
        return places

    return run


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_outputs_that_a_sampler_keeps_are_not_written_over(monkeypatch, mode):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", replays)
    model, plain = (randomize(Wrapped(), 0).eval() for _ in range(2))
    smoothcache.compile(model, Schedule.uniform(4, 1), mode=mode)
    with torch.no_grad():
        given = [inputs() for _ in range(8)]
        kept = [model(x, c) for x, c in given]
        expected = [plain(x, c) for x, c in given]
    torch.testing.assert_close([k.sample for k in kept], [e.sample for e in expected])
    torch.testing.assert_close([k.more for k in kept], [e.more for e in expected])


def test_without_cuda_graphs_outputs_are_not_copied(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", replays)
    model = randomize(Stack(), 0).eval()
    smoothcache.compile(model, Schedule.uniform(4, 1), mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        assert model(*inputs()).data_ptr() == model(*inputs()).data_ptr()


def test_outputs_of_any_structure_are_owned():
    tensor = torch.randn(3)
    value = {"a": [tensor, None], "b": Output(tensor, (tensor, 3))}
    result = owned(value)
    leaves = [result["a"][0], result["b"].sample, result["b"].more[0]]
    assert all(leaf.equal(tensor) and leaf.data_ptr() != tensor.data_ptr() for leaf in leaves)
    assert result["a"][1] is None and result["b"].more[1] == 3
    assert value["b"].sample is tensor


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda x, cache: x + cache, True),
        (lambda x, cache: (cache.copy_(x * 2), x)[1], True),
        (lambda x, cache: (cache.view(-1).copy_(x.view(-1)), x)[1], True),
        (lambda x, cache: (x.copy_(cache), x * 2)[1], False),
        (lambda x, cache: (x.view(-1).add_(cache.view(-1)), x * 2)[1], False),
        (lambda x, cache: x + torch.rand_like(x), False),
        (lambda x, cache: torch.nn.functional.dropout(x, 0.5), False),
    ],
    ids=["reads", "stores", "stores through a view", "writes", "writes through a view", "random", "dropout"],
)
def test_a_variant_runs_twice_only_where_that_is_the_same_as_once(step, expected):
    gm = make_fx(step, tracing_mode="fake")(torch.randn(2, 3), torch.randn(2, 3))
    assert may_run_twice(gm, [1]) is expected


def test_a_recording_is_made_at_the_first_call_for_each_size():
    seen = []

    def run(arguments):
        seen.append(list(arguments))
        arguments.clear()
        return [len(seen)]

    call = recorded_at_once(run, [0], [])
    assert [call([size, "x"]) for size in (4, 4, 5, 4, 5)] == [[2], [3], [5], [6], [7]]
    assert seen == [[4, "x"]] * 3 + [[5, "x"]] * 2 + [[4, "x"], [5, "x"]]


@pytest.mark.parametrize(
    "older_is, through, expected",
    [
        (lambda x, newest: newest, lambda cache: cache, ([1, 2], [5, 1])),
        (lambda x, newest: x - newest, lambda cache: cache, ([1, -1], [5, 4])),
        (lambda x, newest: x - newest, lambda cache: cache.view(1, 1), ([1, -1], [5, 4])),
    ],
    ids=["values", "differences", "written through a view"],
)
def test_a_history_moves_on_once_though_the_graph_runs_twice(older_is, through, expected):
    def step(x, newest, older):
        older.copy_(older_is(x, newest))
        through(newest).copy_(through(x))
        return x * 2

    gm = make_fx(step, tracing_mode="fake")(*torch.randn(3, 1))
    assert may_run_twice(gm, [1, 2]) and read_and_written(gm) == [1]
    x, newest, older = torch.tensor([[1.0], [2.0], [3.0]])
    call = recorded_at_once(lambda arguments: [gm(*arguments)], [], read_and_written(gm))
    for values in expected:
        call([x, newest, older])
        assert [newest.item(), older.item()] == values
        x = torch.tensor([5.0])


def test_every_variant_is_recorded_within_the_first_trajectory(monkeypatch):
    """Of a schedule with variants that a trajectory has once: warmed up and recorded, then replayed."""
    runs = []

    def count(gm, example_inputs, **settings):
        runs.append(0)
        index = len(runs) - 1

        def run(arguments):
            runs[index] += 1
            return gm(*arguments)

        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", count)
    model, plain = (randomize(Stack(), 0).eval() for _ in range(2))
    smoothcache.compile(model, Schedule(4, ROWS), mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            model(*inputs())
        assert runs == [2] * 4
        x, c = inputs()
        torch.testing.assert_close(model(x, c), plain(x, c))
        for _ in range(3):
            model(*inputs())
    assert runs == [3] * 4


@pytest.mark.parametrize("calls_per_step", [1, 2])
def test_nothing_in_a_step_waits_for_the_device(calls_per_step):
    """On the meta device a tensor's values cannot be read: neither by ``.item()`` nor by a copy to the CPU."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        model = DiTTransformer2DModel(2, 8, 4, num_layers=2, sample_size=8, num_embeds_ada_norm=10).eval()
        latent, label, timestep = torch.empty(2, 4, 8, 8), torch.zeros(2, dtype=int), torch.zeros(2, dtype=int)
    with pytest.raises((RuntimeError, NotImplementedError)):
        timestep[0].item()
    with pytest.raises(NotImplementedError):
        latent.cpu()
    smoothcache.compile(model, Schedule(4, ROWS), backend="eager", calls_per_step=calls_per_step)
    with torch.no_grad():
        for _ in range(2 * 4 * calls_per_step):
            assert model(latent, timestep, label).sample.is_meta
    report = smoothcache.report(model)
    assert not report.forced and {group.computed for group in report.groups} == {2 * 2 * 2 * calls_per_step}


NAMES = [f"blocks.{index}.{branch}" for index in range(2) for branch in ("attn", "mlp")]
NAMED_ROWS = {name: ROWS["attn" if name.endswith("attn") else "ffn"] for name in NAMES}


def follow(device: str, mode: str, calls_per_step: int, sizes: Sequence[tuple[int, int]]) -> Iterator[set[int]]:
    """Run a trajectory for each size beside the oracle; after each, where the caches lie. Outputs are compared last."""
    model, reference = (randomize(Stack(2), 0).eval().to(device) for _ in range(2))
    options = {"dynamic": True} if len(set(sizes)) > 1 else {}
    smoothcache.compile(model, Schedule(4, NAMED_ROWS), mode=mode, calls_per_step=calls_per_step, **options)
    kept, expected = [], []
    with Oracle(reference, {name: ModuleCall(name) for name in NAMES}, NAMED_ROWS) as oracle, torch.no_grad():
        for size in sizes:
            for step, stream in itertools.product(range(4), range(calls_per_step)):
                x, c = (tensor.to(device) for tensor in inputs(*size))
                kept.append(model(x, c))
                with oracle.step(step, stream):
                    expected.append(reference(x, c))
            bindings = [binding for p in compiled_forward(model).session.programs for binding in p.bindings]
            streams = [stream for binding in bindings for stream in binding.streams.values()]
            yield {buffer.data_ptr() for stream in streams for buffer in stream.buffers if buffer is not None}
    assert_close(kept, expected, COMPILED)


@pytest.mark.parametrize("calls_per_step", [1, 2])
def test_trajectories_with_replayed_outputs(monkeypatch, calls_per_step):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", replays)
    places = list(follow("cpu", "reduce-overhead", calls_per_step, [(2, 6)] * 3))
    assert len(places[0]) == 4 * calls_per_step and places[0] == places[1] == places[2]


@pytest.fixture
def recordings(monkeypatch) -> list[int]:
    """The functions that Inductor has recorded, in order; where it cannot record, it fails."""
    from torch._inductor import config, cudagraph_trees

    monkeypatch.setattr(config.triton, "cudagraph_or_error", True)
    found = []
    record = cudagraph_trees.CUDAGraphTreeManager.record_function

    def recorded(self, new_inputs, function_id):
        found.append(function_id.id)
        return record(self, new_inputs, function_id)

    monkeypatch.setattr(cudagraph_trees.CUDAGraphTreeManager, "record_function", recorded)
    return found


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("calls_per_step", [1, 2])
def test_trajectories_on_a_gpu_replay_what_the_first_one_recorded(mode, calls_per_step, recordings):
    skips, counts, places = counters["inductor"]["cudagraph_skips"], [], []
    for found in follow("cuda", mode, calls_per_step, [(2, 6)] * 3):
        counts.append(len(recordings))
        places.append(found)
    # A variant for each of the four steps, and each stream's cache lies elsewhere.
    assert counts == [4 * calls_per_step] * 3
    assert places[0] == places[1] == places[2] and counters["inductor"]["cudagraph_skips"] == skips


@pytest.mark.gpu
@on_a_gpu
def test_other_shapes_on_a_gpu_are_recorded_anew(recordings):
    counts = []
    for _ in follow("cuda", "reduce-overhead", 1, [(2, 6), (3, 8), (3, 8)]):
        counts.append(len(recordings))
    assert counts[1] > counts[0] > 0 and counts[2] == counts[1]
