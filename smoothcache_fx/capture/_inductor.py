"""The semi-private parts of Inductor that this package uses. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
import torch.compiler.config
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config as inductor_config
from torch._inductor.output_code import OutputCode
from torch.fx import Graph, GraphModule, Node
from torch.utils._ordered_set import OrderedSet

InnerCompile = Callable[..., Any]

#: Changes whenever ``CapturedGraph`` does, so that no entry of an older one is read.
CACHE_KEY_TAG = "smoothcache_fx captured graph 2"
# What a graph's nodes are known by later on; the rest of their metadata holds on to what cannot be pickled.
_KEPT_METADATA = (
    *("val", "tensor_meta", "desc", "stack_trace", "nn_module_stack", "original_aten"),
    *("user_visible_output_idxs", "output_stack_traces", "mutation_region_id"),
)
# Settings that are given when a graph is captured and not when it is read from disk: left out, since all settings are
# part of the key of Inductor's own cache. Their defaults are what they are given as.
_NOT_SETTLED = ("is_backward", "get_decomp_fn")
#: Optional steps of Inductor by the file that they are in, with the settings that switch them off. Where one of these
#: files is in a traceback, code without the step can still be had.
_OPTIONAL = {
    "tiling_utils.py": {"triton.coalesce_tiling_analysis": False},
    "pad_mm.py": {"shape_padding": False},
    "b2b_gemm.py": {"b2b_gemm_pass": False},
    "group_batch_fusion.py": {"group_fusion": False, "batch_fusion": False},
    "combo_kernel.py": {"combo_kernels": False},
    "triton_combo_kernel.py": {"combo_kernels": False},
    "select_algorithm.py": {"max_autotune": False, "max_autotune_gemm": False, "max_autotune_pointwise": False},
    "loop_body.py": {"loop_ordering_after_fusion": False},
    "memory.py": {"reorder_for_peak_memory": False},
}
_inner_compile: ContextVar[InnerCompile] = ContextVar("_inner_compile")


def patches_of(mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> dict[str, Any]:
    """Inductor's settings for a ``mode`` and ``options`` of ``torch.compile``, validated by it."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, dynamic).config)


def uses_cuda_graphs(patches: dict[str, Any]) -> bool:
    """Whether Inductor, with these settings, records CUDA graphs of what it compiles."""
    return bool(patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def takes_products_as_they_are(patches: dict[str, Any]) -> bool:
    """Whether Inductor, with these settings, calls the library for matrix products, from Python.

    Where it autotunes its own kernels for them, a given output would prevent that.
    """
    with inductor_config.patch(patches):
        return not (inductor_config.max_autotune or inductor_config.max_autotune_gemm or inductor_config.cpp_wrapper)


class CapturedGraph(OutputCode):
    """What AOTAutograd gets for Inductor's code of a graph, and keeps on disk: the captured graph.

    A plain ``torch.compile`` of the same model leaves finished code there. Under a key of their own
    (``CACHE_KEY_TAG``) entries of this class spare another process the tracing, whatever its schedule is. Its variants'
    code comes from Inductor's own cache.
    """

    def __init__(self, captured: GraphModule, settings: dict[str, Any]) -> None:
        self.captured: GraphModule | None = captured
        self.settings = settings
        self.run: Callable[[list[Any]], Sequence[Any]] | None = None
        self._boxed_call = True
        self._pickled = b""

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return self.run(cast(list, inputs))

    def prepare_for_serialization(self) -> None:
        """Called on a copy of what goes on running. Sizes that are symbols belong to one process: not kept."""
        from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
        from torch.fx._graph_pickler import GraphPickler, Options

        if any(isinstance(node.meta.get("val"), torch.SymInt) for node in self.captured.graph.nodes):
            raise BypassAOTAutogradCache("symbolic sizes")
        options = Options(ops_filter=None, node_metadata_key_filter=None)
        try:
            self._pickled = GraphPickler.dumps(_bare_copy(self.captured), options)
        except Exception as error:  # whatever the objects in a graph raise
            raise BypassAOTAutogradCache(f"the captured graph cannot be pickled: {error}") from error
        self.captured = self.run = None
        self.settings = {key: self.settings[key] for key in ("static_input_idxs", "is_inference")}

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, settings: Any) -> None:
        """Called on what was read from disk."""
        from torch.fx._graph_pickler import GraphPickler

        self.captured = GraphPickler.loads(self._pickled, detect_fake_mode(example_inputs))
        self.captured.recompile()
        self.settings = {**settings, **self.settings}
        self.compile(example_inputs)

    def compile(self, example_inputs: Sequence[Any]) -> None:
        settings = {key: value for key, value in self.settings.items() if key not in _NOT_SETTLED}
        self.run = _inner_compile.get()(self.captured, example_inputs, **settings)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """The variants' kernels are in Inductor's own cache."""


def _bare_copy(captured: GraphModule) -> GraphModule:
    """A copy with the metadata that can be pickled; of the stack of modules it has the paths alone."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in captured.graph.nodes:
        copy = mapping[node] = graph.node_copy(node, mapping.__getitem__)
        copy.meta = {key: value for key, value in node.meta.items() if key in _KEPT_METADATA}
        if stack := copy.meta.get("nn_module_stack"):
            copy.meta["nn_module_stack"] = {key: (path, None) for key, (path, _) in stack.items()}
    return GraphModule(captured, graph)


def capture(gm: GraphModule, inputs: Sequence[Any], inner_compile: InnerCompile, patches: dict[str, Any]) -> Any:
    """Inductor's front half: ``inner_compile(gm, inputs, **settings)`` gets the functional ATen graph."""
    from torch._inductor.compile_fx import compile_fx

    def captured(graph: GraphModule, example_inputs: Sequence[Any], **settings: Any) -> CapturedGraph:
        code = CapturedGraph(graph, settings)
        code.compile(example_inputs)
        return code

    with functorch_config.patch(bundled_autograd_cache=True), _tagged(CACHE_KEY_TAG), _during(inner_compile):
        return compile_fx(gm, inputs, inner_compile=captured, config_patches=patches)


