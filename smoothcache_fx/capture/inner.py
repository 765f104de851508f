"""Inner compilers: what captures a frame's ATen graph, and what compiles each variant of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from ..errors import CompiledError
from ..passes.mutation import read_and_written
from . import _inductor, _torch
from .cuda_graphs import Boxed, may_run_twice, recorded_at_once

#: Gets the ATen graph and a function that compiles a variant of it; returns a callable that takes one list.
Transform = Callable[[GraphModule, "CompileVariant"], Callable[[list[Any]], Sequence[Any]]]


class CompileVariant(Protocol):
    """Compiles one graph.

    ``inputs`` are real. ``origin`` says for each of them which of the captured graph's inputs it is, or -1 for a cache
    buffer, which keeps its address. ``settings`` are the compiler's own, beside those that it was made with.
    """

    def __call__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        origin: Sequence[int],
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Boxed: ...


class InnerCompiler(Protocol):
    #: Whether what it compiles for symbolic sizes serves all sizes (else each variant is compiled per shape).
    shape_generic: bool
    #: Whether it fuses kernels and picks them by itself, and so rounds otherwise than the ops one by one.
    optimizes: bool
    #: Whether it accepts products that write into a given buffer (``passes/store_products.py``).
    stores_products: bool
    #: Whether what it compiles may return tensors that its next call writes over.
    cuda_graphs: bool

    def capture(self, gm: GraphModule, inputs: Sequence[Any], transform: Transform) -> Callable[..., Any]: ...

    def settings_to_switch_off(self, error: BaseException) -> dict[str, Any]:
        """Settings of an optional step that this error comes from, so that it may be left out; empty if none."""


def refuse_training(gm: GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
    raise CompiledError(
        "a graph with gradients was captured, but caching is for inference: call the model under torch.no_grad() "
        "or torch.inference_mode()"
    )


class NamedCompiler:
    """Any registered Dynamo backend but Inductor: AOTAutograd captures, the backend compiles each variant."""

    optimizes = False
    stores_products = False

    def __init__(self, name: str, mode: str | None, options: dict[str, Any] | None) -> None:
        self.backend = _torch.named_backend(name)
        self.kwargs = {key: value for key, value in (("mode", mode), ("options", options)) if value is not None}
        self.shape_generic = name == "eager"
        self.cuda_graphs = name == "cudagraphs"

    def capture(self, gm: GraphModule, inputs: Sequence[Any], transform: Transform) -> Callable[..., Any]:
        def inference(captured: GraphModule, _: Sequence[Any]) -> Boxed:
            return transform(captured, self._compile)

        return _torch.aot_capture(gm, inputs, inference, refuse_training)

    def settings_to_switch_off(self, error: BaseException) -> dict[str, Any]:
        return {}

    def _compile(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        origin: Sequence[int],
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Boxed:
        with torch.no_grad(), _torch.without_dispatch_modes():
            compiled = self.backend(gm, list(inputs), **self.kwargs)

        def call(arguments: list[Any]) -> Sequence[Any]:
            values = tuple(arguments)
            arguments.clear()
            return compiled(*values)

        return call


class InductorCompiler:
    """Inductor: its front half captures, its back half compiles each variant with the caches as static inputs."""

    shape_generic = True
    optimizes = True

    def __init__(self, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> None:
        self.patches = _inductor.patches_of(mode, options, dynamic)
        self.cuda_graphs = _inductor.uses_cuda_graphs(self.patches)
        self.stores_products = _inductor.takes_products_as_they_are(self.patches)

    def capture(self, gm: GraphModule, inputs: Sequence[Any], transform: Transform) -> Callable[..., Any]:
        def inner_compile(captured: GraphModule, examples: Sequence[Any], **settings: Any) -> Boxed:
            if not settings.get("is_inference"):
                refuse_training(captured, examples)
            return transform(captured, functools.partial(self._compile, settings))

        return _inductor.capture(gm, inputs, inner_compile, self.patches)

    def settings_to_switch_off(self, error: BaseException) -> dict[str, Any]:
        return _inductor.settings_to_switch_off(error)

    def _compile(
        self,
        captured: dict[str, Any],
        gm: GraphModule,
        inputs: Sequence[Any],
        origin: Sequence[int],
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Boxed:
        fakes = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        # The captured graph's static inputs are its parameters; the variant's are these and every cache buffer.
        static = set(captured.get("static_input_idxs") or ())
        caches = [i for i, source in enumerate(origin) if source < 0]
        positions = [i for i, source in enumerate(origin) if source in static] + caches
        twice, moved = self.cuda_graphs and may_run_twice(gm, caches), read_and_written(gm)
        patches = {**self.patches, **settings}
        run = _inductor.compile(gm, fakes, {**captured, "static_input_idxs": positions}, patches)
        if not twice:
            return run
        return recorded_at_once(run, [i for i, fake in enumerate(fakes) if isinstance(fake, torch.SymInt)], moved)


def inner_compiler(
    backend: str, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None
) -> InnerCompiler:
    """The inner compiler for a backend's name, with ``torch.compile``'s own meaning of mode and options."""
    if not isinstance(backend, str):
        raise TypeError(f"backend is the name of an inner compiler, such as 'inductor' or 'eager'; got {backend!r}")
    if mode is not None and options is not None:
        raise ValueError("give either mode or options, not both: a mode is a set of options")
    if backend == "inductor":
        return InductorCompiler(mode, options, dynamic)
    if backend == "smoothcache":
        raise ValueError("the inner compiler cannot be 'smoothcache' itself; use 'inductor', 'aot_eager' or 'eager'")
    return NamedCompiler(backend, mode, options)
