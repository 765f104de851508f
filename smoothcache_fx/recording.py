"""``calibrate``: run the model as it is, and measure how much each site's output changes from step to step."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ._optimal import reach
from ._products import Products
from ._replay import EffectSums, Subset, floating_tensors
from .backend import Session
from .build import GraphBuilder
from .calibration import Calibration
from .clock import Call, Clock, TimestepReader
from .compiler import check_compilable
from .errors import CalibrationError
from .forward import ForwardPlace, check_inference, no_sites_error
from .inner import inner_compiler
from .kernels import relative_l1
from .passes import observe
from .pipelines import denoisers, follow_cache_context, is_pipeline
from .program import Binding, Mask, SiteInfo, Variant
from .schedule import HIGHEST_ORDER, Schedule
from .scheduler_clock import DenoiserClock, SchedulerClock
from .site_errors import SiteErrors
from .traced import Traced

log = logging.getLogger(__name__)


@dataclass
class _Kept:
    """One call's outputs per site, and the step that they are of."""

    step: int
    outputs: list[list[torch.Tensor]]
    #: Where they were made.
    device: torch.device
    #: Per site, some elements of its outputs.
    subsets: list[torch.Tensor]


class ObservedProgram:
    """The dispatcher of a captured graph that also returns its sites' outputs, which it hands to the recorder."""

    _boxed_call = True

    def __init__(self, builder: GraphBuilder, recorder: Recorder) -> None:
        self.builder = builder
        self.graph = observe(builder.captured, builder.sites)
        self.outputs_per_site = [len(site.outputs) for site in builder.sites]
        self.recorder = recorder
        self.binding: Binding | None = None
        self._readers: dict[Mask, Variant] = {}

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        if self.recorder.replaying is not None and self.outputs_per_site:
            return self._read(inputs, *self.recorder.replaying)
        outputs = self.graph(*inputs)
        inputs.clear()
        own = len(outputs) - sum(self.outputs_per_site)
        rest = iter(outputs[own:])
        values = [[next(rest) for _ in range(count)] for count in self.outputs_per_site]
        self.recorder.record(self.binding, values)
        return outputs[:own]

    def _read(self, inputs: list[Any], lag: int, group: str | None) -> Sequence[Any]:
        """The graph's outputs if the group's sites give what they gave ``lag`` steps before the last call recorded."""
        sites = self.binding.sites
        computed = sum(1 << i for i, site in enumerate(sites) if group not in (None, site.group))
        mask = Mask(computed, store=0)
        if mask not in self._readers:
            self._readers[mask] = self.builder.build_uncompiled(mask)
        reader = self._readers[mask]
        kept = self.recorder.kept(self.binding, lag)
        values: dict[int, torch.Tensor] = {}
        for site, outputs in zip(sites, kept.outputs, strict=True):
            values.update(zip(site.buffers, outputs, strict=True))
        arguments = reader.pick_inputs(inputs)
        inputs.clear()
        return reader.run([*arguments, *(values[i].to(kept.device) for i in reader.buffers)])


