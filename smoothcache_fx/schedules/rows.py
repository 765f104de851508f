"""One row of a schedule: checking it, weighing it, and asking what it decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from ..checks import is_number, numbers_of, scalar
from ..errors import ScheduleError


def last_compute(row: Sequence[bool], step: int) -> int:
    """The latest step up to and including `step` at which `row` computes: whose output `step` uses."""
    return _last_computes(tuple(row))[step]


@lru_cache(maxsize=1024)
def _last_computes(row: tuple[bool, ...]) -> tuple[int, ...]:
    result: list[int] = []
    for step, computed in enumerate(row):
        result.append(step if computed else result[-1])
    return tuple(result)


def compute_fraction(computed: Mapping[str, int], steps: int, flops: Mapping[str, float] | None = None) -> float:
    """Share of FLOPs computed where selector `key` computes `computed[key]` of `steps` steps.

    `flops[key]` is the selector's weight, the same for all if None. 1.0 if there is no weight at all. The
    result is correctly rounded: 24 of 50 steps are 0.48 whatever the weights, so that a budget can be met
    exactly.
    """
    weights = {key: Fraction(1 if flops is None else flops[key]) for key in computed}
    total = sum(weights.values())
    if not total:
        return 1.0
    return float(sum(weights[key] * count for key, count in computed.items()) / (steps * total))


def selector_of(key: object) -> str:
    """`key` if it can be a selector."""
    if not isinstance(key, str) or not key:
        raise ScheduleError(f"a selector is {key!r}, expected a site's name, a group or glob, or a kind")
    return key


def row_of(key: str, row: object, steps: int) -> tuple[bool, ...]:
    """The row of selector `key` as bools, one for each of `steps` steps, the first True."""
    if isinstance(row, (str, bytes, Mapping)) or not isinstance(row, Iterable):
        raise ScheduleError(f"the row of {key!r} is {row!r}, expected a sequence of {steps} zeros and ones")
    values = [scalar(value) for value in row]
    for step, value in enumerate(values):
        if not isinstance(value, int) or value not in (0, 1):
            raise ScheduleError(
                f"the row of {key!r} has {value!r} at step {step}, expected 1 (compute) or 0 (reuse the last "
                f"computed output)"
            )
    if len(values) != steps:
        raise ScheduleError(
            f"the row of {key!r} has {len(values)} entries, expected one for each of the {steps} steps; "
            f"give as many, or pass steps={len(values)}"
        )
    if not values[0]:
        raise ScheduleError(
            f"the row of {key!r} reuses at step 0, where nothing has been computed yet; make its first entry 1"
        )
    return tuple(map(bool, values))


def coefficients_of(key: str, values: object, steps: int, most: int) -> tuple[tuple[float, ...], ...]:
    """The coefficients of selector `key`: at most `most` finite numbers for each of `steps` steps."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ScheduleError(f"the coefficients of {key!r} are {values!r}, expected numbers for each of {steps} steps")
    found = []
    for step, one in enumerate(values):
        listed = [scalar(value) for value in one] if isinstance(one, Iterable) and not isinstance(one, str) else [None]
        numbers = [float(value) for value in listed if is_number(value) and math.isfinite(value)]
        if len(numbers) < len(listed) or len(numbers) > most:
            raise ScheduleError(
                f"the coefficients of {key!r} at step {step} are {one!r}, expected at most {most} finite numbers, one "
                "more than the order, newest value first"
            )
        found.append(tuple(numbers))
    if len(found) != steps:
        raise ScheduleError(f"the coefficients of {key!r} are of {len(found)} steps, expected {steps}")
    return tuple(found)


def times_of(times: object, steps: int) -> tuple[float, ...]:
    """The positions of `steps` steps as finite floats, strictly rising or falling."""
    values = numbers_of(times, "times", steps)
    gaps = [after - before for before, after in pairwise(values)]
    if not (all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)):
        raise ScheduleError("times neither rises nor falls from each step to the next; give each step its own time")
    return values


def weights_of(flops: object, selectors: Iterable[str]) -> dict[str, float]:
    """The FLOPs of each selector as finite floats of at least 0, not all 0, none of `selectors` missing."""
    if not isinstance(flops, Mapping):
        raise ScheduleError(f"flops is a {type(flops).__name__}, expected a mapping from selector to FLOPs, or None")
    weights = {selector_of(key): _weight(key, value) for key, value in flops.items()}
    missing = [key for key in selectors if key not in weights]
    if missing:
        raise ScheduleError(
            f"flops has no entry for {', '.join(map(repr, missing))}; give one for each selector in compute, "
            f"or flops=None to weigh them evenly"
        )
    if weights and not any(weights.values()):
        raise ScheduleError("all entries of flops are 0; give FLOPs, or flops=None to weigh them evenly")
    return weights


def _weight(key: str, value: object) -> float:
    number = scalar(value)
    # A whole number can be too large for a float, and then raises OverflowError where inf is meant.
    if isinstance(number, int) and abs(number) > 10**300:
        number = math.inf
    if not is_number(number) or not 0 <= number < math.inf:
        raise ScheduleError(f"flops of {key!r} is {value!r}, expected a finite number of at least 0")
    return float(number)
