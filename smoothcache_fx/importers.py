"""Plans of other methods as a ``Schedule``: what they decide before sampling, for these passes to carry out.

Each function restates a published rule and gives rows for ``compile``. FORA is ``Schedule.uniform``, and
``Schedule.load`` reads the files of ``dit-smoothcache``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch

from .calibration.measurements import GRAINS
from .checks import is_number, one_of, scalar, sequence, some_of, whole_number
from .errors import ScheduleError
from .passes.names import STACK, BlockRange
from .schedules.schedule import Schedule
from .schedules.selectors import KINDS

__all__ = ["db_cache", "learning_to_cache", "mag_cache", "pyramid_attention_broadcast", "taylor_seer"]

BLOCK = "{block}"
#: Attention and feed-forward of block ``{block}``, as facebookresearch/DiT calls them.
DIT_NAMES = ("*.{block}.attn", "*.{block}.mlp")
#: Which sites are attention over space, over time, and to the text. The glob is as diffusers' Latte calls them.
PAB_SELECTORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"spatial": ("attn",), "temporal": ("*temporal_transformer_blocks.*.attn*",), "cross": ("cross_attn",)}
)
PAB_RANGE = (100.0, 800.0)


def learning_to_cache(
    path: str | PathLike[str], *, threshold: float = 0.1, names: Sequence[str] = DIT_NAMES
) -> Schedule:
    """The plan in a trained router of Learning-to-Cache (arXiv 2406.01733; horseee/learning-to-cache, ``DiT/ckpt``).

    The file is a ``torch.save`` of ``{"routers": state dict, ...}``. The state dict has ``"0.prob"`` to
    ``"{steps-1}.prob"``, float ``[2 * depth]`` each: logits, entry ``2 * i`` of block i's attention, ``2 * i + 1`` of
    its feed-forward. Routers are numbered upwards in time, so step s follows router ``steps - 1 - s``. The rule
    (``DiT/models/dynamic_models.py``) forgets what is kept and computes everything where that number is odd; where it
    is even, a branch is computed if ``sigmoid(logit) > threshold``, and else repeats what it gave one step earlier.
    With an odd number of steps the first one is even, but nothing is kept yet: everything is computed.

    Args:
        path: of the file; it is read by ``torch.load(weights_only=True)``, so it runs no code.
        threshold: 0 to 1; the authors' is 0.1, and 0.9 for DiT-XL/2 of 512 by 512 pixels.
        names: selectors of attention and feed-forward, with ``{block}`` for the block's index. For diffusers' DiT:
            ``("transformer_blocks.{block}.attn1", "transformer_blocks.{block}.ff")``.

    Returns:
        A schedule of as many steps as there are routers, with a row for each branch.

    Raises:
        ScheduleError: the file cannot be read or is another one, such as a router for U-ViT, whose rule differs.

    Example:
        >>> schedule = smoothcache.importers.learning_to_cache("ckpt/DDIM20_router.pt")  # doctest: +SKIP
    """
    threshold = _number(threshold, "threshold", 0.0, 1.0)
    templates = _templates(names)
    routers = _routers(path)
    last = len(routers) - 1
    columns = []
    for step in range(len(routers)):
        logits = routers[last - step]
        chosen = (torch.sigmoid(logits) > threshold).tolist()
        columns.append([True] * len(chosen) if step == 0 or (last - step) % 2 else chosen)
    rows = {}
    for branch, row in enumerate(zip(*columns, strict=True)):
        block, part = divmod(branch, 2)
        rows[templates[part].replace(BLOCK, str(block))] = row
    return Schedule(len(routers), rows)


def pyramid_attention_broadcast(
    timesteps: Iterable[float],
    *,
    spatial: int | None = None,
    temporal: int | None = None,
    cross: int | None = None,
    timestep_range: tuple[float, float] | Mapping[str, tuple[float, float]] = PAB_RANGE,
    selectors: Mapping[str, Sequence[str]] = PAB_SELECTORS,
) -> Schedule:
    """Pyramid Attention Broadcast (arXiv 2408.12588), as diffusers' ``PyramidAttentionBroadcastConfig`` decides it.

    A kind of attention with interval n is computed at step 0, at each step that n divides (all steps count, those
    outside of the range too), and wherever not ``low < timestep < high``. Feed-forwards are always computed.

    diffusers counts calls of the attention, this counts steps: they are the same where a step is one call of the
    model. With guidance in two calls a step, diffusers lets both share one cache; here each has its own. By its default
    identifiers ``spatial`` also takes what is temporal, even if ``temporal`` is given; here ``temporal`` has the last
    word. A single-stream block, whose attention and feed-forward are one branch (``attn_ffn``), is always computed:
    diffusers would skip its attention alone.

    Args:
        timesteps: of the sampler, ``[steps]``, in sampling order and in the units of the range (1000 down to 0), such
            as ``pipe.scheduler.timesteps`` after ``set_timesteps``.
        spatial, temporal, cross: compute every n-th step; None computes every step. The paper's PAB246 is 2, 4
            and 6.
        timestep_range: where reuse is allowed, both ends excluded; one for all, or by kind of attention, such as
            ``{"cross": (100, 850)}``, and the default for the rest.
        selectors: the sites of each kind of attention, as in ``Schedule``.

    Raises:
        ScheduleError: no interval is given, or something is not as described.

    Example:
        >>> pipe.scheduler.set_timesteps(50)
        >>> timesteps = pipe.scheduler.timesteps
        >>> schedule = smoothcache.importers.pyramid_attention_broadcast(timesteps, spatial=2, cross=6)
    """
    times = _finite(timesteps, "timesteps", "the sampler's timesteps in sampling order, such as [999, 979, ..., 19]")
    wanted = {"spatial": spatial, "temporal": temporal, "cross": cross}
    for name, given in (("selectors", selectors), ("timestep_range", timestep_range)):
        if isinstance(given, Mapping) and (unknown := sorted(set(given) - set(wanted))):
            raise ScheduleError(f"{name} has {unknown}, expected some of {', '.join(wanted)}")
    intervals = {
        kind: whole_number(interval, kind, least=1) for kind, interval in wanted.items() if interval is not None
    }
    if not intervals:
        raise ScheduleError("none of spatial, temporal and cross is given; give at least one, such as spatial=2")
    rows = {}
    for kind, interval in intervals.items():
        each = timestep_range.get(kind, PAB_RANGE) if isinstance(timestep_range, Mapping) else timestep_range
        low, high = _range(each)
        row = tuple(step % interval == 0 or not low < time < high for step, time in enumerate(times))
        rows.update(dict.fromkeys(_selectors(selectors, kind), row))
    return Schedule(len(times), rows)


def mag_cache(
    ratios: Iterable[float],
    *,
    threshold: float = 0.06,
    max_skip_steps: int = 3,
    retention_ratio: float = 0.2,
    steps: int | None = None,
    grain: str = "branch",
) -> Schedule:
    """MagCache (arXiv 2506.09045), as diffusers' ``MagCacheConfig`` decides it from calibrated magnitude ratios.

    The first ``int(retention_ratio * steps + 0.5)`` steps are computed. From there on each step multiplies the
    accumulated ratio by its own, and adds the distance of that product from 1 to the accumulated error. The step is
    skipped while the error is at most ``threshold`` and at most ``max_skip_steps`` were skipped in a row; else it is
    computed, and ratio and error start again.

    With ``grain="stack"`` what is reused is MagCache's, too: what the whole list of blocks adds to the hidden states
    (of each list, where a model has several). By default each branch repeats its own output under the step's own gate,
    and what lies between branches is computed. All sites share one row.

    Args:
        ratios: ``[steps]``, mean magnitude of the stack's residual over that of the step before, 1 for the first; as
            ``MagCacheConfig(calibrate=True)`` prints them, or diffusers' ``FLUX_MAG_RATIOS``. Those of another number
            of steps are stretched to ``steps`` by taking the nearest.
        threshold: the largest accumulated error of a skipped step.
        max_skip_steps: the most steps skipped in a row.
        retention_ratio: share of the first steps that are always computed, 0 to 1.
        steps: of the sampler; as many as ratios by default.
        grain: ``branch`` or ``stack``.

    Raises:
        ScheduleError: something is not as described.

    Example:
        >>> ratios = [1.0] + [0.99] * 48 + [0.9]  # as MagCacheConfig(calibrate=True) prints them
        >>> schedule = smoothcache.importers.mag_cache(ratios, threshold=0.06)
    """
    listed = _finite(ratios, "ratios", "what MagCacheConfig(calibrate=True) prints")
    # In the precision that they are given in, float32 for a list: it decides where an error is at the threshold.
    measured = torch.as_tensor(ratios if hasattr(ratios, "dtype") else listed).cpu()
    steps = whole_number(len(listed) if steps is None else steps, "steps", least=1)
    threshold = _number(threshold, "threshold", 0.0, math.inf)
    most = whole_number(max_skip_steps, "max_skip_steps", least=0)
    retained = int(_number(retention_ratio, "retention_ratio", 0.0, 1.0) * steps + 0.5)
    row = []
    ratio, error, skipped = 1.0, 0.0, 0
    for step, own in enumerate(_nearest(measured, steps)):
        if step >= retained:
            ratio, skipped = ratio * own, skipped + 1
            error = error + abs(1.0 - ratio)
        skip = step > 0 and skipped > 0 and bool(error <= threshold) and skipped <= most
        if not skip:
            ratio, error, skipped = 1.0, 0.0, 0
        row.append(not skip)
    kinds = (STACK,) if one_of(grain, "grain", GRAINS) == STACK else KINDS
    return Schedule(steps, dict.fromkeys(kinds, row))


def db_cache(
    mask: Iterable[int], *, blocks: str, depth: int, first: int = 8, last: int = 0, order: int = 0
) -> Schedule:
    """DBCache of cache-dit (github.com/vipshop/cache-dit) with a static ``steps_computation_mask``.

    The first ``first`` blocks (Fn) and the ``last`` ones (Bn) are computed at every step. What the blocks between them
    add to the hidden states is computed where the mask is 1, and repeated, or forecast, where it is 0. cache-dit
    chooses these steps by a threshold unless it is given a mask; a schedule knows them before sampling.

    Args:
        mask: ``[steps]``, 1 (compute) or 0; as ``cache_dit.steps_mask`` makes them.
        blocks: the list of blocks, such as ``transformer_blocks``.
        depth: how many blocks it has.
        first, last: blocks at its ends that are always computed.
        order: of the forecast, 0 to 2; cache-dit's TaylorSeer calibrator has one.

    Raises:
        ScheduleError: something is not as described.

    Example:
        >>> schedule = smoothcache.importers.db_cache([1, 1, 0, 1, 0, 0], blocks="blocks", depth=12, first=2)
        >>> list(schedule.compute)
        ['blocks.2-11']
    """
    depth = whole_number(depth, "depth", least=1)
    first, last = whole_number(first, "first", least=0), whole_number(last, "last", least=0)
    if first + last >= depth:
        raise ScheduleError(
            f"first is {first} and last {last}, of a list of {depth} blocks: no block between them is left to be cached"
        )
    row = sequence(mask, "mask")
    return Schedule(len(row), {str(BlockRange(blocks, first, depth - 1 - last)): row}, order=order)


def taylor_seer(
    steps: int,
    *,
    interval: int = 5,
    order: int = 1,
    compute_before: int = 3,
    compute_from: int | None = None,
    kinds: Sequence[str] = KINDS,
) -> Schedule:
    """TaylorSeer (arXiv 2503.06923), with the steps that diffusers' ``TaylorSeerCacheConfig`` computes.

    Computed are the steps before ``compute_before``, then step ``compute_before + 1`` and every ``interval``-th after
    it, and all steps from ``compute_from`` on. In between, a branch is its Taylor expansion of this order.

    TaylorSeer takes differences of differences for the derivatives; a schedule takes the polynomial through the same
    outputs. At order 1 these are the same. At order 2 the polynomial is exact where outputs are quadratic in the step,
    the differences are not. diffusers keeps factors in bfloat16 unless told otherwise, and forecasts only attention;
    here ``kinds`` says what is forecast, and caches keep the outputs' dtype.

    Args:
        steps: of the sampler.
        interval: diffusers' ``cache_interval``.
        order: its ``max_order``, 0 to 2.
        compute_before: its ``disable_cache_before_step``, at least 1: something must be there to go on from.
        compute_from: its ``disable_cache_after_step``.
        kinds: of sites that are forecast; ``("stack",)`` forecasts what a whole list of blocks adds.

    Raises:
        ScheduleError: something is not as described.

    Example:
        >>> schedule = smoothcache.importers.taylor_seer(50, interval=5, order=1)
        >>> model = smoothcache.compile(model, schedule)
    """
    steps = whole_number(steps, "steps", least=1)
    interval = whole_number(interval, "interval", least=1)
    before = whole_number(compute_before, "compute_before", least=1)
    after = steps if compute_from is None else whole_number(compute_from, "compute_from", least=0)
    row = [step < before or (step - before - 1) % interval == 0 or step >= after for step in range(steps)]
    return Schedule(steps, dict.fromkeys(some_of(kinds, "kinds", (*KINDS, STACK)), row), order=order)


def _routers(path: str | PathLike[str]) -> list[torch.Tensor]:
    """The logits of each router, float32 ``[2 * depth]``, in the order of their numbers."""
    wanted = "expected a router of Learning-to-Cache for DiT: torch.save of {'routers': state dict}"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training script's options lie beside
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as reason:
        raise ScheduleError(f"cannot read the router {str(path)!r}: {reason.strerror or reason}") from reason
    except Exception as reason:  # whatever a foreign or cut-off file makes of the unpickler
        line = str(reason).strip().partition("\n")[0]
        raise ScheduleError(f"{str(path)!r} cannot be loaded ({type(reason).__name__}: {line}); {wanted}") from reason
    if not isinstance(data, Mapping):
        raise ScheduleError(f"{str(path)!r} holds a {type(data).__name__}, {wanted}")
    routers = data.get("routers")
    if not isinstance(routers, Mapping):
        found = ", ".join(map(repr, list(data)[:4])) or "nothing"
        if "0.prob" in data:
            found += " (a bare state dict, as U-ViT's routers are saved: they follow another rule)"
        raise ScheduleError(f"{str(path)!r} has no state dict under 'routers', but {found}; {wanted}")
    keys = [f"{index}.prob" for index in range(len(routers))]
    if not routers or set(routers) != set(keys):
        wrong = sorted(map(str, set(routers) ^ set(keys)))
        raise ScheduleError(
            f"the routers of {str(path)!r} are not numbered '0.prob', '1.prob', ...: {wrong[:4]} are missing or too "
            f"many; {wanted}"
        )
    return [_logits(routers[key], key, routers[keys[0]]) for key in keys]


def _logits(value: Any, key: str, first: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or not value.is_floating_point() or value.numel() % 2:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ScheduleError(f"router {key!r} is {got}, expected float [2 * depth]: two logits for each block")
    if value.shape != first.shape or not value.numel():
        raise ScheduleError(
            f"router {key!r} has {value.numel()} logits, '0.prob' {first.numel()}: expected as many, two for each block"
        )
    if not torch.isfinite(value).all():
        raise ScheduleError(
            f"router {key!r} has NaN or infinite logits; expected numbers, give a file that was trained"
        )
    return value.float()


def _templates(names: Sequence[str]) -> tuple[str, str]:
    right = isinstance(names, Sequence) and len(names) == 2 and all(isinstance(n, str) and BLOCK in n for n in names)
    if not right or names[0] == names[1]:
        raise ScheduleError(
            f"names is {names!r}, expected two selectors, of attention and feed-forward, each with {BLOCK} for the "
            f"block's index, such as {DIT_NAMES}"
        )
    return names[0], names[1]


def _selectors(selectors: Mapping[str, Sequence[str]], kind: str) -> Sequence[str]:
    found = selectors.get(kind, ()) if isinstance(selectors, Mapping) else ()
    if isinstance(found, str) or not found:
        raise ScheduleError(
            f"selectors has {found!r} for {kind!r}, expected a sequence of selectors, such as {PAB_SELECTORS[kind]}"
        )
    return found


def _range(given: Any) -> tuple[float, float]:
    values = _finite(given, "timestep_range", f"two timesteps, such as {PAB_RANGE}")
    if len(values) != 2 or not values[0] < values[1]:
        raise ScheduleError(f"timestep_range is {given!r}, expected two timesteps, the lower one first")
    return values[0], values[1]


def _nearest(values: torch.Tensor, steps: int) -> torch.Tensor:
    """``values`` at ``steps`` places that are evenly spread over them; halves go to the even one."""
    if len(values) == steps:
        return values
    places = torch.arange(steps, dtype=torch.float32) * ((len(values) - 1) / max(1, steps - 1))
    return values[places.round().long()]


def _finite(values: Any, name: str, expected: str) -> list[float]:
    """``values`` as Python's numbers, at least one."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    iterable = isinstance(values, Iterable) and not isinstance(values, (str, bytes))
    listed = [scalar(value) for value in values] if iterable else []
    if not listed or not all(_is_number(value) for value in listed):
        raise ScheduleError(f"{name} is {values!r}, expected finite numbers: {expected}")
    return listed


def _number(value: Any, name: str, low: float, high: float) -> float:
    number = scalar(value)
    if not _is_number(number) or not low <= number <= high:
        span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ScheduleError(f"{name} is {value!r}, expected a number {span}")
    return float(number)


def _is_number(value: object) -> bool:
    return is_number(value) and math.isfinite(value)