class Recorder(Session):
    """The session of a calibration: keeps the last outputs of each site and notes how far each new one lies from them.

    Attributes:
        observations: per site, ``(lag, step, relative L1 error)`` in the order they were seen.
        products: per site, ``(lag, step, mean product)`` likewise; none where ``reach`` is 0.
        effects: sums of the effects of reads.
        reach: how many steps back products and effects go.
        replaying: the lag at which the sites of a group (None for all) are read; None where all are computed.
        history_bytes: memory of the outputs kept at the same time, at most.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        clock: Clock | DenoiserClock,
        lags: int,
        history_device: torch.device | None,
        reach: int = 0,
    ) -> None:
        super().__init__(Schedule(steps=1), inner_compiler("eager", None, None, None), clock, root)
        self.lags = lags
        self.history_device = history_device
        self.sites: dict[str, SiteInfo] = {}
        self.observations: dict[str, list[tuple[int, int, float]]] = {}
        self.products: dict[str, list[tuple[int, int, float]]] = {}
        self.effects = EffectSums()
        self.reach = reach
        self.replaying: tuple[int, str | None] | None = None
        self.history_bytes = 0
        self._subset = Subset()
        self._history: dict[tuple[int, Hashable], tuple[int, deque[_Kept]]] = {}
        self._kept: dict[tuple[int, Hashable], int] = {}

    def dispatcher(self, builder: GraphBuilder) -> ObservedProgram:
        return ObservedProgram(builder, self)

    def record(self, binding: Binding, values: list[list[torch.Tensor]]) -> None:
        """Compare one call's outputs, per site, with those of the steps before in the same trajectory and stream."""
        if not values:
            return
        place = id(binding), self.clock.stream
        trajectory, history = self._history.get(place, (-1, deque()))
        step, farthest = self.clock.step, max(self.lags, self.reach)
        if trajectory != self.clock.trajectory:
            history = deque(maxlen=farthest + (self.reach > 0))
        while history and not 0 < step - history[-1].step <= farthest:
            history.pop()  # a stream may be absent for some steps
        self._history[place] = self.clock.trajectory, history
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
        self._kept[place] = sum(t.numel() * t.element_size() for e in history for out in e.outputs for t in out)
        self.history_bytes = max(self.history_bytes, sum(self._kept.values()))

    def kept(self, binding: Binding, lag: int) -> _Kept:
        """What the binding's sites gave ``lag`` steps before this one; CalibrationError if that was not seen."""
        _, history = self._history[id(binding), self.clock.stream]
        found = next((kept for kept in history if self.clock.step - kept.step == lag), None)
        if found is None:
            raise CalibrationError(f"no output of {binding.sites[0].name} is kept of {lag} steps before")
        return found

    def lags_kept(self) -> list[int]:
        """The lags at which all sites of the last call can be read."""
        stream, step = self.clock.stream, self.clock.step
        seen = [
            {step - kept.step for kept in history}
            for (_, of), (trajectory, history) in self._history.items()
            if of == stream and trajectory == self.clock.trajectory and history[0].step == step
        ]
        return sorted(set.intersection(*seen) - {0}) if seen else []

    def replay(self, forward: Callable[[], Any], lag: int, group: str | None = None) -> Any:
        """What the model returns if all sites, or those of a group, are read from ``lag`` steps before."""
        self.clock.serial += 1  # a call of its own, for the bindings
        self.replaying = lag, group
        try:
            with torch.random.fork_rng():
                return forward()
        finally:
            self.replaying = None

    def try_out(self, forward: Callable[[], Any], output: Any) -> None:
        """Call the model again for each lag, with all sites read, and note what that changes."""
        computed = floating_tensors(output)
        for lag in self.lags_kept():
            read = floating_tensors(self.replay(forward, lag))
            change = [after.float() - before.float() for after, before in zip(read, computed, strict=True)]
            self.effects.add(self.clock.step, lag, change, self.clock.stream, self.clock.trajectory)

    def set_aside(self) -> dict[str, Any]:
        names = ("sites", "observations", "products", "_history", "_kept")
        kept = super().set_aside() | {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, {})
        return kept

    def forget(self) -> None:
        """Free the kept outputs: Dynamo holds on to the recorder for as long as to what it compiled."""
        self._history.clear()

    def _note_products(
        self, binding: Binding, values: list[list[torch.Tensor]], history: Sequence[_Kept]
    ) -> list[torch.Tensor]:
        """The mean products of each site's outputs with its earlier ones, over the elements that are looked at."""
        subsets = [torch.cat([self._subset(output) for output in outputs]) for outputs in values]
        earlier = [kept for kept in history if self.clock.step - kept.step <= self.reach]
        means = [
            torch.stack([fresh, *(kept.subsets[i] for kept in earlier)]) @ fresh / len(fresh)
            for i, fresh in enumerate(subsets)
        ]
        lags = [0, *(self.clock.step - kept.step for kept in earlier)]
        for site, found in zip(binding.sites, torch.stack(means).tolist(), strict=True):
            seen = self.products.setdefault(site.name, [])
            seen.extend((lag, self.clock.step, value) for lag, value in zip(lags, found, strict=True))
        return subsets

    def _note(self, site: SiteInfo, size: float, distances: Iterable[tuple[int, float]]) -> None:
        step = self.clock.step
        if not math.isfinite(size):
            raise CalibrationError(
                f"the output of {site.name} has NaN or infinite values at step {step} of trajectory "
                f"{self.clock.trajectory}: no schedule can be made of this. Check the weights, the inputs, and "
                "whether the dtype's range is enough"
            )
        self.sites.setdefault(site.name, site)
        seen = self.observations.setdefault(site.name, [])
        for lag, distance in distances:
            # A branch that is all zeros, then and now, has not changed.
            seen.append((lag, step, distance / size if size else (0.0 if distance == 0.0 else math.inf)))


def gather(recorders: Sequence[Recorder], steps: int, metadata: dict[str, str]) -> Calibration:
    """All observations per site; denoisers of one pipeline may have sites of one name, seen at different steps."""
    infos = {name: info for recorder in recorders for name, info in recorder.sites.items()}
    lags, farthest = recorders[0].lags, recorders[0].reach
    sites = []
    for name, info in infos.items():
        errors = SiteErrors.empty(name, info.group, info.kind, info.flops, lags=lags, steps=steps)
        if farthest:
            errors.products = Products.empty(steps, farthest)
        for recorder in recorders:
            for lag, step, value in recorder.observations.get(name, ()):
                errors.add(lag, step, value)
            for lag, step, value in recorder.products.get(name, ()):
                errors.products.add(step, lag, value)
        sites.append(errors)
    effects = EffectSums.together([recorder.effects for recorder in recorders], steps, farthest) if farthest else None
    history_bytes = sum(recorder.history_bytes for recorder in recorders)
    return Calibration(steps, lags, sites, history_bytes, metadata, effects)


