"""``calibrate``: run the model as it is, and measure how much each site's output changes from step to step."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
from .forecast import weights
from .forward import ForwardPlace, check_inference, no_sites_error
from .inner import inner_compiler
from .kernels import relative_l1
from .passes import observe
from .passes.forecast import forecast
from .pipelines import denoisers, follow_cache_context, is_pipeline
from .program import Binding, Mask, SiteInfo, Variant
from .schedule import HIGHEST_ORDER, Schedule
from .scheduler_clock import DenoiserClock, SchedulerClock
from .site_errors import SiteErrors
from .traced import Traced

log = logging.getLogger(__name__)


Reads = Callable[[SiteInfo, Collection[int]], Sequence[tuple[int, float]]]
"""How a site is read, given the lags at which outputs are kept: lags and weights; empty if it is computed."""


def _all_from(lag: int) -> Reads:
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
            return self._read(inputs, self.recorder.replaying)
        outputs = self.graph(*inputs)
        inputs.clear()
        own = len(outputs) - sum(self.outputs_per_site)
        rest = iter(outputs[own:])
        values = [[next(rest) for _ in range(count)] for count in self.outputs_per_site]
        self.recorder.record(self.binding, values)
        return outputs[:own]

    def _read(self, inputs: list[Any], reads: Reads) -> Sequence[Any]:
        """The graph's outputs if sites are read in place of being computed.

        What is kept of this step are then, of sites that are computed, the outputs of this call.
        """
        sites = self.binding.sites
        history = self.recorder.history(self.binding)
        terms = [reads(site, history) for site in sites]
        computed = sum(1 << i for i, read in enumerate(terms) if not read)
        mask = Mask(computed, store=computed)
        if mask not in self._readers:
            self._readers[mask] = self.builder.build_uncompiled(mask)
        reader = self._readers[mask]
        values: dict[int, torch.Tensor] = {}
        now = history[0]
        for index, (site, read) in enumerate(zip(sites, terms, strict=True)):
            for place, buffer in enumerate(site.buffers):
                if not read:
                    values[buffer] = torch.empty_like(now.outputs[index][place], device=now.device)
                    continue
                outputs = [history[lag].outputs[index][place] for lag, _ in read]
                amounts = torch.tensor([weight for _, weight in read], device=outputs[0].device)
                values[buffer] = (outputs[0] if len(outputs) == 1 else forecast(outputs, amounts)).to(now.device)
        arguments = reader.pick_inputs(inputs)
        inputs.clear()
        result = reader.run([*arguments, *(values[buffer] for buffer in reader.buffers)])
        for site, read, outputs in zip(sites, terms, now.outputs, strict=True):
            if not read:
                outputs[:] = [values[buffer].to(outputs[0].device) for buffer in site.buffers]
        return result


class Recorder(Session):
    """The session of a calibration: keeps the last outputs of each site and notes how far each new one lies from them.

    Attributes:
        observations: per site, ``(lag, step, relative L1 error)`` in the order they were seen.
        products: per site, ``(lag, step, mean product)`` likewise; none where ``reach`` is 0.
        effects: sums of the effects of reads.
        reach: how many steps back products and effects go.
        replaying: how sites are read; None where all are computed.
        history_bytes: memory of the outputs kept at the same time, at most.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        clock: Clock | DenoiserClock,
        lags: int,
        history_device: torch.device | None,
        reach: int = 0,
        followed: Schedule | None = None,
    ) -> None:
        super().__init__(Schedule(steps=1), inner_compiler("eager", None, None, None), clock, root)
        self.lags = lags
        self.reach = reach
        self.followed = followed
        #: Steps for which outputs are kept; where the model is called again, the last call's are kept beside them.
        self.keep = max(lags, reach, 0 if followed is None else _lookback(followed))
        self.history_device = history_device
        self.sites: dict[str, SiteInfo] = {}
        self.observations: dict[str, list[tuple[int, int, float]]] = {}
        self.products: dict[str, list[tuple[int, int, float]]] = {}
        self.effects = EffectSums()
        self.replaying: Reads | None = None
        self.history_bytes = 0
        self._subset = Subset()
        self._history: dict[tuple[int, Hashable], tuple[int, deque[_Kept]]] = {}
        self._kept: dict[tuple[int, Hashable], int] = {}

    @property
    def calls_again(self) -> bool:
        """Whether the model is called again after each call, with sites that are read."""
        return self.reach > 0 or self.followed is not None

    def call_again(self, forward: Callable[[], Any], output: Any) -> Any:
        """What the call returns: ``output``, or what the followed schedule makes of it.

        Before, reads at all lags are tried out, to note what they change.
        """
        computed = floating_tensors(output)
        for lag in self.lags_kept():
            if lag > self.reach:
                break
            read = floating_tensors(self.replay(forward, _all_from(lag)))
            change = [after.float() - before.float() for after, before in zip(read, computed, strict=True)]
            self.effects.add(self.clock.step, lag, change, self.clock.stream, self.clock.trajectory)
        return output if self.followed is None else self.replay(forward, self._as_scheduled)

    def _as_scheduled(self, site: SiteInfo, kept: Collection[int]) -> Sequence[tuple[int, float]]:
        """How the followed schedule has a site read at this step."""
        schedule, step = self.followed, self.clock.step
        if step >= schedule.steps:
            raise CalibrationError(
                f"the sampler takes more steps than the schedule to be followed, which has {schedule.steps}"
            )
        row = schedule.row_for(site)
        if row[step]:
            return ()
        lags = [lag for lag in sorted(kept) if lag and row[step - lag]][: schedule.order_for(site) + 1]
        times = range(schedule.steps) if schedule.times is None else schedule.times
        return tuple(zip(lags, weights([times[step - lag] for lag in lags], times[step]), strict=True)) if lags else ()

    def dispatcher(self, builder: GraphBuilder) -> ObservedProgram:
        return ObservedProgram(builder, self)

    def record(self, binding: Binding, values: list[list[torch.Tensor]]) -> None:
        """Compare one call's outputs, per site, with those of the steps before in the same trajectory and stream."""
        if not values:
            return
        place = id(binding), self.clock.stream
        trajectory, history = self._history.get(place, (-1, deque()))
        step = self.clock.step
        if trajectory != self.clock.trajectory:
            history = deque(maxlen=self.keep + self.calls_again)
        while history and not 0 < step - history[-1].step <= self.keep:
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

    def history(self, binding: Binding) -> dict[int, _Kept]:
        """What is kept of the binding's sites in this stream, by how many steps ago it was made."""
        _, history = self._history[id(binding), self.clock.stream]
        return {self.clock.step - kept.step: kept for kept in history}

    def lags_kept(self) -> list[int]:
        """The lags at which all sites of the last call can be read."""
        stream, step = self.clock.stream, self.clock.step
        seen = [
            {step - kept.step for kept in history}
            for (_, of), (trajectory, history) in self._history.items()
            if of == stream and trajectory == self.clock.trajectory and history[0].step == step
        ]
        return sorted(set.intersection(*seen) - {0}) if seen else []

    def replay(self, forward: Callable[[], Any], reads: Reads) -> Any:
        """What the model returns if sites are read like this."""
        self.clock.serial += 1  # a call of its own, for the bindings
        self.replaying = reads
        try:
            with torch.random.fork_rng():
                return forward()
        finally:
            self.replaying = None

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


