"""Figures: calibration errors, schedules, costs and frontiers. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from .calibration.calibration import Calibration
from .checks import instance, number_of, sequence
from .errors import SmoothCacheError
from .graphs.html import COLOURS, COMPUTED, REUSED
from .schedules.schedule import Schedule

FROM = "calibrate makes one, and Calibration.load reads it"


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, size in inches, that no window or notebook shows."""
    return _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "smoothcache_fx[plot]"') from error


def plot_errors(calibration: Calibration, path: str | PathLike[str], *, alphas: tuple[float, ...] = ()) -> None:
    """Draw each group's error over the steps, a line per lag with its 95% interval; alphas as dashed lines."""
    instance(calibration, "calibration", Calibration, FROM)
    alphas = tuple(number_of(alpha, "an alpha", "a number", SmoothCacheError) for alpha in sequence(alphas, "alphas"))
    groups = list(calibration.groups)
    figure = new_figure(4.2 * len(groups), 3.4)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    steps = np.arange(calibration.steps)
    for axis, group in zip(axes[0], groups, strict=True):
        error, interval = calibration.error(group), calibration.interval(group)
        for lag in range(calibration.lags):
            colour = COLOURS[lag % len(COLOURS)]
            axis.plot(steps, error[lag], color=colour, label=f"{lag + 1} step{'s' if lag else ''} ago")
            axis.fill_between(
                steps,
                error[lag] - interval[lag],
                error[lag] + interval[lag],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        for alpha in alphas:
            axis.axhline(alpha, color="0.4", linestyle="--", linewidth=0.8)
            axis.text(
                1.01,
                alpha,
                f"α = {alpha:g}",
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=7,
                color="0.3",
            )
        kinds = "/".join(dict.fromkeys(site.kind for site in calibration.groups[group]))
        axis.set_title(f"{group} ({kinds})", fontsize=10)
        axis.set_xlabel("denoising step")
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("relative L1 error of reuse")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(Path(path), dpi=150)


def plot_site_errors(calibration: Calibration, path: str | PathLike[str], *, lag: int = 1) -> None:
    """Draw a heat map per group: the mean error of using the output of ``lag`` steps ago, by site and step.

    Raises:
        ValueError: the calibration has no such lag.
    """
    instance(calibration, "calibration", Calibration, FROM)
    if isinstance(lag, bool) or lag not in range(1, calibration.lags + 1):
        raise ValueError(f"lag is {lag!r}, but the calibration has lags 1 to {calibration.lags}")
    groups = calibration.groups
    heights = [len(sites) for sites in groups.values()]
    figure = new_figure(8.5, 1.0 + 0.75 * len(groups) + 0.09 * sum(heights))
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=[3 + h for h in heights])[:, 0]
    errors = [np.stack([site.mean[lag - 1] for site in sites]) for sites in groups.values()]
    # The last steps' errors are many times the others': a scale by square root keeps both apart.
    scale = _matplotlib("colors").PowerNorm(0.5, vmin=0, vmax=max(float(np.nanmax(error)) for error in errors))
    for axis, (group, sites), error in zip(axes, groups.items(), errors, strict=True):
        image = axis.imshow(error, aspect="auto", cmap="cividis", norm=scale, interpolation="nearest")
        kinds = "/".join(dict.fromkeys(site.kind for site in sites))
        axis.set_title(f"{group} ({kinds})", fontsize=10)
        axis.set_ylabel("site")
    axes[-1].set_xlabel("denoising step (white: no output so far back)")
    steps_ago = f"{lag} step{'s' if lag > 1 else ''} ago"
    figure.colorbar(image, ax=list(axes), label=f"relative L1 error of\nreusing {steps_ago}")
    figure.savefig(Path(path), dpi=150)


def plot_costs(costs: Sequence[float], path: str | PathLike[str], *, label: str, title: str) -> None:
    """Draw what each step costs; ``label`` says what that is and in which unit. NaN where it is not known."""
    figure = new_figure(8.5, 2.4)
    axis = figure.subplots()
    axis.bar(range(len(costs)), costs, width=0.84, color=COLOURS[0])
    axis.set_title(title, fontsize=10)
    axis.set_xlim(-0.8, len(costs) - 0.2)
    axis.set_xlabel("denoising step")
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.25)
    figure.savefig(Path(path), dpi=150)


def plot_schedules(schedules: Mapping[str, Schedule], path: str | PathLike[str]) -> None:
    """Draw schedules above each other, a row per selector: dark where computed, light where reused.

    Raises:
        ValueError: no schedule selects anything.
    """
    for name, schedule in instance(schedules, "schedules", Mapping, "schedules by name").items():
        instance(schedule, f"schedules[{name!r}]", Schedule, "Calibration.schedule or Schedule.uniform makes one")
    rows = [
        (f"{name}\n{selector}", row)
        for name, schedule in schedules.items()
        for selector, row in schedule.compute.items()
    ]
    if not rows:
        raise ValueError("there is no row to draw: no schedule selects anything")
    steps = max(len(row) for _, row in rows)
    figure = new_figure(8.5, 0.42 * len(rows) + 0.9)
    axis = figure.subplots()
    for y, (_, row) in enumerate(rows):
        for step, computed in enumerate(row):
            axis.barh(y + 0.5, 0.88, left=step + 0.06, height=0.76, color=COMPUTED if computed else REUSED)
        axis.text(steps + 0.6, y + 0.5, f"{sum(row)}/{len(row)}", va="center", fontsize=8)
    axis.set_xlim(0, steps + 3.5)
    axis.set_ylim(len(rows), 0)
    axis.set_yticks([y + 0.5 for y in range(len(rows))], [label for label, _ in rows], fontsize=8)
    axis.set_xticks(np.arange(0, steps, 5) + 0.5, [str(step) for step in range(0, steps, 5)])
    axis.set_xlabel("denoising step (dark: computed, light: reused)")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(left=False)
    figure.savefig(Path(path), dpi=150)


def plot_frontier(points: Sequence[tuple[str, float, float, float]], path: str | PathLike[str]) -> None:
    """Draw PSNR in dB over measured speed-up and over MAC ratio; a point is name, speed-up, MAC ratio and PSNR.

    The line is the Pareto front: points that no other one beats in both. A triangle at the top stands for the uncached
    sample, whose PSNR is infinite, and for others that equal it.

    Raises:
        ValueError: no point has a finite PSNR.
    """
    finite = [point for point in points if np.isfinite(point[3])]
    if not finite:
        raise ValueError("there is no point to draw: every sample equals the uncached one, or there is none")
    figure = new_figure(8.5, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    heights = [point[3] for point in finite]
    top = max(heights) + max(3.0, 0.12 * (max(heights) - min(heights)))
    for axis, index, label in ((axes[0], 1, "times faster than uncached"), (axes[1], 2, "MAC ratio")):
        front = pareto_front([(cast(float, point[index]), point[3]) for point in finite])
        axis.plot(*zip((1.0, top), *front, strict=True), color="0.75", zorder=1)
        axis.plot(1.0, top, "^", color="0.3", label="uncached (infinite)")
        for number, (name, *_) in enumerate(points):
            colour = COLOURS[number % len(COLOURS)]
            known = np.isfinite(points[number][3])
            axis.plot(
                points[number][index],
                points[number][3] if known else top,
                "o" if known else "^",
                color=colour,
                label=name,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("PSNR to the uncached sample (dB)")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(Path(path), dpi=150)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one reaches in both coordinates, by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]
