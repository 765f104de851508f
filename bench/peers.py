"""The caches that `end_to_end.py` compares with, each on the DiT of `ddim.py` and at (nearly) equal compute.

A builder takes an uncompiled copy of the model and gives the `Peer`. It raises `ImportError` where its package is
missing; whatever else it raises is what the peer says about this model.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ddim import Peer, Sampler
from paper import twin
from torch import nn

import smoothcache_fx as smoothcache

#: Tries to find a threshold; each is a trajectory.
TRIES = 8


@dataclass
class Task:
    """What all peers are given: the model, the sampler, and the steps that may be computed.

    Attributes:
        model: uncompiled and without hooks; peers get copies that share its weights.
        sampler: of the trajectory.
        row: 1 where the schedule of equal compute computes a step.
        full: FLOPs of the uncached trajectory.
    """

    model: nn.Module
    sampler: Sampler
    row: Sequence[int]
    full: int

    def mac_ratio(self, peer: Peer) -> float:
        return self.full / sum(self.sampler.flops(peer))


def compiled(forward: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    """``torch.compile`` whose recompiles count for this peer alone."""
    options: dict[str, Any] = {"backend": backend, "mode": mode}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(forward, isolate_recompiles=True, **options)

    # torch 2.11: Dynamo counts per code object, so each peer gets one of its own.
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    return torch.compile(own, **options)


def ours(
    model: nn.Module,
    schedule: smoothcache.Schedule,
    backend: str,
    mode: str | None,
    options: dict[str, Any] | None = None,
) -> Peer:
    smoothcache.compile(model, schedule, backend=backend, mode=mode, options=options)

    @contextlib.contextmanager
    def fresh() -> Iterator[None]:
        smoothcache.reset(model)
        yield

    return Peer(model, fresh, "", model)


def dit_smoothcache(model: nn.Module, row: Sequence[int]) -> Peer:
    """The paper's own package, its general helper around attention and feed-forward."""
    from diffusers.models.attention import BasicTransformerBlock

    with contextlib.redirect_stdout(io.StringIO()):  # it prints about models that are not installed
        module = importlib.import_module("SmoothCache.smooth_cache_helper")
    # Each cached or computed call prints a line, which would be timed, and which breaks the graph.
    vars(module)["print"] = _say_nothing
    rows = {"attn1": list(row), "ff": list(row)}
    helper = module.SmoothCacheHelper(model, BasicTransformerBlock, ["attn1", "ff"], rows)
    helper.enable()

    @contextlib.contextmanager
    def fresh() -> Iterator[None]:
        # Not disable() and enable(), which make new functions: each trajectory would be compiled anew.
        helper.reset_state()
        yield

    return Peer(model, fresh, f"{sum(row)} of {len(row)} steps; its line of output per call is silenced")


def _say_nothing(*args: object) -> None:
    pass


def _hooked(model: nn.Module, setting: str) -> Peer:
    """A model with diffusers' hooks. The class has no ``enable_cache``, so the hooks were applied to it directly."""
    from diffusers.models.cache_utils import CacheMixin

    @contextlib.contextmanager
    def fresh() -> Iterator[None]:
        CacheMixin._reset_stateful_cache(model)
        with CacheMixin.cache_context(model, "denoiser"):
            yield

    return Peer(model, fresh, setting)


def first_block_cache(task: Task) -> Callable[[nn.Module], Peer]:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    def build(model: nn.Module, threshold: float) -> Peer:
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold))
        return _hooked(model, f"threshold {threshold:.3g}, found by bisection: with random weights it means nothing")

    threshold = nearest(lambda value: task.mac_ratio(build(twin(task.model), value)), _target(task), 1e-3, 3.0)
    return lambda model: build(model, threshold)


