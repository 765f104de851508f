"""JSON files with a format name and a version: reading, with errors that name the file and its fault."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import SmoothCacheError


def read_object(path: str | PathLike[str], error: type[SmoothCacheError], what: str) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    `what` names the kind of file in messages ("schedule", "calibration"); whatever goes wrong is raised as
    `error`. A key that occurs twice in one object is an error: parsers would keep the last one, silently.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as reason:
        raise error(
            f"cannot read the {what} file {str(path)!r}: {reason.strerror or reason}; give the path of a "
            f"file that save() wrote"
        ) from reason
    except UnicodeDecodeError as reason:
        raise error(f"{str(path)!r} is no {what} file: it is not text ({reason})") from reason

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise error(f"{str(path)!r} gives {', '.join(map(repr, twice))} more than once; keep one of each")
        return result

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except SmoothCacheError:
        raise
    except (ValueError, RecursionError) as reason:
        raise error(f"{str(path)!r} is no {what} file: it is not JSON ({reason})") from reason
    if not isinstance(data, dict):
        raise error(f"{str(path)!r} is no {what} file: it holds a JSON {type(data).__name__}, expected an object")
    return data


def check_header(
    data: dict[str, Any],
    path: str | PathLike[str],
    *,
    format: str,
    version: int,
    keys: tuple[str, ...],
    error: type[SmoothCacheError],
) -> None:
    """Raise `error` unless `data` is `format`, of a version up to `version`, and has exactly `keys`."""
    found = data.get("format")
    if found != format:
        raise error(
            f"{str(path)!r} has format {found!r}, expected {format!r}; give a file of that format, "
            f"such as save() writes"
        )
    got = data.get("version")
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise error(f"{str(path)!r} has version {got!r}, expected a whole number from 1 to {version}")
    if got > version:
        raise error(
            f"{str(path)!r} has version {got} of {format}, this smoothcache_fx reads up to {version}; "
            f"upgrade smoothcache_fx, or save the file again with this version"
        )
    expected = {"format", "version", *keys}
    missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
    if missing or unknown:
        raise error(
            f"{str(path)!r} does not have the keys of {format} version {got}: missing {missing}, "
            f"unknown {unknown}; expected {sorted(expected)}"
        )
