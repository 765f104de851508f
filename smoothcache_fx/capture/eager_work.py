"""What a model's blocks cost when it runs eagerly: the measure for what graph breaks leave in no graph at all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..passes.flops import PRODUCTS_WITHOUT_FORMULA, SDPA, custom_product_flops, is_custom, sdpa_flops


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with our formulas beside its own."""
    formulas = dict.fromkeys(SDPA, _sdpa_flops) | dict.fromkeys(PRODUCTS_WITHOUT_FORMULA, _product_flops)
    return _FlopCounter(display=False, custom_mapping=formulas)


class _FlopCounter(FlopCounterMode):
    """Counts custom ops that are linear layers, too."""

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if is_custom(func_packet) and func_packet not in self.flop_registry:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            weights = [value for value in tensors if isinstance(value, torch.nn.Parameter)]
            others = [value for value in tensors if not isinstance(value, torch.nn.Parameter)]
            flops = custom_product_flops(others[0], weights, out) if others and weights else 0
            for parent in set(self.mod_tracker.parents):
                self.flop_counts[parent][func_packet] += flops
        return super()._count_flops(func_packet, out, args, kwargs)


def flops_by_container(model: nn.Module, call: Callable[[], object]) -> Counter[str]:
    """FLOPs of each list of blocks (``transformer_blocks``) during one eager call of the model; under '' of the rest.

    Dynamo runs a frame eagerly where it cannot go on after a break, in a loop: no captured graph shows that work.
    """
    counted: Counter[str] = Counter()
    counter = flop_counter()
    handles = []
    for name, block in model.named_modules():
        container, dot, index = name.rpartition(".")
        # The outermost list counts: a block's own lists are part of the block.
        if dot and index.isdigit() and not re.search(r"\.\d+(\.|$)", container):
            handles += _count(block, container, counter, counted)
    try:
        with counter, torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    counted[""] = counter.get_total_flops() - counted.total()
    return counted


def _count(block: nn.Module, container: str, counter: FlopCounterMode, counted: Counter[str]) -> list[Any]:
    began: list[int] = []

    def enter(*_: object) -> None:
        began.append(counter.get_total_flops())

    def leave(*_: object) -> None:
        counted[container] += counter.get_total_flops() - began.pop()

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


def _sdpa_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flops(query, key, value)


def _product_flops(left: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * left[-1]
