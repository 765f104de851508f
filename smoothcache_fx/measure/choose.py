"""``choose``: the schedule that is best for a budget, or cheapest for a quality, by sampling with a few of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.measurements import FIT, GRAINS
from ..calibration.optimal import require_effects
from ..checks import function, instance, number_of, some_of, whole_number
from ..compiled.compiler import compile, remove
from ..errors import CalibrationError
from ..graphs.tables import Printable, format_table
from ..reports.compare import Metric, as_vector, psnr
from ..schedules.schedule import HIGHEST_ORDER, Schedule
from .calibrate import calibrate
from .candidates import Candidate, affordable_steps, candidates_for
from .sensitivity import measure_sensitivity

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
    """

    rows: str
    schedule: Schedule
    predicted: float
    metric: float
    grain: str


@dataclass(frozen=True)
class Choice(Printable):
    """What ``choose`` found; ``print`` it.

    Attributes:
        schedule: the one to compile with.
        metric: what was measured of it; infinite where it computes everything.
        trials: all that were sampled with, in that order.
        trajectories: calls of ``sample``, the calibration's among them.
        calibration: of the chosen grain, with sensitivities; for schedules of other budgets.
    """

    schedule: Schedule
    metric: float
    trials: tuple[Trial, ...]
    trajectories: int
    calibration: Calibration

    def __str__(self) -> str:
        table = [("grain", "rows", "order", "compute", "predicted error", "metric", "")]
        for trial in self.trials:
            schedule = trial.schedule
            chosen = "chosen" if schedule is self.schedule else ""
            figures = f"{schedule.compute_fraction:.2f}", f"{trial.predicted:.4f}", f"{trial.metric:.4g}"
            order = FIT if schedule.coefficients else str(schedule.order)
            table.append((trial.grain, trial.rows, order, *figures, chosen))
        end = "" if any(trial.schedule is self.schedule for trial in self.trials) else "\nchosen: compute everything"
        return f"{format_table(table)}{end}\n({self.trajectories} runs of sample)"


def choose(
    model_or_pipeline: Any,
    sample: Callable[[Any], Any],
    *,
    compute: float | None = None,
    at_least: float | None = None,
    metric: Metric | None = None,
    orders: Sequence[int | str] = (0, 1, 2, FIT),
    grains: Sequence[str] = ("branch",),
    lags: int = 5,
    trajectories: int = 20,
    probes: int = 4,
    calibration: Calibration | None = None,
    steps: int | None = None,
    calls_per_step: int | None = None,
    backend: str = "eager",
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
        metric: a function of what ``sample`` returned uncached and cached, the higher the better; by default the PSNR
            in dB.
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
        calls_per_step, backend, options: as for ``compile``. The default backend compiles nothing.
        progress: show progress bars (needs tqdm).

    Raises:
        CalibrationError: if not exactly one of compute and at_least is given, one argument is out of range,
            ``trajectories`` leaves none to try a schedule, no schedule meets the budget, or ``calibration``
            was not made with as high an order.

    Example:
        >>> choice = smoothcache.choose(model, sample, compute=0.4, steps=50)
        >>> print(choice)  # every schedule that was tried
        >>> model = smoothcache.compile(model, choice.schedule)
    """
    if (compute is None) == (at_least is None):
        raise CalibrationError(f"compute is {compute} and at_least is {at_least}; give exactly one of them")
    name, given = ("compute", compute) if at_least is None else ("at_least", at_least)
    wanted = number_of(given, name, "a number", CalibrationError)
    function(sample, "sample", "the model or pipeline that runs it")
    if metric is not None:
        function(metric, "metric", "the uncached and the cached samples")
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

    def run(schedule: Schedule) -> Any:
        compile(model_or_pipeline, schedule, backend=backend, calls_per_step=calls_per_step, **options)
        try:
            return sample(model_or_pipeline)
        finally:
            remove(model_or_pipeline)

    trials = Trials(run, reference, metric, most=trajectories - before)
    best = trials.best(calibrations, orders, wanted) if at_least is None else trials.least(calibrations, orders, wanted)
    schedule = Schedule.uniform(calibrations[0].steps, 1) if best is None else best.schedule
    value = math.inf if best is None else best.metric
    chosen = next((one for one in calibrations if best is not None and one.grain == best.grain), calibrations[0])
    return Choice(schedule, value, tuple(trials.made), before + len(trials.made), chosen)


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

    def __init__(self, run: Callable[[Schedule], Any], reference: Any, metric: Metric | None, most: int) -> None:
        """Raises ``CalibrationError`` where no PSNR to ``reference`` can be measured, and no metric is given."""
        self.made: list[Trial] = []
        self._run, self._most = run, most
        if metric is None:
            uncached = as_vector(reference)
            self._measure = lambda value: psnr(uncached, as_vector(value))
        else:
            self._measure = lambda value: metric(reference, value)

    @property
    def left(self) -> int:
        return self._most - len(self.made)

    def of(self, candidates: Iterable[Candidate], most: int) -> Iterator[Trial]:
        """Trials of at most ``most`` candidates, one after the other, while there are runs left."""
        for candidate in itertools.islice(candidates, min(most, self.left)):
            value = float(self._measure(self._run(candidate.schedule)))
            self.made.append(Trial(candidate.rows, candidate.schedule, candidate.predicted, value, candidate.grain))
            yield self.made[-1]

    def best(self, calibrations: Sequence[Calibration], orders: Sequence[int | str], compute: float) -> Trial:
        """The best of all candidates for a budget."""
        candidates = [
            candidate
            for calibration in calibrations
            for candidate in candidates_for(calibration, affordable_steps(calibration, compute), orders)
        ]
        candidates.sort(key=lambda candidate: candidate.predicted)
        return max(self.of(candidates, self._most), key=lambda trial: trial.metric)

    def least(self, calibrations: Sequence[Calibration], orders: Sequence[int | str], at_least: float) -> Trial | None:
        """The one that computes the fewest steps of those that are good enough, by bisection; None for all steps."""
        found = None
        fewest, most = math.ceil(calibrations[0].steps / (calibrations[0].lags + 1)), calibrations[0].steps
        while fewest < most and self.left:
            count = (fewest + most) // 2
            candidates = [one for calibration in calibrations for one in candidates_for(calibration, count, orders)]
            candidates.sort(key=lambda candidate: candidate.predicted)
            trials = self.of(candidates, TRIED)
            good = next((trial for trial in trials if trial.metric >= at_least), None)
            if good is None:
                fewest = count + 1
            else:
                found, most = good, count
        return found
