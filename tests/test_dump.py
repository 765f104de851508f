"""``dump``, ``SMOOTHCACHE_DUMP`` and ``diff``: the files run, and say what they are."""

from __future__ import annotations

import json
import os
import re
import runpy
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Block, Stack, inputs
from helpers.cases import randomize
from helpers.models import CASES
from smoothcache_fx import CompiledError, Schedule
from smoothcache_fx.cli.main import main
from smoothcache_fx.compiled.forward import compiled_forward
from smoothcache_fx.graphs.diff import count_ops
from smoothcache_fx.passes.guard import CACHE
from smoothcache_fx.passes.rewriting import placeholders
from smoothcache_fx.runtime.dispatch import GuardedDispatcher

ROWS = {"attn": [1, 0, 1, 0], "ffn": [1, 0, 0, 0]}


@pytest.fixture
def given(monkeypatch) -> list[list[object]]:
    """What each call of a captured graph was given, copied."""
    found = []
    call = GuardedDispatcher.__call__

    def recorded(self, arguments):
        found.append([value.clone() if isinstance(value, torch.Tensor) else value for value in arguments])
        return call(self, arguments)

    monkeypatch.setattr(GuardedDispatcher, "__call__", recorded)
    return found


def run_steps(model: nn.Module, steps: int = 4) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(*inputs()) for _ in range(steps)]


def dumped(model: nn.Module, folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in smoothcache.dump(model, folder)}


def graph_of(path: Path) -> nn.Module:
    return runpy.run_path(str(path))["Graph"]()


def caches_of(builder) -> list[torch.Tensor]:
    nodes = [node for node in placeholders(builder.guarded.graph) if CACHE in node.meta]
    return [torch.randn(node.meta["val"].shape) for node in nodes]


def test_the_files(tmp_path):
    model = randomize(Stack(3), 0).eval()
    smoothcache.compile(model, Schedule(4, ROWS), backend="eager")
    with pytest.raises(CompiledError, match="run what you have compiled once"):
        smoothcache.dump(model, tmp_path)
    run_steps(model)
    files = dumped(model, tmp_path)
    stages = ["captured", "guarded", "variant_0", "variant_1", "variant_2"]
    expected = [f"graph_0/{stage}.{kind}" for stage in stages for kind in ("py", "dot")]
    assert [name for name in files if not name.endswith(".svg")] == ["README.md", "sites.json", *expected]
    text = files["graph_0/variant_1.py"].read_text()
    assert "Reused: blocks.0.attn, blocks.0.mlp" in text
    captured, guarded = (files[f"graph_0/{stage}.py"].read_text() for stage in ("captured", "guarded"))
    for part in (
        "# f32[48, 16], blocks.0.attn.qkv.weight",
        "# blocks.1.attn: capture.py:",
        "x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)",
    ):
        assert part in captured, part
    for part in (", cache of blocks.2.mlp", "# whether blocks.0.attn is computed", "site blocks.1.mlp"):
        assert part in guarded and part not in captured, part
    assert guarded.count(" = guard_(") == 6
    assert count_ops(text)["aten.addmm.default"] < count_ops(captured)["aten.addmm.default"]


@pytest.mark.parametrize("name", ["adaln_zero", "joint", "demo", "diffusers_pixart", "diffusers_flux"])
def test_every_file_runs_and_gives_what_its_graph_gives(name, given, tmp_path):
    case = CASES[name]
    model = case.build(0, torch.float32)
    kinds = ("attn", "cross_attn", "ffn", "attn_ffn")
    smoothcache.compile(model, Schedule(2, {kind: [1, 0] for kind in kinds}), backend="eager")
    latents, (conditioning,) = case.inputs(1, torch.float32)
    with torch.no_grad():
        outputs = [case.call(model, latents, 1.0 - step / 2, conditioning) for step in range(2)]
    files = dumped(model, tmp_path)
    (program,) = compiled_forward(model).session.programs
    builder = program.builder
    with torch.no_grad():
        torch.testing.assert_close(graph_of(files["graph_0/captured.py"])(*given[0])[0], outputs[0])
        mask = [index % 2 == 0 for index in range(len(builder.sites))]
        caches = caches_of(builder)
        run = graph_of(files["graph_0/guarded.py"])
        expected = builder.guarded(*given[1], *[cache.clone() for cache in caches], *mask)
        torch.testing.assert_close(run(*given[1], *[cache.clone() for cache in caches], *mask), expected)
        for index, variant in enumerate(program.dispatcher.variants.values()):
            values = [given[1][i] for i in variant.inputs]
            ours, theirs = ([*values, *(caches[i].clone() for i in variant.buffers)] for _ in range(2))
            result = graph_of(files[f"graph_0/variant_{index}.py"])(*ours)
            torch.testing.assert_close(result, type(result)(variant.run(list(theirs))))


