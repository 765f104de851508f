"""The semi-private parts of PyTorch that this package uses, but Inductor's. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._dynamo.convert_frame
import torch._logging
from torch._dynamo import config as dynamo_config
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    ParamAOTInput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

#: Held by Dynamo while it compiles a frame.
compile_lock = torch._dynamo.convert_frame.compile_lock
#: Contexts that switch the ``__torch_function__`` of tensor subclasses off, and on again.
NoTorchFunction = torch._C.DisableTorchFunctionSubclass
TorchFunction = torch._C._EnableTorchFunction
MOST_GRAPHS = 1 << 16
InnerCompile = Callable[..., Any]
#: What Dynamo and its backends raise where a function cannot be compiled.
CompileError = torch._dynamo.exc.TorchDynamoException
#: Of these, what is raised where the backend failed; ``inner_exception`` is its own error.
BackendFailed = torch._dynamo.exc.BackendCompilerFailed


#: Of ops that wait for the device: Inductor keeps them out of CUDA graphs.
HOST_SYNC_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def current_compile_id() -> Any:
    """Which of Dynamo's compilations is going on, or None."""
    return torch._guards.CompileContext.current_compile_id()


def trace_artifact(name: str, text: Callable[[], str], compile_id: Any) -> None:
    """A text for ``TORCH_TRACE``, which tlparse shows with the compilation it belongs to; made only if wanted."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        compile_id=compile_id,
        expect_trace_id=False,
        record_logging_overhead=False,
    )


def dynamo_compile(
    forward: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    data_dependent_sizes: bool = False,
    guard_filter_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """``torch.compile`` whose recompiles count for this call alone: many models of a class do not exhaust the limit.

    ``torch.compile(isolate_recompiles=True)`` does that too, but identifies its regions by a number that all threads
    share (torch 2.13): of two models that run at once, one is captured anew at each call.

    With ``data_dependent_sizes`` the graph does not break where a size depends on data, as after ``nonzero``.
    ``guard_filter_fn`` is ``torch.compile``'s option of this name.
    """
    if guard_filter_fn is not None:
        options["options"] = {"guard_filter_fn": guard_filter_fn}
    # Frames behind a graph break have code that other calls share: Dynamo tells whose graphs are whose by the backend.
    backend = functools.partial(backend)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in torch 2.11
        options["recompile_limit"] = MOST_GRAPHS
    compiled = torch.compile(_with_own_code(forward), backend=backend, **options)
    if not data_dependent_sizes:
        return compiled
    settings = dynamo_config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with settings:
            return compiled(*args, **kwargs)

    return call


def refused_while_tracing(error: RuntimeError) -> bool:
    """Whether Dynamo refused a call because FX was tracing: it does not see that another thread was.

    Waits until nothing is being compiled. False if FX is tracing still, so that it is this thread.
    """
    if "symbolically trace a dynamo-optimized function" not in str(error):
        return False
    with compile_lock:
        return not torch.fx._symbolic_trace.is_fx_symbolic_tracing()


class _Lifted:
    """How many are inside of ``no_recompile_limit``, and the limits that the last one to leave restores."""

    count = 0
    limits = 0, 0


class _LiftedInThread(_Lifted, threading.local):
    pass


#: Dynamo's settings are each thread's own (torch 2.13) or the process's (torch 2.11).
_lifted = _LiftedInThread() if hasattr(dynamo_config, "_hash_dirty_var") else _Lifted()
_lifting = threading.Lock()


@contextlib.contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Inside, Dynamo captures a function anew as often as it must: a server meets any number of prompt lengths."""
    with _lifting:
        if not _lifted.count:
            _lifted.limits = dynamo_config.recompile_limit, dynamo_config.accumulated_recompile_limit
            dynamo_config.recompile_limit = dynamo_config.accumulated_recompile_limit = MOST_GRAPHS
        _lifted.count += 1
    try:
        yield
    finally:
        with _lifting:
            _lifted.count -= 1
            if not _lifted.count:
                dynamo_config.recompile_limit, dynamo_config.accumulated_recompile_limit = _lifted.limits


