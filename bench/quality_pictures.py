"""The pictures of what `quality.py` wrote to bench/results: ``python bench/quality_pictures.py``."""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS
from quality_samplers import SAMPLERS

from smoothcache_fx.plots import COLOURS, new_figure

PICTURES = RESULTS.parents[1] / "docs" / "bench"
#: Colours tell orders apart, dashes whose rows are even.
STYLES = {
    "fewer steps": ("0.45", "s-"),
    "alpha": (COLOURS[1], "^-"),
    "every n-th step": (COLOURS[0], "v--"),
    "TaylorSeer, order 1": (COLOURS[2], "D--"),
    "TaylorSeer, order 2": (COLOURS[3], "D--"),
    "chosen": ("black", "o-"),
}
LABELS = {"alpha": "alpha rule (SmoothCache)", "every n-th step": "every n-th step (FORA)", "chosen": "choose (ours)"}


def draw_all() -> None:
    """`quality.png` of Euler's sampler for README, `quality_samplers.png` of all that were measured."""
    results = {
        name: json.loads(path.read_text()) for name in SAMPLERS if (path := RESULTS / f"quality_{name}.json").exists()
    }
    if not results:
        return
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw({name: result for name, result in results.items() if name == "euler"}, "quality.png")
    draw(results, "quality_samplers.png", frechet=True)


def draw(results: dict[str, dict[str, Any]], name: str, frechet: bool = False) -> None:
    """A row of panels for each sampler: PSNR to the uncached and to the converged sample, Frechet distance, time."""
    if not results:
        return
    timed = any("seconds" in row for result in results.values() for row in result["rows"])
    columns = 2 + frechet + (timed and not frechet)
    figure = new_figure(3.9 * columns, 3.4 * len(results) + 0.4)
    axes = figure.subplots(len(results), columns, squeeze=False)
    for line, (sampler, result) in zip(axes, results.items(), strict=True):
        rows, title = result["rows"], SAMPLERS[sampler].title
        uncached = next(row for row in rows if row["method"] == "uncached")
        steps = result["arguments"]["steps"]
        _panel(line[0], rows, "compute", "psnr", f"{title}, PSNR to the uncached sample (dB)")
        _panel(line[1], rows, "compute", "psnr_converged", f"{title}, PSNR to {4 * steps} steps (dB)")
        line[1].axhline(uncached["psnr_converged"], color="0.3", linestyle=":", linewidth=1)
        line[1].annotate("uncached", (0.2, uncached["psnr_converged"]), fontsize=7, va="bottom")
        if frechet:
            _panel(line[2], rows, "compute", "frechet", f"{title}, Frechet distance", error="frechet_error")
            for key, value in (("uncached", uncached.get("frechet")), ("real images", _floor(result))):
                if value is not None:
                    line[2].axhline(value, color="0.3", linestyle=":", linewidth=1)
                    line[2].annotate(key, (0.2, value), fontsize=7, va="bottom")
        elif timed:
            _panel(line[2], rows, "seconds", "psnr", f"{title}, PSNR to the uncached sample (dB)")
            line[2].set_xlabel("seconds, " + result["machine"]["device"], fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6 if columns > 2 else 3, frameon=False, fontsize=8)
    figure.savefig(PICTURES / name, dpi=130)


def _floor(result: dict[str, Any]) -> float | None:
    return result["real_versus_real_frechet_distance"]


def _panel(axis: Any, rows: list[dict[str, Any]], x: str, y: str, title: str, error: str | None = None) -> None:
    for method, (colour, line) in STYLES.items():
        points = [row for row in rows if row["method"] == method and row.get(y) is not None and x in row]
        points.sort(key=lambda row: row["compute"])
        across = [row[x]["median"] if x == "seconds" else row[x] for row in points]
        bars = [row[error] for row in points] if error else None
        width = 2 if method == "chosen" else 1.2
        label = LABELS.get(method, method)
        axis.errorbar(across, [row[y] for row in points], bars, fmt=line, color=colour, label=label, ms=4, lw=width)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("share of the branches' arithmetic", fontsize=8)
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    draw_all()
