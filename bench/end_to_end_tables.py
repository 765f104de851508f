"""The table and the picture of `end_to_end.py`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoothcache_fx.graphs.tables import format_bytes, format_table

Results = Mapping[str, Mapping[str, Any]]
COLOURS = {"plain": "black", "smoothcache": "tab:red", "peer": "tab:blue"}
FILL = {"eager": "none", "default": "full", "max-autotune": "left", "reduce-overhead": "right"}


def table(results: Results) -> str:
    """The figures that a reader compares; the rest is in the file."""
    rows = [
        (
            "",
            "s/image",
            "p20 to p80",
            "x torch.compile",
            "MAC ratio",
            "efficiency",
            "in own mode",
            "cached step",
            "peak memory",
            "compile s",
            "graphs",
            "recompiled",
        )
    ]
    for name, found in results.items():
        if "refused" in found:
            rows.append((name, *["-"] * 11))
            continue
        seconds = found["seconds_per_image"]
        share, peak, compile_seconds = (found[key] for key in ("cached_step_share", "peak_bytes", "compile_seconds"))
        rows.append(
            (
                name,
                f"{seconds['median']:.4g}",
                f"{seconds['p20']:.4g} to {seconds['p80']:.4g}",
                f"{found['speedup']:.3f}",
                f"{found['mac_ratio']:.3f}",
                f"{found['efficiency']:.3f}",
                f"{found['efficiency_in_same_mode']:.3f}",
                "-" if share is None else f"{share:.1%}",
                "-" if peak is None else format_bytes(peak),
                "-" if compile_seconds is None else f"{compile_seconds:.1f}",
                str(found["graphs"]),
                str(found["recompiled"]),
            )
        )
    lines = [format_table(rows)]
    lines += [f"{name}: {found['refused']}" for name, found in results.items() if "refused" in found]
    lines += [f"{name}: {found['setting']}" for name, found in results.items() if found.get("setting")]
    if all(found.get("peak_bytes") is None for found in results.values()):
        lines.append("peak memory: not measured on a CPU")
    return "\n".join(lines)


def picture(by_images: Mapping[str, Results], title: str, path: Path) -> None:
    """Speed-up over torch.compile against MAC ratio, a panel for each number of images; beside the ideal line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(by_images) + 3.5, 5.5), layout="constrained")
    panels = figure.subplots(1, len(by_images), squeeze=False)[0]
    for panel, (images, results) in zip(panels, by_images.items(), strict=True):
        measured = {name: found for name, found in results.items() if "refused" not in found}
        families = dict.fromkeys(map(_family, measured))
        markers = dict(zip(families, itertools.cycle("os^vD<>PX*pd"), strict=False))
        for name, found in measured.items():
            panel.plot(
                found["mac_ratio"],
                found["speedup"],
                markers[_family(name)],
                color=COLOURS[found["kind"]],
                fillstyle=FILL[found["mode"]],
                label=name,
            )
        end = 1.05 * max(found["mac_ratio"] for found in measured.values())
        panel.plot([0.9, end], [0.9, end], color="grey", linewidth=1, label="ideal")
        panel.set_xlabel("MAC ratio: uncached arithmetic over that which is done")
        panel.set_ylabel("times faster than uncached torch.compile")
        panel.set_title(f"{images} image{'s' if images != '1' else ''}")
        panel.grid(alpha=0.3)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _family(name: str) -> str:
    """The name without the mode: one marker for all its modes."""
    return name.removesuffix(" + compile").removesuffix(" max-autotune").removesuffix(" reduce-overhead")
