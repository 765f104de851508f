"""What a pass changed, from two files that ``dump`` wrote."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .tables import format_table

_CALL = re.compile(r"^        \w+ = (?:torch\.ops\.)?([\w.]+)\(")


def count_ops(source: str) -> Counter[str]:
    """How often each op is called in a dumped graph: ``aten.addmm.default``."""
    return Counter(match[1] for line in source.splitlines() if (match := _CALL.match(line)))


def diff_files(before: Path, after: Path, *, context: int = 1) -> Iterator[str]:
    """Lines: the ops whose number differs, then a unified diff of the two files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not one that ``dump`` wrote.
    """
    texts = []
    for path in (before, after):
        texts.append(path.read_text(encoding="utf-8"))
        if "\nclass Graph(torch.nn.Module):" not in texts[-1]:
            raise ValueError(
                f"{path} holds no graph: expected a .py file that smoothcache.dump(model, directory) wrote"
            )
    ours, theirs = map(count_ops, texts)
    changed = [op for op in sorted(ours | theirs) if ours[op] != theirs[op]]
    total = str(ours.total()), str(theirs.total())
    rows = [("op", before.stem, after.stem), *((op, str(ours[op]), str(theirs[op])) for op in changed)]
    yield format_table([*rows, ("all ops", *total)])
    yield ""
    old, new = (text.splitlines() for text in texts)
    yield from difflib.unified_diff(old, new, str(before), str(after), n=context, lineterm="")
