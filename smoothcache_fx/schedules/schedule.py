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

from ..checks import number_of, numbers_of, some_of, whole_number
from ..errors import ScheduleError
from ..passes.names import STACK, BlockRange
from .clusters import variants_of
from .coefficients import ahead_of, forecast_coefficients
from .files import check_header, read_object
from .html import schedule_html
from .rows import coefficients_of, compute_fraction, last_compute, row_of, selector_of, times_of, weights_of
from .selectors import KINDS, SiteLike, block_range, check_overlaps, selects_stacks, specificity

__all__ = ["KINDS", "Schedule", "last_compute"]

FORMAT = "smoothcache_fx.schedule"
VERSION = 2

#: The highest order of a forecast: beyond it noise in the outputs outgrows what is gained.
HIGHEST_ORDER = 2

#: Dtypes that the differences of a history can be kept in.
HISTORY_DTYPES = ("float16", "bfloat16")


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
            selects is computed at every step. Runs of blocks are cached as one by `stack`, which takes the longest
            runs that `explain` lists, or by a range of blocks, `transformer_blocks.2-27`; kinds of branches then
            select branches outside of them.
        order: degree, 0 to 2, of the polynomial in the step through the last computed outputs that a reused branch
            follows (TaylorSeer, arXiv 2503.06923, but exact for uneven gaps). 0 repeats the last output; 1 needs
            twice and 2 three times its memory. One number, or selector -> order for those that forecast; fewer
            outputs in a trajectory so far mean a lower degree.
        times: a position for each step, strictly rising or falling, such as its timestep or sigma: what the polynomial
            is one of in place of the step's index.
        history_dtype: `float16` or `bfloat16`: where an output's dtype has more bytes, such as float32, the outputs
            before the last are kept as differences from one to the next, in this dtype. That takes half of float32's
            memory for them. What a forecast loses is the rounding of the differences, 2^-11 of each in float16 and
            2^-8 in bfloat16, times their weights; the last output stays as it is. A difference beyond float16's
            65504 counts as that. Outputs in float16 and bfloat16 keep theirs. None keeps all as they are.
        coefficients: selector -> for each step the coefficients of the last computed outputs, newest first, whose sum a
            reused branch reads in place of the polynomial; none, or an empty sequence, for the polynomial's. At most
            one more than its order. `Calibration.fit` makes them.
        lead: how far past its own step, in steps, a forecast aims, 0 to 1. Samplers of first order, such as Euler's and
            DDIM, keep a step's output for the whole step; with 0.5 a forecast is of the step's middle, and samples come
            nearer to those of many steps. 0 aims at what the step itself would compute.
        flops: selector -> FLOPs of all its sites, in any unit: the weights for `compute_fraction`. Needs an
            entry for each selector in `compute`; further selectors count as always computed.
        timesteps: those that the sampler had at each step when the schedule was made. A compiled model warns if it is
            called at others. They say nothing about what is computed: schedules that differ in them alone are equal.

    Raises:
        ScheduleError: for whatever does not fit the description above.

    Example:
        >>> row = [step % 3 == 0 for step in range(50)]
        >>> schedule = smoothcache.Schedule(50, {"attn": row, "blocks.0.mlp": [True] * 50}, order={"attn": 1})
    """

    steps: int = 50
    compute: Mapping[str, Sequence[int]] = field(default_factory=dict)
    order: int | Mapping[str, int] = 0
    flops: Mapping[str, float] | None = None
    times: Sequence[float] | None = None
    history_dtype: str | None = None
    timesteps: Sequence[float] | None = field(default=None, compare=False)
    coefficients: Mapping[str, Sequence[Sequence[float]]] | None = None
    lead: float = 0.0

    def __post_init__(self) -> None:
        steps = whole_number(self.steps, "steps", least=1)
        order: int | Mapping[str, int]
        if isinstance(self.order, Mapping):
            order = MappingProxyType({selector_of(key): _order(value) for key, value in self.order.items()})
        else:
            order = _order(self.order)
        times = None if self.times is None else times_of(self.times, steps)
        if not isinstance(self.compute, Mapping):
            raise ScheduleError(
                f"compute is a {type(self.compute).__name__}, expected a mapping from selector to row, "
                f"such as {{'attn': [1, 0, ...]}}"
            )
        rows = {selector_of(key): row_of(key, row, steps) for key, row in self.compute.items()}
        flops = None if self.flops is None else MappingProxyType(weights_of(self.flops, rows))
        checked = {
            "steps": steps,
            "order": order,
            "compute": MappingProxyType(rows),
            "flops": flops,
            "times": times,
            "timesteps": None if self.timesteps is None else numbers_of(self.timesteps, "timesteps", steps),
            "lead": number_of(self.lead, "lead", "a number from 0 to 1", ScheduleError, lambda lead: 0 <= lead <= 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.coefficients is not None:
            object.__setattr__(self, "coefficients", self._checked_coefficients(self.coefficients))
        check_overlaps(self.selectors)
        if self.lead and not self.highest_order:
            raise ScheduleError(
                f"lead is {self.lead:g}, but order is {_plain(self.order)}, so that nothing is forecast; expected an "
                "order of 1 or 2, or no lead"
            )
        if self.history_dtype is None:
            return
        if self.history_dtype not in HISTORY_DTYPES:
            raise ScheduleError(f"history_dtype is {self.history_dtype!r}, expected None, 'float16' or 'bfloat16'")
        if not self.highest_order:
            raise ScheduleError(
                f"history_dtype is {self.history_dtype!r}, but order is {_plain(self.order)}, so that nothing has a "
                "history; expected an order of 1 or 2, or no history_dtype"
            )

    def _checked_coefficients(self, given: object) -> Mapping[str, Sequence[Sequence[float]]]:
        if not isinstance(given, Mapping):
            raise ScheduleError(f"coefficients is a {type(given).__name__}, expected a mapping from selector to steps")
        most = self.highest_order + 1
        found = {selector_of(key): coefficients_of(key, values, self.steps, most) for key, values in given.items()}
        return MappingProxyType(found)

    def forecast(self, site: SiteLike, step: int, computed: Sequence[int]) -> tuple[float, ...]:
        """The coefficients of a site's outputs of these `computed` steps, newest first, in what it reads at `step`.

        Those of `coefficients`, if they are of as many outputs and the row has computed just these; else the
        polynomial's.
        """
        if self.coefficients is not None:
            fitted = _select(self.coefficients, site, "coefficients", ((),) * self.steps)[step]
            if len(fitted) == len(computed) and tuple(computed) == self.history_for(site, step):
                return fitted
        return self.polynomial(step, computed)

    def polynomial(self, step: int, computed: Sequence[int]) -> tuple[float, ...]:
        """The coefficients of the `computed` steps' outputs in the polynomial through them, `lead` past `step`."""
        times = range(self.steps) if self.times is None else self.times
        return forecast_coefficients([times[at] for at in computed], ahead_of(times, step, self.lead))

    def history_for(self, site: SiteLike, step: int) -> tuple[int, ...]:
        """The last steps before `step` at which `site` is computed, newest first: one more than its order, at most."""
        row = self.row_for(site)
        computed = [at for at in range(step - 1, -1, -1) if row[at]]
        return tuple(computed[: self.order_for(site) + 1])

    def row_for(self, site: SiteLike) -> tuple[bool, ...]:
        """One decision per step for `site` (anything with `name`, `group` and `kind`): True is compute.

        Raises:
            ScheduleError: if two globs that are equally specific select the site and have different rows.
        """
        return _select(self.compute, site, "rows", (True,) * self.steps)

    def order_for(self, site: SiteLike) -> int:
        """The degree of the forecast that `site` reads.

        Raises:
            ScheduleError: if two globs that are equally specific select the site and have different orders.
        """
        return _select(self.order, site, "orders", 0) if isinstance(self.order, Mapping) else self.order

    def selects(self, site: SiteLike) -> bool:
        """Whether a selector of rows selects `site`."""
        return any(specificity(key, site) is not None for key in self.compute)

    @property
    def highest_order(self) -> int:
        """The highest of all orders."""
        return max(self.order.values(), default=0) if isinstance(self.order, Mapping) else self.order

    def unused_selectors(self, sites: Iterable[SiteLike]) -> list[str]:
        """The selectors that select none of `sites`, in the schedule's order.

        A selector that more specific ones overrule everywhere still counts as used.
        """
        sites = list(sites)
        return [key for key in self.selectors if all(specificity(key, site) is None for site in sites)]

    @property
    def selectors(self) -> list[str]:
        """All selectors, of rows, then of orders and coefficients, each once."""
        orders = self.order if isinstance(self.order, Mapping) else ()
        return list(dict.fromkeys((*self.compute, *orders, *(self.coefficients or ()))))

    @property
    def block_ranges(self) -> tuple[BlockRange, ...]:
        """The ranges of blocks among the selectors."""
        return tuple(found for key in self.compute if (found := block_range(key)) is not None)

    @property
    def has_stacks(self) -> bool:
        """Whether a selector stands for runs of blocks."""
        return any(map(selects_stacks, self.compute))

    @property
    def compute_fraction(self) -> float:
        """Share of the branches' FLOPs that a trajectory computes, in (0, 1].

        Rows are weighted by `flops`; without it every selector weighs the same. 1.0 for an empty schedule.
        """
        computed = dict.fromkeys(self.flops or self.compute, self.steps)
        computed.update((key, sum(row)) for key, row in self.compute.items())
        return compute_fraction(computed, self.steps, self.flops)

    @property
    def variants(self) -> int:
        """How many variants there are to compile of a model that has all that is selected, and nothing else."""
        return variants_of([list(map(bool, row)) for row in self.compute.values()]) if self.compute else 1

    @classmethod
    def uniform(cls, steps: int, interval: int, kinds: Sequence[str] = KINDS) -> Schedule:
        """FORA (arXiv 2407.01425): sites of `kinds`, all branches by default, are computed at the steps that `interval`
        divides.

        The last step is computed only if it is one of those, as in the paper.

        Raises:
            ScheduleError: if steps or interval is below 1, or a kind is unknown.

        Example:
            >>> schedule = smoothcache.Schedule.uniform(50, 2)
            >>> schedule.compute_fraction
            0.5
        """
        steps = whole_number(steps, "steps", least=1)
        interval = whole_number(interval, "interval", least=1)
        row = tuple(step % interval == 0 for step in range(steps))
        return cls(steps, dict.fromkeys(some_of(kinds, "kinds", (*KINDS, STACK)), row))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the schedule as JSON, one line per row; `load` gives an equal schedule back.

        Example:
            >>> schedule.save("schedule.json")
            >>> assert smoothcache.Schedule.load("schedule.json") == schedule
        """
        rows = [f"    {json.dumps(key)}: {json.dumps(list(map(int, row)))}" for key, row in self.compute.items()]
        lines = [
            f'  "format": {json.dumps(FORMAT)}',
            f'  "version": {VERSION}',
            f'  "steps": {self.steps}',
            f'  "order": {json.dumps(_plain(self.order))}',
            '  "compute": {' + ("\n" + ",\n".join(rows) + "\n  " if rows else "") + "}",
            f'  "flops": {json.dumps(_plain(self.flops))}',
            f'  "times": {json.dumps(_plain(self.times))}',
        ]
        if self.history_dtype is not None:
            lines.append(f'  "history_dtype": {json.dumps(self.history_dtype)}')
        if self.timesteps is not None:
            lines.append(f'  "timesteps": {json.dumps(_plain(self.timesteps))}')
        if self.coefficients is not None:
            lines.append(f'  "coefficients": {json.dumps(_plain(self.coefficients))}')
        if self.lead:
            lines.append(f'  "lead": {json.dumps(self.lead)}')
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Read a schedule that `save` wrote, or one of the files that `dit-smoothcache` publishes.

        Those map the last name of a module to a row: `attn` means every module of that name (not the kind),
        and becomes the glob `*.attn`; `attn-7` means those whose last name but one is `7`: `*.7.attn`.

        Raises:
            ScheduleError: if the file is missing, is not JSON, is of another format or a newer version, or
                does not hold a schedule.
        """
        data = read_object(path, ScheduleError, "schedule")
        keys: tuple[str, ...] = ("steps", "order", "compute", "flops", "times")
        if data.get("format") == FORMAT and data.get("version") == 1:
            data.setdefault("times", None)
        keys += tuple(key for key in ("history_dtype", "timesteps", "coefficients", "lead") if key in data)
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
        lines = [
            f"{key:<{width}}  {''.join('█' if c else '·' for c in row)}  {sum(row):>{digits}}/{self.steps}"
            for key, row in self.compute.items()
        ]
        if self.highest_order:
            times = ", in its times" if self.times else ""
            fitted = ", with fitted coefficients" if self.coefficients else ""
            lead = f", {self.lead:g} of a step ahead" if self.lead else ""
            history = f", with a history of differences in {self.history_dtype}" if self.history_dtype else ""
            lines.append(f"forecasts of order {_plain(self.order)}{times}{lead}{fitted}{history}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return schedule_html(self)

    def __repr__(self) -> str:
        rows = {key: list(map(int, row)) for key, row in self.compute.items()}
        more = "".join(
            f", {name}={_plain(value)!r}"
            for name in ("flops", "times", "history_dtype", "timesteps", "coefficients")
            if (value := getattr(self, name)) is not None
        )
        more += f", lead={self.lead:g}" if self.lead else ""
        return f"Schedule(steps={self.steps}, compute={rows}, order={_plain(self.order)}{more})"

    def __hash__(self) -> int:
        flops = None if self.flops is None else frozenset(self.flops.items())
        order = frozenset(self.order.items()) if isinstance(self.order, Mapping) else self.order
        fitted = None if self.coefficients is None else frozenset(self.coefficients.items())
        rows = frozenset(self.compute.items())
        return hash((self.steps, rows, order, flops, self.times, self.history_dtype, fitted, self.lead))

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only mappings can be neither pickled nor deep-copied.
        plain = self.steps, dict(self.compute), _plain(self.order), _plain(self.flops)
        fitted = None if self.coefficients is None else dict(self.coefficients)
        return Schedule, (*plain, self.times, self.history_dtype, self.timesteps, fitted, self.lead)


def _select(values: Mapping[str, Any], site: SiteLike, what: str, default: Any) -> Any:
    """The value of the selector that selects the site most specifically."""
    found = [(rank, key) for key in values if (rank := specificity(key, site)) is not None]
    if not found:
        return default
    best = max(rank for rank, _ in found)
    winners = [key for rank, key in found if rank == best]
    value = values[winners[0]]
    if any(values[key] != value for key in winners):
        raise ScheduleError(
            f"site {site.name!r} is selected by {' and '.join(map(repr, winners))}, which are equally "
            f"specific and have different {what}; give the site one by its name"
        )
    return value


def _order(value: object) -> int:
    order = whole_number(value, "order", least=0)
    if order > HIGHEST_ORDER:
        raise ScheduleError(f"order is {order}, expected 0, 1 or {HIGHEST_ORDER}")
    return order


def _plain(value: Any) -> Any:
    """What JSON and repr take for a mapping or tuple."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _glob(key: str) -> str:
    """The selector for a key of a published file: `*.attn` for `attn`, `*.7.attn` for `attn-7`."""
    match = re.fullmatch(r"(\w+)(?:-(\w+))?", key)
    if match is None:
        raise ScheduleError(
            f"key {key!r}: expected the name of a module, such as 'attn', or one with an index, such as 'attn-7'"
        )
    name, index = match.groups()
    return f"*.{name}" if index is None else f"*.{index}.{name}"
