"""What ``compile`` and ``calibrate`` need to know of a pipeline. By its shape alone: diffusers is not imported here."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .calls import TIMESTEP_NAMES
from .copies import copied
from .scheduler_clock import DenoiserClock


def is_pipeline(candidate: Any) -> bool:
    """Whether it is made of named parts, one of which is a scheduler."""
    return (
        not isinstance(candidate, (torch.nn.Module, type))
        and hasattr(candidate, "components")
        and hasattr(candidate, "scheduler")
    )


def denoisers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's denoisers by component name: modules whose ``forward`` takes a timestep, ControlNets excepted.

    Raises ``TypeError`` if there is none, or if the scheduler has no ``set_timesteps`` and ``step``.
    """
    scheduler = pipeline.scheduler
    if not callable(getattr(scheduler, "set_timesteps", None)) or not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"the scheduler of {type(pipeline).__name__} is a {type(scheduler).__name__}, expected an object with "
            "set_timesteps and step: they say where a trajectory and a step end. For another sampler use "
            "smoothcache.compile on the model itself"
        )
    found, looked_at = {}, []
    for name, part in pipeline.components.items():
        part = getattr(part, "_orig_mod", part)  # torch.compile's wrapper on top of a compiled model
        if isinstance(part, torch.nn.Module):
            looked_at.append(f"{name} ({type(part).__name__})")
            if "ControlNet" not in type(part).__name__ and _takes_timestep(type(part)):
                found[name] = part
    if not found:
        raise TypeError(
            f"{type(pipeline).__name__} has no denoiser: no forward of {', '.join(looked_at) or 'its parts'} has an "
            f"argument called one of {', '.join(TIMESTEP_NAMES)}. Give smoothcache the model itself"
        )
    return found


def _takes_timestep(model: type[torch.nn.Module]) -> bool:
    return any(name in TIMESTEP_NAMES for name in inspect.signature(model.forward).parameters)


def follow_cache_context(model: Any, clock: DenoiserClock) -> Callable[[], None]:
    """Let diffusers' ``model.cache_context(name)`` name the streams of ``clock``. Returns what undoes it."""
    if not hasattr(model, "cache_context"):
        return lambda: None
    original, replaced = model.cache_context, model.__dict__.get("cache_context")

    @contextlib.contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with clock.naming(name), original(name, *args, **kwargs):
            yield

    model.cache_context = cache_context

    def undo() -> None:
        if model.__dict__.get("cache_context") is not cache_context:
            return
        if replaced is None:
            del model.__dict__["cache_context"]
        else:
            model.cache_context = replaced

    return undo


class _Caught(BaseException):
    """All denoisers were called. No Exception: nothing on the way may handle it."""


def first_calls(
    pipeline: Any, run: Callable[[Any], Any]
) -> dict[str, tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The denoisers with the inputs of their first calls, by component name; the run ends when all are known.

    Raises ``TypeError`` if ``run`` does not call a denoiser.
    """
    models = denoisers(pipeline)
    found: dict[str, tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def catch(name: str, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found:
            args, kwargs = copied((args, kwargs))
            found[name] = model, args, kwargs
        if len(found) == len(models):
            raise _Caught

    with contextlib.ExitStack() as hooks:
        for name, model in models.items():
            hook = model.register_forward_pre_hook(functools.partial(catch, name), with_kwargs=True)
            hooks.callback(hook.remove)
        with contextlib.suppress(_Caught):
            run(pipeline)
    if not found:
        raise TypeError(f"the function ran none of {', '.join(models)}: it must run the {type(pipeline).__name__}")
    return found