def _lookback(schedule: Schedule) -> int:
    """How many steps back the schedule's reads look, at most."""
    farthest = 0
    for row in schedule.compute.values():
        computed: list[int] = []
        for step, decision in enumerate(row):
            if decision:
                computed = [step, *computed[: schedule.highest_order]]
            elif computed:
                farthest = max(farthest, step - computed[-1])
    return farthest


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
        self._timestep = TimestepReader(original)
        self._compiled = Traced(original, recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_inference(self.model, args, kwargs)
        clock = self.recorder.clock
        clock.enter(Call(type(self.model).__name__, self._timestep, args, kwargs), wait=True)
        if clock.trajectories > len(self.lengths):
            self.lengths.append(0)
        # The call may write to its own inputs.
        again = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)) if self.recorder.calls_again else None
        with torch.no_grad():
            output = self._compiled(*args, **kwargs)
            if again is not None:
                output = self.recorder.call_again(lambda: self._compiled(*again[0], **again[1]), output)
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
    schedule: Schedule | None = None,
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
        order: also measure what optimal schedules need (``Calibration.schedule(solver="optimal")``), for forecasts up
            to this order, 0 to 2. Outputs are then kept for ``(order + 1) * (lags + 1) - 1`` steps, and after each call
            the model is called once more for each of them, with all branches read in place of being computed, which
            costs little in a model that is large. Inner products of a branch's outputs are taken over 4096 random
            elements of each: a relative error of a forecast is known to within about 2% of itself from one call.
        schedule: follow this schedule, with its forecasts: the sampler gets what the compiled model would give it, and
            all is measured along that trajectory. All branches are computed nonetheless.
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
    if schedule is not None and not isinstance(schedule, Schedule):
        raise CalibrationError(f"schedule is a {type(schedule).__name__}, expected a Schedule to follow, or None")
    farthest = 0 if order is None else reach(lags, order)
    device = None if history_device is None else torch.device(history_device)
    metadata = {"model": type(model_or_pipeline).__name__}

    def recorder(model: torch.nn.Module, clock: Clock | DenoiserClock) -> Recorder:
        return Recorder(model, clock, lags, device, farthest, schedule)

    with observing(model_or_pipeline, recorder, steps, calls_per_step, progress) as observed:
        sample(model_or_pipeline)
        total = observed.steps()
    if schedule is not None and schedule.steps != total:
        raise CalibrationError(f"the sampler takes {total} steps, the schedule to be followed has {schedule.steps}")
    recorder_bytes = sum(recorder.history_bytes for recorder in observed.recorders)
    log.info("calibration kept %.1f MiB of outputs", recorder_bytes / 2**20)
    return gather(observed.recorders, total, metadata)


