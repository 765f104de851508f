"""What `quality.py` writes: its figures beside earlier ones, wall times, and how what was chosen compares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import ratio_of_medians, summary

TAYLORSEER = ("TaylorSeer, order 1", "TaylorSeer, order 2")
#: Arguments that do not change figures.
HOW = ("folder", "write", "add", "methods", "times")
#: Arguments that name budgets: results of other budgets can be joined.
BUDGETS = ("shares", "intervals", "all_judged")
#: Plans whose pairs' mean PSNR in dB differ by less, to the uncached and to the converged ones, are the same.
SAME = 0.01


def verdict(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each budget, by how much what was chosen is better than others.

    In dB beside the best method without forecasts, and beside TaylorSeer's; and Frechet distances above the best of all
    others, in standard errors of the two.
    """
    without = ("fewer steps", "alpha", "every n-th step")
    found: dict[str, dict[str, float]] = {}
    for chosen in (row for row in result["rows"] if row["method"] == "chosen"):
        near = [row for row in result["rows"] if row["budget"] == chosen["budget"]]
        line: dict[str, float] = {}
        for key in ("psnr", "mean_psnr", "psnr_converged", "mean_psnr_converged", "psnr_set", "mean_psnr_set"):
            for name, methods in (("order 0", without), ("TaylorSeer", TAYLORSEER)):
                theirs = [row[key] for row in near if row["method"] in methods and key in row]
                if theirs and key in chosen:
                    line[f"{key} over {name}"] = chosen[key] - max(theirs)
        others = [row for row in near if "frechet" in row and row["method"] != "chosen"]
        if others and "frechet" in chosen:
            best = min(others, key=lambda row: row["frechet"])
            error = float(np.hypot(best["frechet_error"], chosen["frechet_error"]))
            line["frechet, standard errors above the best"] = (chosen["frechet"] - best["frechet"]) / error
        found[f"{chosen['budget']:.2f}"] = line
    return found


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result says of how it came about."""
    return {name: value for name, value in vars(arguments).items() if name not in HOW}


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