def mag_cache(task: Task) -> Callable[[nn.Module], Peer]:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    steps = task.sampler.steps
    calibrated = twin(task.model)
    apply_mag_cache(calibrated, MagCacheConfig(calibrate=True, num_inference_steps=steps))
    # The ratios are printed, to be copied.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        task.sampler(_hooked(calibrated, ""))
    (line,) = (line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]"))
    ratios = ast.literal_eval(line)

    def build(model: nn.Module, threshold: float) -> Peer:
        apply_mag_cache(model, MagCacheConfig(threshold, num_inference_steps=steps, mag_ratios=ratios))
        return _hooked(model, f"calibrated here, threshold {threshold:.3g}, found by bisection")

    threshold = nearest(lambda value: task.mac_ratio(build(twin(task.model), value)), _target(task), 1e-6, 10.0)
    return lambda model: build(model, threshold)


def taylor_seer(task: Task) -> Callable[[nn.Module], Peer]:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    # Computed at step 0, then each interval-th from step 2 on.
    interval = max(1, round((task.sampler.steps - 2) / max(1, sum(task.row) - 1)))

    def build(model: nn.Module) -> Peer:
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=1,
            max_order=1,
            taylor_factors_dtype=task.sampler.dtype,
            # By default whole names are compared with patterns that end in "attn", and none is "attn1".
            cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
        )
        apply_taylorseer_cache(model, config)
        return _hooked(model, f"order 1, interval {interval}, attention and feed-forward named by hand")

    return build


def pab(task: Task) -> Callable[[nn.Module], Peer]:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    interval = max(2, round(task.sampler.steps / sum(task.row)))

    def build(model: nn.Module) -> Peer:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval,
            spatial_attention_timestep_skip_range=(0, 1000),
            # In range at each step. A callback that tells the timestep would have the graph recompiled for each.
            current_timestep_callback=lambda: 500,
        )
        apply_pyramid_attention_broadcast(model, config)
        return _hooked(model, f"attention at each {interval}. step; it caches no feed-forward, so takes more compute")

    return build


def cache_dit(task: Task) -> Callable[[nn.Module], Peer]:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    package = importlib.import_module("cache_dit")

    def config() -> Any:
        return package.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            num_inference_steps=task.sampler.steps,
            steps_computation_mask=list(task.row),
            steps_computation_policy="static",
            enable_separate_cfg=False,
        )

    def build(model: nn.Module) -> Peer:
        package.enable_cache(model, cache_config=config())

        @contextlib.contextmanager
        def fresh() -> Iterator[None]:
            package.refresh_context(model, cache_config=config())
            yield

        steps = f"{sum(task.row)} of {len(task.row)} steps by a static mask"
        return Peer(model, fresh, f"DBCache, {steps}, first block always computed")

    return build


def _target(task: Task) -> float:
    return task.sampler.steps / sum(task.row)


def nearest(ratio: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The threshold, between two, whose counted MAC ratio comes nearest to the target; by bisection of its logarithm.

    Raises:
        ValueError: if nothing tried comes within a quarter of the target.
    """
    found: dict[float, float] = {}
    for _ in range(TRIES):
        threshold = (low * high) ** 0.5
        found[threshold] = ratio(threshold)
        if abs(found[threshold] / target - 1) < 0.02:
            break
        low, high = (threshold, high) if found[threshold] < target else (low, threshold)
    best = min(found, key=lambda threshold: abs(found[threshold] - target))
    if abs(found[best] / target - 1) > 0.25:
        tried = ", ".join(f"{ratio:.2f} at {threshold:.3g}" for threshold, ratio in found.items())
        raise ValueError(f"no threshold gives a MAC ratio near {target:.2f}: {tried}")
    return best


#: Name -> what sets the peer up for a task, and gives what builds it on a copy of the model.
PEERS: dict[str, Callable[[Task], Callable[[nn.Module], Peer]]] = {
    "dit-smoothcache": lambda task: lambda model: dit_smoothcache(model, task.row),
    "FirstBlockCache": first_block_cache,
    "MagCache": mag_cache,
    "TaylorSeer": taylor_seer,
    "PAB": pab,
    "cache-dit": cache_dit,
}
