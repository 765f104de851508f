"""Which residual adds of a variant become kernels of this package, and which stay with the inner compiler.

Measured in bfloat16, torch 2.11, triton 3.6, in November 2026, on an H100 80GB at commit d7ec242 and on an H200
(``bench/results/*_cuda.json`` where a script of this repository measured it; the rest by scripts that are not in it):

- A single load, store or forecast: on the H100 ours and Inductor's code take the same time within 3% from 8 samples of
  DiT-XL/2 on, and at 2 samples Inductor's is 0.3 us of 7 faster. It stays with Inductor, which also fuses what is
  beside it.
- A run of 56 reused branches of DiT-XL/2, 64 samples: Inductor fuses the run with the transposed output of the patch
  embedding before it and the last norm after it into one reduction over rows, which takes 19.1 ms on the H100; its
  memory traffic takes 0.7 ms. As one op the run takes 0.52 ms on the H200. The whole cached call fell from 20.2 ms
  (H100) to 1.0 ms (H200). By itself, without what is around it, Inductor's code takes 0.54 ms.
- 28 linears for the gates of 28 blocks: on the H200 Inductor takes 149 us one by one, ``grouped_linear`` 32 us (2
  samples), 155 and 35 us (64).
- A norm behind a residual add: our one pass takes 56 us, Inductor's 81 us (64 samples of DiT-XL/2, H200). Behind a run
  it does not pay, by a sweep that is not in this repository: 660 us in one pass, 513 and 70 us in two. So Inductor
  keeps its norms, and others, which would take a pass for each of norm, product and sum, get ours.
- The copy of a branch's output to its cache: Inductor makes it in the kernel of the add and the norm behind it.
  ``passes/store_products.py`` has the product write the cache, one write of ``[batch, tokens, width]`` less for each
  branch. No gain is shown yet: in profiles that kernel took 2.9 ms of a full call with the copy and without, and plain
  ``torch.compile``'s 1.7 ms in one run and 2.7 in the next, by the configuration that Inductor happened to pick.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lowering:
    """What of a variant goes to kernels of this package.

    Attributes:
        singles: loads, forecasts and stores of single branches.
        runs: two or more reused branches that follow on each other in one residual stream.
        norms: the norm behind a residual add that has become a kernel.
        groups: linears of one shape that only make gates.
    """

    singles: bool
    runs: bool
    norms: bool
    groups: bool


def lowering_for(device: str, fuses_by_itself: bool) -> Lowering | None:
    """The choice for a device type (``"cuda"``, ``"cpu"``) and an inner compiler; None leaves all as it is.

    Args:
        device: type of the device that the variant runs on.
        fuses_by_itself: whether the inner compiler fuses pointwise work, as Inductor does.
    """
    if device != "cuda":
        return None
    return Lowering(singles=not fuses_by_itself, runs=True, norms=not fuses_by_itself, groups=fuses_by_itself)
