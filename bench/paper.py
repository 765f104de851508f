"""What the scripts of the paper's three models share: calibrate, schedule, compile, sample, and time it all."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from common import interleaved, ratio_of_medians, summary, write_result
from torch import nn

import smoothcache_fx as smoothcache
from smoothcache_fx.graphs.tables import format_bytes, format_table

Target = TypeVar("Target")


@dataclass
class Subject:
    """What is sampled: a model or a pipeline.

    Attributes:
        name: of the result file.
        build: makes it anew, with the weights of all others that it has made: the same seed, the same sample.
        sample: ``sample(target, seed)`` runs one whole trajectory and returns the latents.
        model: the transformer in it.
        steps: denoising steps.
        alphas, lags: of the paper's schedules.
    """

    name: str
    build: Callable[[], Any]
    sample: Callable[[Any, int], torch.Tensor]
    model: Callable[[Any], nn.Module]
    steps: int
    alphas: Sequence[float]
    lags: int


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module that shares its parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def arguments_of(description: str | None, **sizes: int) -> argparse.Namespace:
    """The command line of such a script: sizes, which by default are the published ones, and how to run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s, as published)")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--samples", type=int, default=10, help="calibration trajectories (default: 10, the paper's)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, all configurations in turns")
    parser.add_argument("--alphas", type=float, nargs="+", help="in place of the paper's")
    parser.add_argument("--backend", default="inductor", help="inner compiler, for the plain model alike")
    parser.add_argument("--mode", default=None, help="torch.compile's mode, for both")
    parser.add_argument("--write", action="store_true", help="write bench/results/<name>.json")
    return parser.parse_args()


def run(subject: Subject, arguments: argparse.Namespace) -> None:
    """Calibrate, schedule for each alpha, compile, sample in turns with the plain compiled model; print and write."""
    target = subject.build()
    calibration = smoothcache.calibrate(
        target,
        lambda target: [subject.sample(target, seed) for seed in range(arguments.samples)],
        lags=subject.lags,
        order=None,
    )
    print(calibration)
    plain = subject.build()
    model = subject.model(plain)
    model.forward = torch.compile(model.forward, backend=arguments.backend, mode=arguments.mode)
    targets = {"torch.compile": plain}
    for alpha in arguments.alphas or subject.alphas:
        schedule = calibration.schedule(alpha=alpha)
        print(f"\nalpha {alpha:g}\n{schedule}")
        targets[f"alpha {alpha:g}"] = smoothcache.compile(
            subject.build(), schedule, backend=arguments.backend, mode=arguments.mode
        )
    seconds = interleaved(
        {name: lambda target=target: subject.sample(target, 0) for name, target in targets.items()}, arguments.rounds
    )
    rows, results = [("", "seconds", "x torch.compile", "MAC ratio", "efficiency", "cache")], {}
    for name, target in targets.items():
        result: dict[str, Any] = {"seconds": summary(seconds[name])}
        if name != "torch.compile":
            report = smoothcache.report(target)
            speedup = ratio_of_medians(seconds["torch.compile"], seconds[name])
            result |= {
                "speedup": speedup,
                "mac_ratio": report.mac_ratio,
                "efficiency": speedup / report.mac_ratio,
                "cache_bytes": report.cache_bytes,
                "variants": report.variants,
                "graphs": report.graphs,
            }
        results[name] = result
        rows.append(
            (
                name,
                f"{statistics.median(seconds[name]):.3f}",
                *(f"{result[key]:.3f}" if key in result else "-" for key in ("speedup", "mac_ratio", "efficiency")),
                format_bytes(result["cache_bytes"]) if "cache_bytes" in result else "-",
            )
        )
    print("\n" + format_table(rows))
    if arguments.write:
        print(write_result(subject.name, {"arguments": vars(arguments), "results": results}))
