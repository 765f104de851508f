"""Modules kept whole: where the graph breaks inside of a module, the module can be one op in the graph around it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from ..errors import CompiledError
from . import _torch
from .eager_work import flop_counter

aten = torch.ops.aten

# By the number that stands for a module in graphs. Whoever compiles for it holds it.
_modules: weakref.WeakValueDictionary[int, WholeModule] = weakref.WeakValueDictionary()
_numbers = itertools.count()
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class WholeModule:
    """A module that stands as one op in graphs, and runs as it is, uncompiled, where the op runs.

    Attributes:
        name: in the model.
        module, forward: the module, and its own forward.
        arguments: by position and by keyword: numbers, strings and None as they are, tensors as ``...``.
        flops, elements: of the call that was recorded: its work, and the elements of its first tensor.
        columns, grows, dtype: of the output: its last dimension, whether it follows on all of the first tensor's (an
            embedding's) or stands in place of their last, and its type.
        keys: which tensor attention's keys are computed from; -1 without attention.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forward: Callable[..., Any],
        *,
        arguments: Arguments,
        flops: int,
        elements: int,
        dimensions: int,
        output: Tensor,
        keys: int,
    ) -> None:
        self.name = name
        self.module = module
        self.forward = forward
        self.arguments = arguments
        self.flops = flops
        self.elements = elements
        self.columns = output.shape[-1]
        self.grows = output.ndim > dimensions
        self.dtype = output.dtype
        self.keys = keys
        self.number = next(_numbers)
        _modules[self.number] = self

    def stand_in(self) -> Callable[..., Any]:
        """What takes the forward's place while the model's is captured and runs."""
        module, forward, arguments, number = self.module, self.forward, self.arguments, self.number
        keys = self.keys

        def whole(*args: Any, **kwargs: Any) -> Any:
            if not _plain(args, kwargs) or _arguments(args, kwargs) != arguments:
                return forward(*args, **kwargs)
            inputs = _tensors(args, kwargs)
            if torch.is_autocast_enabled(inputs[0].device.type):
                return forward(*args, **kwargs)
            return whole_module(inputs, list(module.parameters()), number, keys)

        return whole

    def shape_for(self, first: Tensor) -> list[Any]:
        """The output's shape for a first tensor."""
        return [*(first.shape if self.grows else first.shape[:-1]), self.columns]

    def run(self, inputs: list[Tensor]) -> Tensor:
        rest = iter(inputs)
        positional, named = self.arguments
        args = [next(rest) if value is ... else value for value in positional]
        kwargs = {name: next(rest) if value is ... else value for name, value in named.items()}
        with _torch.TorchFunction():  # the graph that this is an op of runs without
            output = self.forward(*args, **kwargs)
        expected = self.shape_for(inputs[0])
        if not isinstance(output, Tensor) or (list(output.shape), output.dtype) != (expected, self.dtype):
            got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise CompiledError(
                f"{self.name} gave {got}, expected as at first {self.dtype} {expected}. Call "
                "smoothcache.remove(model), and compile it anew for such inputs"
            )
        shared = _shares(output, (*inputs, *self.module.parameters()))
        return output.clone(memory_format=torch.contiguous_format) if shared else output.contiguous()


@torch.library.custom_op("smoothcache::whole_module", mutates_args=(), tags=_torch.HOST_SYNC_TAGS)
def whole_module(inputs: list[Tensor], weights: list[Tensor], number: int, keys: int) -> Tensor:
    """The output of the module that ``number`` stands for.

    ``weights`` are its parameters: they tell where in the model it is. ``keys`` is for the passes.
    """
    return _modules[number].run(inputs)


@whole_module.register_fake
def _(inputs: list[Tensor], weights: list[Tensor], number: int, keys: int) -> Tensor:
    if not inputs[0].is_meta and not isinstance(inputs[0], FakeTensor):
        # Offloaded weights are on the meta device between calls, and the op is dispatched by them.
        return _modules[number].run(inputs)
    module = _modules[number]
    return inputs[0].new_empty(module.shape_for(inputs[0]), dtype=module.dtype)


