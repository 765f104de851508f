"""What a cached step takes on the host besides its graph: ``python bench/host_time.py``.

A DiT of 28 blocks under Inductor, ours with all branches reused and plain ``torch.compile``. Once compiled, each graph
is replaced by one that returns at once what it returned before, as a replayed CUDA graph does: what is left of a call
is the host's part. Dynamo's guards are in both; ours has the clock, the choice of a variant and its arguments on top.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import summary, write_result
from efficiency import build
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from turns import turn

import smoothcache_fx as smoothcache

STEPS = 4


def replaying(run: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
    """The compiled graph, of which only the first call computes."""
    kept: list[Any] = []

    def call(arguments: list[Any]) -> Sequence[Any]:
        if not kept:
            kept.extend(run(arguments))
        arguments.clear()
        return list(kept)

    call._boxed_call = True
    return call


@torch.no_grad()
def host_seconds(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Per call but a trajectory's first, which computes."""
    found = []
    for number in range(len(calls) * rounds):
        start = time.perf_counter()
        calls[number % len(calls)]()
        if number % len(calls):
            found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument(
        "--fewer-guards", action="store_true", help="without guards on modules: what is set on them goes unnoticed"
    )
    parser.add_argument("--write", action="store_true", help="write bench/results/host_time.json")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = build(arguments.depth, 64).to(device)
    cached = copy.deepcopy(plain)
    latents, labels = torch.randn(1, 4, 32, 32, device=device), torch.zeros(1, dtype=torch.long, device=device)
    timesteps = [torch.full((1,), 1.0 - step / STEPS, device=device) for step in range(STEPS)]

    def compile_replaying(*args: Any, **kwargs: Any) -> Any:
        return replaying(compile_fx_inner(*args, **kwargs))

    def inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(gm, inputs, inner_compile=compile_replaying)

    options: dict[str, Any] = {}
    if arguments.fewer_guards:
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    models = {"torch.compile": torch.compile(plain, backend=inductor, options=dict(options)), "smoothcache": cached}
    with config.patch(force_disable_caches=True), torch.no_grad():  # what replays cannot be kept on disk
        models["torch.compile"](latents, timesteps[0], labels)
    smoothcache.compile(cached, smoothcache.Schedule.uniform(STEPS, STEPS), options=options)
    with torch.no_grad():
        for step in range(STEPS):
            cached(latents, timesteps[step], labels)
    (program,) = cached.forward.session.programs
    for variant in program.dispatcher.variants.values():
        variant.run = replaying(variant.run)

    host: dict[str, list[float]] = {name: [] for name in models}
    turns = 10
    with turn():
        for _ in range(turns):
            for name, model in models.items():
                calls = [functools.partial(model, latents, timestep, labels) for timestep in timesteps]
                host[name] += host_seconds(calls, arguments.rounds // turns)
    microseconds = {name: {key: 1e6 * value for key, value in summary(found).items()} for name, found in host.items()}
    for name, found in microseconds.items():
        print(f"{name:14s} {found['median']:.0f} us a call on the host  ({found['p20']:.0f} to {found['p80']:.0f})")
    added = microseconds["smoothcache"]["median"] - microseconds["torch.compile"]["median"]
    print(f"ours over plain: {added:.0f} us")
    if arguments.write:
        path = write_result(
            "host_time", {"arguments": vars(arguments), "microseconds": microseconds, "added_microseconds": added}
        )
        print(f"written to {path}")


if __name__ == "__main__":
    main()
