"""What is asked of every model here."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from smoothcache_fx import Schedule
from zoo.case import ROWS, STEPS

from .cases import Branch, Case, run_trajectory
from .oracle import Oracle
from .tolerances import assert_trajectories_close, tolerance, worst


def branches(kind_of: Mapping[str, str], outputs: Mapping[str, str] | None = None) -> dict[str, Branch]:
    """Site name -> branch, for ``{"blocks.0.attn": "attn"}``; a ``0-2`` in a name counts through.

    Args:
        kind_of: site names and their kinds.
        outputs: the submodule of a site whose output is the branch, where it is not the site's own name:
            the part to append, by the name's last component.
    """
    found = {}
    for pattern, kind in kind_of.items():
        for name in _counted(pattern):
            inner = (outputs or {}).get(name.rpartition(".")[2])
            found[name] = Branch(f"{name}.{inner}" if inner else name, kind, matmuls=0)
    return found


def _counted(pattern: str) -> list[str]:
    parts = pattern.split(".")
    for place, part in enumerate(parts):
        first, dash, last = part.partition("-")
        if dash and first.isdigit():
            return [
                name
                for index in range(int(first), int(last) + 1)
                for name in _counted(".".join([*parts[:place], str(index), *parts[place + 1 :]]))
            ]
    return [pattern]


def check_sites(case: Case, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Every branch is found under its name, with its kind, and nothing else is."""
    explained = []

    class Explained(nn.Module):
        def forward(self, *args: object, **kwargs: object) -> object:
            explained.append(smoothcache.explain(subject, *args, **kwargs))
            return subject(*args, **kwargs)

        def __getattr__(self, name: str) -> object:
            # A method such as forward_with_cfg, around this forward.
            return functools.partial(getattr(type(subject), name), self)

    subject = model or case.build()
    latents, (conditioning,) = case.inputs(1, dtype)
    with torch.no_grad():
        case.call(Explained(), latents, 1.0, conditioning)
    (explanation,) = explained
    found = [(site.name, site.kind) for site in explanation.sites]
    assert sorted(found) == sorted((name, branch.kind) for name, branch in case.branches.items())


def check_trajectory(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """A trajectory with a row for each kind is the oracle's, and would not be without the cache."""
    model = case.build(0, dtype)
    assert_nothing_is_zero(model)
    run = {"steps": STEPS, "seed": 1, "dtype": dtype}
    plain = run_trajectory(case, model, **run)
    with Oracle(model, case.branches, {name: ROWS[b.kind] for name, b in case.branches.items()}) as oracle:
        expected = run_trajectory(case, model, around=oracle.step, **run)
    smoothcache.compile(model, Schedule(STEPS, ROWS), backend="eager")
    actual = run_trajectory(case, model, **run)
    assert all(output.isfinite().all() for output in actual)
    assert_trajectories_close(actual, expected, tolerance(dtype), case.name)
    assert worst(plain, expected, tolerance(dtype)) > 100, "the cache changes nothing: nothing was compared"
    assert not smoothcache.report(model).forced


def check_all_compute(case: Case, dtype: torch.dtype = torch.float32, plain_backend: str | None = None) -> None:
    """With everything computed the outputs are the plain model's, bit for bit.

    Args:
        plain_backend: the plain model is compiled with it, where AOTAutograd alone already changes the last bit.
    """
    model = case.build(0, dtype)
    run = {"steps": 3, "seed": 1, "dtype": dtype}
    reference = case.build(0, dtype)
    if plain_backend:
        reference.forward = torch.compile(reference.forward, backend=plain_backend)
    plain = run_trajectory(case, reference, **run)
    smoothcache.compile(model, Schedule(3, dict.fromkeys(ROWS, (1, 1, 1))), backend="eager")
    actual: list[Tensor] = run_trajectory(case, model, **run)
    assert all(map(torch.equal, actual, plain))


def assert_nothing_is_zero(model: nn.Module) -> None:
    """A zero gate or projection hides every mistake. (Quantised weights have no ``any``.)"""
    zero = [name for name, p in model.named_parameters() if type(p) is nn.Parameter and not p.any()]
    assert not zero, f"parameters that are all zero: {zero}"