@register_flop_formula(torch.ops.smoothcache.whole_module)
def _flops(inputs: list[Any], weights: list[Any], number: int, keys: int, *rest: Any, **more: Any) -> int:
    module, (first, *_) = _modules[number], inputs
    return module.flops * torch.Size(first).numel() // max(1, module.elements)


def _plain(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether all arguments are tensors or constants."""
    return all(
        value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in (*args, *kwargs.values())
    )


def _arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Arguments:
    return (
        tuple(... if isinstance(value, Tensor) else value for value in args),
        {name: ... if isinstance(value, Tensor) else value for name, value in kwargs.items()},
    )


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _follows(output: Any, first: Tensor) -> bool:
    """Whether the output is a tensor with a row for each of the first input's, or for each of its elements."""
    if not isinstance(output, Tensor) or not output.ndim or output.device != first.device:
        return False
    return output.shape[:-1] in (first.shape[:-1], first.shape)


def _shares(output: Tensor, inputs: Iterable[Tensor]) -> bool:
    return any(output.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() for value in inputs)


class WholeModules:
    """The modules of a model that are kept whole; ``with`` it, their stand-ins are in place."""

    def __init__(self, modules: Collection[WholeModule]) -> None:
        self.modules = modules
        self.names = [module.name for module in modules]
        self._stand_ins = [(module.module, module.stand_in()) for module in modules]
        self._inside: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        self._inside = contextlib.ExitStack()
        for module, stand_in in self._stand_ins:
            self._inside.callback(_put(module, stand_in))

    def __exit__(self, *exception: object) -> None:
        if self._inside is not None:
            self._inside.close()


def _put(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put a forward in a module's place; returns what undoes that. Hooks have put theirs on the instance, too."""
    own = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    return undo


def record(
    root: nn.Module, stacks: Iterable[Sequence[tuple[str, int]]], call: Callable[[], Any]
) -> WholeModules | None:
    """The modules that can be kept whole so that the graph does not break inside of them; None if there is none.

    A module can if it takes tensors and constants, writes to no tensor, and gives one tensor. That has a row for each
    of the first tensor's rows, as a linear's or a norm's, or for each of its elements, as an embedding's. Of modules
    with hooks those without submodules are kept, else those around them.

    Args:
        root: the model, which is none of them.
        stacks: per graph break, file and line of the frames that led to it, outermost first. Of the modules that
            these are code of, the innermost is kept that can be.
        call: runs the model once, uncompiled, to see what its modules take and give.
    """
    hooked = {name: root.get_submodule(name) for name in hooked_modules(root)}
    leaves = {name: module for name, module in hooked.items() if not list(module.children())}
    chains = [*_broken_classes(root, stacks), *_around_hooks(root)]
    broken = {kind for chain in chains for kind in chain}
    around = {name: module for name, module in root.named_modules() if type(module) in broken and name not in hooked}
    recorded = _record(around | leaves, call)
    kept = {name: recorded[name] for name in leaves if name in recorded}
    for chain in chains:
        for kind in chain:
            if found := {n: whole for n, whole in recorded.items() if n in around and type(whole.module) is kind}:
                kept |= found
                break
    # One that contains another would hide its branch.
    kept = {name: whole for name, whole in kept.items() if not any(inner.startswith(f"{name}.") for inner in kept)}
    return WholeModules(kept.values()) if kept else None


def _broken_classes(root: nn.Module, stacks: Iterable[Sequence[tuple[str, int]]]) -> list[list[type[nn.Module]]]:
    """Per graph break the classes of the modules that it is inside of, innermost first."""
    kinds = {type(module): None for module in root.modules()}
    lines = {kind: _lines_of(kind) for kind in kinds if kind is not type(root)}
    return [
        list(dict.fromkeys(kind for place in reversed(stack) for kind in lines if place in lines[kind]))
        for stack in stacks
    ]


def _around_hooks(root: nn.Module) -> list[list[type[nn.Module]]]:
    """For modules with hooks of accelerate or diffusers the classes of those that they are in, innermost first.

    A hook breaks the graph wherever it runs, and the stack does not say around which module where Dynamo runs a loop of
    blocks in Python.
    """
    parts = dict(root.named_modules())
    chains: dict[tuple[type[nn.Module], ...], None] = {}
    for hooked in hooked_modules(root):
        around = [parts[name] for name in itertools.accumulate(hooked.split("."), "{}.{}".format) if name != hooked]
        chains[tuple(type(part) for part in reversed(around))] = None
    return [list(chain) for chain in chains]


def hooked_modules(root: nn.Module) -> list[str]:
    """Names of the submodules that accelerate or diffusers has put hooks on."""
    return [name for name, part in root.named_modules() if name and vars(part).keys() & {"_hf_hook", "_diffusers_hook"}]


def _lines_of(kind: type[nn.Module]) -> set[tuple[str, int]]:
    """File and line of all code of a module's class."""
    found: set[tuple[str, int]] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else None
            pending = [code] if (code := getattr(function, "__code__", None)) else []
            while pending:
                code = pending.pop()
                found.update((code.co_filename, line) for *_, line in code.co_lines() if line is not None)
                pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


def _record(candidates: Mapping[str, nn.Module], call: Callable[[], Any]) -> dict[str, WholeModule]:
    """Those of the modules that can be kept whole, by name."""
    recorded: dict[str, WholeModule | None] = {}
    watched = {
        name: module
        for name, module in candidates.items()
        if all(type(parameter.data) is Tensor for parameter in module.parameters())
    }
    with contextlib.ExitStack() as undo, torch.no_grad():
        for name, module in watched.items():
            undo.callback(_put(module, _recorder(name, module, recorded)))
        call()
    return {name: whole for name, whole in recorded.items() if whole is not None}


def _recorder(name: str, module: nn.Module, recorded: dict[str, WholeModule | None]) -> Callable[..., Any]:
    forward = module.forward

    def record_call(*args: Any, **kwargs: Any) -> Any:
        inputs = _tensors(args, kwargs)
        if not inputs or not _plain(args, kwargs) or recorded.get(name, ...) is None:
            recorded[name] = None
            return forward(*args, **kwargs)
        before = [value.clone() for value in inputs]
        counter = flop_counter()
        with counter, _SeesAttention(module) as sees:
            output = forward(*args, **kwargs)
        if not _follows(output, inputs[0]) or not all(map(torch.equal, inputs, before)):
            recorded[name] = None
            return output
        recorded[name] = WholeModule(
            name,
            module,
            forward,
            arguments=_arguments(args, kwargs),
            flops=counter.get_total_flops(),
            elements=inputs[0].numel(),
            dimensions=inputs[0].ndim,
            output=output,
            keys=_keys(inputs) if sees.attention else -1,
        )
        return output

    return record_call


class _SeesAttention(TorchDispatchMode):
    """Sees whether a module's activations are multiplied with each other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attention = False
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = op.overloadpacket
        if packet in (aten.bmm, aten.baddbmm, aten.matmul):
            factors = {value.untyped_storage().data_ptr() for value in args[-2:]}
            self.attention |= not factors & self._weights
        elif "attention" in packet.__name__ or "attn" in packet.__name__:
            self.attention = True
        return op(*args, **(kwargs or {}))


def _keys(inputs: Sequence[Tensor]) -> int:
    """Which input attention's keys come from: the first other sequence of tokens, or else the first input itself."""
    for index, value in enumerate(inputs):
        if index and value.is_floating_point() and value.ndim == 3 and len(value) == len(inputs[0]):
            return index
    return 0
