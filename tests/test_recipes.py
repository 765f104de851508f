"""docs/recipes.md: its code needs weights of a hub, so what it calls is checked against what there is."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest

import smoothcache_fx as smoothcache

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def bind(function: Any, call: ast.Call, bound: bool = False) -> None:
    """Raises ``TypeError`` where the function does not take what the call gives."""
    given = [None] * (len(call.args) + bound)
    inspect.signature(function).bind(*given, **{keyword.arg: None for keyword in call.keywords})


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_it_calls_what_there_is(block):
    tree = ast.parse(block)
    pipelines = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "diffusers"
        for alias in node.names
    ]
    checked = 0
    for name, call in calls(tree):
        if name.startswith("smoothcache."):
            function = smoothcache
            for part in name.split(".")[1:]:
                function = getattr(function, part)
            bind(function, call)
            checked += 1
        elif name == "calibration.schedule":
            bind(smoothcache.Calibration.schedule, call, bound=True)
        elif name == "pipe":
            (pipeline,) = pipelines
            bind(getattr(diffusers, pipeline).__call__, call, bound=True)
    assert checked


def test_the_table_is_what_the_bench_wrote():
    models = json.loads((ROOT / "bench/results/memory.json").read_text(encoding="utf-8"))["models"]
    rows = []
    for name, one in models.items():
        branches, stacks = one["cache_bytes"]["branch"].values(), one["cache_bytes"]["stack"].values()
        sizes = [f"{size / 2**30:.2f}" for size in branches] + [f"{size / 2**30:.3f}" for size in stacks]
        rows.append(f"| {name} | {one['size']} | {one['weight_bytes'] / 2**30:.1f} | {' | '.join(sizes)} |")
    missing = [row for row in rows if row not in PAGE.splitlines()]
    assert not missing, "write into docs/recipes.md:\n" + "\n".join(missing)


def test_every_model_has_two_values_of_order_one_and_the_mac_ratio_of_the_page():
    models = json.loads((ROOT / "bench/results/memory.json").read_text(encoding="utf-8"))["models"]
    for one in models.values():
        assert f"{one['mac_ratio']:.2f}" == "2.00"
        for sizes in one["cache_bytes"].values():
            assert sizes["1"] == 2 * sizes["0"]
