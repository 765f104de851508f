"""Pictures and a table of what `quality.py` wrote to bench/results: ``python bench/quality_tables.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from common import RESULTS
from quality_samplers import SAMPLERS

from smoothcache_fx.graphs.html import COLOURS
from smoothcache_fx.plots import new_figure

#: Of results that do not say what was sampled.
DIGITS = "DiT of digits"
PICTURES = RESULTS.parents[1] / "docs" / "bench"
#: Images of a set are counted whose own PSNR in dB is lower: a few that went another way decide that of all together.
FAR = 30.0
#: Colours tell orders apart, dashes whose rows are even.
STYLES = {
    "fewer steps": ("0.45", "s-"),
    "alpha": (COLOURS[1], "^-"),
    "every n-th step": (COLOURS[0], "v--"),
    "TaylorSeer, order 1": (COLOURS[2], "D--"),
    "TaylorSeer, order 2": (COLOURS[3], "D--"),
    "chosen": ("black", "o-"),
    "chosen, converged": (COLOURS[4], "o-"),
}
#: Colours tell forecasts apart, lines what is cached as one.
GRAIN_STYLES = {
    f"{prefix}{method}": (colour, f"{marker}{line}")
    for prefix, line in (("", "--"), ("stacks, ", "-"))
    for method, colour, marker in (
        ("every n-th step", COLOURS[0], "v"),
        ("TaylorSeer, order 1", COLOURS[2], "D"),
        ("TaylorSeer, order 2", COLOURS[3], "D"),
        ("every n-th step, fit", COLOURS[1], "^"),
        ("optimal, fit", "black", "o"),
    )
}
TITLES = (
    *("compute", "PSNR", "mean", "converged", "mean", "of the set", "mean", f"under {FAR:.0f} dB"),
    *("recognised", "Frechet distance", "over uncached", "s/image", "of uncached"),
)
LABELS = {
    "alpha": "alpha rule (SmoothCache)",
    "every n-th step": "every n-th step (FORA)",
    "chosen": "choose (ours)",
    "chosen, converged": "choose(target=) (ours)",
}


def write_all() -> None:
    """`quality.png` of Euler's sampler for README; of all samplers two more pictures, and `quality.md`."""
    results = {
        name: json.loads(path.read_text()) for name in SAMPLERS if (path := RESULTS / f"quality_{name}.json").exists()
    }
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw({name: result for name, result in results.items() if name == "euler"}, "quality.png")
    draw(results, "quality_samplers.png", frechet=True)
    draw_grains(results, "grains.png")
    (RESULTS / "quality.md").write_text("\n".join(page(results)) + "\n")