class _ObservedForward:
    """What stands in the module's ``forward`` while it is calibrated."""

    def __init__(self, model: torch.nn.Module, original: Callable[..., Any], recorder: Recorder, progress: Any) -> None:
        functools.update_wrapper(self, original, updated=())
        self.model = model
        self.recorder = recorder
        self.progress = progress
        self.lengths: list[int] = []
        #: A step, and the group (None for all) whose sites are read there in place of being computed.
        self.probe: tuple[int, str | None] | None = None
        self._timestep = TimestepReader(original)
        self._compiled = Traced(original, recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_inference(self.model, args, kwargs)
        clock = self.recorder.clock
        clock.enter(Call(type(self.model).__name__, self._timestep, args, kwargs), wait=True)
        if clock.trajectories > len(self.lengths):
            self.lengths.append(0)
        recorder = self.recorder
        probed = self.probe is not None and clock.step == self.probe[0]
        # The call may write to its own inputs.
        again = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)) if recorder.reach or probed else None
        with torch.no_grad():
            output = self._compiled(*args, **kwargs)
            if probed and 1 in recorder.lags_kept():
                output = recorder.replay(lambda: self._compiled(*again[0], **again[1]), 1, self.probe[1])
            elif recorder.reach:
                recorder.try_out(lambda: self._compiled(*again[0], **again[1]), output)
        if not self.recorder.sites:
            raise no_sites_error(self.model, self.recorder)
        self.lengths[-1] += 1
        self.progress.update()
        return output