class WithConstant(nn.Module):
    """A tensor that is part of the graph, an infinity, and a dtype among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x, c):
        x = x * torch.tensor([1.0, 2.0]).repeat(8)
        x = self.blocks[0](x, c)
        return x.to(torch.float64).masked_fill(x.isnan(), float("-inf")).to(torch.float32)


def test_tensors_that_are_part_of_a_graph_lie_beside_it(given, tmp_path):
    model = randomize(WithConstant(), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
    outputs = run_steps(model, 2)
    files = dumped(model, tmp_path)
    assert "graph_0/constants.pt" in files
    torch.testing.assert_close(graph_of(files["graph_0/captured.py"])(*given[0])[0], outputs[0])


def test_sites_and_masks_as_json(tmp_path):
    model = randomize(Stack(2), 0).eval()
    smoothcache.compile(model, Schedule(4, ROWS), backend="eager")
    run_steps(model)
    found = json.loads(dumped(model, tmp_path)["sites.json"].read_text())
    (graph,) = found["graphs"]
    ((first, *_),) = graph["places"]
    assert found["model"] == "Stack" and graph["graph_break"] is None
    assert (first["name"], first["group"], first["kind"]) == ("blocks.0.attn", "blocks.*.attn", "attn")
    assert first["cache_bytes"] == 2 * 6 * 16 * 4 and 0 < first["flops"] < graph["flops"]
    assert [variant["reused"] for variant in graph["variants"]] == [
        [],
        ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"],
        ["blocks.0.mlp", "blocks.1.mlp"],
    ]
    assert all(variant["compiled"][0]["inductor_code"] is None for variant in graph["variants"])
    flops = [variant["flops"] for variant in graph["variants"]]
    assert flops[0] == graph["flops"] > flops[2] > flops[1]


def test_under_inductor_its_code_is_named_and_graphs_are_as_it_got_them(tmp_path):
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}))
    run_steps(model, 2)
    files = dumped(model, tmp_path)
    ops = count_ops(files["graph_0/variant_0.py"].read_text())
    assert ops["aten.view.default"] and not ops["aten.reshape.default"], "Inductor changes the graph that it is given"
    for variant in json.loads(files["sites.json"].read_text())["graphs"][0]["variants"]:
        (compiled,) = variant["compiled"]
        assert "def call(" in Path(compiled["inductor_code"]).read_text() and compiled["seconds"] > 0
        assert compiled["inductor_code"] in files["README.md"].read_text()


def test_a_drawing_has_a_box_per_site(tmp_path):
    model = randomize(Stack(28), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
    run_steps(model, 2)
    files = dumped(model, tmp_path)
    texts = {stage: files[f"graph_0/{stage}.dot"].read_text() for stage in ("captured", "guarded", "variant_1")}
    boxes = {stage: len(re.findall(r"^ +n\d+ \[", text, re.MULTILINE)) for stage, text in texts.items()}
    nodes = len(compiled_forward(model).session.programs[0].builder.captured.graph.nodes)
    assert boxes["captured"] < nodes / 5
    for stage, text in texts.items():
        assert text.count("{") == text.count("}")
        assert text.count("subgraph cluster_") == 56, stage
        assert set(re.findall(r"n\d+(?= ->)|(?<=-> )n\d+", text)) <= set(re.findall(r"n\d+(?= \[)", text))
    assert texts["guarded"].count("shape=diamond") == texts["guarded"].count("shape=cylinder") == 56
    assert 'label="blocks.27.mlp"' in texts["captured"] and "shape=diamond" not in texts["captured"]
    assert "fontcolor=white" not in texts["variant_1"], "a reused branch is not in the graph"


def test_graphviz_draws_where_it_is_installed(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "<svg/>" > "$4"\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(1, {}), backend="eager")
    run_steps(model, 1)
    files = dumped(model, tmp_path / "graphs")
    assert "graph_0/captured.svg" in files and all(path.exists() for path in files.values())
    program.write_text("#!/bin/sh\nexit 1\n")
    assert not [name for name in dumped(model, tmp_path / "again") if name.endswith("svg")]


def test_graphs_of_a_broken_model_each_have_a_folder(tmp_path):
    model = randomize(Stack(2, broken=True), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
    run_steps(model, 2)
    files = dumped(model, tmp_path)
    programs = compiled_forward(model).session.programs
    assert f"graph_{len(programs) - 1}/guarded.py" in files
    assert sum(len(graph["places"]) for graph in json.loads(files["sites.json"].read_text())["graphs"]) == 2
    assert any(program.graph_break for program in programs) == ("Dynamo ended it" in files["README.md"].read_text())


def test_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOOTHCACHE_DUMP", str(tmp_path))
    models = [randomize(Stack(1), 0).eval() for _ in range(2)]
    for model in models:
        smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
    run_steps(models[0], 1)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("Stack") and not (folder / "graph_0/variant_1.py").exists()
    run_steps(models[0], 1)
    assert (folder / "graph_0/variant_1.py").exists()
    before = (folder / "README.md").stat().st_mtime_ns
    run_steps(models[0], 2)
    assert (folder / "README.md").stat().st_mtime_ns == before, "nothing new"
    run_steps(models[1], 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_graphs_are_there_where_the_inner_compiler_fails(tmp_path, monkeypatch):
    """Whatever it raises: what this package can do something about, and what ends the run."""
    monkeypatch.setenv("SMOOTHCACHE_DUMP", str(tmp_path))

    def fail(gm, inputs):
        raise MemoryError("no such room")

    monkeypatch.setattr("smoothcache_fx.capture._torch.named_backend", lambda name: fail)
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
    with pytest.raises(Exception, match="no such room"):
        run_steps(model, 1)
    (folder,) = tmp_path.iterdir()
    assert (folder / "graph_0/variant_0.py").exists()


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOOTHCACHE_DUMP", str(tmp_path / "file"))
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(1, {}), backend="eager")
    run_steps(model, 1)
    assert "the graphs cannot be written" in caplog.text


def test_diff(tmp_path, capsys):
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 1]}), backend="eager")
    run_steps(model, 2)
    files = dumped(model, tmp_path)
    before, after = (str(files[f"graph_0/{stage}.py"]) for stage in ("captured", "variant_1"))
    assert main(["diff", before, after]) == 0
    text = capsys.readouterr().out
    # QKV and the projection are gone; modulation and the feed-forward are left.
    assert re.search(r"aten\.addmm\.default +5 +3\n", text)
    assert re.search(r"^-        \w+ = torch\.ops\.aten\._scaled_dot_product", text, re.MULTILINE)
    assert re.search(r"^\+        cache_0,", text, re.MULTILINE)
    assert main(["diff", before, str(files["sites.json"])]) == 1
    assert "holds no graph: expected a .py file" in capsys.readouterr().err
    assert main(["diff", before, str(tmp_path / "none.py")]) == 1


def test_passes_steps_and_variants_are_logged(caplog):
    model = randomize(Stack(1), 0).eval()
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0], "ffn": [1, 1]}), backend="eager")
    with caplog.at_level("DEBUG", logger="smoothcache_fx"):
        run_steps(model, 2)
    for line in (
        r"variant 1: 1 of 2 sites are computed",
        r"variant 1: specialize: \d+ nodes -> \d+, \d+ ms",
        r"variant 1: compiled in \d+\.\d s",
        r"step 0, stream 0: computed 2 of 2",
        r"step 1, stream 0: computed 1 of 2",
    ):
        assert re.search(line, caplog.text), line


def test_pytorchs_trace_has_our_stages(tmp_path):
    script = """
        import torch
        import smoothcache_fx as smoothcache
        from helpers.capture import Stack, inputs

        model = Stack(1).eval()
        smoothcache.compile(model, smoothcache.Schedule(2, {"attn": [1, 0], "ffn": [1, 0]}), backend="eager")
        with torch.no_grad():
            model(*inputs()), model(*inputs())
    """
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (trace,) = tmp_path.iterdir()
    text = trace.read_text()
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"name": "smoothcache_' in line]
    names = [record["artifact"]["name"] for record in found]
    assert names == ["smoothcache_guarded", "smoothcache_variant_0", "smoothcache_variant_1"]
    assert all((record["frame_id"], record["frame_compile_id"]) == (0, 0) for record in found)
    assert "cache of blocks.0.mlp" in text
