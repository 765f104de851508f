"""What `quality.py` writes: its figures beside earlier ones, wall times, and how what was chosen compares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import ratio_of_medians, summary

#: What `choose` took, and the suffix of the figures that it was to be best in.
OURS = {"chosen": "", "chosen, converged": "_converged"}
#: Arguments that do not change figures.
HOW = ("folder", "write", "add", "methods", "times", "anew")
#: Arguments that name budgets: results of other budgets can be joined.
BUDGETS = ("shares", "intervals", "all_judged")
#: Arguments that plans depend on.
PLANNED = ("steps", "intervals", "shares", "calibrated", "lags", "trajectories")
#: Plans whose pairs' mean PSNR in dB differ by less, to the uncached and to the converged ones, are the same.
SAME = 0.01


def verdict(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each budget, how what was chosen compares with the best of the other methods.

    By mean and median PSNR in dB: to the uncached samples for ``chosen``, to the converged ones for ``chosen,
    converged``, where the uncached sampler is compared, too. ``within`` says whether the other's figure is no higher
    than the upper end of the chosen one's 95% interval. At equal wall time others are interpolated along their budgets.
    Frechet distances above the best of all others are in standard errors of the two.
    """
    found: dict[str, dict[str, Any]] = {}
    others = [row for row in result["rows"] if row["method"] not in OURS and "history in" not in row["method"]]
    for chosen in (row for row in result["rows"] if row["method"] in OURS):
        suffix, line = OURS[chosen["method"]], found.setdefault(f"{chosen['budget']:.2f}", {})
        for figure in ("mean_psnr", "median_psnr"):
            line[f"{chosen['method']}, {figure}"] = beside(chosen, others, figure, suffix)
        if suffix:
            uncached = next(row for row in others if row["method"] == "uncached")
            over = chosen["mean_psnr_converged"] - uncached["mean_psnr_converged"]
            line["chosen, converged, over the uncached sampler"] = over
        near = [row for row in others if row["budget"] == chosen["budget"] and "frechet" in row]
        if near and "frechet" in chosen:
            best = min(near, key=lambda row: row["frechet"])
            error = float(np.hypot(best["frechet_error"], chosen["frechet_error"]))
            line["frechet, standard errors above the best"] = (chosen["frechet"] - best["frechet"]) / error
    return found


def beside(chosen: dict[str, Any], others: list[dict[str, Any]], figure: str, suffix: str) -> dict[str, Any]:
    """A figure of what was chosen beside the best of the others of its budget, and of as much wall time."""
    key = f"{figure}{suffix}"
    same_cost = {
        row["method"]: row[key] for row in others if row["budget"] == chosen["budget"] and row.get(key) is not None
    }
    if not same_cost:
        return {}
    upper = chosen.get(f"{figure}_interval{suffix}", [chosen[key]] * 2)[1]
    best = max(same_cost, key=lambda method: same_cost[method])
    line = {"best other": best, "over it": chosen[key] - same_cost[best], "within": bool(same_cost[best] <= upper)}
    same_time = {method: at_time(others, method, key, chosen) for method in same_cost}
    timed = {method: value for method, value in same_time.items() if value is not None}
    if timed:
        best = max(timed, key=lambda method: timed[method])
        line |= {"best other at equal time": best, "over it at equal time": chosen[key] - timed[best]}
    return line


def at_time(rows: list[dict[str, Any]], method: str, key: str, chosen: dict[str, Any]) -> float | None:
    """A method's figure at the wall time of what was chosen, along its budgets; None where it was not timed there."""
    points = sorted(
        (row["share_of_time"], row[key])
        for row in rows
        if row["method"] == method and "share_of_time" in row and row.get(key) is not None
    )
    at = chosen.get("share_of_time")
    if at is None or not points or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(at, *zip(*points, strict=True)))


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result says of how it came about."""
    return {name: value for name, value in vars(arguments).items() if name not in HOW}


def same_plans(path: Path, now: dict[str, Any]) -> bool:
    """Whether the plans of what was written are those that would be made now."""
    if not path.exists():
        return False
    before = json.loads(path.read_text())["arguments"]
    return all(json.loads(json.dumps(now[name])) == before.get(name) for name in PLANNED)


def earlier_result(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What was written before, if the arguments were the same but for the budgets."""
    if not path.exists():
        raise SystemExit(f"there is no {path} to add to: leave out --add")
    earlier: dict[str, Any] = json.loads(path.read_text())
    before = earlier["arguments"]
    if differ := [name for name in now if name not in BUDGETS and now[name] != before.get(name)]:
        pairs = ", ".join(f"{name} {before.get(name)} before and {now[name]} now" for name in differ)
        raise SystemExit(f"cannot add to {path}: {pairs}. Make them equal, or leave out --add to write anew")
    return earlier


def joined(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A result with an earlier one's other rows, and with what it knows of the same plans beside."""
    arguments = dict(result["arguments"])
    for name in BUDGETS:
        arguments[name] = sorted({*earlier["arguments"][name], *arguments[name]}, reverse=name != "intervals")
    new = {(row["method"], round(row["budget"], 2)): row for row in result["rows"]}
    rows = []
    for old in earlier["rows"]:
        row = new.pop((old["method"], round(old["budget"], 2)), old)
        rows.append(old | row if same_plan(old, row) else dict(row))
    timed = {"timed": earlier["timed"]} if "timed" in earlier else {}
    return {**timed, **result, "arguments": arguments, "rows": [*rows, *new.values()]}


def same_plan(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """To the converged samples alone good plans are equally far: as far as the uncached sampler."""
    figures = ("compute", "mean_psnr", "mean_psnr_converged")
    pairs = [(old[name], new[name]) for name in figures if old[name] is not None and new[name] is not None]
    return all(abs(before - now) < SAME for before, now in pairs)


def add_times(result: dict[str, Any], folder: Path) -> None:
    """Give the rows of a result what `measure_times` left in the folder, if it did.

    That is seconds an image, and what they share of the uncached time, the median over the rounds.
    """
    path = folder / "times.json"
    if not path.exists():
        return
    kept = json.loads(path.read_text())
    if result.setdefault("timed", kept["timed"]) != kept["timed"]:
        print(f"wall times of {result['timed']} are left out: those in {path} are of {kept['timed']}", flush=True)
        for row in result["rows"]:
            for figure in ("seconds", "share_of_time"):
                row.pop(figure, None)
        result["timed"] = kept["timed"]
    seconds = {(method, near["budget"]): own for near in kept["budgets"] for method, own in near["seconds"].items()}
    base = {near["budget"]: near["seconds"]["uncached"] for near in kept["budgets"]}
    for row in result["rows"]:
        if row["method"] == "uncached":
            own = same = [each for near in base.values() for each in near]
        elif (row["method"], row["budget"]) in seconds:
            own, same = seconds[row["method"], row["budget"]], base[row["budget"]]
        else:
            continue
        row["seconds"] = summary([each / kept["timed"]["batch"] for each in own])
        row["share_of_time"] = ratio_of_medians(own, same)
