"""Benches that run side by side compile at the same time, and time one after the other.

``bench/gpu.py`` starts them with a folder in ``BENCH_TURNS``. Each has a file ``<name>.preparing`` there until it asks
for its turn, or ends. A turn begins when no bench is preparing any more (or a file ``go`` says not to wait), and lasts
until the bench lets go of the lock. Without the variable every turn begins at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

#: The folder, and the name of this bench in it.
FOLDER, NAME = "BENCH_TURNS", "BENCH_NAME"
_held = 0


def preparing(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-')}.preparing"


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """What is timed; may be nested."""
    global _held
    if FOLDER not in os.environ or _held:
        yield
        return
    folder = Path(os.environ[FOLDER])
    preparing(folder, os.environ[NAME]).unlink(missing_ok=True)
    while any(folder.glob("*.preparing")) and not (folder / "go").exists():
        time.sleep(0.05)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held += 1
        try:
            yield
        finally:
            _held -= 1
