"""From error curves to rows: the paper's rule, and the alpha that meets a FLOP budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..schedules.rows import compute_fraction

Errors = NDArray[np.float64]
"""[lags, steps]: at [k - 1, t] the error of using step t - k's output at step t; NaN where unknown."""


def scan(errors: Errors, alpha: float, keep_last: bool = True) -> list[bool]:
    """The paper's rule (arXiv 2411.10510, as its code has it): one decision per step, True is compute.

    Step 0 is computed. From a computed step s, the largest k with `errors[k - 1, s + k] <= alpha` lets
    s+1..s+k be reused, whatever the errors of smaller lags are, and s+k+1 is computed next; with no such k,
    s+1 is. No k reaches beyond the last step. One that reaches the last step is taken as any other, and
    `keep_last` then has the last step computed all the same: the steps before it stay reused.
    """
    lags, steps = errors.shape
    reach = [0] * steps
    for lag in range(1, min(lags, steps - 1) + 1):
        for source in np.flatnonzero(errors[lag - 1, lag:] <= alpha).tolist():
            reach[source] = lag
    return _walk(reach, keep_last)


def _walk(reach: list[int], keep_last: bool) -> list[bool]:
    row = [False] * len(reach)
    step = 0
    while step < len(row):
        row[step] = True
        step += reach[step] + 1
    row[-1] = row[-1] or keep_last
    return row


def alpha_for(
    errors: Mapping[str, Errors], budget: float, flops: Mapping[str, float] | None, keep_last: bool = True
) -> float:
    """The alpha whose rows compute the largest share of FLOPs that is at most `budget`.

    Exact: rows change only where alpha reaches one of the errors, so 0 and those are all the alphas there
    are. The share may go up as alpha does (a longer reuse can jump over a better one), so all of them are
    tried. Of alphas with the same share, the smallest.

    Raises:
        CalibrationError: if every alpha computes more than `budget`; says which computes the least.
    """
    steps = next(iter(errors.values())).shape[1]
    events: list[tuple[float, str, int, int]] = []
    for group, curve in errors.items():
        for lag in range(1, min(curve.shape[0], steps - 1) + 1):
            values = enumerate(curve[lag - 1, lag:].tolist())
            events += [(value, group, source, lag) for source, value in values if math.isfinite(value)]
    events.sort()

    reach = {group: [0] * steps for group in errors}
    rows = {group: [True] * steps for group in errors}
    share = 1.0
    candidates: list[tuple[float, float]] = [] if events and events[0][0] == 0 else [(share, 0.0)]
    for alpha, batch in groupby(events, key=lambda event: event[0]):
        changed = set()
        for _, group, source, lag in batch:
            if lag > reach[group][source]:
                reach[group][source] = lag
                # Only a step that is computed is jumped from.
                if rows[group][source]:
                    changed.add(group)
        if changed:
            rows.update((group, _walk(reach[group], keep_last)) for group in changed)
            share = compute_fraction({group: sum(row) for group, row in rows.items()}, steps, flops)
            candidates.append((share, alpha))
    within = [(share, -alpha) for share, alpha in candidates if share <= budget]
    if not within:
        least, alpha = min(candidates)
        raise CalibrationError(
            f"no alpha computes {budget:.4g} of the FLOPs or less: the least is {least:.4g}, at alpha "
            f"{alpha:.4g}; ask for compute={math.ceil(least * 1000) / 1000} or more, or calibrate with more "
            f"lags"
        )
    return -max(within)[1]
