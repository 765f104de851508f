"""Calibration: how much each site's output changes from step to step, and the schedules that follow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._effects import Effects
from ._files import check_header, read_object
from ._plans import optimal_rows, predicted_error
from ._rows import numbers_of, scalar, whole_number
from ._solve import alpha_for, scan
from ._statistics import Moments, combine, half_width
from .errors import CalibrationError
from .schedule import Schedule
from .site_errors import SiteErrors

__all__ = ["Calibration", "SiteErrors"]

FORMAT = "smoothcache_fx.calibration"
VERSION = 2

#: Stands for all groups together, where sensitivities are by group.
ALL = "*"


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
    """

    steps: int
    lags: int
    sites: list[SiteErrors]
    history_bytes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    effects: Effects | None = None
    sensitivity: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    timesteps: Sequence[float] | None = None

    def __post_init__(self) -> None:
        self.steps = whole_number(self.steps, "steps", 1, CalibrationError)
        self.lags = whole_number(self.lags, "lags", 1, CalibrationError)
        self.history_bytes = whole_number(self.history_bytes, "history_bytes", 0, CalibrationError)
        if not isinstance(self.metadata, dict):
            raise CalibrationError(f"metadata is a {type(self.metadata).__name__}, expected a dict")
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
        if not isinstance(self.sensitivity, dict):
            raise CalibrationError(f"sensitivity is a {type(self.sensitivity).__name__}, expected a dict")
        self.sensitivity = {key: self._checked(key, values) for key, values in self.sensitivity.items()}

    def _checked(self, key: str, values: Any) -> NDArray[np.float64]:
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
        names = ("steps", "lags", "sites", "history_bytes", "metadata", "effects", "timesteps")
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
        solver: str = "greedy",
        order: int = 0,
        rows: str | None = None,
        times: Sequence[float] | None = None,
        keep_last: bool | None = None,
    ) -> Schedule:
        """A schedule by the paper's rule (``greedy``), or of the least predicted error for a budget (``optimal``).

        The paper's rule: from each computed step, the longest reuse whose error is at most `alpha`.

        Args:
            alpha: the largest error allowed, the same for all groups, at least 0. For ``greedy`` alone.
            compute: in place of alpha: the largest share of the branches' FLOPs to compute, in (0, 1]; of alphas the
                one that comes closest from below is taken (for rows of groups `alpha_for` gives it).
            solver: ``greedy`` or ``optimal``. The latter needs ``calibrate(..., order=...)``, or order 0 and rows of
                groups. It is the better the better errors are known to reach the end: see ``measure_sensitivity``.
            order: of the reads, 0 to 2. A greedy schedule's rows are those for order 0.
            rows: ``joint``, one row for all groups; ``group``, one for each, which share the budget by their FLOPs;
                ``site``, one for each site, of ``optimal`` alone. The default of ``optimal`` is joint where the
                calibration allows it: forecasts are more exact where all branches of a step are computed together.
                That of ``greedy`` is group, as in the paper; joint rows reuse where all groups' errors allow it.
            times: a position for each step, in which reads are polynomials (see `Schedule`).
            keep_last: compute the last step too, as the paper's code does: the default of ``greedy``.

        Returns:
            One row per group (or site), and their FLOPs as weights.

        Raises:
            CalibrationError: if not exactly one of alpha and compute is given, one is out of range, the calibration
                lacks what the solver needs, or no schedule meets the budget.
        """
        if solver not in ("greedy", "optimal"):
            raise CalibrationError(f"solver is {solver!r}, expected 'greedy' or 'optimal'")
        if (alpha is None) == (compute is None):
            raise CalibrationError(f"alpha is {alpha} and compute is {compute}; give exactly one of them")
        if solver == "optimal":
            if compute is None:
                raise CalibrationError("the optimal solver wants compute, the share of FLOPs, and no alpha")
            budget = self._share_of_flops(compute)
            found = optimal_rows(self, budget, order, rows, times, bool(keep_last))
            flops = self._flops() if rows != "site" else {site.name: site.flops for site in self.sites}
            flops = flops if flops and any(flops.values()) else None
            return Schedule(self.steps, found, order=order, flops=flops, times=times, timesteps=self.timesteps)
        keep_last = keep_last is not False
        errors = self._greedy_errors(rows)
        if compute is not None:
            flops = self._flops() if errors.keys() == self.groups.keys() else None
            alpha = alpha_for(errors, self._share_of_flops(compute), flops, keep_last)
        number = scalar(alpha)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number >= 0:
            raise CalibrationError(f"alpha is {alpha!r}, expected a number of at least 0, such as 0.18")
        scanned = {key: scan(error, number, keep_last) for key, error in errors.items()}
        found = {group: scanned[group if group in scanned else ALL] for group in self.groups}
        return Schedule(self.steps, found, order=order, flops=self._flops(), times=times, timesteps=self.timesteps)

    def predicted_error(self, schedule: Schedule) -> float:
        """What a schedule that has one row and one order for all groups is predicted to be off by at the end.

        With sensitivities (``measure_sensitivity``) the relative L2 distance of the final samples; without, the root
        mean square by which the model's outputs are off in sum. Infinite where it reuses for longer than ``lags``.

        Raises:
            CalibrationError: if the calibration was made without ``order`` or for lower ones, the steps differ, or
                groups have rows of their own.
        """
        return predicted_error(self, schedule)

    def alpha_for(self, compute: float, *, keep_last: bool = True) -> float:
        """The alpha whose schedule's `compute_fraction` is the largest that is at most `compute`.

        Exact, over all alphas that make a difference; of those with equal fractions, the smallest.

        Raises:
            CalibrationError: if `compute` is not in (0, 1], or no alpha meets it (says the least possible).
        """
        number = self._share_of_flops(compute)
        errors = {group: self.error(group) for group in self.groups}
        return alpha_for(errors, number, self._flops(), keep_last)

    def _greedy_errors(self, rows: str | None) -> dict[str, NDArray[np.float64]]:
        """What the paper's rule goes by: each group's error, or for joint rows the largest of all groups."""
        errors = {group: self.error(group) for group in self.groups}
        if rows in (None, "group"):
            return errors
        if rows == "joint":
            return {ALL: np.maximum.reduce(list(errors.values()))}
        hint = "; rows of sites need solver='optimal'" if rows == "site" else ""
        raise CalibrationError(f"rows is {rows!r}, expected 'joint' or 'group' with the greedy solver{hint}")

    def _share_of_flops(self, compute: object) -> float:
        number = scalar(compute)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= 1:
            raise CalibrationError(f"compute is {compute!r}, expected a share of FLOPs, above 0 and up to 1")
        return float(number)

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
        return Calibration(self.steps, self.lags, sites, history_bytes, metadata, effects, sensitivity, timesteps)

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything as JSON, one line per site; `load` gives an equal calibration back.

        Raises:
            CalibrationError: if the metadata holds what JSON cannot.
        """
        try:
            metadata = json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as reason:
            raise CalibrationError(f"metadata holds what JSON cannot: {reason}; keep plain values in it") from reason
        lines = [
            f'  "format": {json.dumps(FORMAT)}',
            f'  "version": {VERSION}',
            f'  "steps": {self.steps}',
            f'  "lags": {self.lags}',
            f'  "history_bytes": {self.history_bytes}',
            f'  "metadata": {metadata}',
            f'  "effects": {json.dumps(None if self.effects is None else self.effects.to_json())}',
            f'  "sensitivity": {json.dumps({key: values.tolist() for key, values in self.sensitivity.items()})}',
            '  "sites": [\n' + ",\n".join(f"    {json.dumps(site.to_json())}" for site in self.sites) + "\n  ]",
        ]
        if self.timesteps is not None:
            lines.insert(-1, f'  "timesteps": {json.dumps(self.timesteps)}')
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read a calibration that `save` wrote.

        Raises:
            CalibrationError: if the file is missing, is not JSON, is of another format or a newer version, or
                holds something that is no calibration.
        """
        data = read_object(path, CalibrationError, "calibration")
        keys = ("steps", "lags", "sites", "history_bytes", "metadata", "effects", "sensitivity")
        if data.get("format") == FORMAT and data.get("version") == 1:
            data = {"effects": None, "sensitivity": {}, **data}
        if "timesteps" in data:
            keys = (*keys, "timesteps")
        check_header(data, path, format=FORMAT, version=VERSION, keys=keys, error=CalibrationError)
        try:
            if not isinstance(data["sites"], list):
                raise CalibrationError(f"sites is a {type(data['sites']).__name__}, expected a list")
            sites = [SiteErrors.from_json(site) for site in data["sites"]]
            effects = None if data["effects"] is None else Effects.from_json(data["effects"])
            arguments = [data[key] for key in ("steps", "lags")], [data[key] for key in ("history_bytes", "metadata")]
            return cls(*arguments[0], sites, *arguments[1], effects, data["sensitivity"], data.get("timesteps"))
        except CalibrationError as reason:
            raise CalibrationError(f"{str(path)!r} holds no valid calibration: {reason}") from reason

    def __str__(self) -> str:
        """A table of the groups, with the median over the steps of each lag's error, and its 95% interval."""
        counts = [int(n) for site in self.sites for n in site.count[0, 1:]] or [0]
        seen = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        title = (
            f"{self.steps} steps, {len(self.sites)} sites, {seen} observations of each site at each step, "
            f"history {self.history_bytes / 2**20:.1f} MiB"
        )
        table = [["group", "kind", "sites", "FLOPs", *(f"lag {lag}" for lag in range(1, self.lags + 1))]]
        total = sum(site.flops for site in self.sites) or 1.0
        for group, sites in self.groups.items():
            share = sum(site.flops for site in sites) / total
            kinds = "/".join(dict.fromkeys(site.kind for site in sites))
            cells = map(_median, self.error(group), self.interval(group))
            table.append([group, kinds, str(len(sites)), f"{share:.1%}", *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligns = "<<" + ">" * (len(widths) - 2)
        lines = []
        for row in table:
            cells = zip(row, aligns, widths, strict=True)
            lines.append("  ".join(f"{cell:{align}{width}}" for cell, align, width in cells))
        return "\n".join([title, *lines, "(error: median over the steps, with the mean's 95% interval there)"])

    def _moments(self, group: str) -> Moments:
        sites = [site.moments for site in self.sites if site.group == group]
        if not sites:
            known = ", ".join(map(repr, self.groups))
            raise CalibrationError(f"there is no group {group!r}; this calibration has {known}")
        return combine(sites)

    def _flops(self) -> dict[str, float] | None:
        flops = {group: sum(site.flops for site in sites) for group, sites in self.groups.items()}
        return flops if any(flops.values()) else None


def _median(error: NDArray[np.float64], interval: NDArray[np.float64]) -> str:
    """The (upper) median of one lag's errors and the interval at that step."""
    known = np.flatnonzero(np.isfinite(error))
    if not known.size:
        return "-"
    step = known[np.argsort(error[known], kind="stable")[known.size // 2]]
    spread = "" if np.isnan(interval[step]) else f" ±{interval[step]:.4f}"
    return f"{error[step]:.4f}{spread}"
