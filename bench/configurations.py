"""The configurations of `end_to_end.py`: made from one set of weights, checked against each other, and timed."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import PUBLISHED_24_OF_50, interleaved, ratio_of_medians, summary
from ddim import Peer, Sampler, even_row
from entries import (
    AUTOTUNE,
    DEFAULT,
    EAGER,
    OURS,
    PLAIN,
    THEIRS,
    Entry,
    VerificationError,
    allocated_bytes,
    difference,
    require_same,
)
from paper import twin
from peers import PEERS, Task, compiled, dit_smoothcache, ours
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from smoothcache_fx import Schedule, report

#: The published schedule for DiT-XL/2 with 50 DDIM steps at alpha 0.08, equal for attn and mlp.
PUBLISHED_46_OF_50 = [int(digit) for digit in "1001010" + "1" * 43]
#: Relative difference of outputs that is rounding, even where torch.compile differs from eager by less.
ROUNDING = 1e-5


def rows_for(steps: int) -> dict[str, list[int]]:
    """Name -> row: the published ones for 50 steps, evenly spaced ones of the same shares for others."""
    rows = {
        f"alpha {alpha}": even_row(steps, max(2, round(steps * computed / 50)))
        for alpha, computed in (("0.08", 46), ("0.18", 24), ("0.22", 18))
    }
    if steps == 50:
        rows |= {"alpha 0.08": PUBLISHED_46_OF_50, "alpha 0.18": PUBLISHED_24_OF_50}
    return rows


def schedule_of(row: Sequence[int], order: int = 0, grain: str = "branch") -> Schedule:
    kinds = ("stack",) if grain == "stack" else ("attn", "ffn")
    return Schedule(len(row), dict.fromkeys(kinds, row), order=order)


def describe(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"not measured: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Configurations:
    """All configurations for one number of images."""

    def __init__(self, model: nn.Module, sampler: Sampler, arguments: argparse.Namespace) -> None:
        self.model, self.sampler, self.arguments = model, sampler, arguments
        self.rows = rows_for(sampler.steps)
        self.row = self.rows["alpha 0.18"]
        self.task = Task(model, sampler, self.row, sum(sampler.flops(Peer(twin(model)))))
        self.entries: list[Entry] = []
        self.checks: dict[str, Any] = {}
        self.modes = [*arguments.modes, AUTOTUNE] if arguments.autotune else list(arguments.modes)

    def wanted(self, name: str) -> bool:
        return not self.arguments.only or any(part in name for part in self.arguments.only)

    def add(self, name: str, kind: str, mode: str, build: Callable[[], Peer]) -> Entry:
        """Make a configuration and run it once. What a peer raises becomes the reason why it has no figures."""
        gc.collect()
        allocated = allocated_bytes()
        entry = Entry(name, kind, mode)
        self.entries.append(entry)
        try:
            entry.peer = build()
            with fresh_cache(delete=False) if self.arguments.cold else contextlib.nullcontext():
                entry.run_first(self.sampler, allocated)
        except Exception as error:
            if kind != THEIRS:
                raise
            self.refuse(entry, describe(error))
        return entry

    def refuse(self, entry: Entry, reason: str) -> None:
        entry.peer, entry.refused = None, reason
        print(f"{entry.name}: {reason}")

    def add_all(self) -> None:
        eager = self.add("eager", PLAIN, EAGER, lambda: Peer(twin(self.model)))
        plain = {
            mode: self.add(
                compile_name(mode), PLAIN, mode, lambda mode=mode: Peer(self.compiled(twin(self.model), mode))
            )
            for mode in self.modes
        }
        self.checks["compile_to_eager"] = difference(plain[DEFAULT].outputs, eager.outputs)
        noise = max(difference(entry.outputs, eager.outputs) for entry in plain.values())
        self.limit = max(ROUNDING, 3 * noise)
        references = self.references() if self.arguments.verify else {}
        if self.arguments.verify:
            self.check_identity(plain[DEFAULT].outputs)
        grains = [(name, "branch") for name in self.rows] + [("alpha 0.18", "stack")]
        for mode, (name, grain), order in itertools.product(self.modes, grains, self.arguments.orders):
            label = f"smoothcache {name}" + (" stacks" if grain == "stack" else "")
            label += (f" order {order}" if order else "") + (f" {mode}" if mode != DEFAULT else "")
            if self.wanted(label):
                # The paper's package repeats branches; it has nothing to compare others with.
                reference = None if order or grain == "stack" else references.get(name)
                self.add_ours(label, mode, schedule_of(self.rows[name], order, grain), reference)
        label = "smoothcache alpha 0.18 stacks, modules not guarded"
        if self.wanted(label) and DEFAULT in self.modes:
            options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            self.add_ours(label, DEFAULT, schedule_of(self.row, 0, "stack"), None, options)
        for name in PEERS:
            if self.wanted(name):
                self.add_peer(name)

    def compiled(self, model: nn.Module, mode: str) -> Any:
        return compiled(model.forward, self.arguments.backend, None if mode == DEFAULT else mode)

    def ours(self, schedule: Schedule, mode: str, options: dict[str, Any] | None = None) -> Peer:
        return ours(twin(self.model), schedule, self.arguments.backend, None if mode == DEFAULT else mode, options)

    def references(self) -> dict[str, Tensor]:
        """What the paper's package predicts with each schedule; empty where it is not installed."""
        try:
            found = {
                name: self.sampler.outputs(dit_smoothcache(twin(self.model), row)) for name, row in self.rows.items()
            }
        except ImportError as error:
            self.checks["same_as_dit_smoothcache"] = describe(error)
            print(f"the algorithm is not compared with dit-smoothcache: {error}")
            return {}
        self.checks["same_as_dit_smoothcache"] = {"uncompiled, float32": self.check_algorithm()}
        self.checks["effect_of_caching"] = difference(found["alpha 0.18"], self.entries[0].outputs)
        return found

    def check_algorithm(self) -> float:
        """Ours and the paper's package, both uncompiled and in float32, where no rounding hides a wrong step."""
        model = copy.deepcopy(self.model).float()
        sampler = dataclasses.replace(self.sampler, images=1, dtype=torch.float32)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            found, theirs = (
                sampler.outputs(peer)
                for peer in (
                    ours(twin(model), schedule_of(self.row), "eager", None),
                    dit_smoothcache(twin(model), self.row),
                )
            )
        finally:
            torch.set_float32_matmul_precision(precision)
        return require_same("smoothcache and dit-smoothcache, uncompiled, float32", found, theirs, ROUNDING)

    def check_identity(self, plain: Tensor) -> None:
        outputs = self.sampler.outputs(self.ours(schedule_of([1] * self.sampler.steps), DEFAULT))
        what = "smoothcache with everything computed, and torch.compile"
        self.checks["identity_to_compile"] = require_same(what, outputs, plain, self.limit)

    def add_ours(
        self,
        name: str,
        mode: str,
        schedule: Schedule,
        reference: Tensor | None,
        options: dict[str, Any] | None = None,
    ) -> None:
        row = next(iter(schedule.compute.values()))
        entry = self.add(name, OURS, mode, lambda: self.ours(schedule, mode, options))
        entry.cached = [not computed for computed in row]
        entry.peer.setting = f"{sum(row)} of {len(row)} steps"
        if reference is not None:
            found = require_same(f"{name}, and dit-smoothcache", entry.outputs, reference, self.limit)
            self.checks["same_as_dit_smoothcache"][name] = found

    def add_peer(self, name: str) -> None:
        """A peer, eager and under torch.compile."""
        eager = Entry(name, THEIRS, EAGER)
        under_compile = Entry(f"{name} + compile", THEIRS, DEFAULT)
        try:
            build = PEERS[name](self.task)
        except Exception as error:  # noqa: BLE001 - whatever a peer says of this model is its result
            self.entries += [eager, under_compile]
            for entry in (eager, under_compile):
                self.refuse(entry, describe(error))
            return
        eager = self.add(eager.name, THEIRS, EAGER, lambda: build(twin(self.model)))
        if eager.peer is None:
            self.entries.append(under_compile)
            self.refuse(under_compile, "refused uncompiled already")
            return
        flops = self.sampler.flops(eager.peer)

        def build_compiled() -> Peer:
            model = twin(self.model)
            peer = build(model)
            peer.forward = self.compiled(model, DEFAULT)
            return peer

        under_compile = self.add(under_compile.name, THEIRS, DEFAULT, build_compiled)
        for entry in (eager, under_compile):
            # Where the data decides, compiled peers are taken to decide as they do uncompiled.
            entry.mac_ratio = self.task.full / sum(flops)
            entry.cached = [count < 0.99 * max(flops) for count in flops]
        if under_compile.peer is not None:
            differences = self.checks.setdefault("peers_compiled_to_eager", {})
            differences[name] = difference(under_compile.outputs, eager.outputs)

    def measure(self) -> dict[str, Any]:
        running = {entry.name: entry for entry in self.entries if entry.peer is not None}
        seconds = interleaved(
            {name: lambda entry=entry: entry.run(self.sampler) for name, entry in running.items()},
            self.arguments.rounds,
            warmup=0,
        )
        for entry in running.values():
            self.check_last(entry)
        return {entry.name: self.result(entry, seconds) for entry in self.entries}

    def check_last(self, entry: Entry) -> None:
        """One more trajectory must be the first one again: what was timed is what was checked."""
        found = difference(self.sampler.outputs(entry.peer), entry.outputs)
        entry.outputs = None
        if found <= self.limit:
            return
        reason = f"a later trajectory differs from the first by {found:.3g} of its norm (limit {self.limit:.3g})"
        if entry.kind != THEIRS:
            raise VerificationError(f"{entry.name}: {reason}")
        self.refuse(entry, reason)

    def result(self, entry: Entry, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
        if entry.peer is None:
            return {"kind": entry.kind, "mode": entry.mode, "refused": entry.refused}
        if entry.kind == OURS:
            seen = report(entry.peer.model)
            if seen.forced or seen.uncompiled_calls:
                raise VerificationError(f"{entry.name} did not follow its schedule:\n{seen}")
            entry.mac_ratio = seen.mac_ratio
        mine = seconds[entry.name]
        own = seconds["eager" if entry.mode == EAGER else compile_name(entry.mode)]
        speedup = ratio_of_medians(seconds[compile_name(DEFAULT)], mine)
        over_own_mode = ratio_of_medians(own, mine)
        found = {
            "kind": entry.kind,
            "mode": entry.mode,
            "setting": entry.peer.setting,
            "seconds_per_image": summary([value / self.sampler.images for value in mine]),
            "speedup": speedup,
            "speedup_over_uncached_in_same_mode": over_own_mode,
            "mac_ratio": entry.mac_ratio,
            "efficiency": speedup / entry.mac_ratio,
            "efficiency_in_same_mode": over_own_mode / entry.mac_ratio,
            "cached_step_share": entry.cached_step_share() if any(entry.cached) else None,
            "cached_steps": sum(entry.cached),
            "peak_bytes": self.weights() + entry.held + entry.peak if self.sampler.device != "cpu" else None,
            "compile_seconds": max(0.0, entry.first - statistics.median(mine)) if entry.mode != EAGER else None,
            "graphs": entry.graphs,
            "recompiled": entry.recompiled,
        }
        if entry.kind == OURS:
            found |= {"variants": seen.variants, "cache_bytes": seen.cache_bytes}
        return found

    def weights(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))


def compile_name(mode: str) -> str:
    return "torch.compile" if mode == DEFAULT else f"torch.compile {mode}"
