"""The passes between a specialized variant and its compiler, in their order.

A pass takes a graph module and returns one; it leaves the one that it was given as it is. To add one of your own, put a
``Pass`` into ``PASSES``, where it is to run::

    from smoothcache_fx.passes.pipeline import PASSES, Pass

    PASSES.append(Pass("count_adds", lambda gm, target: count_adds(gm), lambda target: target.optimizes))

Each pass runs in a ``GraphTransformObserver``: a name in ``torch._inductor.config.disabled_passes`` is left
out. PyTorch looks for the name anywhere in that string, so no name is part of another.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from .fuse import fuse
from .fuse_norms import fuse_norms
from .group import group_linears
from .lowering import Lowering
from .merge_equal import merge_equal
from .narrow import narrow
from .store_products import store_products

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a variant is compiled for.

    Attributes:
        optimizes: whether the compiler fuses and picks kernels by itself, and so rounds otherwise than the ops alone.
        stores_products: whether it takes products that write where they are told.
        lowering: what goes to kernels of this package; None leaves all to the compiler.
        reuses: whether the variant reuses any branch.
    """

    optimizes: bool
    stores_products: bool
    lowering: Lowering | None
    reuses: bool


@dataclass(frozen=True)
class Pass:
    """One pass by name: what it does to a graph for a target, and for which targets it runs."""

    name: str
    run: Callable[[GraphModule, Target], GraphModule]
    applies: Callable[[Target], bool]


def _fuses_norms(target: Target) -> bool:
    return target.lowering is not None and target.lowering.norms


def _groups(target: Target) -> bool:
    """With everything computed the conditioning is a small part of the work."""
    return target.lowering is not None and target.lowering.groups and target.reuses


PASSES = [
    # A narrower product may be summed in another order.
    Pass("narrow", lambda gm, target: narrow(gm), lambda target: target.optimizes),
    Pass("fuse_adds", lambda gm, target: fuse(gm, target.lowering), lambda target: target.lowering is not None),
    Pass("fuse_norms", lambda gm, target: fuse_norms(gm), _fuses_norms),
    Pass("merge_equal", lambda gm, target: merge_equal(gm), _groups),
    Pass("group_linears", lambda gm, target: group_linears(gm), _groups),
    Pass("store_products", lambda gm, target: store_products(gm), lambda target: target.stores_products),
]


def run_passes(gm: GraphModule, target: Target, label: str) -> GraphModule:
    """The graph after all passes for a target; ``label`` names it in the log."""
    for one in PASSES:
        if one.applies(target):
            gm = run_pass(one.name, functools.partial(_run_for, one, target), gm, label)
    return gm


def _run_for(one: Pass, target: Target, gm: GraphModule) -> GraphModule:
    return one.run(gm, target)


def run_pass(name: str, run: Callable[[GraphModule], GraphModule], gm: GraphModule, label: str) -> GraphModule:
    """One pass, observed and timed; the graph itself where the pass is disabled."""
    start = time.perf_counter()
    result = GraphTransformObserver(gm, name, subsystem="smoothcache").apply_gm_pass(run)
    if result is None:
        log.info("%s: %s is disabled", label, name)
        return gm
    seconds = time.perf_counter() - start
    counts = len(gm.graph.nodes), len(result.graph.nodes)
    log.info("%s: %s: %d nodes -> %d, %.0f ms", label, name, *counts, 1e3 * seconds)
    return result
