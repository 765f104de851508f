"""The session of a calibration: a model's outputs, site by site, compared with those of the steps before."""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.inner import inner_compiler
from ..capture.session import Capture, Session
from ..capture.variants import GraphBuilder
from ..errors import CalibrationError
from ..graphs.tables import format_bytes
from ..kernels.relative_l1 import relative_l1
from ..passes.forecast import forecast
from ..passes.names import STACK
from ..passes.observe import observe
from ..runtime.binding import Binding
from ..runtime.calls import ModelCall, Moment, StepClock
from ..runtime.variant import Mask, SiteInfo, Variant
from ..schedules.schedule import Schedule
from .sketches import EffectSums, Subset, Tokens, floating_tensors

log = logging.getLogger(__name__)

Reuse = Callable[[SiteInfo, Collection[int]], Sequence[tuple[int, float]]]
"""How a site is reused, given the lags at which outputs are kept: lags and coefficients; empty if it is computed."""


def _all_from(lag: int) -> Reuse:
    return lambda site, kept: ((lag, 1.0),)


@dataclass
class _Kept:
    """One call's outputs per site, and the step that they are of."""

    step: int
    outputs: list[list[torch.Tensor]]
    #: Where they were made.
    device: torch.device
    #: Per site, some elements of its outputs.
    subsets: list[torch.Tensor]


@dataclass
class Recorded:
    """What was recorded of one capture.

    Attributes:
        sites: by name.
        observations: per site, ``(lag, step, relative L1 error)`` in the order they were seen.
        products: per site, ``(lag, step, mean product)`` likewise; none where ``reach`` is 0.
        history: per binding and stream, the trajectory and the outputs kept of it, the latest first.
        kept_bytes: their memory.
    """

    sites: dict[str, SiteInfo] = field(default_factory=dict)
    observations: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    products: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    history: dict[tuple[int, Hashable], tuple[int, deque[_Kept]]] = field(default_factory=dict)
    kept_bytes: dict[tuple[int, Hashable], int] = field(default_factory=dict)


class ObservedDispatcher:
    """The dispatcher of a captured graph that also returns its sites' outputs, which it hands to the recorder."""

    _boxed_call = True

    def __init__(self, builder: GraphBuilder, recorder: Recorder) -> None:
        self.builder = builder
        self.graph = observe(builder.captured, builder.sites)
        self.outputs_per_site = [len(site.outputs) for site in builder.sites]
        self.recorder = recorder
        self.variants: dict[Hashable, Variant] = {}

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        if self.recorder.replaying is not None and self.outputs_per_site:
            return self._reuse(inputs, self.recorder.replaying)
        outputs = self.graph(*inputs)
        inputs.clear()
        own = len(outputs) - sum(self.outputs_per_site)
        rest = iter(outputs[own:])
        values = [[next(rest) for _ in range(count)] for count in self.outputs_per_site]
        self.recorder.record(self.recorder.current.call.binding, values)
        return outputs[:own]

    def serve(self, builder: GraphBuilder, variants: dict[Hashable, Variant]) -> None:
        self.builder, self.variants = builder, variants

    def close(self) -> None:
        self.variants.clear()

    def _reuse(self, inputs: list[Any], reuse: Reuse) -> Sequence[Any]:
        """The graph's outputs if sites are reused in place of being computed.

        What is kept of this step are then, of sites that are computed, the outputs of this call.
        """
        binding = self.recorder.current.call.binding
        sites, history = binding.sites, self.recorder.history(binding)
        if 0 not in history:  # Dynamo has captured the second call anew: its branches have no outputs to be reused
            self.recorder.note_not_reused()
            outputs = self.graph(*inputs)
            inputs.clear()
            return outputs[: len(outputs) - sum(self.outputs_per_site)]
        terms = [reuse(site, history) for site in sites]
        computed = sum(1 << i for i, reused in enumerate(terms) if not reused)
        mask = Mask(computed, store=computed)
        if mask not in self.variants:
            self.variants[mask] = self.builder.build_uncompiled(mask)
        variant = self.variants[mask]
        values: dict[int, torch.Tensor] = {}
        now = history[0]
        for index, (site, reused) in enumerate(zip(sites, terms, strict=True)):
            for place, buffer in enumerate(site.buffers):
                if not reused:
                    values[buffer] = torch.empty_like(now.outputs[index][place], device=now.device)
                    continue
                outputs = [history[lag].outputs[index][place] for lag, _ in reused]
                amounts = torch.tensor([coefficient for _, coefficient in reused], device=outputs[0].device)
                values[buffer] = (outputs[0] if len(outputs) == 1 else forecast(outputs, amounts)).to(now.device)
        arguments = variant.pick_inputs(inputs)
        inputs.clear()
        result = variant.run([*arguments, *(values[buffer] for buffer in variant.buffers)])
        for site, reused, outputs in zip(sites, terms, now.outputs, strict=True):
            if not reused:
                outputs[:] = [values[buffer].to(outputs[0].device) for buffer in site.buffers]
        return result


