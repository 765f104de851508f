"""What a model's blocks cost when it runs eagerly: the measure for what graph breaks leave in no graph at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .passes.flops import SDPA, sdpa_flops


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with our formula for fused attention."""
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(SDPA, _sdpa_flops))


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
