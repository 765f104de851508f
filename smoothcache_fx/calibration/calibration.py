"""Calibration: how much each site's output changes from step to step, and the schedules that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import flag, instance, numbers_of, one_of, whole_number
from ..errors import CalibrationError
from ..schedules.schedule import Schedule
from .effects import Effects
from .file import OPTIONAL, fields_of, read, write
from .fitted import fitted
from .greedy import alpha_for
from .html import calibration_html
from .measurements import ALL, GRAINS, group_flops
from .optimal import predicted_error
from .request import ScheduleRequest, share_of_flops
from .site_errors import SiteErrors
from .statistics import Moments, combine, half_width
from .table import aligned, table_of
from .transfer import steps_of, transferred

__all__ = ["Calibration", "SiteErrors"]


@dataclass(eq=False)
class Calibration:
    """The errors of all sites of a model over whole trajectories; `calibrate` makes it.

    Args:
        steps: denoising steps in a trajectory.
        lags: the largest lag k that was measured.
        sites: one `SiteErrors` for each site, with arrays of shape [lags, steps].
        history_bytes: memory that the kept outputs took while calibrating.
        metadata: anything JSON can hold, kept with the file.
        effects: what reads do to the model's output, if ``calibrate`` was given an ``order``.
        sensitivity: how errors reach the final sample, float64 [steps] by group, or `ALL` for all groups together
            (``measure_sensitivity``); what is not in it counts the same at each step.
        timesteps: of each step, if all trajectories had the same. Schedules made of the calibration keep them.
        grain: ``branch``, or ``stack`` if runs of blocks were measured as one; schedules are of that grain.
        noise_levels: of each step the share of noise, ``sigma / (alpha + sigma)``, by the scheduler's own table, if
            a pipeline was calibrated whose scheduler has one.
        interpolated: whether steps lie between those that were measured (`transfer`): less is then made of errors that
            undo each other.
    """

    steps: int
    lags: int
    sites: list[SiteErrors]
    history_bytes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    effects: Effects | None = None
    sensitivity: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    timesteps: Sequence[float] | None = None
    grain: str = GRAINS[0]
    noise_levels: Sequence[float] | None = None
    interpolated: bool = False

    def __post_init__(self) -> None:
        self.steps = whole_number(self.steps, "steps", 1, CalibrationError)
        self.lags = whole_number(self.lags, "lags", 1, CalibrationError)
        self.history_bytes = whole_number(self.history_bytes, "history_bytes", 0, CalibrationError)
        if not isinstance(self.metadata, dict):
            raise CalibrationError(f"metadata is a {type(self.metadata).__name__}, expected a dict")
        one_of(self.grain, "grain", GRAINS, CalibrationError)
        flag(self.interpolated, "interpolated")
        self.sites = list(self.sites)
        if not self.sites:
            raise CalibrationError("a calibration without sites; expected at least one")
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CalibrationError(f"more than one site is called {' or '.join(map(repr, twice))}")
        for site in self.sites:
            if site.count.shape != (self.lags, self.steps):
                raise CalibrationError(
                    f"site {site.name!r} has errors of shape {list(site.count.shape)}, expected "
                    f"[lags, steps] = [{self.lags}, {self.steps}]"
                )
            if site.products is not None and len(site.products.count) != self.steps:
                raise CalibrationError(f"site {site.name!r} has products of {len(site.products.count)} steps")
        if self.effects is not None and len(self.effects.sketch) != self.steps:
            raise CalibrationError(f"effects of {len(self.effects.sketch)} steps, expected {self.steps}")
        if self.timesteps is not None:
            self.timesteps = numbers_of(self.timesteps, "timesteps", self.steps, CalibrationError)
        if self.noise_levels is not None:
            self.noise_levels = numbers_of(self.noise_levels, "noise_levels", self.steps, CalibrationError)
        if not isinstance(self.sensitivity, dict):
            raise CalibrationError(f"sensitivity is a {type(self.sensitivity).__name__}, expected a dict")
        self.sensitivity = {key: self._checked_sensitivity(key, values) for key, values in self.sensitivity.items()}

    def _checked_sensitivity(self, key: str, values: Any) -> NDArray[np.float64]:
        try:
            array = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        known = key == ALL or key in self.groups
        if not known or array.shape != (self.steps,) or not ((0 < array) & (array < np.inf)).all():
            raise CalibrationError(
                f"impossible sensitivity of {key!r}: expected a group of this calibration, or {ALL!r}, and a finite "
                f"number above 0 for each of {self.steps} steps"
            )
        return array

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Calibration):
            return NotImplemented
        names = ("steps", "lags", "sites", "history_bytes", "metadata", "effects", *OPTIONAL)
        return all(getattr(self, name) == getattr(other, name) for name in names) and (
            {key: values.tolist() for key, values in self.sensitivity.items()}
            == {key: values.tolist() for key, values in other.sensitivity.items()}
        )

    @property
    def groups(self) -> dict[str, tuple[SiteErrors, ...]]:
        """Group -> its sites, in the model's order."""
        result: dict[str, tuple[SiteErrors, ...]] = {}
        for site in self.sites:
            result[site.group] = (*result.get(site.group, ()), site)
        return result

    def error(self, group: str) -> NDArray[np.float64]:
        """Mean error over the group's sites and their observations, float64 [lags, steps].

        At [k - 1, t] that of using step t - k's output at step t; NaN where there is no observation (t < k).
        """
        return self._moments(group)[1]

    def interval(self, group: str) -> NDArray[np.float64]:
        """Half the 95% interval of `error(group)`, float64 [lags, steps]: the mean is known to within this.

        Student's t over all observations of all sites, taken as independent; NaN where there is only one.
        """
        count, _, m2 = self._moments(group)
        return half_width(count, m2)

    def schedule(
        self,
        *,
        alpha: float | None = None,
        compute: float | None = None,
        quality: str | None = None,
        solver: str | None = None,
        order: int | str | None = None,
        rows: str | None = None,
        max_variants: int | None = None,
        times: Sequence[float] | None = None,
        keep_last: bool | None = None,
        target: str = "uncached",
        steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        scheduler: Any = None,
    ) -> Schedule:
        """The best schedule for a budget (``compute``) or a ``quality``, or the one of the paper's rule (``alpha``).

        For a budget all groups share one row, so that two variants are all there is to compile: the row and the order
        of forecasts that are predicted to move the final sample least. Where none is predicted to be clearly better it
        is every n-th step, without forecasts.

        The paper's rule: from each computed step, the longest reuse whose error is at most `alpha`. Each group has
        its own row.

        Args:
            alpha: the largest error allowed, the same for all groups, at least 0.
            compute: in place of alpha: the largest share of the branches' FLOPs to compute, in (0, 1].
            quality: in place of alpha: how far the final sample may be off, in predicted relative L2 distance, with as
                few steps computed as that takes. ``lossless`` computes everything, ``high`` allows 0.01 (40 dB below
                the sample), ``medium`` 0.03 and ``fast`` 0.1. Needs ``measure_sensitivity``.
            solver: ``optimal``, the default for compute: the rows of least predicted error. ``greedy``, the default for
                alpha: the paper's rule; with compute it takes the alpha that comes closest from below (for rows of
                groups `alpha_for` gives it).
            order: of the forecasts, 0 to 2; or ``"fit"``: the coefficients of `fit` for the highest order that the
                calibration can predict, with the rows of any order that suit them best. The default of ``optimal`` is
                the best of the orders that the calibration can predict (``calibrate(..., order=...)``); that of
                ``greedy`` is 0, whose rows it has at any order.
            rows: ``joint``, one row for all groups, the default of ``optimal`` (where it can predict it: without
                effects for order 0); ``group``, the default of ``greedy``, one for each group, which ``optimal`` has
                share the budget by their FLOPs, groups under 3% of them following the one before; ``site``, one for
                each site, of ``optimal`` alone. Joint rows of ``greedy`` reuse where all groups' errors allow it.
            max_variants: the most variants that there may be, at least 2: groups whose rows differ least then share
                one. By default as many as the rows make.
            times: a position for each step, in which forecasts are polynomials (see `Schedule`).
            keep_last: compute the last step too, as the paper's code does: the default of ``greedy``.
            target: what samples shall be near: ``uncached``, those of the same steps, or ``converged``, those of many
                more. For the latter forecasts aim at the middle of their step (``lead`` of `Schedule`), which suits
                samplers of first order, such as Euler's and DDIM; predicted errors are then to what they aim at.
                ``choose(target=)`` measures what suits yours.
            steps, timesteps, scheduler: for other steps than the calibrated ones, as for `transfer`.

        Returns:
            One row per group (or site), and their FLOPs as weights.

        Raises:
            CalibrationError: if not exactly one of alpha, compute and quality is given, one is out of range, the
                calibration lacks what the solver needs, or no schedule meets the budget.

        Example:
            >>> schedule = calibration.schedule(compute=0.5)  # at most half of the branches' FLOPs
            >>> paper = calibration.schedule(alpha=0.18)
            >>> shorter = calibration.schedule(compute=0.5, steps=30)
        """
        other = any(given is not None for given in (steps, timesteps, scheduler))
        request = ScheduleRequest(
            self.transfer(steps, timesteps=timesteps, scheduler=scheduler) if other else self,
            alpha=alpha,
            compute=compute,
            quality=quality,
            solver=solver,
            order=order,
            rows=rows,
            max_variants=max_variants,
            times=times,
            keep_last=keep_last,
            target=target,
        )
        return request.schedule()

    def transfer(
        self, steps: int | None = None, *, timesteps: Sequence[float] | None = None, scheduler: Any = None
    ) -> Calibration:
        """This calibration for other steps: another number of them, or another sampler of the same model.

        What was measured is taken as a function of the noise level, and reuse over some steps as one over a distance
        between levels. Levels are matched by the scheduler's own table of noise where the calibration and `scheduler`
        both have one, else by timesteps. Sensitivities go with how far a step goes.

        Args:
            steps: how many there are to be; alone, they are spaced as the calibrated ones are.
            timesteps: those of the other sampler, in sampling order, as the calibrated model or pipeline was given
                them.
            scheduler: the other sampler, of diffusers or like those, after its ``set_timesteps``; a copy of it is set
                to `steps` if they are given.

        Returns:
            A calibration with as many steps. Its ``lags`` are how many of the new steps the measured ones reach over.

        Raises:
            CalibrationError: steps are so few that not even reuse from one to the next was measured, the noise levels
                have nothing in common, or a step's level is not known.

        Example:
            >>> fewer = calibration.transfer(steps=30)
            >>> schedule = fewer.schedule(compute=0.5)
        """
        return replace(self, **transferred(self, steps_of(self, steps, timesteps, scheduler)))

    def fit(self, schedule: Schedule) -> Schedule:
        """A copy of a schedule whose forecasts have fitted coefficients in place of the polynomials'.

        Where all groups have one row they have the same coefficients: those with which all reused steps together are
        predicted to move the final sample least, so that later steps make good for earlier ones. Groups with rows of
        their own have coefficients of their own: those of the sum of kept outputs that is nearest to the group's
        output. Steps that reuse for longer than was measured keep the polynomial's. Nothing more is compiled:
        coefficients are inputs of the graphs. (L2P, arXiv 2604.26365, fits them too.)

        Args:
            schedule: of this calibration's steps, with an order of 1 or 2.

        Raises:
            CalibrationError: the steps differ, the schedule has no order, or the calibration was made without
                ``order``.

        Example:
            >>> schedule = smoothcache.Schedule(50, smoothcache.Schedule.uniform(50, 4).compute, order=1)
            >>> fitted = calibration.fit(schedule)
        """
        instance(schedule, "schedule", Schedule, "Calibration.schedule or Schedule.uniform makes one")
        return fitted(self, schedule)

    def predicted_error(self, schedule: Schedule) -> float:
        """What a schedule that has one row and one order for all groups is predicted to be off by at the end.

        With sensitivities (``measure_sensitivity``) the relative L2 distance of the final samples; without, the root
        mean square by which the model's outputs are off in sum. Infinite where it reuses for longer than ``lags``.

        Raises:
            CalibrationError: if the calibration was made without ``order`` or for lower ones, the steps differ, or
                groups have rows of their own.
        """
        instance(schedule, "schedule", Schedule, "Calibration.schedule or Schedule.uniform makes one")
        return predicted_error(self, schedule)

    def alpha_for(self, compute: float, *, keep_last: bool = True) -> float:
        """The alpha whose schedule's `compute_fraction` is the largest that is at most `compute`.

        Exact, over all alphas that make a difference; of those with equal fractions, the smallest.

        Raises:
            CalibrationError: if `compute` is not in (0, 1], or no alpha meets it (says the least possible).
        """
        budget = share_of_flops(compute)
        errors = {group: self.error(group) for group in self.groups}
        return alpha_for(errors, budget, group_flops(self), flag(keep_last, "keep_last"))

    def merge(self, other: Calibration) -> Calibration:
        """The observations of both, for calibrations of one model with the same steps and lags.

        `history_bytes` is the larger one; of metadata and timesteps, what both agree on; of sensitivities, the
        first's where it has them.

        Raises:
            CalibrationError: if steps, lags or sites differ.
        """
        if not isinstance(other, Calibration):
            raise CalibrationError(f"cannot merge with a {type(other).__name__}, expected a Calibration")
        if (self.steps, self.lags) != (other.steps, other.lags):
            raise CalibrationError(
                f"cannot merge a calibration of {self.steps} steps and {self.lags} lags with one of "
                f"{other.steps} steps and {other.lags} lags; calibrate with the same number of both"
            )
        if self.grain != other.grain:
            raise CalibrationError(
                f"cannot merge a calibration of grain {self.grain!r} with one of {other.grain!r}; calibrate both alike"
            )
        theirs = {site.name: site for site in other.sites}
        mine = {site.name: site for site in self.sites}
        if theirs.keys() != mine.keys():
            first, second = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
            raise CalibrationError(
                f"cannot merge calibrations of models with other sites: {len(first)} only in the first "
                f"({', '.join(first[:3])}), {len(second)} only in the second ({', '.join(second[:3])})"
            )
        sites = [site.merge(theirs[site.name]) for site in self.sites]
        agreed = self.metadata.keys() & other.metadata.keys()
        agreed = {key for key in agreed if self.metadata[key] == other.metadata[key]}
        metadata = {key: value for key, value in self.metadata.items() if key in agreed}
        history_bytes = max(self.history_bytes, other.history_bytes)
        both = self.effects is not None and other.effects is not None
        effects = self.effects.merge(other.effects) if both else None
        sensitivity = {**other.sensitivity, **self.sensitivity}
        timesteps = self.timesteps if self.timesteps == other.timesteps else None
        levels = self.noise_levels if self.noise_levels == other.noise_levels else None
        return replace(
            self,
            sites=sites,
            history_bytes=history_bytes,
            metadata=metadata,
            effects=effects,
            sensitivity=sensitivity,
            timesteps=timesteps,
            noise_levels=levels,
            interpolated=self.interpolated or other.interpolated,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything as JSON, one line per site; `load` gives an equal calibration back.

        Raises:
            CalibrationError: if the metadata holds what JSON cannot.
        """
        write(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read a calibration that `save` wrote.

        Raises:
            CalibrationError: if the file is missing, is not JSON, is of another format or a newer version, or
                does not hold a calibration.
        """
        content = read(path)
        try:
            return cls(**fields_of(content))
        except CalibrationError as reason:
            raise CalibrationError(f"{str(path)!r} holds no valid calibration: {reason}") from reason

    def lines(self) -> list[list[str]]:
        """What is printed, cell by cell: a title, a heading, a line per group, and a note."""
        return table_of(self)

    def __str__(self) -> str:
        """A table of the groups, with the median over the steps of each lag's error, and its 95% interval."""
        return aligned(self.lines())

    def _repr_html_(self) -> str:
        return calibration_html(self)

    def _moments(self, group: str) -> Moments:
        sites = [site.moments for site in self.sites if site.group == group]
        if not sites:
            known = ", ".join(map(repr, self.groups))
            raise CalibrationError(f"there is no group {group!r}; this calibration has {known}")
        return combine(sites)