R = TypeVar("R", bound=Recorder)


@dataclass
class Observed(Generic[R]):
    """A model or pipeline whose denoisers are observed: a recorder each, and the steps of each trajectory so far."""

    recorders: list[R]
    steps: Callable[[], int]


@contextlib.contextmanager
def observing(
    model_or_pipeline: Any,
    recorder: Callable[[torch.nn.Module, Clock | DenoiserClock], R],
    steps: int | None,
    calls_per_step: int,
    progress: bool,
) -> Iterator[Observed[R]]:
    """Observe while the ``with`` lasts. The model is then as it was; what was kept of outputs is freed."""
    with _progress_bar(progress) as bar, contextlib.ExitStack() as restore:
        if not is_pipeline(model_or_pipeline):
            check_compilable(model_or_pipeline)
            only = recorder(model_or_pipeline, Clock(steps, calls_per_step))
            forward = _observe(only, model_or_pipeline, bar, restore)
            yield Observed([only], lambda: _whole_steps(forward.lengths, calls_per_step, steps))
            return
        models = denoisers(model_or_pipeline).values()
        if calls_per_step != 1:
            raise CalibrationError("calls_per_step is for bare models: a pipeline's scheduler ends a step")
        shared = SchedulerClock(steps)
        recorders = []
        for model in models:
            check_compilable(model)
            recorders.append(recorder(model, DenoiserClock(shared)))
            _observe(recorders[-1], model, bar, restore)
            restore.callback(follow_cache_context(model, recorders[-1].clock))
        restore.callback(shared.detach)
        shared.attach(model_or_pipeline)
        yield Observed(recorders, lambda: _steps_of(shared))


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
