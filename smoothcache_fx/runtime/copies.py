"""Copies of what a model is given, for a second call that Dynamo takes for one like the first."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils import _pytree as pytree


def copied(inputs: Any) -> Any:
    """A structure with its tensors copied: with the same strides, as views where they are views, sharing memory alike.

    Dynamo guards on all of that, and would capture a call with other tensors anew.
    """
    memo: dict[int, Any] = {}

    def copy_of(value: torch.Tensor) -> torch.Tensor:
        if type(value) is torch.Tensor and value._base is not None:
            return copy.deepcopy(value._base, memo).as_strided(value.shape, value.stride(), value.storage_offset())
        return copy.deepcopy(value, memo)

    return pytree.tree_map_only(torch.Tensor, copy_of, inputs)
