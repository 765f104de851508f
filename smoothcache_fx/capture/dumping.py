"""The files that ``dump`` writes: graphs as Python and as drawings, sites and masks as JSON, and an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ..graphs.drawing import as_dot, draw
from ..graphs.python_code import CONSTANTS, as_python, constants_of, notes
from ..passes.flops import count_flops
from ..runtime.variant import Mask
from . import _inductor
from .program import Program
from .session import Session

INDEX = "README.md"
SITES = "sites.json"
_EXPLANATION = f"""\
Each `.py` file holds a module `Graph` that runs; its arguments are listed with what they are. Each `.dot` file is the
same graph for Graphviz (`dot -Tsvg file.dot -o file.svg`) with a box per site: blue is a branch, an orange diamond a
guard, a green cylinder a cache. What a pass has changed:
`python -m smoothcache_fx diff graph_0/captured.py graph_0/variant_1.py`.

- `captured`: as AOTAutograd gave it.
- `guarded`: with a guard behind each site's output, which computes and stores, or reads the cache.
- `variant_N`: guards resolved for one decision, dead code gone: what the inner compiler got.
- [`{SITES}`]({SITES}): sites, masks, FLOPs, and where Inductor's code lies, which is also named below.
""".splitlines()


@dataclass(frozen=True)
class Stage:
    """One form of a captured graph: its file's name, what it is in a sentence, and for a variant its mask."""

    name: str
    heading: str
    graph: GraphModule
    mask: Mask | None = None


def write_session(session: Session, model: str, directory: Path) -> list[Path]:
    """Write all that is known of a compiled model's graphs; returns the files, the index first."""
    written: list[Path] = []
    described = []
    for position, program in enumerate(session.programs):
        folder = directory / f"graph_{position}"
        folder.mkdir(parents=True, exist_ok=True)
        stages = list(_stages(program))
        written += _write_stages(program, stages, folder)
        described.append(_describe(program, stages))
    sites = directory / SITES
    sites.write_text(json.dumps({"model": model, "graphs": described}, indent=2) + "\n", encoding="utf-8")
    index = directory / INDEX
    index.write_text(_index(model, described), encoding="utf-8")
    return [index, sites, *written]


def _write_stages(program: Program, stages: Sequence[Stage], folder: Path) -> list[Path]:
    written = []
    names = _names(program)
    constants = constants_of(program.builder.captured)
    if constants:
        written.append(folder / CONSTANTS)
        torch.save(constants, written[-1])
    for stage in stages:
        python, dot = folder / f"{stage.name}.py", folder / f"{stage.name}.dot"
        python.write_text(as_python(stage.heading, stage.graph, notes(names)), encoding="utf-8")
        title = f"{stage.name}: {stage.heading.splitlines()[0]}"
        dot.write_text(as_dot(title, stage.graph, program.builder.sites, names), encoding="utf-8")
        written += [python, dot]
        if (picture := draw(dot)) is not None:
            written.append(picture)
    return written


def _names(program: Program) -> list[str]:
    """The sites' names at the first place where the program runs."""
    if program.bindings:
        return [site.name for site in program.bindings[0].sites]
    return [site.name for site in program.builder.sites]


def _stages(program: Program) -> Iterator[Stage]:
    builder, names = program.builder, _names(program)
    yield Stage("captured", "The graph as AOTAutograd captured it.", builder.captured)
    listed = ", ".join(names) or "none"
    yield Stage("guarded", f"A guard behind each site's output.\n\nSites in order: {listed}.", builder.guarded)
    for index, (mask, graph) in enumerate(builder.graphs.items()):
        computed, reused = _split(names, mask)
        heading = f"{len(computed)} sites computed, {len(reused)} reused.\n\n"
        heading += f"Computed: {', '.join(computed) or 'none'}.\nReused: {', '.join(reused) or 'none'}."
        yield Stage(f"variant_{index}", heading, graph, mask)


def _split(names: Sequence[str], mask: Mask) -> tuple[list[str], list[str]]:
    computed = [name for i, name in enumerate(names) if mask.computes(i)]
    return computed, [name for i, name in enumerate(names) if not mask.computes(i)]


def _describe(program: Program, stages: Sequence[Stage]) -> dict[str, Any]:
    """A graph's part of ``sites.json``."""
    builder = program.builder
    variants = []
    for stage in stages:
        if stage.mask is None:
            continue
        computed, reused = _split(_names(program), stage.mask)
        variants.append(
            {
                "file": f"{stage.name}.py",
                "computed": computed,
                "reused": reused,
                "flops": count_flops(stage.graph.graph),
                "compiled": [
                    {"seconds": variant.seconds, "inductor_code": _inductor.code_path(variant.run)}
                    for key, variant in program.dispatcher.variants.items()
                    if key == stage.mask or (isinstance(key, tuple) and key[0] == stage.mask)
                ],
            }
        )
    return {
        "flops": builder.flops,
        "graph_break": program.graph_break,
        "places": [
            [
                {
                    "name": site.name,
                    "group": site.group,
                    "kind": site.kind,
                    "flops": site.flops,
                    "cache_bytes": site.cache_bytes,
                }
                for site in binding.sites
            ]
            for binding in program.bindings
        ],
        "variants": variants,
    }


def _index(model: str, described: Sequence[dict[str, Any]]) -> str:
    lines = [f"# Graphs of {model}", "", *_EXPLANATION]
    for position, graph in enumerate(described):
        places = graph["places"]
        sites = len(places[0]) if places else 0
        lines += ["", f"## graph_{position}", "", f"{sites} sites; places where it runs: {len(places)}."]
        if graph["graph_break"]:
            reason, place = graph["graph_break"]
            lines.append(f"Dynamo ended it at {place}: {reason}")
        lines.append("")
        for variant in graph["variants"]:
            stem, share = variant["file"].removesuffix(".py"), variant["flops"] / max(1, graph["flops"])
            counts = f"{len(variant['computed'])} sites computed, {len(variant['reused'])} reused"
            paths = [compiled["inductor_code"] for compiled in variant["compiled"] if compiled["inductor_code"]]
            lines.append("; ".join([f"- `{stem}`: {counts}, {share:.1%} of the FLOPs", *(f"`{p}`" for p in paths)]))
    return "\n".join(lines) + "\n"