def _tagged(tag: str) -> AbstractContextManager[None]:
    """What is written to the disk, or read from it, belongs to this tag."""
    config: Any = torch.compiler.config  # its patch is made at run time
    return config.patch(cache_key_tag=f"{config.cache_key_tag} {tag}")


@functools.cache
def _schemas() -> str:
    """Of our ops. Inductor's key for code has their names alone, and so would find code for an older version's."""
    schemas = torch._C._jit_get_all_schemas()
    return "; ".join(sorted(str(schema) for schema in schemas if schema.name.startswith("smoothcache::")))


@contextlib.contextmanager
def _during(inner_compile: InnerCompile) -> Iterator[None]:
    token = _inner_compile.set(inner_compile)
    try:
        yield
    finally:
        _inner_compile.reset(token)


@functools.cache
def _register_lowerings() -> None:
    """Have Inductor call the library for ``smoothcache::matmul_store``: a custom op would go through Python."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    class MatmulStore(ir.ExternKernel):
        """``cache <- left @ right + bias``."""

        def __init__(self, left: ir.IRNode, right: ir.IRNode, bias: ir.IRNode | None, cache: ir.IRNode) -> None:
            operands = (cache, left, right, *(() if bias is None else (bias,)))
            tensors = [self.realize_input(one) for one in operands]
            super().__init__(None, ir.NoneLayout(device=cache.get_device()), self.unwrap_storage(tensors))
            V.graph.mark_buffer_mutated(self.input_name(0))
            self.name = V.graph.register_buffer(self)
            V.graph.register_operation(self)

        def codegen(self, wrapper: Any) -> None:
            cache, *operands = (cast(Any, one).codegen_reference() for one in self.inputs)
            kernel = "mm" if len(operands) == 2 else "addmm"
            operands = [*operands[2:], *operands[:2]]
            wrapper.writeline(f"extern_kernels.{kernel}({', '.join(operands)}, out={cache})")

        def should_allocate(self) -> bool:
            return False

        def get_mutation_names(self) -> list[str]:
            return [self.input_name(0)]

        def get_unbacked_symbol_defs(self) -> OrderedSet[Any]:
            return OrderedSet()

    @register_lowering(torch.ops.smoothcache.matmul_store.default, type_promotion_kind=None)
    def matmul_store(left: ir.IRNode, right: ir.IRNode, bias: ir.IRNode | None, cache: ir.IRNode) -> None:
        MatmulStore(left, right, bias, cache)


def compile(
    gm: GraphModule, fake_inputs: Sequence[Any], settings: dict[str, Any], patches: dict[str, Any]
) -> Callable[[list[Any]], Sequence[Any]]:
    """Inductor's back half for one graph, outside of any capture: a callable that takes one list.

    The tracing context is a fresh one: Inductor notes the strides of the outputs in it, once per graph.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    _register_lowerings()
    settings = dict(settings)
    cudagraphs = settings.get("cudagraphs")
    # Compiling may switch CUDA graphs off for one variant; the others keep them.
    settings["cudagraphs"] = None if cudagraphs is None else BoxedBool(bool(cudagraphs))
    fake_mode = detect_fake_mode(fake_inputs)
    with (
        inductor_config.patch(patches),
        _tagged(_schemas()),
        tracing(TracingContext(fake_mode)),
        V.set_fake_mode(fake_mode),
        torch.no_grad(),
    ):
        return compile_fx_inner(gm, fake_inputs, **settings)


def settings_to_switch_off(error: BaseException) -> dict[str, Any]:
    """Settings without which the code would not have run that raised the error; empty where that is none optional."""
    files = {
        Path(frame.f_code.co_filename).name
        for one in causes(error)
        for frame, _ in traceback.walk_tb(one.__traceback__)
        if "_inductor" in Path(frame.f_code.co_filename).parts
    }
    return {name: value for file in files & _OPTIONAL.keys() for name, value in _OPTIONAL[file].items()}


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from or while handling, the last one first."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            pending += [one.__cause__, one.__context__, getattr(one, "inner_exception", None)]


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the error says that memory, a compiler or Triton is missing: no other code would help."""
    from torch._inductor import exc

    missing = tuple(
        getattr(exc, name)
        for name in ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton")
        if hasattr(exc, name)
    )
    return any(isinstance(one, (MemoryError, torch.OutOfMemoryError, *missing)) for one in causes(error))


def code_path(run: Callable[..., Any]) -> str | None:
    """Where the Python code lies that Inductor made for a compiled graph; None for other compilers' code."""
    from torch._inductor.codecache import get_path

    key = getattr(inspect.unwrap(run), "cache_key", None)
    path = Path(get_path(key, "py")[2]) if isinstance(key, str) else None
    return str(path) if path is not None and path.exists() else None


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor finds, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return None


def cache_directory() -> str:
    """Where Inductor keeps compiled code; it is made if it is not there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