def calibrate(
    model_or_pipeline: Any,
    sample: Callable[[Any], Any],
    *,
    lags: int = 3,
    order: int | None = None,
    steps: int | None = None,
    calls_per_step: int = 1,
    history_device: torch.device | str | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure how much the sites' outputs change between steps, over whole sampling runs.

    The model runs uncached, and what ``sample`` gets from it is bit for bit what it gets without calibration.

    Args:
        model_or_pipeline: the transformer, in eval mode and not compiled, or a pipeline (see ``compile``), whose
            scheduler then tells the steps.
        sample: called once with the model or pipeline; runs one or more whole trajectories with it. The paper uses ten
            samples, in one batch or one after the other. Where a trajectory of a bare model begins is seen from its
            timestep argument; for a model without one, give ``steps``.
        lags: how many steps back to compare with: the longest reuse that a schedule made of this can have.
        order: also measure what optimal schedules need (``Calibration.schedule(solver="optimal")``), for forecasts up to
            this order, 0 to 2. Outputs are then kept for ``(order + 1) * (lags + 1) - 1`` steps, and after each call the
            model is called once more for each of them, with all branches read in place of being computed, which costs
            little. Inner products of a branch's outputs are taken over 4096 random elements of each: a relative
            error of a forecast is known to within about 2% of itself from one call, and better from more.
        steps: denoising steps in a trajectory, if they cannot be seen from the timesteps.
        calls_per_step: calls of a bare model in one step; each has a history of its own.
        history_device: where the last ``lags`` outputs of every site are kept (the model's device by default). They
            take ``lags`` times the cache of the schedule: ``batch * tokens * width * bytes per element`` a branch.
            ``"cpu"`` spares the device's memory and takes longer.
        progress: show a progress bar (needs tqdm).

    Returns:
        The errors of Eq. 4 of the paper (arXiv 2411.10510): ``sum|y_t - y_{t-k}| / sum|y_t|`` with the fresh output
        in the denominator, per site, lag k and step t, averaged over trajectories and calls. Sites of one name in two
        denoisers of a pipeline are one.

    Raises:
        CalibrationError: no model call was made, trajectories differ in length, or an output is NaN or infinite.
        NoSitesError: the model has no residual branch.
        CompiledError: the model is compiled, in training mode, or an input requires gradients.
    """
    for name, value in (("lags", lags), ("calls_per_step", calls_per_step), ("steps", steps or 1)):
        if not isinstance(value, int) or value < 1:
            raise CalibrationError(f"{name} must be a positive whole number, got {value!r}")
    if order is not None and order not in range(HIGHEST_ORDER + 1):
        raise CalibrationError(f"order is {order!r}, expected 0, 1 or 2, or None for the paper's rule alone")
    farthest = 0 if order is None else reach(lags, order)
    device = None if history_device is None else torch.device(history_device)
    metadata = {"model": type(model_or_pipeline).__name__}
    with observing(model_or_pipeline, lags, farthest, steps, calls_per_step, device, progress) as observed:
        sample(model_or_pipeline)
        total = observed.steps()
    recorders = [forward.recorder for forward in observed.forwards]
    recorder_bytes = sum(recorder.history_bytes for recorder in recorders)
    log.info("calibration kept %.1f MiB of outputs", recorder_bytes / 2**20)
    return gather(recorders, total, metadata)


@dataclass
class Observed:
    """A model or pipeline whose denoisers are observed: their forwards, and the steps of each trajectory so far."""

    forwards: list[_ObservedForward]
    steps: Callable[[], int]


@contextlib.contextmanager
def observing(
    model_or_pipeline: Any,
    lags: int,
    farthest: int,
    steps: int | None,
    calls_per_step: int,
    device: torch.device | None,
    progress: bool,
) -> Iterator[Observed]:
    """Observe while the ``with`` lasts. The model is then as it was; what was kept of outputs is freed."""
    with _progress_bar(progress) as bar, contextlib.ExitStack() as restore:
        if not is_pipeline(model_or_pipeline):
            check_compilable(model_or_pipeline)
            recorder = Recorder(model_or_pipeline, Clock(steps, calls_per_step), lags, device, farthest)
            forward = _observe(recorder, model_or_pipeline, bar, restore)
            yield Observed([forward], lambda: _whole_steps(forward.lengths, calls_per_step, steps))
            return
        models = denoisers(model_or_pipeline).values()
        if calls_per_step != 1:
            raise CalibrationError("calls_per_step is for bare models: a pipeline's scheduler ends a step")
        shared = SchedulerClock(steps)
        forwards = []
        for model in models:
            check_compilable(model)
            forwards.append(
                _observe(Recorder(model, DenoiserClock(shared), lags, device, farthest), model, bar, restore)
            )
            restore.callback(follow_cache_context(model, forwards[-1].recorder.clock))
        restore.callback(shared.detach)
        shared.attach(model_or_pipeline)
        yield Observed(forwards, lambda: _steps_of(shared))


def _observe(
    recorder: Recorder, model: torch.nn.Module, progress: Any, restore: contextlib.ExitStack
) -> _ObservedForward:
    """Put the observer in the model's forward, and what takes it off again on ``restore``."""
    place = ForwardPlace(model)
    observed = _ObservedForward(model, place.forward, recorder, progress)
    place.put(observed)
    restore.callback(recorder.forget)
    restore.callback(_take_off, observed, place)
    return observed


def _take_off(observed: _ObservedForward, place: ForwardPlace) -> None:
    now = ForwardPlace(place.model)
    if now.forward is observed:
        now.put(place.forward)


def _steps_of(shared: SchedulerClock) -> int:
    """Steps of each of the pipeline's runs."""
    shared.finish()
    if not shared.trajectories:
        raise CalibrationError(
            "sample did not run the pipeline's denoisers between its scheduler's set_timesteps and last step: it must "
            "run the whole pipeline that it is given. For a sampling loop of your own give calibrate the model itself"
        )
    if len(shared.lengths) > 1 or shared.unfinished:
        raise CalibrationError(
            f"the runs had {', '.join(map(str, sorted(shared.lengths)))} timesteps, {shared.unfinished} ended early: "
            "sample must run the pipeline to the end, with the same number of steps each time"
        )
    (steps,) = shared.lengths
    return steps


def _whole_steps(lengths: list[int], calls_per_step: int, steps: int | None) -> int:
    """Steps of each trajectory, given how many calls each took."""
    if not lengths:
        raise CalibrationError(
            "sample did not call the model: it must run whole trajectories with the model it is given"
        )
    expected = steps * calls_per_step if steps else lengths[0]
    if set(lengths) != {expected} or expected % calls_per_step:
        wanted = f"{expected} each" if steps else f"one multiple of calls_per_step ({calls_per_step}) for all"
        raise CalibrationError(
            f"the trajectories took {', '.join(map(str, lengths))} calls of the model, expected {wanted}: sample must "
            "run whole trajectories of the same number of steps"
        )
    return lengths[0] // calls_per_step


def _progress_bar(show: bool) -> Any:
    if show:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            log.info("no progress bar: tqdm is not installed")
        else:
            return tqdm(desc="calibrating", unit=" calls")
    return _NoProgress()


class _NoProgress(contextlib.AbstractContextManager[Any]):
    """Stands where a progress bar would."""

    def __exit__(self, *details: object) -> None:
        pass

    def update(self) -> None:
        pass