def page(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A table for each sampler, budget by budget."""
    yield "# Quality against compute"
    yield ""
    yield "Made by `python bench/quality.py --write`; its docstring says what is measured, and of what model."
    for sampler, result in results.items():
        arguments, machine = result["arguments"], result["machine"]
        yield ""
        yield f"## {SAMPLERS[sampler].title}, {arguments['steps']} steps, {result.get('model', DIGITS)}"
        yield ""
        yield (
            f"PSNR in dB, of all images together and the images' mean, to the uncached samples and to those of "
            f"{4 * arguments['steps']} steps: {arguments['paired']} images. {_sets(result)}{_times(result)}"
            f"{machine['device']}, torch {machine['torch']}, {machine['date']}."
        )
        yield ""
        yield f"|  | {' | '.join(TITLES)} |"
        yield "| --- " + "| ---: " * len(TITLES) + "|"
        for row in sorted(result["rows"], key=lambda row: -row["budget"]):
            yield "| " + " | ".join(_cells(row)) + " |"


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["method"] + (f" (order {row['order']})" if row["method"] == "chosen" else "")
    yield f"{row['compute']:.2f}"
    for key in ("", "_converged", "_set"):
        value, error = row.get(f"psnr{key}"), row.get(f"psnr_error{key}")
        yield "" if value is None else f"{value:.1f}" if error is None else f"{value:.1f} ± {error:.1f}"
        yield "" if value is None else f"{row[f'mean_psnr{key}']:.1f} ± {row[f'mean_psnr_error{key}']:.1f}"
    yield str(row.get("far_set", ""))
    yield f"{row['accuracy']:.2%}" if "accuracy" in row else ""
    yield f"{row['frechet']:.3f} ± {row['frechet_error']:.3f}" if "frechet" in row else ""
    beside = "frechet_over_uncached" in row and row["method"] != "uncached"
    yield f"{row['frechet_over_uncached']:+.3f} ± {row['frechet_over_uncached_error']:.3f}" if beside else ""
    yield f"{row['seconds']['median']:.3f}" if "seconds" in row else ""
    yield f"{row['share_of_time']:.2f}" if "seconds" in row else ""


def _sets(result: dict[str, Any]) -> str:
    """What the columns of sets are of; nothing where no sets were judged."""
    paired = result["arguments"]["paired"]
    images = -(-result["arguments"]["images"] // paired) * paired  # whole batches
    if not images:
        return ""
    return (
        f"Of the set (PSNR to the uncached, how many images are under {FAR:.0f} dB), recognised, Frechet distance: "
        f"{images} images; real images have {_floor(result):.3f}. How much it is over that of the uncached images is "
        "known better: both are of the same noise. "
    )


def _times(result: dict[str, Any]) -> str:
    """What the column of wall times is of; nothing where none were taken."""
    timed = result.get("timed")
    if timed is None:
        return ""
    return (
        f"Seconds an image in a batch of {timed['batch']}, {timed['backend']}, {timed['threads']} threads; those of "
        "one budget took turns with the uncached. "
    )


def draw(results: dict[str, dict[str, Any]], name: str, frechet: bool = False) -> None:
    """A row of panels for each sampler: PSNR to the uncached and to the converged sample, Frechet distance, time."""
    if not results:
        return
    frechet = frechet and any("frechet" in row for result in results.values() for row in result["rows"])
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
        _level(line[1], "uncached", uncached["psnr_converged"])
        if frechet:
            _panel(line[2], rows, "compute", "frechet", f"{title}, Frechet distance", error="frechet_error")
            _level(line[2], "uncached", uncached.get("frechet"))
            _level(line[2], "real images", _floor(result))
        elif timed:
            _panel(line[2], rows, "share_of_time", "psnr", f"{title}, PSNR to the uncached sample (dB)")
            line[2].set_xlabel("share of the uncached wall time, " + result["machine"]["device"], fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6 if columns > 2 else 3, frameon=False, fontsize=8)
    figure.savefig(PICTURES / name, dpi=130)


def draw_grains(results: dict[str, dict[str, Any]], name: str) -> None:
    """PSNR to the uncached sample of branches and of stacks: by sampler; over wall time too if it was measured."""
    measured = {
        sampler: [row for row in result["rows"] if row["method"] in GRAIN_STYLES]
        for sampler, result in results.items()
        if any(row["method"].startswith("stacks, ") for row in result["rows"])
    }
    panels = [("compute", sampler) for sampler in measured]
    panels += [
        ("share_of_time", sampler)
        for sampler, rows in measured.items()
        if any("seconds" in row and row["method"].startswith("stacks, ") for row in rows)
    ]
    if not panels:
        return
    figure = new_figure(4.4 * len(panels), 4.1)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (x, sampler) in zip(axes, panels, strict=True):
        title = f"{SAMPLERS[sampler].title}: mean PSNR to the uncached, dB"
        _panel(axis, measured[sampler], x, "mean_psnr", title, styles=GRAIN_STYLES)
        if x == "share_of_time":
            device = results[sampler]["machine"]["device"]
            axis.set_xlabel(f"share of the uncached wall time, {device}", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 5 if len(panels) > 2 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.savefig(PICTURES / name, dpi=130)


def _floor(result: dict[str, Any]) -> float:
    """Of real images to real images; not a number where no sets were judged."""
    floor = result["real_versus_real_frechet_distance"]
    return math.nan if floor is None else floor


def _level(axis: Any, name: str, value: float | None) -> None:
    """A dotted line across, if there is anything to draw."""
    if value is not None and math.isfinite(value):
        axis.axhline(value, color="0.3", linestyle=":", linewidth=1)
        axis.text(0.01, value, name, transform=axis.get_yaxis_transform(), fontsize=7, va="top")


def _panel(
    axis: Any,
    rows: list[dict[str, Any]],
    x: str,
    y: str,
    title: str,
    error: str | None = None,
    styles: Mapping[str, tuple[str, str]] = STYLES,
) -> None:
    for number, (method, (colour, line)) in enumerate(styles.items()):
        points = [row for row in rows if row["method"] == method and row.get(y) is not None and x in row]
        points.sort(key=lambda row: row[x])
        apart = 0.004 * (number - 2.5) if error else 0.0  # bars side by side
        across = [row[x] + apart for row in points]
        bars = [row[error] for row in points] if error else None
        width = 2 if method == "chosen" else 1.2
        label = LABELS.get(method, method)
        axis.errorbar(across, [row[y] for row in points], bars, fmt=line, color=colour, label=label, ms=4, lw=width)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("share of the branches' arithmetic", fontsize=8)
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    write_all()
