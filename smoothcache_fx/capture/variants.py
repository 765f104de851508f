"""The graph side of a program: makes, checks and compiles the variants of one captured graph."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..graphs.python_code import as_python, notes
from ..passes.facts import tensor_value
from ..passes.flops import count_flops
from ..passes.forecast import holds_differences
from ..passes.guard import CACHE, SITE, SLOT, insert_guards
from ..passes.lowering import lowering_for
from ..passes.pipeline import Target, run_pass, run_passes
from ..passes.rewriting import copy_graph, placeholders, with_graph
from ..passes.simplify import simplify
from ..passes.sites import Site, find_sites_and_rejections, output_bytes
from ..passes.specialize import specialize, variant_inputs
from ..passes.stacks import Stack, as_site
from ..passes.verify import check_graph
from ..runtime.variant import Mask, Variant
from . import _inductor, _torch
from .inner import CompileVariant, InnerCompiler

log = logging.getLogger(__name__)


class GraphBuilder:
    """A captured graph, its sites, its guarded form and the variants made so far.

    Attributes:
        captured: the ATen graph as AOTAutograd gave it, without what does nothing.
        branches, rejections: what ``find_sites_and_rejections`` says of it.
        sites: what is cached: branches, and stacks of them.
        guarded: the guarded graph, with caches for forecasts of ``order``, all but the first in ``history_dtype`` where
            that is narrower.
        graphs: the variants' graphs by mask, before the inner compiler had them.
    """

    def __init__(
        self,
        captured: GraphModule,
        compile_variant: CompileVariant,
        inner: InnerCompiler,
        order: int = 0,
        history_dtype: str | None = None,
        stacks: Callable[[Graph, list[Site]], list[Stack]] = lambda graph, branches: [],
    ) -> None:
        start = time.perf_counter()
        captured = self.captured = run_pass("simplify", simplify, captured, "captured")
        self.branches, self.rejections = find_sites_and_rejections(captured.graph)
        found = stacks(captured.graph, self.branches)
        left = [site for site in self.branches if not any(site in stack.sites for stack in found)]
        self.sites = [*left, *(as_site(stack, left) for stack in found)]
        narrower = None if history_dtype is None else getattr(torch, history_dtype)
        guarded = insert_guards(captured, self.sites, order, narrower)
        self.guarded = check_graph(guarded, like=captured, stage="guarded")
        #: What became of variants that the inner compiler failed on.
        self.failures: dict[Mask, str] = {}
        self._compile_id = _torch.current_compile_id()
        self._trace("smoothcache_guarded", "A guard behind each site's output.", self.guarded)
        self.graphs: dict[Mask, GraphModule] = {}
        self.flops = count_flops(captured.graph)
        #: Caches of a site's output, for the values that its forecasts look back to.
        self.slots = order + 1
        self._compile_variant = compile_variant
        inputs = placeholders(captured.graph)
        self._input_values = [node.meta.get("val") for node in inputs]
        self._caches = [node for node in placeholders(self.guarded.graph) if CACHE in node.meta]
        #: Positions of the inputs that are symbolic sizes.
        self.shape_inputs = [i for i, value in enumerate(self._input_values) if isinstance(value, torch.SymInt)]
        self.size_inputs = self._size_inputs()
        self.shape_generic = inner.shape_generic or not self.shape_inputs
        self._inner = inner
        devices = {value.device.type for node in captured.graph.nodes if (value := tensor_value(node)) is not None}
        #: What of the variants goes to kernels of ours.
        self.lowering = lowering_for("cuda" if "cuda" in devices else "cpu", inner.optimizes)
        self._fake_mode = next((value.fake_mode for value in self._input_values if hasattr(value, "fake_mode")), None)
        self._conditions: list[Any] = []
        log.info(
            "%d nodes, %d sites, %d adds not taken, %.0f ms",
            len(captured.graph.nodes),
            len(self.sites),
            len(self.rejections),
            1e3 * (time.perf_counter() - start),
        )

    def _size_inputs(self) -> list[int]:
        """Symbolic inputs that are a size of a tensor input or of a cache.

        Others change from step to step and shape nothing: where a view begins in its storage, a number that the model
        is given.
        """
        tensors = (value for value in self._input_values if isinstance(value, torch.Tensor))
        caches = [node.meta["val"] for node in self._caches]
        sizes = [size for value in (*tensors, *caches) for size in value.shape]
        sizes += [stride for value in caches for stride in value.stride()]
        symbols = frozenset().union(*map(_torch.symbols_of, sizes))
        return [i for i in self.shape_inputs if _torch.symbols_of(self._input_values[i]) & symbols]

    def buffers_of(self, site: Site) -> tuple[int, ...]:
        """Positions of a site's cache buffers."""
        return tuple(node.meta[CACHE] for node in self._caches_of(site))

    def slot_bytes_of(self, site: Site) -> int:
        """Bytes of the site's outputs as the history keeps one of each; 0 without a history."""
        return sum(output_bytes(node) for node in self._caches_of(site) if node.meta[SLOT] == 1)

    def differences_of(self, site: Site) -> frozenset[int]:
        """Positions of those of a site's cache buffers that hold a difference of outputs."""
        caches = self._caches_of(site)
        newest = {node.meta[CACHE] - node.meta[SLOT]: node for node in caches if not node.meta[SLOT]}
        return frozenset(
            node.meta[CACHE]
            for node in caches
            if holds_differences(newest[node.meta[CACHE] - node.meta[SLOT]].meta["val"], node.meta["val"])
        )

    def _caches_of(self, site: Site) -> list[Node]:
        index = self.sites.index(site)
        return [node for node in self._caches if node.meta[SITE] == index]

    @property
    def buffer_count(self) -> int:
        return len(self._caches)

    def allocate(self, buffer: int, inputs: Sequence[Any]) -> torch.Tensor:
        """A cache buffer for inputs of these sizes; an ordinary tensor even where inference mode is on."""
        value = self._caches[buffer].meta["val"]
        symbols = self._symbols(inputs)
        shape, strides = (
            [_torch.symbol_value(size, symbols) for size in sizes] for sizes in (value.shape, value.stride())
        )
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    def size_of(self, buffer: int, inputs: Sequence[Any]) -> int:
        """Bytes of what ``allocate`` makes."""
        value = self._caches[buffer].meta["val"]
        symbols = self._symbols(inputs)
        return math.prod(_torch.symbol_value(size, symbols) for size in value.shape) * value.element_size()

    def coefficients(self, values: Sequence[float]) -> torch.Tensor:
        """The forecasts' coefficients, one per buffer, where the graph wants them."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.tensor(values, dtype=torch.float32, device=self._caches[0].meta["val"].device)

    def build(self, mask: Mask, inputs: Sequence[Any]) -> Variant:
        """Specialise the guarded graph to the mask and compile it."""
        graph = self.graph(mask)
        count, end = len(self._input_values), len(self._input_values) + self.buffer_count
        kept = variant_inputs(graph)
        variant = self._variant(graph)
        examples = [inputs[i] for i in variant.inputs] + [self.allocate(i, inputs) for i in variant.buffers]
        if variant.takes_coefficients:
            examples.append(self.coefficients([0.0] * self.buffer_count))
        start = time.perf_counter()
        with _torch.recording_guards(self._fake_mode if self.shape_inputs else None) as conditions:
            origin = [-1 if count <= i < end else i for i in kept]
            variant.run = self._compile(mask, graph, examples, origin) or variant.run
        self._conditions.extend(conditions)
        log.info("variant %d: compiled in %.1f s", list(self.graphs).index(mask), time.perf_counter() - start)
        return variant

    def _compile(
        self, mask: Mask, graph: GraphModule, examples: Sequence[Any], origin: Sequence[int]
    ) -> Callable[[list[Any]], Sequence[Any]] | None:
        """The variant's code. Where the compiler fails, code without the optional step that failed, or None."""
        settings: dict[str, Any] = {}
        while True:
            try:
                # Inductor changes the graph that it is given.
                return self._compile_variant(with_graph(graph, copy_graph(graph)[0]), examples, origin, settings)
            except Exception as error:
                if _inductor.is_of_the_machine(error):
                    raise
                more = {} if settings else self._inner.settings_to_switch_off(error)
                self._note_failure(mask, error, more)
                if not more:
                    return None
                settings = more

    def _note_failure(self, mask: Mask, error: Exception, settings: Mapping[str, Any]) -> None:
        """Say it once for all variants that fail alike."""
        if settings:
            done = f"is compiled with {', '.join(f'{name}={value}' for name, value in settings.items())}"
        else:
            done = "runs op by op: right, but slower"
        first_line = (str(error).strip() or "no message").splitlines()[0]
        what = f"the inner compiler failed ({type(error).__name__}: {first_line}): the variant {done}"
        if what not in self.failures.values():
            log.warning("%d of %d sites computed: %s", mask.compute.bit_count(), len(self.sites), what, exc_info=error)
        self.failures[mask] = what

    def build_uncompiled(self, mask: Mask) -> Variant:
        """The variant run node by node: for sizes that the compiled one does not hold for."""
        return self._variant(self.graph(mask))

    def _variant(self, graph: GraphModule) -> Variant:
        """A variant that runs its graph node by node."""
        count, end = len(self._input_values), len(self._input_values) + self.buffer_count
        kept = variant_inputs(graph)

        def run(arguments: list[Any]) -> Sequence[Any]:
            values = tuple(arguments)
            arguments.clear()
            return graph(*values)

        return Variant(
            run,
            inputs=tuple(i for i in kept if i < count),
            buffers=tuple(i - count for i in kept if count <= i < end),
            takes_coefficients=any(i >= end for i in kept),
            flops=count_flops(graph.graph),
        )

    def holds_for(self, inputs: Sequence[Any]) -> bool:
        """Whether what the compiler has assumed of symbolic sizes is true of these inputs."""
        if not self._conditions:
            return True
        symbols = self._symbols(inputs)
        return all(bool(condition.xreplace(symbols)) for condition in self._conditions)

    def graph(self, mask: Mask) -> GraphModule:
        """The variant's graph for a mask, compiled or not."""
        if mask not in self.graphs:
            sites = range(len(self.sites))
            chosen: dict[str, Any] = {
                "compute": {i for i in sites if mask.computes(i)},
                "store": {i for i in sites if mask.stores(i)},
                "orders": mask.orders,
            }
            name = f"variant {len(self.graphs)}"
            log.info("%s: %d of %d sites are computed", name, len(chosen["compute"]), len(sites))
            graph = run_pass("specialize", functools.partial(specialize, **chosen), self.guarded, name)
            reuses = len(chosen["compute"]) < len(sites)
            target = Target(self._inner.optimizes, self._inner.stores_products, self.lowering, reuses)
            graph = run_passes(graph, target, name)
            heading = f"{len(chosen['compute'])} of {len(sites)} sites are computed."
            self._trace(f"smoothcache_{name.replace(' ', '_')}", heading, graph)
            self.graphs[mask] = check_graph(graph, like=self.captured, stage="variant")
        return self.graphs[mask]

    def _trace(self, name: str, heading: str, gm: GraphModule) -> None:
        names = [site.name for site in self.sites]
        _torch.trace_artifact(name, lambda: as_python(heading, gm, notes(names)), self._compile_id)

    def _symbols(self, inputs: Sequence[Any]) -> dict[Any, int]:
        values: dict[Any, int] = {}
        if self.shape_inputs:
            for fake, real in zip(self._input_values, inputs, strict=True):
                _torch.bind_symbols(fake, real, values)
        return values
