"""Calibration: how much each site's output changes from step to step, and the schedules that follow."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._files import check_header, read_object
from ._rows import scalar, whole_number
from ._solve import alpha_for, scan
from ._statistics import Moments, combine, half_width
from .errors import CalibrationError
from .schedule import Schedule
from .site_errors import SiteErrors

__all__ = ["Calibration", "SiteErrors"]

FORMAT = "smoothcache_fx.calibration"
VERSION = 1


@dataclass
class Calibration:
    """The errors of all sites of a model over whole trajectories; `calibrate` makes it.

    Args:
        steps: denoising steps in a trajectory.
        lags: the largest lag k that was measured.
        sites: one `SiteErrors` for each site, with arrays of shape [lags, steps].
        history_bytes: memory that the kept outputs took while calibrating.
        metadata: anything JSON can hold, kept with the file.
    """

    steps: int
    lags: int
    sites: list[SiteErrors]
    history_bytes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

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

    def schedule(self, *, alpha: float | None = None, compute: float | None = None, keep_last: bool = True) -> Schedule:
        """The paper's schedule: from each computed step, the longest reuse whose error is at most `alpha`.

        Args:
            alpha: the largest error allowed, the same for all groups, at least 0.
            compute: in place of alpha: the largest share of the branches' FLOPs to compute, in (0, 1]; the
                alpha that comes closest from below is taken (`alpha_for` gives it).
            keep_last: compute the last step too, as the paper's code does.

        Returns:
            One row per group, and the groups' FLOPs as weights.

        Raises:
            CalibrationError: if not exactly one of alpha and compute is given, one is out of range, or no
                alpha meets the budget.
        """
        if (alpha is None) == (compute is None):
            raise CalibrationError(f"alpha is {alpha} and compute is {compute}; give exactly one of them")
        if compute is not None:
            alpha = self.alpha_for(compute, keep_last=keep_last)
        number = scalar(alpha)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number >= 0:
            raise CalibrationError(f"alpha is {alpha!r}, expected a number of at least 0, such as 0.18")
        rows = {group: scan(self.error(group), number, keep_last) for group in self.groups}
        return Schedule(self.steps, rows, flops=self._flops())

    def alpha_for(self, compute: float, *, keep_last: bool = True) -> float:
        """The alpha whose schedule's `compute_fraction` is the largest that is at most `compute`.

        Exact, over all alphas that make a difference; of those with equal fractions, the smallest.

        Raises:
            CalibrationError: if `compute` is not in (0, 1], or no alpha meets it (says the least possible).
        """
        number = scalar(compute)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= 1:
            raise CalibrationError(f"compute is {compute!r}, expected a share of FLOPs, above 0 and up to 1")
        errors = {group: self.error(group) for group in self.groups}
        return alpha_for(errors, number, self._flops(), keep_last)

    def merge(self, other: Calibration) -> Calibration:
        """The observations of both, for calibrations of one model with the same steps and lags.

        `history_bytes` is the larger one; of the metadata, what both agree on is kept.

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
        return Calibration(self.steps, self.lags, sites, history_bytes, metadata)

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
            '  "sites": [\n' + ",\n".join(f"    {json.dumps(site.to_json())}" for site in self.sites) + "\n  ]",
        ]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read a calibration that `save` wrote.

        Raises:
            CalibrationError: if the file is missing, is not JSON, is of another format or a newer version, or
                holds something that is no calibration.
        """
        data = read_object(path, CalibrationError, "calibration")
        keys = ("steps", "lags", "sites", "history_bytes", "metadata")
        check_header(data, path, format=FORMAT, version=VERSION, keys=keys, error=CalibrationError)
        try:
            if not isinstance(data["sites"], list):
                raise CalibrationError(f"sites is a {type(data['sites']).__name__}, expected a list")
            sites = [SiteErrors.from_json(site) for site in data["sites"]]
            return cls(data["steps"], data["lags"], sites, data["history_bytes"], data["metadata"])
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
