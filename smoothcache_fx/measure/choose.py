"""``choose``: the schedule that is best for a budget, or cheapest for a quality, by sampling with a few of them."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.measurements import FIT, GRAINS
from ..calibration.optimal import require_effects
from ..checks import function, instance, number_of, one_of, some_of, whole_number
from ..compiled.compiler import compile, remove, set_schedule
from ..errors import CalibrationError
from ..graphs.tables import Printable, format_table
from ..reports.compare import Comparison, Metric, as_vector, compare
from ..schedules.schedule import HIGHEST_ORDER, Schedule
from .calibrate import calibrate
from .candidates import Candidate, affordable_steps, candidates_for
from .expectation import Expectation, expectation
from .metrics import OVER, metric_of, over_samples
from .pace import MET, TimeBudget, degree
from .sensitivity import measure_sensitivity

log = logging.getLogger(__name__)

#: How far ahead forecasts aim that are tried where samples shall be near a ``target``.
TARGET_LEADS = (0.0, 0.25, 0.5)
#: Schedules of one budget that are tried before a larger budget is, where a quality is asked for.
TRIED = 3


@dataclass(frozen=True)
class Trial:
    """A schedule that was sampled with.

    Attributes:
        rows: where its rows come from: ``optimal``, ``even`` or ``every n-th``.
        schedule: itself.
        predicted: `Calibration.predicted_error`.
        metric: what was measured.
        grain: ``branch`` or ``stack``.
        expected: what the samples say of others.
    """

    rows: str
    schedule: Schedule
    predicted: float
    metric: float
    grain: str
    expected: Expectation | None = None


@dataclass(frozen=True)
class Choice(Printable):
    """What ``choose`` found; ``print`` it.

    Attributes:
        schedule: the one to compile with.
        metric: what was measured of it; infinite where it computes everything.
        trials: all that were sampled with, in that order.
        trajectories: calls of ``sample``, the calibration's among them.
        calibration: of the chosen grain, with sensitivities; for schedules of other budgets.
        expected: what to expect of other samples; None where everything is computed.
        seconds, speedup: of a run of ``sample``, and over the uncached run by the same compiler, if a time was asked
            for.
    """

    schedule: Schedule
    metric: float
    trials: tuple[Trial, ...]
    trajectories: int
    calibration: Calibration
    expected: Expectation | None = None
    seconds: float | None = None
    speedup: float | None = None

    def __str__(self) -> str:
        table = [("grain", "rows", "order", "compute", "predicted error", "metric", "")]
        for trial in self.trials:
            schedule = trial.schedule
            chosen = "chosen" if schedule is self.schedule else ""
            figures = f"{schedule.compute_fraction:.2f}", f"{trial.predicted:.4f}", f"{trial.metric:.4g}"
            order = FIT if schedule.coefficients else str(schedule.order)
            order += f" +{schedule.lead:g}" if schedule.lead else ""
            table.append((trial.grain, trial.rows, order, *figures, chosen))
        end = "" if any(trial.schedule is self.schedule for trial in self.trials) else "\nchosen: compute everything"
        lines = [f"{format_table(table)}{end}"]
        if self.expected is not None:
            lines.append(f"expected: {self.expected}")
        if self.seconds is not None:
            lines.append(f"a run takes {self.seconds:.3g} s, {self.speedup:.2f} times faster than an uncached one")
        return "\n".join([*lines, f"({self.trajectories} runs of sample)"])


def choose(
    model_or_pipeline: Any,
    sample: Callable[[Any], Any],
    *,
    compute: float | None = None,
    at_least: float | None = None,
    speedup: float | None = None,
    seconds: float | None = None,
    metric: Metric | str | None = None,
    target: Callable[[Any], Any] | None = None,
    over: str = "pooled",
    orders: Sequence[int | str] = (0, 1, 2, FIT),
    grains: Sequence[str] = ("branch",),
    lags: int = 5,
    trajectories: int = 20,
    probes: int = 4,
    calibration: Calibration | None = None,
    steps: int | None = None,
    calls_per_step: int | None = None,
    backend: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Choice:
    """Pick rows, order and grain by measuring: the best schedule for a budget, or the cheapest that is good enough.

    For each grain ``sample`` is run uncached to calibrate, and ``probes + 1`` times for sensitivities; then once with
    each schedule that is tried: of each order the optimal rows, evenly spaced ones, and every n-th step, the last too
    if the budget has room for it; those of the least predicted error first. All sites share a row. Afterwards the model
    is as it was.

    Args:
        model_or_pipeline: in eval mode and not compiled, as for ``compile``.
        sample: called with the model or pipeline; runs whole trajectories from fixed seeds and returns the samples.
            The more samples, the better what is chosen holds for others.
        compute: the largest share of the branches' FLOPs to compute, in (0, 1].
        at_least: in place of compute: what the metric must reach. The least share that does is searched by bisection.
        speedup: in place of compute: how many times faster a run of ``sample`` must be than an uncached one by the same
            compiler. What steps take is measured first, by runs that ``trajectories`` does not count; what is chosen is
            timed, and computes fewer steps where it has missed by more than 3%.
        seconds: in place of compute: what a run of ``sample`` may take, likewise.
        metric: a function of what ``sample`` returned uncached and cached, the higher the better; or the name of one:
            ``psnr`` (the default, in dB), ``ssim`` (needs scikit-image), ``lpips`` (1 less its distance; needs lpips).
        target: called once like ``sample``, uncached; returns what samples shall be near in place of the uncached ones,
            from the same seeds: such as those of four times the steps, which they converge to. Then forecasts that aim
            a quarter and half of a step ahead are tried, too (``lead`` of `Schedule`).
        over: what the metric is of: ``pooled``, of all samples together, where those that are farthest off decide; or
            ``mean`` or ``median``, of what it is of single samples.
        orders: of the forecasts that are tried: 0 to 2, and ``"fit"``, with the coefficients of `Calibration.fit`.
        grains: what schedules that are tried cache as one: ``branch``, ``stack`` (the longest runs of blocks), or both.
            Each grain is calibrated by itself.
        lags: the longest reuse.
        trajectories: how often ``sample`` may be run in all.
        probes: steps probed for sensitivities.
        calibration: in place of calibrating and probing, such as ``Choice.calibration`` of the same ``sample`` for
            another budget; ``sample`` is run uncached once all the same, to compare with. ``grains``, ``lags`` and
            ``probes`` then have no effect.
        steps: of a trajectory, if they cannot be seen from the timesteps.
        calls_per_step, backend, options: as for ``compile``. The default backend compiles nothing, but for times, where
            it is ``inductor``.
        progress: show progress bars (needs tqdm).

    Raises:
        CalibrationError: if not exactly one of compute, at_least, speedup and seconds is given, one argument is out of
            range, ``trajectories`` leaves none to try a schedule, no schedule meets the budget, or ``calibration``
            was not made with as high an order.
        ImportError: if the metric's package is not installed.

    Example:
        >>> choice = smoothcache.choose(model, sample, compute=0.4, steps=50)
        >>> print(choice)  # every schedule that was tried
        >>> model = smoothcache.compile(model, choice.schedule)
    """
    asked = {"compute": compute, "at_least": at_least, "speedup": speedup, "seconds": seconds}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        told = ", ".join(f"{name} is {value}" for name, value in asked.items())
        raise CalibrationError(f"{told}; give exactly one of them")
    ((name, value),) = given.items()
    wanted = number_of(value, name, "a number", CalibrationError)
    if name in ("speedup", "seconds"):
        least = 1 if name == "speedup" else 0
        number_of(value, name, f"a number above {least}", CalibrationError, lambda number: number > least)
    function(sample, "sample", "the model or pipeline that runs it")
    if target is not None:
        function(target, "target", "the model or pipeline, to sample what samples shall be near")
    measure = over_samples(metric_of(metric), one_of(over, "over", OVER, CalibrationError))
    if backend is None:
        backend = "inductor" if name in ("speedup", "seconds") else "eager"
    orders = some_of(orders, "orders", (*range(HIGHEST_ORDER + 1), FIT), CalibrationError)
    if not orders:
        raise CalibrationError("orders is empty, expected some of 0, 1, 2 and 'fit'")
    highest = HIGHEST_ORDER if FIT in orders else max(orders)
    grains = list(dict.fromkeys(some_of(grains, "grains", GRAINS, CalibrationError)))
    if not grains:
        raise CalibrationError("grains is empty, expected 'branch', 'stack' or both")
    probes = whole_number(probes, "probes", 1, CalibrationError)
    trajectories = whole_number(trajectories, "trajectories", 1, CalibrationError)
    if calibration is not None:
        instance(calibration, "calibration", Calibration, "calibrate makes one, and Calibration.load reads it")
    before = (probes + 2) * len(grains) if calibration is None else 1
    if not trajectories > before:
        raise CalibrationError(
            f"trajectories is {trajectories}, of which calibration and probes take {before}: none is left to try a "
            "schedule with; allow more, or probe less"
        )
    if calibration is None:
        found = [
            _calibrated(
                model_or_pipeline,
                sample,
                probes=probes,
                calls_per_step=calls_per_step,
                progress=progress,
                lags=lags,
                order=highest,
                steps=steps,
                grain=grain,
            )
            for grain in grains
        ]
        calibrations, reference = [one for one, _ in found], found[0][1]
    else:
        require_effects(calibration, max((order for order in orders if order != FIT), default=1))
        calibrations, reference = [calibration], sample(model_or_pipeline)
    if target is not None:
        reference = target(model_or_pipeline)
    leads = TARGET_LEADS if target is not None else (0.0,)

    if metric is None:
        as_vector(reference)  # raises where there is nothing that PSNR could be of
    compiled = False
    best: Trial | None

    def run(schedule: Schedule) -> Any:
        nonlocal compiled
        if compiled:
            set_schedule(model_or_pipeline, schedule)
        else:
            compile(model_or_pipeline, schedule, backend=backend, calls_per_step=calls_per_step, **options)
            compiled = True
        return sample(model_or_pipeline)

    trials = Trials(run, reference, measure, trajectories - before, leads)
    took: tuple[float, float] | tuple[None, None] = None, None
    try:
        if name == "at_least":
            best = trials.least(calibrations, orders, wanted)
        elif name == "compute":
            candidates = [
                candidate
                for calibration in calibrations
                for candidate in candidates_for(calibration, affordable_steps(calibration, wanted), orders, leads)
            ]
            best = trials.best(candidates, trials.left)
        else:

            def timing(schedules: Mapping[str, Schedule]) -> Comparison:
                nonlocal compiled
                if compiled:
                    remove(model_or_pipeline)
                    compiled = False
                settings = {"backend": backend, "calls_per_step": calls_per_step, **options}
                return compare(model_or_pipeline, schedules, sample, **settings)

            best, took = trials.in_time(TimeBudget(seconds, speedup, timing), calibrations, orders)
    finally:
        if compiled:
            remove(model_or_pipeline)
    schedule = Schedule.uniform(calibrations[0].steps, 1) if best is None else best.schedule
    reached = math.inf if best is None else best.metric
    chosen = next((one for one in calibrations if best is not None and one.grain == best.grain), calibrations[0])
    expected = None if best is None else best.expected
    return Choice(schedule, reached, tuple(trials.made), before + len(trials.made), chosen, expected, *took)


def _if_any(calibration: Calibration, count: int, order: int | str, leads: Sequence[float]) -> list[Candidate]:
    """The candidates of one order that compute so many steps; none where there are too few of them."""
    try:
        return candidates_for(calibration, count, [order], leads) if count else []
    except CalibrationError:
        return []


def _calibrated(
    model_or_pipeline: Any,
    sample: Callable[[Any], Any],
    *,
    probes: int,
    calls_per_step: int | None,
    progress: bool,
    **settings: Any,
) -> tuple[Calibration, Any]:
    """A calibration with sensitivities, and what ``sample`` returned uncached."""
    seen: list[Any] = []
    calibration = calibrate(
        model_or_pipeline,
        lambda model: seen.append(sample(model)),
        calls_per_step=calls_per_step,
        progress=progress,
        **settings,
    )
    calibration = measure_sensitivity(
        model_or_pipeline, sample, calibration, probes=probes, calls_per_step=calls_per_step, progress=progress
    )
    return calibration, seen[0]


class Trials:
    """Samples with schedules, measures what comes out, and searches for the best within a number of runs.

    Attributes:
        made: so far, in order.
    """

    def __init__(
        self, run: Callable[[Schedule], Any], reference: Any, metric: Metric, most: int, leads: Sequence[float]
    ) -> None:
        self.made: list[Trial] = []
        self._leads = leads
        self._run, self._most = run, most
        self._reference, self._metric = reference, metric

    @property
    def left(self) -> int:
        return self._most - len(self.made)

    def of(self, candidates: Iterable[Candidate], most: int) -> Iterator[Trial]:
        """Trials of at most ``most`` candidates, one after the other, while there are runs left."""
        for candidate in itertools.islice(candidates, min(most, self.left)):
            samples = self._run(candidate.schedule)
            value = float(self._metric(self._reference, samples))
            rows, schedule, predicted, grain = candidate
            expected = expectation(self._reference, samples)
            self.made.append(Trial(rows, schedule, predicted, value, grain, expected))
            yield self.made[-1]

    def best(self, candidates: Iterable[Candidate], most: int) -> Trial:
        """The best of those candidates of a budget that are predicted to be: of ``most``, or as many as there are."""
        by_prediction = sorted(candidates, key=lambda candidate: candidate.predicted)
        return max(self.of(by_prediction, most), key=lambda trial: trial.metric)

    def in_time(
        self, budget: TimeBudget, calibrations: Sequence[Calibration], orders: Sequence[int | str]
    ) -> tuple[Trial | None, tuple[float, float] | tuple[None, None]]:
        """The best of those that are predicted to be fast enough, and its own seconds and speed-up.

        Where they are measured to miss the budget, the best of those that compute fewer steps, as long as there are
        runs left.
        """
        counts = budget.steps(calibrations, orders)
        while True:
            candidates = [
                candidate
                for one in calibrations
                for order in orders
                for candidate in _if_any(one, counts.get((one.grain, degree(one, order)), 0), order, self._leads)
            ]
            if not candidates:
                raise CalibrationError(
                    "so few steps can be computed in this time that no forecast can be made: allow more, or order 0"
                )
            best = self.best(candidates, max(1, self.left // 2))  # the rest for what computes fewer steps
            took = budget.measured(best.schedule)
            missed = budget.missed_by(*took)
            if missed <= MET:
                return best, took
            if not self.left:
                log.warning("what was chosen takes %.0f%% longer than asked for: allow more trajectories", 100 * missed)
                return best, took
            fewer = max(1, round(missed * sum(next(iter(best.schedule.compute.values())))))
            counts = {kind: max(1, count - fewer) for kind, count in counts.items()}

    def least(self, calibrations: Sequence[Calibration], orders: Sequence[int | str], at_least: float) -> Trial | None:
        """The one that computes the fewest steps of those that are good enough, by bisection; None for all steps."""
        found = None
        fewest, most = math.ceil(calibrations[0].steps / (calibrations[0].lags + 1)), calibrations[0].steps
        while fewest < most and self.left:
            count = (fewest + most) // 2
            candidates = [
                one for calibration in calibrations for one in candidates_for(calibration, count, orders, self._leads)
            ]
            candidates.sort(key=lambda candidate: candidate.predicted)
            trials = self.of(candidates, TRIED)
            good = next((trial for trial in trials if trial.metric >= at_least), None)
            if good is None:
                fewest = count + 1
            else:
                found, most = good, count
        return found
