"""Whole trajectories, beside every peer: ``python bench/end_to_end.py``.

DiT-XL/2 at 256x256 with random weights, DDIM-50 with classifier-free guidance, bf16, 32 images and 1; on a CPU a
smaller DiT in float32. All configurations share one set of weights, are checked, and are then timed taking turns:

- eager and ``torch.compile``, uncached;
- smoothcache with the published schedules for alpha 0.08 and 0.18 (46 and 24 of 50 steps computed) and one of the MAC
  ratio that the paper has for alpha 0.22 (18 of 50), whose row is not published: its steps are evenly spaced here;
- the paper's own package with the 24-of-50 schedule, and the caches of diffusers and cache-dit at (nearly) its
  compute, each eager and under ``torch.compile``. What a peer cannot do is printed in place of its figures.

Before timing: everything is finite; smoothcache with a schedule that computes everything equals ``torch.compile``;
and with each schedule it equals the paper's package at each step, up to what ``torch.compile`` itself differs from
eager, and uncompiled in float32 up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from common import write_result
from configurations import Configurations, rows_for
from ddim import Sampler, build_dit
from end_to_end_tables import picture, table
from entries import DEFAULT
from torch import nn
from torch._inductor.utils import fresh_cache

PICTURES = Path(__file__).parents[1] / "docs" / "bench"
PACKAGES = ("diffusers", "dit-smoothcache", "cache-dit", "triton")
DEFAULTS = {
    "cuda": {"layers": 28, "heads": 16, "head_dim": 72, "size": 32, "images": [32, 1], "steps": 50, "rounds": 5},
    "cpu": {"layers": 12, "heads": 6, "head_dim": 64, "size": 32, "images": [1], "steps": 50, "rounds": 3},
    "quick": {"layers": 3, "heads": 2, "head_dim": 32, "size": 8, "images": [1], "steps": 25, "rounds": 1},
}


def versions() -> dict[str, str | None]:
    """Of the peers' packages; None for one that is missing."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "tf32"), help="(default: bfloat16; float32 on a CPU)"
    )
    for name, help_text in (("layers", "blocks"), ("heads", "of attention"), ("head-dim", "width of a head")):
        parser.add_argument(f"--{name}", type=int, help=help_text)
    parser.add_argument("--size", type=int, help="of the latents")
    parser.add_argument("--images", type=int, nargs="+", help="numbers of images; a table for each")
    parser.add_argument("--steps", type=int, help="(default: 50, for which there are published schedules)")
    parser.add_argument("--rounds", type=int, help="timed rounds, all configurations in turns")
    parser.add_argument("--backend", default="inductor", help="inner compiler, for all alike")
    parser.add_argument(
        "--autotune", action=argparse.BooleanOptionalAction, help="max-autotune, too (default: on CUDA)"
    )
    parser.add_argument(
        "--modes", nargs="+", default=[DEFAULT], metavar="MODE", help="of torch.compile, each with a plain model beside"
    )
    parser.add_argument("--orders", type=int, nargs="+", default=[0], help="of smoothcache's forecasts (default: 0)")
    parser.add_argument("--name", help="end of the result's name, where several are kept")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="compile each with an empty cache on disk; else they find what earlier ones of this run have left there",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the paper's package and with a schedule that computes everything (default: yes)",
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="caches whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--write", action="store_true", help="write bench/results and docs/bench")
    arguments = parser.parse_args()
    sizes = DEFAULTS["quick" if arguments.quick else arguments.device]
    for name, value in sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    on_cuda = arguments.device == "cuda"
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if on_cuda else "float32"
    if arguments.autotune is None:
        arguments.autotune = on_cuda and arguments.backend == "inductor"
    if arguments.autotune and arguments.backend != "inductor":
        parser.error(f"max-autotune is a mode of inductor, and the backend is {arguments.backend}: give --no-autotune")
    if DEFAULT not in arguments.modes:
        parser.error(f"--modes {' '.join(arguments.modes)} leaves {DEFAULT} out, which all speed-ups are over: add it")
    return arguments


def run_all(
    model: nn.Module, dtype: torch.dtype, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and checks for each number of images; the tables are printed."""
    by_images, checks = {}, {}
    for images in arguments.images:
        sampler = Sampler(images, arguments.steps, arguments.size, arguments.device, dtype)
        configurations = Configurations(model, sampler, arguments)
        configurations.add_all()
        by_images[str(images)], checks[str(images)] = configurations.measure(), configurations.checks
        print(f"\nimages: {images}, steps: {arguments.steps}, {arguments.dtype}\n{table(by_images[str(images)])}\n")
        del configurations
        torch._dynamo.reset()
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return by_images, checks


def main() -> None:
    arguments = arguments_of()
    if arguments.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    model = build_dit(arguments.layers, arguments.heads, arguments.head_dim, arguments.size)
    model = model.to(arguments.device, dtype)
    # Compile times must not depend on what other runs have left on the disk.
    with fresh_cache() if arguments.backend == "inductor" else contextlib.nullcontext():
        by_images, checks = run_all(model, dtype, arguments)
    if arguments.write:
        name = f"end_to_end_{arguments.device}"
        if arguments.dtype != ("bfloat16" if arguments.device == "cuda" else "float32"):
            name += f"_{arguments.dtype}"
        if arguments.name:
            name += f"_{arguments.name}"
        path = write_result(
            name,
            {
                "arguments": vars(arguments),
                "packages": versions(),
                "rows": rows_for(arguments.steps),
                "checks": checks,
                "results": by_images,
            },
        )
        width = arguments.heads * arguments.head_dim
        title = f"DiT, {arguments.layers} blocks of {width}, {arguments.steps} DDIM steps, {arguments.dtype}"
        picture(by_images, title, PICTURES / f"{name}.png")
        print(f"written to {path} and {PICTURES / f'{name}.png'}")


if __name__ == "__main__":
    main()
