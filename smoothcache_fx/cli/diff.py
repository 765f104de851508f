"""``smoothcache diff``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command


def add(commands: Any) -> None:
    diff = command(
        commands,
        "diff",
        run,
        "show what a pass changed, from two files written by smoothcache.dump",
        "diff graphs/graph_0/captured.py graphs/graph_0/variant_1.py",
    )
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    diff.add_argument("--context", type=int, default=1, help="context lines around each change (1)")


def run(options: argparse.Namespace) -> None:
    from ..graphs.diff import diff_files

    for line in diff_files(options.before, options.after, context=options.context):
        print(line)
