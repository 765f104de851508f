"""The paper's video model: STDiT3-XL/2 as in Open-Sora 1.2, rectified flow, 30 steps, guidance 7.

``python bench/paper_open_sora.py``: the published sizes (480p, 2 s) with random weights. Smaller, for a CPU:
``--depth 2 --width 144 --heads 2 --frames 4 --height 16 --columns 16 --samples 2``.
"""

from __future__ import annotations

import torch
from paper import Subject, arguments_of, run, twin
from stdit3 import STDiT3

from smoothcache_fx.demo.model import randomize

GUIDANCE = 7.0


def main() -> None:
    arguments = arguments_of(
        __doc__, depth=28, width=1152, heads=16, frames=15, height=60, columns=106, tokens=300, batch=1, steps=30
    )
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    model = randomize(STDiT3(arguments.depth, arguments.width, arguments.heads)).to(device, dtype)

    @torch.no_grad()
    def sample(model: STDiT3, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (arguments.batch, 4, arguments.frames, arguments.height, arguments.columns)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        text = torch.randn(2 * arguments.batch, arguments.tokens, 4096, generator=generator).to(device, dtype)
        for step in range(arguments.steps):
            t = torch.full((2 * arguments.batch,), 1 - step / arguments.steps, device=device, dtype=dtype)
            conditional, unconditional = model(torch.cat((x, x)), t, text).chunk(2)
            x = x - (unconditional + GUIDANCE * (conditional - unconditional)) / arguments.steps
        return x

    run(
        Subject("paper_open_sora", lambda: twin(model).eval(), sample, lambda m: m, arguments.steps, (0.02, 0.03), 5),
        arguments,
    )


if __name__ == "__main__":
    main()