class Recorder(Session):
    """The session of a calibration: keeps the last outputs of each site and notes how far each new one lies from them.

    Attributes:
        recorded: sites, observations and products of the capture.
        effects: sums of the effects of reuse.
        reach: how many steps back products and effects go.
        replaying: how sites are reused; None where all are computed.
        history_bytes: memory of the outputs kept at the same time, at most.
        max_history_bytes: what it may be. Where whole outputs would take more, some of their tokens are kept.
        token_share: how many.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        clock: StepClock,
        lags: int,
        history_device: torch.device | None,
        reach: int = 0,
        followed: Schedule | None = None,
        grain: str = "branch",
        max_history_bytes: int | None = None,
    ) -> None:
        sites = Schedule(1, {STACK: (1,)} if grain == STACK else {})
        super().__init__(sites, inner_compiler("eager", None, None, None), clock, root)
        self.lags = lags
        self.reach = reach
        self.followed = followed
        #: Steps for which outputs are kept; where the model is called again, the last call's are kept beside them.
        self.keep = max(lags, reach, 0 if followed is None else _lookback(followed))
        self.history_device = history_device
        self.recorded = Recorded()
        self.effects = EffectSums()
        self.replaying: Reuse | None = None
        self.history_bytes = 0
        self.max_history_bytes = max_history_bytes
        self.token_share = 1.0
        #: Picks the tokens that are kept; None if all are, or until a whole step's outputs have been seen.
        self._tokens: Tokens | None = None
        self._first_moment: Moment | None = None
        #: Whether branches were computed in the last replay that should have been reused.
        self._not_reused = self._told_not_reused = False
        self._subset = Subset()

    @property
    def moment(self) -> Moment:
        """Where the call is that is recorded."""
        return self.current.call.moment

    @property
    def calls_again(self) -> bool:
        """Whether the model is called again after each call, with sites that are reused."""
        return self.reach > 0 or self.followed is not None

    def call_again(self, forward: Callable[[], Any], output: Any) -> Any:
        """What the call returns: ``output``, or what the followed schedule makes of it.

        Before, reuse is tried at all lags, to note what it changes.
        """
        computed = floating_tensors(output)
        for lag in self.lags_kept():
            if lag > self.reach:
                break
            reused = floating_tensors(self.replay(forward, _all_from(lag)))
            if self._not_reused:
                break
            change = [after.float() - before.float() for after, before in zip(reused, computed, strict=True)]
            self.effects.add(self.moment.step, lag, change, self.moment.stream, self.moment.trajectory)
        return output if self.followed is None else self.replay(forward, self._as_scheduled)

    def _as_scheduled(self, site: SiteInfo, kept: Collection[int]) -> Sequence[tuple[int, float]]:
        """How the followed schedule has a site reused at this step."""
        schedule, step = self.followed, self.moment.step
        if step >= schedule.steps:
            raise CalibrationError(
                f"the sampler takes more steps than the schedule to be followed, which has {schedule.steps}"
            )
        row = schedule.row_for(site)
        if row[step]:
            return ()
        lags = [lag for lag in sorted(kept) if lag and row[step - lag]][: schedule.order_for(site) + 1]
        if not lags:
            return ()
        return tuple(zip(lags, schedule.forecast(site, step, [step - lag for lag in lags]), strict=True))

    def dispatcher(self, builder: GraphBuilder) -> ObservedDispatcher:
        return ObservedDispatcher(builder, self)

    def record(self, binding: Binding, values: list[list[torch.Tensor]]) -> None:
        """Compare one call's outputs, per site, with those of the steps before in the same trajectory and stream."""
        if not values:
            return
        self._limit_history()
        if self._tokens is not None:
            values = [[self._tokens(output) for output in outputs] for outputs in values]
        place = id(binding), self.moment.stream
        trajectory, history = self.recorded.history.get(place, (-1, deque()))
        step = self.moment.step
        if trajectory != self.moment.trajectory:
            history = deque(maxlen=self.keep + self.calls_again)
        while history and not 0 < step - history[-1].step <= self.keep:
            history.pop()  # a stream may be absent for some steps
        self.recorded.history[place] = self.moment.trajectory, history
        recent = [earlier for earlier in history if step - earlier.step <= self.lags]
        sums = [
            functools.reduce(
                torch.add,
                (relative_l1(fresh, [earlier.outputs[i][j] for earlier in recent]) for j, fresh in enumerate(outputs)),
            )
            for i, outputs in enumerate(values)
        ]
        lags = [step - earlier.step for earlier in recent]
        # One wait for the device per call, however many sites there are.
        for site, (size, *distances) in zip(binding.sites, torch.stack(sums).tolist(), strict=True):
            self._note(site, size, zip(lags, distances, strict=True))
        subsets = self._note_products(binding, values, history) if self.reach else []
        kept = [[output.to(self.history_device or output.device) for output in outputs] for outputs in values]
        history.appendleft(_Kept(step, kept, values[0][0].device, subsets))
        self.recorded.kept_bytes[place] = _bytes_of(history)
        self.history_bytes = max(self.history_bytes, sum(self.recorded.kept_bytes.values()))

    def _limit_history(self) -> None:
        """Once all outputs of one step are kept, decide how much of those of all steps may be.

        Raises:
            CalibrationError: it is not enough, and whole outputs are needed to call the model again with them.
        """
        if self.max_history_bytes is None:
            return
        if self._first_moment is None:
            self._first_moment = self.moment
        first = self._first_moment
        if (self.moment.trajectory, self.moment.step) == (first.trajectory, first.step):
            return
        limit, self.max_history_bytes = self.max_history_bytes, None
        needed = sum(self.recorded.kept_bytes.values()) * (self.keep + self.calls_again)
        if needed <= limit:
            return
        if self.calls_again:
            raise CalibrationError(
                f"the outputs of {self.keep + self.calls_again} steps take {format_bytes(needed)}, and "
                f"max_history_bytes is {format_bytes(limit)}. Effects and followed schedules need whole outputs: give "
                "order=None, which keeps fewer steps and, if it must, some tokens of each; or fewer lags, "
                "grain='stack', or history_device='cpu' and a higher limit"
            )
        self.token_share = limit / needed
        self._tokens = Tokens(self.token_share)
        log.warning(
            "errors are measured on %.2g%% of the tokens, to keep within max_history_bytes", 100 * limit / needed
        )
        for place, (_, history) in self.recorded.history.items():
            for kept in history:
                kept.outputs = [[self._tokens(output) for output in outputs] for outputs in kept.outputs]
            self.recorded.kept_bytes[place] = _bytes_of(history)

    def history(self, binding: Binding) -> dict[int, _Kept]:
        """What is kept of the binding's sites in this stream, by how many steps ago it was made."""
        _, history = self.recorded.history.get((id(binding), self.moment.stream), (-1, ()))
        return {self.moment.step - kept.step: kept for kept in history}

    def lags_kept(self) -> list[int]:
        """The lags at which all sites of the last call can be reused."""
        stream, step = self.moment.stream, self.moment.step
        seen = [
            {step - kept.step for kept in history}
            for (_, of), (trajectory, history) in self.recorded.history.items()
            if of == stream and trajectory == self.moment.trajectory and history[0].step == step
        ]
        return sorted(set.intersection(*seen) - {0}) if seen else []

    def replay(self, forward: Callable[[], Any], reuse: Reuse) -> Any:
        """What the model returns if sites are reused like this."""
        self.current.call = ModelCall(self.moment)  # its own call, for the bindings
        self.replaying, self._not_reused = reuse, False
        try:
            with torch.random.fork_rng():
                return forward()
        finally:
            self.replaying = None

    def note_not_reused(self) -> None:
        """A graph has no outputs that could be reused in the place of its branches: they were computed."""
        self._not_reused = True
        if not self._told_not_reused:
            self._told_not_reused = True
            log.warning(
                "a call of %s with copies of its inputs was captured as another graph than the call itself, and so "
                "its branches are computed where they should be reused: TORCH_LOGS=recompiles says what differs",
                type(self.root).__name__,
            )

    def set_aside(self) -> Capture:
        kept = super().set_aside()
        kept.recorded, self.recorded = self.recorded, Recorded()
        return kept

    def put_back(self, kept: Capture) -> None:
        super().put_back(kept)
        self.recorded = kept.recorded

    def close(self) -> None:
        """Free the kept outputs, too."""
        self.recorded.history.clear()
        super().close()

    def _note_products(
        self, binding: Binding, values: list[list[torch.Tensor]], history: Sequence[_Kept]
    ) -> list[torch.Tensor]:
        """The mean products of each site's outputs with its earlier ones, over the elements that are looked at."""
        subsets = [torch.cat([self._subset(output) for output in outputs]) for outputs in values]
        earlier = [kept for kept in history if self.moment.step - kept.step <= self.reach]
        means = [
            torch.stack([fresh, *(kept.subsets[i] for kept in earlier)]) @ fresh / len(fresh)
            for i, fresh in enumerate(subsets)
        ]
        lags = [0, *(self.moment.step - kept.step for kept in earlier)]
        for site, found in zip(binding.sites, torch.stack(means).tolist(), strict=True):
            seen = self.recorded.products.setdefault(site.name, [])
            seen.extend((lag, self.moment.step, value) for lag, value in zip(lags, found, strict=True))
        return subsets

    def _note(self, site: SiteInfo, size: float, distances: Iterable[tuple[int, float]]) -> None:
        step = self.moment.step
        if not math.isfinite(size):
            raise CalibrationError(
                f"the output of {site.name} has NaN or infinite values at step {step} of trajectory "
                f"{self.moment.trajectory}: no schedule can be made of this. Check the weights, the inputs, and "
                "whether the dtype's range is enough"
            )
        self.recorded.sites.setdefault(site.name, site)
        seen = self.recorded.observations.setdefault(site.name, [])
        for lag, distance in distances:
            # A branch that is all zeros, then and now, has not changed.
            seen.append((lag, step, distance / size if size else (0.0 if distance == 0.0 else math.inf)))


def _bytes_of(history: Iterable[_Kept]) -> int:
    return sum(tensor.nbytes for kept in history for outputs in kept.outputs for tensor in outputs)


def _lookback(schedule: Schedule) -> int:
    """How many steps back the schedule reuses outputs, at most."""
    farthest = 0
    for row in schedule.compute.values():
        computed: list[int] = []
        for step, decision in enumerate(row):
            if decision:
                computed = [step, *computed[: schedule.highest_order]]
            elif computed:
                farthest = max(farthest, step - computed[-1])
    return farthest
