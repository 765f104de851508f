"""``smoothcache convert``."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

from ..errors import ScheduleError
from .command import command


def add(commands: Any) -> None:
    convert = command(
        commands,
        "convert",
        run,
        "convert a published schedule or router to a schedule file",
        "convert theirs.json ours.json",
        "convert DDIM50_router.pt ours.json --names 'transformer_blocks.{block}.attn1' 'transformer_blocks.{block}.ff'",
    )
    convert.add_argument(
        "source",
        type=Path,
        help="schedule file of this package or of dit-smoothcache, or a Learning-to-Cache router (.pt)",
    )
    convert.add_argument("target", type=Path)
    convert.add_argument("--threshold", type=float, help="router score above which a branch is computed (0.1)")
    convert.add_argument(
        "--names",
        nargs=2,
        metavar=("ATTN", "FFN"),
        help="module names of a router's branches in your model; {block} is the block's index "
        "(*.{block}.attn *.{block}.mlp)",
    )


def run(options: argparse.Namespace) -> None:
    from ..importers import learning_to_cache
    from ..schedules.schedule import Schedule

    given = {"threshold": options.threshold, "names": options.names}
    given = {name: value for name, value in given.items() if value is not None}
    if _is_router(options.source):
        schedule = learning_to_cache(options.source, **given)
    elif given:
        raise ScheduleError(
            f"--{' and --'.join(given)} {'is' if len(given) == 1 else 'are'} for a router of Learning-to-Cache, a .pt "
            f"file that torch.save wrote, which {options.source} is not"
        )
    else:
        schedule = Schedule.load(options.source)
    schedule.save(options.target)
    print(schedule)


def _is_router(path: Path) -> bool:
    """Whether torch.save wrote it, by its name or its first bytes."""
    if path.suffix in (".pt", ".pth"):
        return True
    return path.is_file() and zipfile.is_zipfile(path)