def _with_own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function or bound method with a copy of its code object: Dynamo counts recompiles per code object."""
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, types.FunctionType):
        return forward
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return types.MethodType(copy, forward.__self__) if hasattr(forward, "__self__") else copy


def named_backend(name: str) -> Callable[..., Any]:
    """A registered Dynamo backend. Raises ``torch._dynamo.exc.InvalidBackend`` for an unknown name."""
    return torch._dynamo.lookup_backend(name)


def aot_capture(gm: GraphModule, inputs: Sequence[Any], inference: InnerCompile, training: InnerCompile) -> Any:
    """AOTAutograd without decompositions: ``inference(gm, inputs)`` gets the functional ATen graph."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=training, inference_compiler=inference)(gm, inputs)


def without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Take the active dispatch modes off. AOTAutograd runs a graph's first call under one of its own."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


@contextlib.contextmanager
def recording_guards(fake_mode: FakeTensorMode | None) -> Iterator[list[Any]]:
    """Collect what compiling assumes about symbolic sizes, after Dynamo has already written its guards.

    A frozen shape environment would drop these assumptions. Yields a list of sympy conditions, filled at the end.
    """
    conditions: list[Any] = []
    shape_env = None if fake_mode is None else fake_mode.shape_env
    if shape_env is None:
        yield conditions
        return
    frozen, before = shape_env.frozen, len(shape_env.guards)
    shape_env.frozen = False
    try:
        yield conditions
    finally:
        shape_env.frozen = frozen
        conditions.extend(guard.expr for guard in shape_env.guards[before:])


def graph_break(gm: GraphModule) -> tuple[str, str] | None:
    """Why Dynamo ended a captured graph before its function did, and ``file.py:12 code`` where; None if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    first_line = reason.reason.strip().partition("\n")[0]
    if not reason.user_stack:
        return first_line, "an unknown line"
    frame = reason.user_stack[-1]
    return first_line, f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.line or ''}".strip()


def break_stack(gm: GraphModule) -> list[tuple[str, int]]:
    """File and line of the frames that led to where the graph broke, outermost first; empty if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return []
    return [(frame.filename, frame.lineno) for frame in reason.user_stack]


def dynamo_input_index(placeholder: Node) -> int | None:
    """Which of the captured frame's inputs an ATen graph's placeholder is (a part of), or None."""
    origin = placeholder.meta.get("desc")
    while isinstance(origin, SubclassGetAttrAOTInput):
        origin = origin.base
    return origin.idx if isinstance(origin, PlainAOTInput) else None


def source_path(placeholder: Node) -> str:
    """The dotted path by which the captured frame reached one of its inputs: ``blocks.0.attn.qkv.weight``.

    Read off Dynamo's expression for it, ``L['self']._modules['blocks']._modules['0']...``; a fallback where the
    module that the names are relative to is not known.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return str(placeholder.target)
    name = source.name() if callable(source.name) else source.name
    skipped = ("_modules", "_parameters", "_buffers", "__dict__")
    return ".".join(part for part in re.findall(r"\w+", name)[2:] if part not in skipped)


def own_parameter_name(placeholder: Node) -> str | None:
    """The name of a parameter or buffer that the captured module holds itself, or None."""
    origin = placeholder.meta.get("desc")
    return origin.target if isinstance(origin, (ParamAOTInput, BufferAOTInput)) else None


def symbol_value(size: Any, values: dict[Any, int]) -> int:
    """An int for a size of a captured graph, given the values of its symbols."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr.xreplace(values))
    return int(size)


def symbols_of(size: Any) -> frozenset[Any]:
    """The symbols that a size of a captured graph consists of; none of a number."""
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


def bind_symbols(fake: Any, real: Any, values: dict[Any, int]) -> None:
    """Note the values of the symbols that one input's sizes (or the input itself, a size) consist of."""
    if isinstance(fake, torch.SymInt):
        pairs = [(fake, real)]
    elif isinstance(fake, torch.Tensor):
        pairs = list(zip(cast(Any, fake.shape), real.shape, strict=True))
    else:
        return
    for symbolic, size in pairs:
        if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
            values[symbolic.node.expr] = int(size)
