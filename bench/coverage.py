"""Which transformers of diffusers are cached, and how rightly: ``python bench/coverage.py``.

Every transformer class that the installed diffusers exports is built small with random weights and sampled for a
trajectory with a fixed schedule (``tests/zoo/case.py``), each in a process of its own with a time limit. The outputs
are compared with those of an eager cache on the modules that a reader of the class would name, and the sites with
that list. Classes that the zoo does not know yet are built and called by guess.

Writes ``bench/results/coverage.json`` and ``coverage.md`` with ``--write``; for another torch than the newest that is
tried, add ``--name torch_2.11``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, result_path, write_result
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
KINDS = ("attn", "cross_attn", "ffn", "attn_ffn")
MARK = "RESULT "


def run_here(name: str) -> dict[str, Any]:
    """The outcome of one class, in this process."""
    from zoo.catalog import CASES
    from zoo.check import check
    from zoo.guess import guess

    torch.set_num_threads(1)
    case = CASES.get(name) or guess(name)
    outcome = check(case)
    return {**dataclasses.asdict(outcome), "problems": outcome.problems(), "guessed": name not in CASES}


def run_apart(name: str, limit: float) -> dict[str, Any]:
    """The outcome of one class in a process of its own, or ``{"name", "failed"}`` with the last words."""
    command = [sys.executable, __file__, "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"took longer than {limit:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"name": name, "failed": words[-1] if words else f"exit status {done.returncode}"}


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, what is covered first, and under it what is not, with the reasons."""
    ran = [result for result in results if "failed" not in result and "not_run" not in result]
    good = [result for result in ran if not result["problems"]]
    lines = [
        f"# Coverage: {len(good)} of {len(ran)} transformer classes that could be built",
        "",
        f"Written by `python bench/coverage.py --write` with torch {torch.__version__.partition('+')[0]}.",
        "Sites by kind, as found / as listed by a reader of the class;",
        "FLOPs inside sites over those of the blocks and of the whole (small) model; captured graphs (1: no graph",
        "break); MAC ratio of a fixed schedule of 7 steps; the largest difference to an eager cache along the",
        "trajectory (float32), and the largest that caching makes.",
        "",
        "| class | " + " | ".join(KINDS) + " | of blocks | of model | graphs | MAC ratio | difference | effect |",
        "| --- |" + " ---: |" * (len(KINDS) + 6),
    ]
    for result in sorted(ran, key=lambda result: (bool(result["problems"]), result["name"].lower())):
        counts = [_count(result, kind) for kind in KINDS]
        name = result["name"] + (" (inputs guessed)" if result["guessed"] else "")
        lines.append(
            f"| {name} | {' | '.join(counts)} | {result['block_share']:.1%} | {result['model_share']:.1%} "
            f"| {result['graphs']} | {result['mac_ratio']:.2f} | {result['difference']:.1e} | {result['effect']:.1e} |"
        )
    lines += ["", "## Not covered", ""]
    for result in results:
        if reason := _reason(result):
            lines.append(f"- {result['name']}: {reason}")
    aside = [f"- {r['name']}, `{pattern}`: {why}" for r in ran for pattern, why in r["unfound"].items()]
    broken = [f"- {r['name']} ({r['lost_share']:.1%}): {place}" for r in ran for place in r["breaks"]]
    whole = [f"- {r['name']}: {', '.join(r['whole'])}" for r in ran if r["whole"]]
    if whole:
        lines += ["", "## Run uncompiled, as one op each, since the graph would break inside", "", *whole]
    if aside:
        lines += ["", "## Rightly no site", "", *aside]
    if broken:
        lines += ["", "## Graph breaks, and the share of FLOPs that they leave in no site", "", *broken]
    return "\n".join(lines) + "\n"


def _count(result: dict[str, Any], kind: str) -> str:
    found, listed = result["found"].get(kind, 0), result["listed"].get(kind, 0)
    return "" if not found and not listed else str(found) if found == listed else f"{found} / {listed}"


def _reason(result: dict[str, Any]) -> str:
    if "not_run" in result:
        return f"not run: {result['not_run']}"
    if "failed" in result:
        return f"failed: {result['failed']}"
    if not result["problems"]:
        return ""
    broken = "; ".join(dict.fromkeys(place.split(" ")[0] for place in result["breaks"]))
    return "; ".join(result["problems"]) + (f"; the graph breaks at {broken} (see below)" if broken else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes alone; the others' rows stay")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one class")
    parser.add_argument("--write", action="store_true", help="write bench/results/coverage.json and coverage.md")
    parser.add_argument("--name", help="end of the results' names, where several are kept")
    parser.add_argument("--one", metavar="CLASS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(MARK + json.dumps(run_here(arguments.one)))
        return

    from zoo.case import denoisers
    from zoo.catalog import NOT_RUN

    start = time.perf_counter()
    names = arguments.only or denoisers()
    run = [name for name in names if name not in NOT_RUN]
    with ThreadPoolExecutor(arguments.workers) as pool:
        done = pool.map(lambda name: run_apart(name, arguments.limit), run)
        results = list(tqdm(done, total=len(run), unit=" classes"))
    results += [{"name": name, "not_run": NOT_RUN[name]} for name in names if name in NOT_RUN]
    name = "coverage" + (f"_{arguments.name}" if arguments.name else "")
    if arguments.write and arguments.only:
        # The other classes keep the rows that they have.
        kept = json.loads(result_path(name).read_text())["classes"]
        new = {result["name"]: result for result in results}
        results = [new.pop(result["name"], result) for result in kept] + list(new.values())
    text = table(results)
    print(text)
    if arguments.write:
        write_result(name, {"minutes": (time.perf_counter() - start) / 60, "classes": results})
        (RESULTS / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
