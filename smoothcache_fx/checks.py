"""Checks of arguments: each returns the value as it is used, or raises an error with what was got and expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from .errors import ScheduleError, SmoothCacheError

T = TypeVar("T")


def scalar(value: Any) -> Any:
    """numpy's and torch's scalars as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(value: object, name: str, least: int, error: type[SmoothCacheError] = ScheduleError) -> int:
    """``value`` as an int, numpy's and torch's scalars included; raises ``error`` if it is below ``least``."""
    number = scalar(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise error(f"{name} is {value!r}, expected a whole number of at least {least}")
    return number


def number_of(
    value: object,
    name: str,
    expected: str,
    error: type[SmoothCacheError] = ScheduleError,
    within: Callable[[float], bool] = lambda number: True,
) -> float:
    """``value`` as a float ``within`` bounds and not NaN; ``expected`` says what it may be."""
    found = scalar(value)
    if not is_number(found) or math.isnan(found) or not within(found):
        raise error(f"{name} is {value!r}, expected {expected}")
    return float(found)


def numbers_of(
    numbers: object, name: str, steps: int | None, error: type[SmoothCacheError] = ScheduleError
) -> tuple[float, ...]:
    """``steps`` finite floats; any number of them, but not none, where that is None."""
    if isinstance(numbers, (str, bytes, Mapping)) or not isinstance(numbers, Iterable):
        of = "each step" if steps is None else f"each of the {steps} steps"
        raise error(f"{name} is {numbers!r}, expected a number for {of}, or None")
    values = []
    for value in map(scalar, numbers):
        if not is_number(value) or not math.isfinite(value):
            raise error(f"{name} has {value!r}, expected finite numbers, such as timesteps")
        values.append(float(value))
    if steps is None and not values:
        raise error(f"{name} is empty, expected a number for each step")
    if steps is not None and len(values) != steps:
        raise error(f"{name} has {len(values)} entries, expected one for each of the {steps} steps")
    return tuple(values)


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}


def byte_count(value: object, name: str) -> int:
    """A whole number of bytes of at least 1, from a number or such as ``"2GiB"`` and ``"500 MB"``."""
    found = scalar(value)
    if isinstance(found, str):
        parsed = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", found)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        if parsed is not None and parsed[2].lower() in units:
            found = int(float(parsed[1]) * units[parsed[2].lower()])
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found < 1 or found != int(found):
        raise ValueError(f"{name} is {value!r}, expected bytes: a number of at least 1, or a text such as '2GiB'")
    return int(found)


def flag(value: object, name: str) -> bool:
    """``value`` if it is a bool, numpy's included; raises ``TypeError`` for what merely counts as true or false."""
    found = scalar(value)
    if not isinstance(found, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return found


def instance(value: Any, name: str, kind: type[T], how: str) -> T:
    """``value`` if it is a ``kind``; raises ``TypeError`` that says ``how`` to get one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a {kind.__name__}: {how}")
    return value


def function(value: Any, name: str, of: str) -> Any:
    """``value`` if it can be called; raises ``TypeError`` that says what it is a function of."""
    if not callable(value):
        raise TypeError(f"{name} is {value!r}, expected a function of {of}")
    return value


def sequence(values: Any, name: str) -> list[Any]:
    """The values as a list; raises ``TypeError`` for one value, a string among them."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r}, expected a sequence")
    return list(values)


def one_of(value: object, name: str, known: Sequence[Any], error: type[SmoothCacheError] = ScheduleError) -> Any:
    """``value`` if it is one of ``known``."""
    if isinstance(value, bool) or value not in known:
        raise error(f"{name} is {value!r}, expected {' or '.join(map(repr, known))}")
    return value


def some_of(
    values: object, name: str, known: Sequence[Any], error: type[SmoothCacheError] = ScheduleError
) -> list[Any]:
    """The values, each of which must be one of ``known``."""
    listed = f"some of {', '.join(map(str, known))}"
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise error(f"{name} is {values!r}, expected a sequence of {listed}")
    found = [scalar(value) for value in values]
    unknown = [value for value in found if isinstance(value, bool) or value not in known]
    if unknown:
        raise error(f"{name} has {unknown}, expected a sequence of {listed}")
    return found
