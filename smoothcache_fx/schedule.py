"""Schedule: at which steps the sites of a model are computed, and at which their last output is reused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ._files import check_header, read_object
from ._rows import compute_fraction, last_compute, row_of, selector_of, weights_of, whole_number
from ._selectors import KINDS, SiteLike, specificity
from .errors import ScheduleError

__all__ = ["KINDS", "Schedule", "last_compute"]

FORMAT = "smoothcache_fx.schedule"
VERSION = 1


@dataclass(frozen=True, repr=False)
class Schedule:
    """For every site, the steps of a trajectory at which it is computed.

    Args:
        steps: denoising steps in a trajectory, at least 1.
        compute: selector -> row. A row has `steps` entries in sampling order, 1 (or True) where the site is
            computed, 0 where its last computed output is reused; the first must be 1. A selector is a site's
            name (`blocks.3.attn1`), a group or glob (`blocks.*.attn1`, `*.attn1`; `*` stands for any
            characters) or a kind (`attn`, `cross_attn`, `ffn`, `attn_ffn`). The most specific one wins: name,
            then glob, then kind; among globs the one with the most literal characters. A site that nothing
            selects is computed at every step.
        order: of the forecast that a read returns; 0 repeats the last computed output.
        flops: selector -> FLOPs of all its sites, in any unit: the weights for `compute_fraction`. Needs an
            entry for each selector in `compute`; further selectors count as always computed.

    Raises:
        ScheduleError: for whatever does not fit the description above.
    """

    steps: int = 50
    compute: Mapping[str, Sequence[int]] = field(default_factory=dict)
    order: int = 0
    flops: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        steps = whole_number(self.steps, "steps", least=1)
        order = whole_number(self.order, "order", least=0)
        if order > 0:
            raise ScheduleError(f"order is {order}, but orders above 0 are not supported yet; leave it at 0")
        if not isinstance(self.compute, Mapping):
            raise ScheduleError(
                f"compute is a {type(self.compute).__name__}, expected a mapping from selector to row, "
                f"such as {{'attn': [1, 0, ...]}}"
            )
        rows = {selector_of(key): row_of(key, row, steps) for key, row in self.compute.items()}
        flops = None if self.flops is None else MappingProxyType(weights_of(self.flops, rows))
        checked = {"steps": steps, "order": order, "compute": MappingProxyType(rows), "flops": flops}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def row_for(self, site: SiteLike) -> tuple[bool, ...]:
        """One decision per step for `site` (anything with `name`, `group` and `kind`): True is compute.

        Raises:
            ScheduleError: if two globs that are equally specific select the site and have different rows.
        """
        found = [(rank, key) for key in self.compute if (rank := specificity(key, site)) is not None]
        if not found:
            return (True,) * self.steps
        best = max(rank for rank, _ in found)
        winners = [key for rank, key in found if rank == best]
        row = self.compute[winners[0]]
        if any(self.compute[key] != row for key in winners):
            raise ScheduleError(
                f"site {site.name!r} is selected by {' and '.join(map(repr, winners))}, which are equally "
                f"specific and have different rows; give the site a row by its name"
            )
        return row

    def unused_selectors(self, sites: Iterable[SiteLike]) -> list[str]:
        """The selectors that select none of `sites`, in the schedule's order.

        A selector that more specific ones overrule everywhere still counts as used.
        """
        sites = list(sites)
        return [key for key in self.compute if all(specificity(key, site) is None for site in sites)]

    @property
    def compute_fraction(self) -> float:
        """Share of the branches' FLOPs that a trajectory computes, in (0, 1].

        Rows are weighted by `flops`; without it every selector weighs the same. 1.0 for an empty schedule.
        """
        computed = dict.fromkeys(self.flops or self.compute, self.steps)
        computed.update((key, sum(row)) for key, row in self.compute.items())
        return compute_fraction(computed, self.steps, self.flops)

    @classmethod
    def uniform(cls, steps: int, interval: int, kinds: Sequence[str] = KINDS) -> Schedule:
        """FORA (arXiv 2407.01425): sites of `kinds` are computed at the steps that `interval` divides.

        The last step is computed only if it is one of those, as in the paper.
        """
        steps = whole_number(steps, "steps", least=1)
        interval = whole_number(interval, "interval", least=1)
        unknown = [kinds] if isinstance(kinds, str) else [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ScheduleError(f"kinds has {unknown}, expected a sequence of some of {', '.join(KINDS)}")
        row = tuple(step % interval == 0 for step in range(steps))
        return cls(steps, dict.fromkeys(kinds, row))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the schedule as JSON, one line per row; `load` gives an equal schedule back."""
        rows = [f"    {json.dumps(key)}: {json.dumps(list(map(int, row)))}" for key, row in self.compute.items()]
        lines = [
            f'  "format": {json.dumps(FORMAT)}',
            f'  "version": {VERSION}',
            f'  "steps": {self.steps}',
            f'  "order": {self.order}',
            '  "compute": {' + ("\n" + ",\n".join(rows) + "\n  " if rows else "") + "}",
            f'  "flops": {json.dumps(None if self.flops is None else dict(self.flops))}',
        ]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Read a schedule that `save` wrote, or one of the files that `dit-smoothcache` publishes.

        Those map the last name of a module to a row: `attn` means every module of that name (not the kind),
        and becomes the glob `*.attn`; `attn-7` means those whose last name but one is `7`: `*.7.attn`.

        Raises:
            ScheduleError: if the file is missing, is not JSON, is of another format or a newer version, or
                holds something that is no schedule.
        """
        data = read_object(path, ScheduleError, "schedule")
        keys = ("steps", "order", "compute", "flops")
        published = "format" not in data and data and all(isinstance(row, list) for row in data.values())
        if not published:
            check_header(data, path, format=FORMAT, version=VERSION, keys=keys, error=ScheduleError)
        try:
            if published:
                rows = {_glob(key): row for key, row in data.items()}
                return cls(len(next(iter(rows.values()))), rows)
            return cls(**{key: data[key] for key in keys})
        except ScheduleError as reason:
            raise ScheduleError(f"{str(path)!r} holds no valid schedule: {reason}") from reason

    def __str__(self) -> str:
        """One line per selector: its name, a block for each computed step and a dot for each reused one."""
        if not self.compute:
            return f"every site is computed at each of {self.steps} steps"
        width, digits = max(map(len, self.compute)), len(str(self.steps))
        return "\n".join(
            f"{key:<{width}}  {''.join('█' if c else '·' for c in row)}  {sum(row):>{digits}}/{self.steps}"
            for key, row in self.compute.items()
        )

    def __repr__(self) -> str:
        rows = {key: list(map(int, row)) for key, row in self.compute.items()}
        flops = "" if self.flops is None else f", flops={dict(self.flops)}"
        return f"Schedule(steps={self.steps}, compute={rows}, order={self.order}{flops})"

    def __hash__(self) -> int:
        flops = None if self.flops is None else frozenset(self.flops.items())
        return hash((self.steps, frozenset(self.compute.items()), self.order, flops))

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only mappings can be neither pickled nor deep-copied.
        flops = None if self.flops is None else dict(self.flops)
        return Schedule, (self.steps, dict(self.compute), self.order, flops)


def _glob(key: str) -> str:
    """The selector for a key of a published file: `*.attn` for `attn`, `*.7.attn` for `attn-7`."""
    match = re.fullmatch(r"(\w+)(?:-(\w+))?", key)
    if match is None:
        raise ScheduleError(
            f"key {key!r}: expected the name of a module, such as 'attn', or one with an index, such as 'attn-7'"
        )
    name, index = match.groups()
    return f"*.{name}" if index is None else f"*.{index}.{name}"
