"""Where tensors lie, as a table on the device: a kernel that loops over it takes any number of tensors in one launch.

A launch's arguments are read when a CUDA graph is recorded, and Triton unrolls loops over them: a kernel of 56 terms
would be 56 kernels long. So a first, tiny launch writes the addresses that it is given to memory, and the kernel that
needs them reads them there. No address is kept longer than that: weights that are swapped, updated in place or moved
away and back are read where they lie now, and intermediates of a CUDA graph lie where they lay when it was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton

#: Addresses that one launch writes. The arguments of a launch may take 4 KiB.
PER_LAUNCH = 128


def address_table(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """int64 ``[len(tensors)]`` on ``device``: each tensor's ``data_ptr()``, 0 for None.

    The tensors must outlive the kernels that read the table: pass them to the same op.
    """
    table = torch.empty(len(tensors), dtype=torch.int64, device=device)
    with torch.cuda.device_of(table):
        for first in range(0, len(tensors), PER_LAUNCH):
            # As numbers: of a tensor Triton's launcher asks the driver whether its address is one of the device's.
            part = tuple(0 if one is None else one.data_ptr() for one in tensors[first : first + PER_LAUNCH])
            address_table_kernel[(1,)](table[first:], part, COUNT=len(part), num_warps=1)
    return table


if triton is not None:

    @triton.jit(do_not_specialize_on_alignment=["addresses"])
    def address_table_kernel(
        table,  # [COUNT], int64
        addresses,
        COUNT: tl.constexpr,
    ):
        for number in tl.static_range(COUNT):
            tl.store(table + number, tl.full((), addresses[number], tl.int64))
