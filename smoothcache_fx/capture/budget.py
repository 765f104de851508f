"""Which runs of blocks are cached as one so that a schedule's caches fit into a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ScheduleError
from ..graphs.tables import format_bytes
from ..passes.guard import history_value
from ..passes.names import STACK
from ..passes.sites import Site, bytes_like
from ..passes.stacks import Stack, as_site
from ..runtime.variant import SiteInfo
from ..schedules.schedule import Schedule


def row_of(schedule: Schedule, site: Site | SiteInfo) -> tuple[bool, ...]:
    """A site's row; that of a stack which no selector names is computed where one of its branches would be."""
    if site.kind != STACK or schedule.selects(site):
        return schedule.row_for(site)
    return tuple(map(any, zip(*(schedule.row_for(branch) for branch in site.holds), strict=True)))


def order_of(schedule: Schedule, site: Site | SiteInfo) -> int:
    """A site's order; that of a stack which no selector names is the highest of its branches."""
    if site.kind != STACK or schedule.selects(site):
        return schedule.order_for(site)
    return max(schedule.order_for(branch) for branch in site.holds)


def bytes_of(schedule: Schedule, site: Site) -> int:
    """What a site's caches take in one stream of calls; nothing if it is never reused."""
    if all(row_of(schedule, site)):
        return 0
    narrower = None if schedule.history_dtype is None else getattr(torch, schedule.history_dtype)
    older = sum(bytes_like(history_value(output, narrower)) for output in site.outputs)
    return site.cache_bytes + order_of(schedule, site) * older


def within(
    schedule: Schedule, branches: Sequence[Site], stacks: Sequence[Stack], room: int, selected: int
) -> list[Stack]:
    """The stacks to make so that all caches of a graph fit: as few as will do, those that save most first.

    Args:
        branches, stacks: that no selector of stacks has taken.
        room: bytes for all caches.
        selected: what the caches of stacks take that selectors have taken.

    Raises:
        ScheduleError: not even all stacks are enough.
    """
    size = {branch: bytes_of(schedule, branch) for branch in branches}
    sites = {stack: as_site(stack, branches) for stack in stacks}
    saved = {
        stack: sum(size[branch] for branch in stack.sites) - bytes_of(schedule, site) for stack, site in sites.items()
    }
    by_branch = total = selected + sum(size.values())
    chosen: list[Stack] = []
    for stack in sorted((stack for stack in stacks if saved[stack] > 0), key=saved.__getitem__, reverse=True):
        if total <= room:
            break
        chosen.append(stack)
        total -= saved[stack]
    if total > room:
        raise ScheduleError(
            f"the caches of one stream take {format_bytes(by_branch)} by branch and {format_bytes(total)} by "
            f"stack; max_cache_bytes leaves {format_bytes(max(0, room))} for them. Allow more, lower the order, give "
            "history_dtype, or reuse fewer branches"
        )
    return chosen
